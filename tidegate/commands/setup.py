"""`tidegate init` and `tidegate config`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from tidegate import output, workspace


@click.command()
@click.argument("directory", metavar="DIR")
def init(directory: str) -> None:
    """Make a workspace in DIR, or complete one. What is there already is left as it is.

    The workspace holds params.yaml, the data repository (git + DVC), the privacy ledger, the registry, keys (mode
    0600), adapters and caches. Edit params.yaml, check it with `tidegate config`, then `tidegate up`.
    """
    from tidegate.wiring import complete_workspace

    root = Path(directory)
    made = workspace.lay_out(root)
    made += complete_workspace(workspace.Workspace(root.resolve()))
    for name in made:
        output.say(f"made   {root / name}")
    output.say(f"ready  {root}: edit params.yaml, then `tidegate -w {root} up`")


@click.command()
@click.option("--json", "want_json", is_flag=True, help="JSON instead of a table.")
@click.pass_obj
def config(given: str | None, *, want_json: bool) -> None:
    """Check all settings and print each with its value and where it came from.

    A setting may be overridden by a variable: streams.support-desk.learner.steps is
    TIDEGATE__STREAMS__SUPPORT_DESK__LEARNER__STEPS. Secrets are not shown: they come from TIDEGATE_NAME or a file of
    mode 0600 in the keys folder.
    """
    from tidegate.config import load

    resolved = load(workspace.find(given).params)
    values = dict(_flatten(resolved.settings.model_dump(mode="json")))
    if want_json:
        output.as_json({k: {"value": v, "from": resolved.origins[k]} for k, v in values.items()})
    else:
        rows = [(k, json.dumps(v, ensure_ascii=False), resolved.origins[k]) for k, v in values.items()]
        output.table("", ("setting", "value", "from"), rows)


def _flatten(value: object, path: str = "") -> list[tuple[str, object]]:
    if isinstance(value, dict) and value:
        return [x for key, v in value.items() for x in _flatten(v, f"{path}.{key}" if path else str(key))]
    return [(path, value)]
