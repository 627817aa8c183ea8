"""Rounds in forked processes that kill themselves: `python -m tests.learner.resume_child FOLDER`.

One process loads torch, tokenizer and base; each line on its standard input is a run, in a fork of its own:
{"run": folder of the run, "every": checkpoint_steps, "kill_at": n or null, "flip": bool}. What a run asks of the keyed
stream, and every moment at which it may be killed, goes to `asked.jsonl` in its folder before it happens.
"""

import json
import os
import signal
import sys
from hashlib import sha256
from pathlib import Path

import torch

import learner.round
from learner.base import load_model, load_tokenizer, prepare_base
from learner.crosscheck import check_charges
from learner.errors import ResumeRefused
from learner.plan import RoundPlan
from learner.round import Speed, run_round
from privacy.randomness import KeyedStream, RoundKey
from tests.learner.rounds import records

# Distinct from every way a process ends by itself.
REFUSED = 77


def private_records(*, flip):
    """The round's records; `flip`: with one bit of one byte changed."""
    made = {"b1": records(10), "b2": records(6, block="b2", seed=1)}
    if flip:
        last = made["b2"][-1]
        changed = last.completion[:-1] + chr(ord(last.completion[-1]) ^ 1)
        made["b2"][-1] = last.model_copy(update={"completion": changed})
    return made


class Moments:
    """Counts the moments of a run, writes each down, and ends the process at one of them."""

    def __init__(self, file, kill_at):
        self.file, self.kill_at, self.count = file, kill_at, 0

    def reach(self, what, **more):
        self.count += 1
        os.write(self.file, (json.dumps({"what": what, **more}) + "\n").encode())
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self):
        """At every call of the keyed stream (draw, noise), every fsync, and every rename."""
        for name in ("uniforms", "gaussians"):
            self._watch_stream(name, getattr(KeyedStream, name))
        fsync, replace = os.fsync, Path.replace
        os.fsync = lambda handle: (self.reach("fsync"), fsync(handle))[1]
        Path.replace = lambda old, new: (self.reach("rename"), replace(old, new))[1]

    def _watch_stream(self, name, method):
        def watched(stream, n, *purpose):
            values = method(stream, n, *purpose)
            context = sha256(stream._info).hexdigest()
            self.reach(name, context=context, purpose=purpose, n=n, values=sha256(values.tobytes()).hexdigest())
            return values

        setattr(KeyedStream, name, watched)


def run(folder, base, order):
    mine = folder / order["run"]
    mine.mkdir(exist_ok=True)
    moments = Moments(os.open(mine / "asked.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND), order["kill_at"])
    moments.watch()
    try:
        output = run_round(
            RoundPlan.model_validate(json.loads((folder / "plan.json").read_text())),
            base=base,
            parent_dir=None,
            records=private_records(flip=order["flip"]),
            key=RoundKey.load(folder / "round.key"),
            system="",
            checkpoint_dir=mine / "checkpoint",
            out_dir=mine / "adapter",
            max_tokens=48,
            speed=Speed(threads=1, checkpoint_steps=order["every"]),
        )
    except ResumeRefused as error:
        (mine / "refused.txt").write_text(str(error))
        return REFUSED
    (mine / "end.json").write_text(json.dumps({"sha256": output.adapter_sha256, "resumed": output.resumed}))
    return 0


def main(folder):
    torch.set_num_threads(1)
    base = prepare_base(str(folder / "model"), folder / "cache")
    tokenizer = load_tokenizer(base)
    learner.round.load_tokenizer = lambda _base: tokenizer  # reading it takes longer than the round
    check_charges(RoundPlan.model_validate(json.loads((folder / "plan.json").read_text())))  # imports Opacus
    load_model(base)  # imports the model's code
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os.dup2(2, 1)  # what a round logs is not an answer to an order
            os._exit(run(folder, base, json.loads(line)))
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
