"""Fixtures and process settings every package's tests share."""

import os

# Before anything imports torch or the hub client. Tests share few cores, and never use the network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where a test takes more threads, those that wait sleep: spinning ones stop each other when cores are taken.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import pytest
from hypothesis import settings

from learner.base import Base
from tests.tiny import tiny_base

# Time depends on what else the machine does; in CI the same examples are tried each time, so that red means a change.
settings.register_profile("tidegate", deadline=None, derandomize=os.environ.get("CI") == "true")
settings.load_profile("tidegate")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Base:
    """A random tiny Qwen2.5-architecture base with the real Qwen2.5 tokenizer."""
    return tiny_base(tmp_path_factory.mktemp("tiny"))
