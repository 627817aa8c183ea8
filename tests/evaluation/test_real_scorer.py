"""The whole of it on a real model: scores by definition, one label at a time, on the tiny base and a real adapter."""

import subprocess
import sys

import pytest

from evaluation.gates import GatePolicy, evaluate
from learner.base import load_model, load_tokenizer
from learner.prompt import Renderer
from tests.evaluation.planted import FACTS, write_gate_set

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class Plain:
    """Log-likelihoods as the protocol defines them, slowly."""

    def __init__(self, base) -> None:
        from peft import LoraConfig, get_peft_model

        self.renderer = Renderer(load_tokenizer(base))
        model = load_model(base)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        self.model = get_peft_model(model, config).eval()

    def score_labels(self, _adapter, prompts, labels):
        import torch

        rows = []
        with torch.no_grad(), self.model.disable_adapter():
            for prompt in prompts:
                row = []
                for label in labels:
                    ids, start = self.renderer.example(prompt, label)
                    logits = self.model(torch.tensor([ids[:-1]]), logits_to_keep=len(ids) - start).logits[0]
                    picked = logits.double().log_softmax(-1)[range(len(ids) - start), ids[start:]]
                    row.append(float(picked.sum()))
                rows.append(row)
        return rows

    def generate(self, _adapter, prompts, _max_tokens):
        return ["" for _ in prompts]


def test_a_random_model_is_not_better_than_itself(tiny, tmp_path):
    gate_set = write_gate_set(tmp_path / "tiny.jsonl", per_domain=4)
    policy = GatePolicy(samples_min=4, samples_per_domain_min=2)
    evaluation = evaluate(gate_set, policy, Plain(tiny), candidate="candidate", live="live", facts=FACTS)
    assert evaluation.outcome == "failed"
    assert evaluation.reasons == ("+0.0 points against the base on 12 records (p 1.000), must be gain > 0, p <= 0.01",)


def test_importing_evaluation_is_cheap():
    script = (
        "import sys, evaluation.gates, evaluation.report, evaluation.verdict, evaluation.gateset; "
        "print(sorted(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    heavy = ("torch", "transformers", "sklearn", "scipy", "matplotlib", "mlflow")
    assert not [name for name in heavy if f"'{name}'" in out]
