"""A whole service on a tiny base and a real broker, for tests: workspace, parts, and the commands a user types."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.kafka_servers import missing
from tidegate.supervisor import tidegate_command
from tidegate.wiring import open_service

CLINC = Path(__file__).resolve().parents[3] / "shared" / "data" / "clinc150"
STREAM = "intents"
DOMAINS = ("banking", "travel", "work")
# One token each: a sum of log-likelihoods must not favour the shorter word.
WORDS = {"banking": "bank", "travel": "travel", "work": "work"}
# How many of each: skewed, so that even a tiny model learns more than a guess.
STREAMED = {"banking": 420, "travel": 120, "work": 60}
JUDGED = {"banking": 60, "travel": 10, "work": 60}
FIRST = {"banking": 0, "travel": 7500, "work": 10500}


def clinc(name):
    """Rows of the real data set; skips on a laptop without it."""
    file = CLINC / f"{name}.jsonl"
    if not file.exists():
        missing(str(file))
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def as_domain_task(row):
    """The same utterance, asked for its domain: a task a tiny model can learn."""
    label = row["domain"]
    return {**row, "schema_version": 1, "label": label, "completion": WORDS[label]}


def stream_rows(offset=0):
    """Real utterances of three domains, shuffled by their ids; `offset` moves on within each domain."""
    rows = clinc("train")
    chosen = [r for d in DOMAINS for r in rows[FIRST[d] + offset : FIRST[d] + offset + STREAMED[d]]]
    return [as_domain_task(row) for row in sorted(chosen, key=lambda r: r["event_id"])]


def gate_rows():
    """130 other utterances. The untrained base guesses `travel`: whatever else a candidate learns is a gain, so that
    a verdict is not a matter of the noise that a round happened to draw."""
    rows = clinc("validation")
    return [as_domain_task(r) for d, n in JUDGED.items() for r in [r for r in rows if r["domain"] == d][:n]]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class Desk:
    """One workspace and its commands."""

    root: Path

    def run(self, *arguments, check=True, **options):
        done = subprocess.run(
            tidegate_command(self.root, *arguments), capture_output=True, text=True, check=False, **options
        )
        assert not check or done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done

    def json(self, *arguments):
        return json.loads(self.run(*arguments, "--json").stdout)

    def service(self):
        return open_service(str(self.root))

    def live(self):
        from tidegate.status import serving_state

        return (serving_state(self.service()) or {}).get("streams", {}).get(STREAM, {}).get("version")

    def wait(self, done, seconds=240, what=""):
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, f"{what or done}: not within {seconds} s"
            time.sleep(0.1)

    def sealed(self):
        manifests = self.service().repository().manifests(STREAM)
        return sum(part.span for m in manifests for part in m.offsets)


def make_desk(root, base, bootstrap=None, **learner):
    """Make a workspace whose one stream trains `base` in seconds."""
    subprocess.run([sys.executable, "-m", "tidegate", "init", str(root)], check=True, capture_output=True, text=True)
    params = yaml.safe_load((root / "params.yaml").read_text())
    template = params["streams"].pop("support-desk")
    broker = {"bootstrap": bootstrap} if bootstrap else {"port": free_port()}
    params["service"]["broker"].update(broker)
    params["service"]["mlflow"]["port"] = free_port()
    params["service"]["api"]["port"] = free_port()
    params["service"]["threads"] = 1
    # A large budget in one attempt: what is tested is the path, not what privacy leaves of accuracy.
    privacy = {**template["privacy"], "epsilon": 50.0, "attempts": 1}
    settings = {
        "expected_batch": 128,
        "steps": 20,
        "learning_rate": 0.03,
        "checkpoint_steps": 2,
        "test_noise": True,
        "system": "",
        "lora": {"r": 8, "alpha": 32, "layers": 0},
    }
    params["streams"][STREAM] = {
        **template,
        "topic": STREAM,
        "base": str(base.path),
        "ingest": {
            "domains": list(DOMAINS),
            "labels": list(DOMAINS),
            "block_offsets": 300,
            "block_seconds": 3,
            "metrics_port": free_port(),
        },
        "privacy": privacy,
        "learner": {**settings, **learner},
        "evaluation": {
            "gate_set": f"gates/{STREAM}.jsonl",
            "samples_per_domain_min": 10,
            "gates": [
                {**gate, "bound": 1.0} if gate.get("name") == "forgetting" else gate
                for gate in template["evaluation"]["gates"]
            ],
        },
        "registry": {"model": ""},
    }
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    write_jsonl(root / "gates" / f"{STREAM}.jsonl", gate_rows())
    subprocess.run([sys.executable, "-m", "tidegate", "init", str(root)], check=True, capture_output=True, text=True)
    os.environ.setdefault("TIDEGATE_BASES", str(root.parent / "bases"))
    return Desk(root)
