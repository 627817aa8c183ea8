"""Early stopping on a public signal: the steps that are taken, the weights that are kept, and what a crash changes."""

import math

import pytest
import torch

from learner.adapter import read_adapter
from learner.base import load_model
from learner.errors import RoundError
from learner.lora import LoraModel
from learner.plan import ContinualSettings, LoraSettings, StoppingSettings
from learner.round import Speed
from learner.step import Example
from learner.stopping import Signal, Stopper, likelihood
from tests.learner.rounds import examples, plain_model, plan, private_step
from tests.learner.test_round import Stop, run, stop_after

SHA = "e" * 64


class Scripted:
    """A signal that says what it is told to, and keeps the weights that it saw."""

    def __init__(self, *scores):
        self.scores, self.seen = list(scores), []

    def signal(self):
        return Signal(SHA, lambda _render: self.score)

    def score(self, lora):
        self.seen.append(lora.weights())
        return self.scores[len(self.seen) - 1]


def stopping(**changes):
    return StoppingSettings(**{"every_steps": 1, "patience": 2, "signal_sha256": SHA, **changes})


def kept(output):
    return read_adapter(output.adapter_dir).weights


def same(ours, theirs):
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_round_ends_when_patience_does_and_keeps_what_scored_best(tiny, tmp_path):
    script = Scripted(-3.0, -1.0, -2.0, -1.0)
    output = run(tiny, tmp_path, plan(tiny, stopping=stopping()), signal=script.signal())
    assert output.steps == 4 < plan(tiny).steps
    assert same(kept(output), script.seen[1])


def test_a_round_may_keep_its_last_weights_instead(tiny, tmp_path):
    script = Scripted(-3.0, -1.0, -2.0, -1.0)
    output = run(tiny, tmp_path, plan(tiny, stopping=stopping(keep="last")), signal=script.signal())
    assert output.steps == 4
    assert same(kept(output), script.seen[3])


def test_a_round_that_goes_on_gaining_takes_every_step_and_looks_at_its_last(tiny, tmp_path):
    script = Scripted(-3.0, -2.0)
    output = run(tiny, tmp_path, plan(tiny, stopping=stopping(every_steps=4)), signal=script.signal())
    assert output.steps == 6
    assert len(script.seen) == 2, "after steps 4 and 6"
    assert same(kept(output), script.seen[1])


def test_what_is_scored_is_what_the_round_would_end_with_also_where_it_averages(tiny, tmp_path):
    first = run(tiny, tmp_path / "1")
    script = Scripted(-3.0, -1.0, -2.0, -1.0)
    averaging = ContinualSettings(method="average", weight=0.25)
    second = plan(tiny, round_id="r2", parent_sha256=first.adapter_sha256, stopping=stopping(), continual=averaging)
    output = run(tiny, tmp_path / "2", second, parent_dir=first.adapter_dir, signal=script.signal())
    assert same(kept(output), script.seen[1])
    assert not same(script.seen[0], kept(first))


def test_a_score_that_is_no_number_is_no_gain(tiny, tmp_path):
    script = Scripted(-3.0, math.nan, math.nan)
    output = run(tiny, tmp_path, plan(tiny, stopping=stopping()), signal=script.signal())
    assert output.steps == 3
    assert same(kept(output), script.seen[0])


@pytest.mark.parametrize(("keep", "every"), [("best", 3), ("last", 1)])
def test_the_decision_is_the_same_wherever_the_round_was_interrupted(tiny, tmp_path, keep, every):
    of = plan(tiny, stopping=stopping(keep=keep))

    def signal():
        # A function of the weights alone, as a real one: rises, then falls.
        return Signal(SHA, lambda _render: lambda lora: -abs(float(lora.theta.double().norm()) - ideal))

    ideal = 0.0
    probe = Scripted(*range(6))
    run(tiny, tmp_path / "probe", of, signal=probe.signal())
    ideal = float(torch.cat([w.flatten() for w in probe.seen[1].values()]).double().norm())
    speed = Speed(checkpoint_steps=every)
    whole = run(tiny, tmp_path / "whole", of, signal=signal(), speed=speed)
    assert whole.steps == 4
    for step in (2, 4):
        folder = tmp_path / f"cut-{step}"
        with pytest.raises(Stop):
            run(tiny, folder, of, signal=signal(), speed=speed, progress=stop_after(step))
        again = run(tiny, folder, of, signal=signal(), speed=speed)
        assert (again.steps, again.adapter_sha256) == (whole.steps, whole.adapter_sha256), step


def test_another_set_than_the_planned_one_is_refused(tiny, tmp_path):
    script = Scripted()
    for of, given in (
        (plan(tiny, stopping=stopping(signal_sha256="f" * 64)), script.signal()),
        (plan(tiny, stopping=stopping()), None),
        (plan(tiny), script.signal()),
    ):
        with pytest.raises(RoundError, match="signal_sha256"):
            run(tiny, tmp_path, of, signal=given)


def test_a_stopper_without_settings_never_ends(tiny):
    stopper = Stopper(None, None)
    lora = LoraModel(load_model(tiny), LoraSettings(r=2, layers=1), 1)
    stopper.after(5, 5, lora)
    stopper.settle(lora)
    assert not stopper.ended
    assert stopper.state == ""


def test_the_likelihood_is_that_of_transformers_own_loss(tiny):
    made = [*examples(tiny, 7), Example(examples(tiny, 1)[0].ids, 1)]
    lora, _ = private_step(tiny, made, settings=LoraSettings(r=4, layers=2, dropout=0.5))
    model, _ = plain_model(tiny, lora)
    losses = []
    with torch.no_grad():
        for example in made:
            ids = torch.tensor([example.ids])
            logits = model(input_ids=ids, use_cache=False).logits[0, example.completion_start - 1 : -1]
            losses.append(float(torch.nn.functional.cross_entropy(logits, ids[0, example.completion_start :])))
    for tokens_max in (1, 64, 1 << 20):
        score = likelihood(made, tokens_max=tokens_max)
        assert score(lora) == pytest.approx(-sum(losses) / len(losses), rel=1e-4)
        assert score(lora) == score(lora)
