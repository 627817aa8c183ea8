"""`tidegate round` and `tidegate reproduce`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from tidegate import output


@click.command("round")
@click.argument("stream")
@click.option(
    "--test-noise",
    type=click.IntRange(min=0),
    metavar="SEED",
    help="Reproducible noise: epsilon is infinity, said everywhere, and the version cannot be promoted. Refused unless "
    "learner.test_noise allows it.",
)
@click.option("--quiet", is_flag=True, help="No progress bar, no summary; events are logged.")
@click.option("--json", "want_json", is_flag=True, help="JSON instead of sentences.")
@click.pass_obj
def round(  # noqa: A001 - the command's name
    given: str | None, stream: str, *, test_noise: int | None, quiet: bool, want_json: bool
) -> None:
    """Run one round of STREAM now, private unless privacy.enabled is false: plan, reserve, train, evaluate, register.

    The blocks' budgets are reserved durably before the first private byte is read. A round that was killed resumes
    exactly, and is charged once. With nothing new, or a candidate that waits, nothing runs and the exit code is 0.
    """
    from tidegate import cycle, log
    from tidegate.progress import bar
    from tidegate.wiring import open_service

    log.configure()
    service = open_service(given)
    with bar(quiet=quiet) as tell:
        end = cycle.run(service, stream, progress=tell, test_seed=test_noise)
    if want_json:
        output.as_json(asdict(end))
    elif isinstance(end, cycle.NothingToDo):
        if not quiet:
            output.say(f"no round: {end.reason}")
    elif not quiet:
        output.say(f"round    {end.round_id}, attempt {end.attempt}")
        output.say(f"version  {end.version}: {end.outcome}, now {end.state}")
        for reason in end.reasons:
            output.say(f"         {reason}")
        used = "nothing" if end.epsilon is None else f"at most {end.share_used:.1%} of a block's filter"
        output.say(
            f"spent    {used}; claim {end.promise or f'epsilon {end.epsilon:g}, delta {end.delta:g} per {end.unit}'}"
        )


@click.command()
@click.argument("round_file", type=click.Path(path_type=Path), default="round.json")
@click.option("--out", type=click.Path(path_type=Path), default="outputs", show_default=True)
@click.pass_obj
def reproduce(given: str | None, round_file: Path, *, out: Path) -> None:
    """Verify a finished round from a clone of the data repository, and write its outputs. `dvc repro` calls this.

    A private round is never run again: its hashes and signatures are verified and the stored adapter is returned.
    A round with test noise is trained again and must come out bit for bit the same.
    """
    from tidegate.reproduce import rebuild
    from tidegate.wiring import open_service

    result = rebuild(open_service(given), round_file, out)
    output.say(f"{result.round_id}: {result.how}; adapter {result.adapter_sha256}")
