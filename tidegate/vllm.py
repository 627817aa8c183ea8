"""Starting vLLM for a stream: in an environment of its own, on the stream's base, taking adapters while it runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tidegate.errors import ConfigError
from tidegate.workspace import CHECKOUT

if TYPE_CHECKING:
    from learner.base import Base
    from tidegate.config import LoraConfig
    from tidegate.wiring import Service

ENVIRONMENT = Path(os.environ.get("TIDEGATE_VLLM_ENV", CHECKOUT / ".venv-vllm"))
# What vLLM has kernels for.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Adapters in one batch: old and new of two streams; each place costs memory.
LORAS_IN_BATCH = 4
# Adapters kept in memory: more than a server keeps resident, so that none is read from disk while somebody waits.
LORAS_KEPT = 32


def engines_on_vllm(service: Service) -> dict[str, str]:
    """For each address of a vLLM one stream that is served by it."""
    found: dict[str, str] = {}
    for name, stream in service.settings.streams.items():
        if stream.serving.engine == "vllm":
            found.setdefault(stream.serving.vllm_url, name)
    return found


def rank_max(settings: Sequence[LoraConfig]) -> int:
    """The rank vLLM must make room for."""
    rank = max(max(lora.r, *lora.rank_pattern.values(), 1) for lora in settings)
    return next(size for size in RANKS if size >= rank)


def command(python: Path, base: Base, url: str, *, rank: int, dtype: str, more: Sequence[str] = ()) -> list[str]:
    """The command line of vLLM.

    Args:
        python: of the environment that has vLLM.
        base: what it runs.
        url: where it listens.
        rank: the largest of an adapter.
        dtype: of its weights.
        more: arguments of vLLM's own, behind ours: the later one counts.
    """
    from serving.vllm import model_name

    address = urlsplit(url)
    return [
        str(python),
        *("-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(base.path)),
        *("--served-model-name", model_name(base)),
        *("--host", str(address.hostname), "--port", str(address.port)),
        "--enable-lora",
        *("--max-loras", str(LORAS_IN_BATCH), "--max-cpu-loras", str(LORAS_KEPT)),
        *("--max-lora-rank", str(rank)),
        *("--generation-config", "vllm"),  # the base's own would change what a request says
        *("--dtype", dtype),
        *more,
    ]


def environment(key: str) -> dict[str, str]:
    """The environment of that process: it may load adapters, asks for a key, and reaches no network."""
    kept = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, enough for the embedded base; may be set from outside
        **kept,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_API_KEY": key,
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }


def run_vllm(service: Service, stream: str, env: Path, more: Sequence[str] = ()) -> None:
    """Become vLLM: this process is replaced, so that signals and its end are its own.

    Raises:
        ConfigError: the stream's engine is another, or the environment is not there.
    """
    serving = service.stream(stream).serving
    if serving.engine != "vllm":
        raise ConfigError(f"streams.{stream}.serving.engine={serving.engine}: must be vllm to start one for it")
    python = env / "bin" / "python"
    if not python.exists():
        raise ConfigError(f"{python}: is not there; `make vllm` builds it, or name another environment by --env")
    url = serving.vllm_url
    served = [s for s in service.settings.streams.values() if (s.serving.engine, s.serving.vllm_url) == ("vllm", url)]
    rank = rank_max([s.learner.lora for s in served])
    words = command(python, service.base(stream), url, rank=rank, dtype=serving.vllm_dtype, more=more)
    os.execve(words[0], words, environment(service.vllm_key))  # noqa: S606 - a fixed program
