"""What a round will do, fixed before it reads anything private: settings, rates, noise, and their hash.

Everything here follows from policy, settings, ledger and nominal sizes. Nothing here may see how many records were
accepted, or any content: the plan is public and is hashed into the ledger, the receipt and the model version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from learner.errors import PlanError
from learner.layout import BLOCK_PART, DORA_REFUSED, HEAD, ONE_RANK, check_settings, chosen, scaling
from privacy.accounting import calibrate, rdp, share_used
from privacy.canonical import sha256_of
from privacy.policy import NONE

if TYPE_CHECKING:
    from privacy.ledger import Charge

ALL_TARGETS = tuple(BLOCK_PART)
# More noise than this leaves nothing of a gradient: a block that asks for it has no budget left worth a round.
SIGMA_MAX = 20.0
# Rounding is proven harmless for draws of up to 50,000 units (learner.step.add_weighted), and a Poisson draw of which
# so many are expected passes that with probability below e^-15000 (Chernoff).
EXPECTED_BATCH_MAX = 20_001  # settings allow 20,000; the batch that rates give is that but for rounding
# Fields of LoraSettings that plans made before did not have.
_LATER = {"rank_pattern", "alpha_pattern", "bottleneck", "bottleneck_places", "nonlinearity"}

Share = Annotated[float, Field(ge=0, lt=1)]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _pairs(value: Any) -> Any:
    """A mapping as pairs: their order decides which pattern is looked at first, and canonical JSON sorts mappings."""
    return tuple(value.items()) if isinstance(value, Mapping) else value


Rank = Annotated[int, Field(ge=1, le=512)]
Positive = Annotated[float, Field(gt=0)]


class LoraSettings(_Value):
    """What is trained. `layers`: a number counts from the top (0, or too many: all); a tuple names them.

    Attributes:
        targets: linear layers, among `learner.layout.TARGETS`; the vocabulary projection belongs to no layer.
        rank_pattern, alpha_pattern: (pattern, value) pairs as peft takes them, the first that fits counts.
        bottleneck: width of the bottleneck adapters that are trained along; 0: none.
        bottleneck_places: behind which sublayers of the adapted layers they stand.
    """

    r: Rank = 16
    alpha: Positive = 32.0
    dropout: Share = 0.0
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ALL_TARGETS
    layers: Annotated[int, Field(ge=0)] | Annotated[tuple[int, ...], Field(min_length=1)] = 6
    rslora: bool = False
    rank_pattern: Annotated[tuple[tuple[str, Rank], ...], BeforeValidator(_pairs)] = ()
    alpha_pattern: Annotated[tuple[tuple[str, Positive], ...], BeforeValidator(_pairs)] = ()
    bottleneck: Annotated[int, Field(ge=0, le=4096)] = 0
    bottleneck_places: Annotated[tuple[str, ...], Field(min_length=1)] = ("mlp",)
    nonlinearity: Literal["relu", "gelu", "silu"] = "relu"

    @model_validator(mode="before")
    @classmethod
    def _no_dora(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("use_dora"):
            raise ValueError(DORA_REFUSED)
        return values

    @model_validator(mode="after")
    def _usable(self) -> Self:
        check_settings(self.targets, self.rank_pattern, self.alpha_pattern, self.bottleneck_places)
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Fields that came later are left out at their defaults, so that plans written before keep their hash."""
        values: dict[str, Any] = handler(self)
        fields = type(self).model_fields
        return {k: v for k, v in values.items() if k not in _LATER or getattr(self, k) != fields[k].default}

    @property
    def scale(self) -> float:
        """What B A x is multiplied by where no pattern says otherwise."""
        return scaling(self.alpha, self.r, rslora=self.rslora)

    def rank_of(self, module: str) -> int:
        """The rank of a module, such as "model.layers.3.mlp.up_proj"."""
        return chosen(self.rank_pattern, module, self.r)

    def scale_of(self, module: str) -> float:
        """What its B A x is multiplied by."""
        return scaling(chosen(self.alpha_pattern, module, self.alpha), self.rank_of(module), rslora=self.rslora)

    def layer_indices(self, total: int) -> tuple[int, ...]:
        """Indices of the layers `layers` means in a model of `total`, ascending."""
        if isinstance(self.layers, tuple):
            return tuple(sorted(set(self.layers)))
        count = min(self.layers or total, total)
        return tuple(range(total - count, total))

    def block_layers(self, total: int) -> tuple[int, ...]:
        """The adapted ones: none where the vocabulary projection is all that is trained."""
        within = self.bottleneck or set(self.targets) - {HEAD}
        return self.layer_indices(total) if within else ()


class OptimiserSettings(_Value):
    """AdamW (Loshchilov, Hutter 2019) with a linear warm-up and a cosine to zero, or a constant rate.

    `layer_rate_decay` is what the rate is multiplied by from one adapted layer to the next below it.
    """

    learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    layer_rate_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    warmup_share: Share = 0.1
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Share, Share] = (0.9, 0.999)


class ContinualSettings(_Value):
    """How the round keeps what the live adapter knows: see learner/continual.py.

    `replay` needs replay blocks and a rate; `rank_groups` is for `orthogonal`, `weight` of the new one for `average`.
    """

    method: Literal["sequential", "replay", "orthogonal", "average"] = "replay"
    rank_groups: Annotated[int, Field(ge=1)] = 5
    weight: Annotated[float, Field(gt=0, le=1)] = 0.5


class StoppingSettings(_Value):
    """Early stopping on a public set: scored every so many steps, ended once `patience` scores in a row gained nothing.

    `keep` says which weights become the adapter: those that scored best, or the last. `signal_sha256` is the set's.
    """

    every_steps: Annotated[int, Field(ge=1)]
    patience: Annotated[int, Field(ge=1)] = 3
    keep: Literal["best", "last"] = "best"
    signal_sha256: str


class BlockRate(_Value):
    """A block, and the rate at which each of its units is drawn in every step."""

    id: str
    q: Annotated[float, Field(gt=0, le=1)]


class RoundPlan(_Value):
    """One round, as it is charged and as it runs: sampler, clip, noise, steps and charges come out of one value."""

    round_id: str
    attempt: Annotated[int, Field(ge=1)]
    stream: str
    parent_sha256: str | None  # None: starts from the bare base
    base_sha256: str
    data_revision: str
    unit: Literal["record", "user"]
    blocks: Annotated[tuple[BlockRate, ...], Field(min_length=1)]
    left_out: tuple[str, ...] = ()  # replay blocks that could not pay, by the ledger alone, or are not replayed
    orders: Annotated[tuple[int, ...], Field(min_length=1)]  # Rényi orders the blocks' filters look at
    sigma: Annotated[float, Field(ge=0)]  # zero, as the clip norm is, exactly where there is no privacy
    clip_norm: Annotated[float, Field(ge=0)]
    steps: Annotated[int, Field(ge=1)]
    expected_batch: Annotated[float, Field(gt=0, le=EXPECTED_BATCH_MAX)]
    lora: LoraSettings
    optimiser: OptimiserSettings
    continual: ContinualSettings = ContinualSettings()
    stopping: StoppingSettings | None = None  # a round that stops early has paid for all its steps
    priors: dict[str, Annotated[float, Field(gt=0)]] = {}  # declared shares of domains or labels; empty: not balanced
    noise_source: Literal["system", "test", "none"] = "system"  # none: without privacy
    code_sha256: str

    @model_validator(mode="after")
    def _one_rate_per_user(self) -> Self:
        rates = {block.q for block in self.blocks}
        if self.unit == "user" and len(rates) > 1:
            raise ValueError(f"blocks.q={sorted(rates)}: unit user is drawn once over all its blocks, at one rate")
        return self

    @model_validator(mode="after")
    def _private_or_not(self) -> Self:
        if (self.sigma > 0, self.clip_norm > 0) != (self.private, self.private):
            raise ValueError(
                f"sigma={self.sigma}, clip_norm={self.clip_norm}: must both be > 0, or both 0 with noise_source=none"
            )
        return self

    @property
    def private(self) -> bool:
        """Whether there is a mechanism at all, be it under a known seed."""
        return self.noise_source != NONE

    def weight_of(self, domain: str, label: str | None) -> float:
        """What a record counts, in (0, 1]: the smallest declared share over its own; 1 where none is declared."""
        share = self.priors.get(label or "", self.priors.get(domain))
        return 1.0 if share is None else min(self.priors.values()) / share

    @model_validator(mode="after")
    def _ranks_of_its_own(self) -> Self:
        if self.continual.method == "orthogonal" and (self.lora.rank_pattern or self.lora.bottleneck):
            raise ValueError(ONE_RANK)
        return self

    @property
    def plan_hash(self) -> str:
        """sha256 over the canonical JSON of everything above."""
        return sha256_of(self.as_json())

    def as_json(self) -> dict[str, Any]:
        """JSON form; `RoundPlan.model_validate` reads it back."""
        return self.model_dump(mode="json")

    def charges(self) -> tuple[Charge, ...]:
        """What each block pays: the mechanism that runs, not an epsilon. Without privacy nobody can pay: nothing."""
        from privacy.ledger import Charge

        paying = self.blocks if self.private else ()
        return tuple(Charge(block.id, block.q, self.sigma, self.steps) for block in paying)


@dataclass(frozen=True)
class BlockAccount:
    """All that planning may know of a block.

    Attributes:
        block_id: its name.
        policy: as frozen in its manifest (privacy.policy.Policy.frozen): unit, orders, caps, nominal_units and so on.
        spent: Rényi divergence spent so far per order (privacy.ledger.Ledger.spent).
    """

    block_id: str
    policy: Mapping[str, Any]
    spent: tuple[float, ...]

    @property
    def private(self) -> bool:
        """Whether it was sealed with a promise."""
        return bool(self.policy.get("enabled", True))

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


def plan_round(
    *,
    round_id: str,
    attempt: int,
    stream: str,
    parent_sha256: str | None,
    base_sha256: str,
    data_revision: str,
    new: Sequence[BlockAccount],
    replay: Sequence[BlockAccount] = (),
    expected_batch: float = 384,
    steps: int = 30,
    clip_norm: float = 1.0,
    replay_rate: float = 0.25,
    q_max: float = 0.5,
    sigma_max: float = SIGMA_MAX,
    lora: LoraSettings | None = None,
    optimiser: OptimiserSettings | None = None,
    continual: ContinualSettings | None = None,
    stopping: StoppingSettings | None = None,
    priors: Mapping[str, float] | None = None,
    noise_source: Literal["system", "test", "none"] = "system",
) -> RoundPlan:
    """Choose rates and noise for a round from settings, ledger and public sizes alone.

    A unit of a new block is drawn at q, one of a replay block at replay_rate * q (unit user: at q, everybody has one
    rate), so that the draw is expected to hold `expected_batch` units; where q would pass q_max, the batch shrinks.
    sigma is the smallest with which each new block pays at most (1 - replay_share) / attempts of its cap. Replay
    blocks that cannot pay what is then asked of them are left out, by the ledger alone; all of them are where
    `continual` is not replay. Without privacy (`noise_source` none) there is no noise and no clip, and nobody pays.

    Raises:
        PlanError: no new block, blocks of different units, with and without privacy, or of the other kind than
            `noise_source`, or a new block that cannot pay at sigma <= sigma_max.
    """
    private = noise_source != NONE
    _check_kind([*new, *replay], private=private)
    unit = _unit_of([*new, *replay])
    if not new:
        raise PlanError("new blocks=0: must be >= 1; wait for ingest to seal a block")
    rate = 1.0 if unit == "user" else replay_rate
    continual = continual or ContinualSettings()
    kept = tuple(replay) if replay_rate and continual.method == "replay" else ()
    while True:
        q, batch = _rate(new, kept, rate, expected_batch, q_max)
        sigma = _sigma(round_id, new, q, steps, sigma_max) if private else 0.0
        able = tuple(block for block in kept if not private or _share(block, q * rate, sigma, steps) <= 1.0)
        if len(able) == len(kept):
            break
        kept = able  # fewer units share the batch now, so the others' rate rises: look again
    return RoundPlan(
        round_id=round_id,
        attempt=attempt,
        stream=stream,
        parent_sha256=parent_sha256,
        base_sha256=base_sha256,
        data_revision=data_revision,
        unit=unit,
        blocks=(
            *(BlockRate(id=block.block_id, q=q) for block in new),
            *(BlockRate(id=block.block_id, q=q * rate) for block in kept),
        ),
        left_out=tuple(block.block_id for block in replay if block not in kept),
        orders=tuple(sorted({int(order) for block in (*new, *kept) for order in block.policy["orders"]})),
        sigma=sigma,
        clip_norm=clip_norm if private else 0.0,
        steps=steps,
        expected_batch=batch,
        lora=lora or LoraSettings(),
        optimiser=optimiser or OptimiserSettings(),
        continual=continual,
        stopping=stopping,
        priors=dict(priors or {}),
        noise_source=noise_source,
        code_sha256=code_sha256(),
    )


def _check_kind(blocks: Sequence[BlockAccount], *, private: bool) -> None:
    """A round uses blocks with a promise, or blocks without: never both."""
    others = [block.block_id for block in blocks if block.private != private]
    if others:
        kind, way = ("with", "without") if private else ("without", "with")
        raise PlanError(
            f"blocks {', '.join(others)}: sealed {way} privacy; a round {kind} privacy must use only blocks sealed "
            f"{kind} it: leave them out"
        )


def _unit_of(blocks: Sequence[BlockAccount]) -> Literal["record", "user"]:
    units = sorted({str(block.policy["unit"]) for block in blocks})
    if len(units) > 1:
        raise PlanError(f"privacy.unit={','.join(units)}: must be one for all blocks of a round; plan them apart")
    return "user" if units == ["user"] else "record"


def _rate(
    new: Sequence[BlockAccount], replay: Sequence[BlockAccount], rate: float, expected_batch: float, q_max: float
) -> tuple[float, float]:
    """Q of the new blocks, and the batch to expect."""
    weight = sum(block.units for block in new) + rate * sum(block.units for block in replay)
    if weight <= 0:
        raise PlanError("nominal_units=0 in all blocks: must be > 0 after the holdout; lower privacy.holdout_share")
    q = min(expected_batch / weight, q_max)
    return q, q * weight


def _sigma(round_id: str, new: Sequence[BlockAccount], q: float, steps: int, sigma_max: float) -> float:
    """The smallest noise at which every new block pays within its allowance and within what is left of its cap."""
    demands = []
    for block in new:
        orders = tuple(block.policy["orders"])
        demands.append((q, (0.0,) * len(orders), _allowance(block), orders))
        demands.append((q, block.spent, tuple(block.policy["caps"]), orders))
    sigma = calibrate(demands, steps)
    if sigma is not None and sigma <= sigma_max:
        return sigma
    short = [text for block in new if (text := _short(block, q, steps, sigma_max))]
    raise PlanError(
        f"round={round_id}: blocks {', '.join(short)} cannot pay, even at sigma={sigma_max:g}, the most that leaves "
        f"anything of a gradient; must stay within 100% of the sealed filter and of what it allows for being new once; "
        f"choose fewer steps (now {steps}), a smaller expected_batch (now q={q:.3g}), leave them out, "
        f"or wait for new blocks"
    )


def _short(block: BlockAccount, q: float, steps: int, sigma: float) -> str:
    """What a new block lacks, in the ledger's words; empty when it can pay."""
    caps = tuple(block.policy["caps"])
    rho = rdp(q, sigma, steps, tuple(block.policy["orders"]))
    used, after = share_used(block.spent, caps), _share(block, q, sigma, steps)
    once = share_used(rho, _allowance(block))
    if after > 1:
        return f"{block.block_id} (used {used:.1%}, asked {after - used:.1%}, over by {after - 1:.1%})"
    return f"{block.block_id} (asked {once:.1%} of its allowance, over by {once - 1:.1%})" if once > 1 else ""


def _allowance(block: BlockAccount) -> tuple[float, ...]:
    """Per order, what a block may pay for one attempt at being new; the rest is kept for replay and other attempts."""
    part = (1.0 - float(block.policy["replay_share"])) / int(block.policy["attempts"])
    return tuple(part * cap for cap in block.policy["caps"])


def _share(block: BlockAccount, q: float, sigma: float, steps: int) -> float:
    """What the block would have used of its filter afterwards, at its best order; above 1 it cannot pay."""
    rho = rdp(q, sigma, steps, tuple(block.policy["orders"]))
    return share_used([s + r for s, r in zip(block.spent, rho, strict=True)], tuple(block.policy["caps"]))
