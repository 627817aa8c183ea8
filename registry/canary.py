"""How much a candidate may answer beside what is live: the terms a person signs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from registry.errors import PromotionRefused

# The kind of such a decision in the history, the field of its terms, and the tag that carries it to serving.
CANARY = "canary"


@dataclass(frozen=True)
class Terms:
    """What a canary may do.

    Attributes:
        share: of requests, above 0 and below 1: the rest is what it is compared with.
        header: whether a client may choose by `x-tidegate-canary: always` or `never`.
        sticky: whether one user, by OpenAI's field `user`, always gets the same side.
    """

    share: float
    header: bool = True
    sticky: bool = True

    def as_json(self) -> dict[str, Any]:
        """JSON form, with every field."""
        return asdict(self)

    def __str__(self) -> str:
        rules = [name for name, on in (("by header", self.header), ("sticky", self.sticky)) if on]
        return ", ".join([f"{_percent(self.share)} of the requests", *rules])


def parse(value: Any) -> Terms:
    """Terms from their JSON form.

    Raises:
        PromotionRefused: names the field that is wrong, and its bound.
    """
    if not isinstance(value, Mapping):
        raise PromotionRefused("canary: must be an object with share, header and sticky")
    if unknown := set(value) - {"share", "header", "sticky"}:
        raise PromotionRefused(f"canary: has no {', '.join(sorted(unknown))[:80]}; it has share, header and sticky")
    share = value.get("share")
    if isinstance(share, bool) or not isinstance(share, int | float) or not isfinite(share) or not 0 < share < 1:
        raise PromotionRefused(
            f"canary share={str(share)[:40]}: must be above 0 and below 1; promote the version without a share to let "
            f"it answer everything"
        )
    for name in ("header", "sticky"):
        if not isinstance(value.get(name, True), bool):
            raise PromotionRefused(f"canary {name}={str(value[name])[:40]}: must be true or false")
    return Terms(float(share), bool(value.get("header", True)), bool(value.get("sticky", True)))


def told_of(canary: Mapping[str, Any]) -> str:
    """What a decision on a canary says, in words."""
    if canary.get("automatic"):
        return "stepped back"
    return f"canary {_percent(float(canary['share']))}" if canary["share"] else "canary ended"


def _percent(share: float) -> str:
    return f"{100 * share:.4g}%"
