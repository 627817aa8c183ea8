import pytest

from serving.inprocess import InProcessEngine
from tests.serving.adapters import Shape, random_adapter

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="session")
def adapters(tiny, tmp_path_factory):
    """Folders of three adapters: upper layers, all layers and targets, rank-stabilised."""
    folder = tmp_path_factory.mktemp("adapters")
    random_adapter(tiny, folder / "upper", 1)
    random_adapter(tiny, folder / "all", 2, layers=(0, 1, 2), targets=ALL)
    random_adapter(tiny, folder / "stable", 3, layers=(2,), targets=ALL, shape=Shape(r=8, rslora=True))
    return {name: folder / name for name in ("upper", "all", "stable")}


@pytest.fixture(scope="session")
def engine(tiny, adapters):
    """An engine with the three adapters resident."""
    with InProcessEngine(tiny, threads=1, batch_max=8, queue_max=64, context_max=512) as running:
        for name, folder in adapters.items():
            running.load(name, folder)
        yield running
