"""What a round will do, fixed before it reads anything private: settings, rates, noise, and their hash.

Everything here follows from policy, settings, ledger and nominal sizes. Nothing here may see how many records were
accepted, or any content: the plan is public and is hashed into the ledger, the receipt and the model version.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from learner.adapter import BLOCK_PART
from learner.errors import PlanError
from privacy.canonical import sha256_of

if TYPE_CHECKING:
    from privacy.ledger import Charge

ALL_TARGETS = tuple(BLOCK_PART)
# More noise than this leaves nothing of a gradient: a block that asks for it has no budget left worth a round.
SIGMA_MAX = 20.0

Share = Annotated[float, Field(ge=0, lt=1)]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LoraSettings(_Value):
    """peft's LoRA settings. `layers`: a number counts from the top (0, or more than there are: all); a tuple names them."""

    r: Annotated[int, Field(ge=1, le=512)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Share = 0.0
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ALL_TARGETS
    layers: Annotated[int, Field(ge=0)] | Annotated[tuple[int, ...], Field(min_length=1)] = 6
    rslora: bool = False

    @model_validator(mode="after")
    def _known_targets(self) -> Self:
        unknown = sorted(set(self.targets) - set(ALL_TARGETS))
        if unknown:
            raise ValueError(f"lora.targets={','.join(unknown)}: must be among {','.join(ALL_TARGETS)}")
        return self

    @property
    def scale(self) -> float:
        """What B A x is multiplied by: alpha / r, or alpha / sqrt(r) (Kalajdzievski 2023)."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def layer_indices(self, total: int) -> tuple[int, ...]:
        """Indices of the adapted layers in a model of `total` layers, ascending."""
        if isinstance(self.layers, tuple):
            return tuple(sorted(set(self.layers)))
        count = min(self.layers or total, total)
        return tuple(range(total - count, total))


class OptimiserSettings(_Value):
    """AdamW (Loshchilov, Hutter 2019) with a linear warm-up and a cosine to zero, or a constant rate."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    warmup_share: Share = 0.1
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Share, Share] = (0.9, 0.999)


class BlockRate(_Value):
    """A block, and the rate at which each of its units is drawn in every step."""

    id: str
    q: Annotated[float, Field(gt=0, le=1)]


class RoundPlan(_Value):
    """One round, as it is charged and as it runs: sampler, clip, noise, steps and charges come out of this one value."""

    round_id: str
    attempt: Annotated[int, Field(ge=1)]
    stream: str
    parent_sha256: str | None  # None: starts from the bare base
    base_sha256: str
    data_revision: str
    unit: Literal["record", "user"]
    blocks: Annotated[tuple[BlockRate, ...], Field(min_length=1)]
    left_out: tuple[str, ...] = ()  # replay blocks that could not pay, by the ledger alone
    orders: Annotated[tuple[int, ...], Field(min_length=1)]  # Rényi orders the blocks' filters look at
    sigma: Annotated[float, Field(gt=0)]
    clip_norm: Annotated[float, Field(gt=0)]
    steps: Annotated[int, Field(ge=1)]
    expected_batch: Annotated[float, Field(gt=0)]
    lora: LoraSettings
    optimiser: OptimiserSettings
    noise_source: Literal["system", "test"] = "system"
    code_sha256: str

    @model_validator(mode="after")
    def _one_rate_per_user(self) -> Self:
        rates = {block.q for block in self.blocks}
        if self.unit == "user" and len(rates) > 1:
            raise ValueError(
                f"blocks.q={sorted(rates)}: unit user is drawn once over all its blocks, at one rate"
            )
        return self

    @property
    def plan_hash(self) -> str:
        """sha256 over the canonical JSON of everything above."""
        return sha256_of(self.as_json())

    def as_json(self) -> dict[str, Any]:
        """JSON form; `RoundPlan.model_validate` reads it back."""
        return self.model_dump(mode="json")

    def charges(self) -> tuple[Charge, ...]:
        """What each block pays: the mechanism that runs, not an epsilon."""
        from privacy.ledger import Charge

        return tuple(Charge(block.id, block.q, self.sigma, self.steps) for block in self.blocks)


@dataclass(frozen=True)
class BlockAccount:
    """All that planning may know of a block.

    Attributes:
        block_id: its name.
        policy: as frozen in its manifest {unit, orders, caps, attempts, replay_share, holdout_share, nominal_units, ...}.
        spent: Rényi divergence spent so far per order (privacy.ledger.Ledger.spent).
    """

    block_id: str
    policy: Mapping[str, Any]
    spent: tuple[float, ...]

    @property
    def units(self) -> float:
        """Public size of its training part: nominal units without the holdout's share."""
        return float(self.policy["nominal_units"]) * (1.0 - float(self.policy["holdout_share"]))


@cache
def code_sha256() -> str:
    """sha256 over every source file the update depends on: learner/ and privacy/."""
    root = Path(__file__).resolve().parent.parent
    sources = sorted(path for package in ("learner", "privacy") for path in (root / package).rglob("*.py"))
    return sha256_of({str(path.relative_to(root)): sha256(path.read_bytes()).hexdigest() for path in sources})
