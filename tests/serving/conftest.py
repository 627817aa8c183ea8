import warnings

import pytest

from learner.adapter import write_adapter
from learner.base import load_model
from learner.plan import LoraSettings
from serving.inprocess import InProcessEngine
from tests.learner.rounds import plain_copy
from tests.serving.adapters import ALL_TARGETS, drawn, random_adapter

ALL = ALL_TARGETS


BY_PATTERN = LoraSettings(
    r=3,
    layers=2,
    targets=(*ALL, "lm_head"),
    rank_pattern={"layers.1.*": 5, "lm_head": 2},
    alpha_pattern={"q_proj": 3.0, "layers.2.mlp.up_proj": 40},
)
HEAD = LoraSettings(r=2, targets=("lm_head",))
NARROW = LoraSettings(
    r=2,
    layers=2,
    targets=("q_proj", "o_proj"),
    bottleneck=4,
    bottleneck_places=("attention", "mlp"),
    nonlinearity="gelu",
)


@pytest.fixture(scope="session")
def adapters(tiny, tmp_path_factory):
    """Folders of adapters: upper layers, all layers and targets, rank-stabilised, ranks by pattern with the vocabulary
    projection, that alone, bottlenecks along."""
    folder = tmp_path_factory.mktemp("adapters")
    random_adapter(tiny, folder / "upper", 1)
    random_adapter(tiny, folder / "all", 2, layers=(0, 1, 2), targets=ALL)
    stable = LoraSettings(r=8, alpha=8.0, rslora=True)
    random_adapter(tiny, folder / "stable", 3, layers=(2,), targets=ALL, shape=stable)
    for seed, (name, settings) in enumerate({"patterns": BY_PATTERN, "head": HEAD, "narrow": NARROW}.items()):
        write_adapter(folder / name, settings, drawn(tiny, settings, seed).weights(), tiny)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="session")
def engine(tiny, adapters):
    """An engine with all of them resident."""
    with InProcessEngine(tiny, threads=1, batch_max=8, queue_max=64, context_max=512) as running:
        for name, folder in adapters.items():
            running.load(name, folder)
        yield running


@pytest.fixture(scope="session")
def oracle(tiny, adapters):
    """The model with each adapter, through peft; what peft does not have, as plain modules."""
    from peft import PeftModel

    models = {None: load_model(tiny)}
    with warnings.catch_warnings():
        # peft reads a flag of transformers that is being renamed, and warns of merging an update of the vocabulary
        # projection into the embedding, which nothing here does.
        warnings.simplefilter("ignore")
        for name, folder in adapters.items():
            if name != "narrow":
                models[name] = PeftModel.from_pretrained(load_model(tiny), str(folder)).eval()
    models["narrow"] = plain_copy(load_model(tiny), drawn(tiny, NARROW, seed=2))[0].eval()
    return models
