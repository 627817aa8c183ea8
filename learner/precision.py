"""In which precision the frozen layers compute: asked for, or found by a short timed probe of this machine.

Only the frozen weights and the activations between layers are affected. What is trained, per-sample gradients, norms,
the clip, sums and noise are fp32 and fp64 always, so precision is no part of the privacy argument: each person's
gradient, however it was rounded, is clipped in fp32 to the norm that is charged for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: Mapping[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# A product of a small model's layer: (1024, 512) by (512, 1024). At 1 GFLOP it takes some ten milliseconds on one core.
PROBE_SIZE = (1024, 512, 1024)
PROBE_TIMES = 3
# Half precision must be this much faster: norms, attention and casts gain nothing from it, and fp32 is exact.
WORTH = 1.5


def probe() -> dict[Precision, float]:
    """Seconds of one matrix product in each precision on this machine, the best of a few, with torch's threads as set.

    Nothing but random numbers is multiplied: what this tells of is hardware.
    """
    rows, inside, columns = PROBE_SIZE
    seconds: dict[Precision, float] = {}
    for name, kind in DTYPES.items():
        left, right = torch.ones(rows, inside, dtype=kind), torch.ones(columns, inside, dtype=kind)
        times = []
        for _ in range(1 + PROBE_TIMES):
            begin = time.perf_counter()
            left @ right.t()
            times.append(time.perf_counter() - begin)
        seconds[name] = min(times[1:])  # the first one sets up the kernel
    return seconds


def fastest(seconds: Mapping[Precision, float]) -> Precision:
    """The precision those times speak for: bf16 before fp16, which has less range; fp32 unless one is WORTH it."""
    for name in ("bf16", "fp16"):
        if seconds[name] * WORTH <= seconds["fp32"]:
            return name
    return "fp32"
