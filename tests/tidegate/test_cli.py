import json
import os
import subprocess
import sys
import time

import pytest

from tidegate.cli import COMMANDS

HEAVY = ("torch", "transformers", "mlflow", "kafka", "great_expectations", "dvc", "pandas", "sqlalchemy", "pydantic")
LIGHT_MODULES = ("tidegate.cli", "ingest", "privacy", "learner", "evaluation", "registry", "serving")
# What a command imports before it knows which part it needs: fine, but never the libraries that cost seconds.
NEVER = ("torch", "transformers", "mlflow", "kafka", "great_expectations", "dvc")


def imported(statement):
    code = f"{statement}; import sys; print(' '.join(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_importing_a_package_is_light(module):
    assert imported(f"import {module}").isdisjoint(HEAVY)


def test_values_and_wiring_import_nothing_that_costs_seconds():
    modules = "tidegate.wiring, tidegate.cycle, ingest.manifest, learner.plan, privacy.ledger, evaluation.verdict"
    assert imported(f"import {modules}").isdisjoint(NEVER)


def test_help_answers_in_under_half_a_second():
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "tidegate", "--help"], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - begun)
    assert "round" in done.stdout
    assert min(seconds) < 0.5


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_teaches_itself(name):
    done = subprocess.run(
        [sys.executable, "-m", "tidegate", name, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: tidegate {name}")
    assert len(done.stdout.splitlines()) > 4


def run(*arguments, cwd, env=None):
    return subprocess.run(
        [sys.executable, "-m", "tidegate", *arguments], capture_output=True, text=True, check=False, cwd=cwd, env=env
    )


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli") / "ws"
    done = run("init", str(root), cwd=root.parent)
    assert done.returncode == 0, done.stderr
    return root


def test_init_is_idempotent_and_keys_are_private(workspace):
    before = {p: p.read_bytes() for p in workspace.rglob("*") if p.is_file() and "keys" in p.parts}
    assert before
    again = run("init", str(workspace), cwd=workspace)
    assert again.returncode == 0, again.stderr
    assert not [line for line in again.stdout.splitlines() if line.startswith("made")]
    for path, content in before.items():
        assert path.read_bytes() == content
        if path.suffix != ".pub":
            assert path.stat().st_mode & 0o077 == 0


def test_init_refuses_a_folder_with_other_things(tmp_path):
    (tmp_path / "thesis.txt").write_text("do not touch")
    done = run("init", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 2
    assert "not empty" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["blocks", "nosuch"], 2, "stream=nosuch: not in params.yaml; the streams are: support-desk"),
        (["round", "nosuch"], 2, "stream=nosuch"),
        (["ask", "support-desk", "hello"], 1, "no server answers"),
        (["versions", "support-desk"], 1, "mlflow=http://127.0.0.1"),
        (["produce", "support-desk", "missing.jsonl"], 1, "missing.jsonl"),
        (["produce", "support-desk", "params.yaml", "--field", "text"], 2, "SOURCE=FIELD"),
        (["nosuch"], 2, "No such command"),
        (["lineage", "ans_forged"], 1, "answer"),
    ],
)
def test_wrong_input_gets_one_clear_line_and_a_code(workspace, arguments, code, says):
    done = run(*arguments, cwd=workspace)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "share"), [("10%", 0.1), ("0.25", 0.25), ("0%", 0.0), ("100%", 1.0), (" 2.5% ", 0.025)]
)
def test_a_share_is_a_percentage_or_a_part_of_one(text, share):
    from tidegate.commands.versions import promote

    (option,) = [param for param in promote.params if param.name == "share"]
    assert option.type.convert(text, None, None) == pytest.approx(share)
    for wrong in ("101%", "-1%", "ten", "nan", "2"):
        with pytest.raises(Exception, match="must be between 0% and 100%"):
            option.type.convert(wrong, None, None)


def test_outside_a_workspace_the_way_in_is_told(tmp_path):
    done = run("status", cwd=tmp_path)
    assert done.returncode == 2
    assert "tidegate init DIR" in done.stderr


def test_config_prints_values_with_their_origin(workspace):
    name = "TIDEGATE__SERVICE__API__PORT"
    done = run("config", "--json", cwd=workspace, env={**os.environ, name: "9999"})
    values = json.loads(done.stdout)
    assert values["service.api.port"] == {"value": 9999, "from": name}
    assert values["service.api.host"]["from"] == "params.yaml"
