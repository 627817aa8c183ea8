"""The `tidegate` command. A subcommand's module is imported only when it is called, so that help answers at once."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import click

# name: (module, one line of help). The order is the order of the record's path, and of the help page.
COMMANDS: dict[str, tuple[str, str]] = {
    "init": ("tidegate.commands.setup", "Make a workspace (idempotent)."),
    "config": ("tidegate.commands.setup", "Print the resolved settings and where each came from."),
    "up": ("tidegate.commands.service", "Run the whole service in this terminal."),
    "broker": ("tidegate.commands.service", "Run the embedded Kafka-protocol broker alone."),
    "mlflow": ("tidegate.commands.service", "Run the model registry with the promotion guard alone."),
    "ingest": ("tidegate.commands.service", "Consume a stream's topic into versioned blocks."),
    "learn": ("tidegate.commands.service", "Run rounds of all streams on their schedule."),
    "serve": ("tidegate.commands.service", "Serve what the registry says, OpenAI-compatible."),
    "vllm": ("tidegate.commands.service", "Run vLLM for a stream whose engine it is."),
    "route": ("tidegate.commands.service", "Route requests to several servers, all of them on one version."),
    "produce": ("tidegate.commands.data", "Put labelled records from files on a stream's topic."),
    "blocks": ("tidegate.commands.blocks", "List a stream's sealed blocks."),
    "block": ("tidegate.commands.blocks", "Look into one sealed block, and verify its files."),
    "dlq": ("tidegate.commands.deadletters", "Rejected records: list, show, mend and replay, expire."),
    "expectations": ("tidegate.commands.expectations", "Try a stream's suite on records; build its Data Docs."),
    "plan": ("tidegate.commands.plan", "Show what the next rounds would cost, and how many are left. A dry run."),
    "round": ("tidegate.commands.rounds", "Run one private round now."),
    "reproduce": ("tidegate.commands.rounds", "Verify or rebuild a finished round (what `dvc repro` calls)."),
    "gates": ("tidegate.commands.gates", "Read out what a candidate must show: each gate, its error rates, its cost."),
    "evaluate": ("tidegate.commands.gates", "Run the gates on any version, against what is live. Changes nothing."),
    "versions": ("tidegate.commands.versions", "List a stream's model versions."),
    "approve": ("tidegate.commands.versions", "Approve a candidate: it becomes Production."),
    "promote": ("tidegate.commands.versions", "Approve in steps: a share of the requests, more, all."),
    "reject": ("tidegate.commands.versions", "Reject a candidate with a reason."),
    "rollback": ("tidegate.commands.versions", "Return to a version that was approved before."),
    "history": ("tidegate.commands.versions", "Who moved which version, when and why (signed)."),
    "pause": ("tidegate.commands.switches", "Stop a stream's spending: no round begins."),
    "resume": ("tidegate.commands.switches", "Let rounds begin again."),
    "kill": ("tidegate.commands.switches", "Let the bare base answer, at once, also with MLflow down."),
    "unkill": ("tidegate.commands.switches", "End the kill switch: what was approved last answers again."),
    "status": ("tidegate.commands.insight", "What runs, what waits, what is spent, what is wrong."),
    "doctor": ("tidegate.commands.doctor", "What is wrong with the workspace and its surroundings, and what to do."),
    "lineage": ("tidegate.commands.insight", "From a version or an answer id back to the topic's offsets."),
    "audit": ("tidegate.commands.audit", "Recompute what was spent on whose data; export or verify the proof."),
    "users": ("tidegate.commands.users", "Who may train, approve and read: logins of MLflow and their roles."),
    "keys": ("tidegate.commands.keys", "List, export and change the keys that sign."),
    "apikeys": ("tidegate.commands.apikeys", "Add, list and revoke the keys of the API, with scopes and limits."),
    "ask": ("tidegate.commands.insight", "Ask the live version a question."),
    "hooks": ("tidegate.commands.hooks", "Signed webhooks: what was sent, what receivers said; send a test."),
    "gc": ("tidegate.commands.upkeep", "Remove what no version needs from the data repository's cache."),
    "prune": ("tidegate.commands.upkeep", "Remove adapter weights that nobody needs any more. A dry run by default."),
    "demo": ("tidegate.commands.demo", "The whole path on the example stream, then a summary."),
}


class LazyGroup(click.Group):
    """A group that knows its commands' names and one-line helps without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the record's path."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import the module of one command; None if there is none of that name."""
        del ctx
        if name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(COMMANDS[name][0]), name.replace("-", "_"))
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, from the table above instead of from the modules."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Start here: `tidegate init DIR && cd DIR && tidegate up`. Each command has `--help`.",
)
@click.option(
    "-w",
    "--workspace",
    metavar="DIR",
    help="The workspace; default: TIDEGATE_WORKSPACE, else the current folder.",
)
@click.version_option(package_name="tidegate", prog_name="tidegate")
@click.pass_context
def cli(ctx: click.Context, workspace: str | None) -> None:
    """Keep a language model current with a stream of private, labelled data, and prove what it spent doing so."""
    ctx.obj = workspace


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: expected errors become one line on standard error and a non-zero exit code."""
    try:
        cli.main(args=None if argv is None else list(argv), prog_name="tidegate", standalone_mode=False)
    except click.exceptions.Abort:
        _fail("stopped", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        _fail("stopped", 130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:  # noqa: BLE001 - what is not expected is raised again
        _show(error)


def _show(error: Exception) -> Any:
    from tidegate.errors import EXIT_FAILED, expected_errors

    if not isinstance(error, expected_errors()):
        raise error
    _fail(" ".join(str(error).split()), getattr(error, "exit_code", EXIT_FAILED))


def _fail(message: str, code: int) -> None:
    click.echo(f"tidegate: {message}", err=True)
    sys.exit(code)
