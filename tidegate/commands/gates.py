"""`tidegate gates explain` and `tidegate evaluate`: what is asked of a candidate, and how any version answers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tidegate import output

if TYPE_CHECKING:
    from evaluation.verdict import Evaluation, Gate, Slice

_JSON = click.option("--json", "want_json", is_flag=True, help="JSON instead of tables.")


@click.group()
def gates() -> None:
    """Read a stream's gates, the list `evaluation.gates` in params.yaml.

    A gate is a metric, what it must show, and how often chance may decide; a metric of one's own is named
    `module:function`. `tidegate evaluate` runs the gates on any version.
    """


@gates.command()
@click.argument("stream")
@_JSON
@click.pass_obj
def explain(given: str | None, stream: str, *, want_json: bool) -> None:
    """Read out STREAM's gates: each in one sentence, with its error rates, its cost and its data.

    Nothing is measured and no model is loaded. The gates stand in the order in which they run.
    """
    from evaluation.explain import explain as explained
    from evaluation.explain import summary
    from tidegate.evidence import gate_policy, gate_set_of
    from tidegate.wiring import open_service

    service = open_service(given)
    policy = gate_policy(service, stream)
    found = explained(policy, gate_set_of(service, stream))
    if want_json:
        output.as_json({"gates": [one.as_json() for one in found], "policy": list(summary(policy))})
        return
    for gate in found:
        output.say(f"{gate.gate}{'' if gate.decides else ' (shown, does not decide)'}")
        output.say(f"  {gate.sentence}")
        output.say(f"  chance: {gate.errs}")
        output.say(f"  cost:   {gate.cost}; on {gate.data}")
    output.say("together")
    for line in summary(policy):
        output.say(f"  {line}")


@click.command()
@click.argument("stream")
@click.argument("version", type=int)
@click.option("--all", "everything", is_flag=True, help="Go on measuring after a gate that decides has failed.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write the page of evidence there, with examples, as a round does: one HTML file.",
)
@click.option("--quiet", is_flag=True, help="No progress bar.")
@_JSON
@click.pass_obj
def evaluate(
    given: str | None, stream: str, version: int, *, everything: bool, out: Path | None, quiet: bool, want_json: bool
) -> None:
    """Run STREAM's gates of today on VERSION, against what is live now. Nothing is signed or changed.

    The registry keeps the verdict that the version was promoted or refused by. Gates on the stream's own holdout are
    not asked, because its account would be charged: a policy that has such gates leaves the version undecided here.

    Exit code: 0 when it passes, 1 when it fails or is undecided.
    """
    from tidegate import log
    from tidegate.evidence import evaluate_version, page_of
    from tidegate.progress import bar
    from tidegate.wiring import open_service

    log.configure()
    service = open_service(given)
    with bar(quiet=quiet or want_json) as tell:
        found, live = evaluate_version(
            service, stream, version, tell, everything=everything, side_by_side=out is not None
        )
    if out is not None:
        out.write_bytes(page_of(service, stream, version, found))
    if want_json:
        output.as_json(_json(stream, version, live, found))
    else:
        _show(stream, version, live, found)
    if found.outcome != "passed":
        sys.exit(1)


def _json(stream: str, version: int, live: int | None, found: Evaluation) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "stream": stream,
        "version": version,
        "live": live,
        "outcome": found.outcome,
        "reasons": list(found.reasons),
        "gates": [gate.as_json() for gate in found.gates],
        "figures": [asdict(figure) for figure in found.figures],
        "slices": [asdict(part) for part in found.slices],
        "not_measured": list(found.not_measured),
        "gate_set": dict(found.gate_set),
        "policy_sha256": found.policy_sha256,
    }


def _show(stream: str, version: int, live: int | None, found: Evaluation) -> None:
    against = f"version {live}, which is live" if live is not None else "the base; nothing is live"
    output.say(f"version {version} of {stream} against {against}: {found.outcome}")
    for reason in found.reasons:
        output.say(f"  {reason}")
    columns = ("gate", "decides", "result", "value", "se", "n", "p", "must be", "metric")
    output.table("gates", columns, [_gate_row(gate) for gate in found.gates])
    if any(part.candidate for part in found.slices):
        names = ("domain", "n", "base", "live", "candidate", "against live", "p, worse")
        output.table("accuracy by domain, %", names, [_slice_row(part) for part in found.slices])
    output.say("not measured:")
    for line in found.not_measured:
        output.say(f"  {line}")


def _gate_row(gate: Gate) -> tuple[str, ...]:
    return (
        gate.name,
        "yes" if gate.hard else "no",
        gate.outcome,
        _number(gate.value),
        _number(gate.se),
        "" if gate.n is None else str(gate.n),
        _number(gate.p),
        gate.bound,
        gate.version,
    )


def _slice_row(part: Slice) -> tuple[str, ...]:
    def accuracy(scores: Any) -> str:
        return f"{100 * scores.accuracy.value:.1f}" if scores else "-"

    gain = part.gain_over_live
    return (
        part.domain or "all records",
        str(part.n),
        accuracy(part.base),
        accuracy(part.live),
        accuracy(part.candidate),
        f"{100 * gain.value:+.1f} ± {100 * gain.se:.1f}" if gain else "-",
        _number(part.p_worse_than_live),
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
