"""A second opinion on a round's price, before it reads anything private. The only file that imports opacus."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from learner.errors import RoundError
from privacy.accounting import rdp

if TYPE_CHECKING:
    from learner.plan import RoundPlan

RELATIVE = 1e-6
# Both sum terms near one and take a logarithm: what is left below this per step is rounding, in either of them.
ABSOLUTE_PER_STEP = 1e-13


def check_charges(plan: RoundPlan) -> None:
    """Compare privacy.accounting with Opacus' RDP accountant on every charge and order of a plan.

    Raises:
        RoundError: they disagree; one of them is wrong, and nothing may run before it is known which.
    """
    from opacus.accountants.analysis.rdp import compute_rdp

    for q in sorted({charge.q for charge in plan.charges()}):
        ours = rdp(q, plan.sigma, plan.steps, plan.orders)
        theirs = compute_rdp(q=q, noise_multiplier=plan.sigma, steps=plan.steps, orders=list(plan.orders))
        for order, own, other in zip(plan.orders, ours, theirs, strict=True):
            if not math.isclose(own, other, rel_tol=RELATIVE, abs_tol=ABSOLUTE_PER_STEP * plan.steps):
                raise RoundError(
                    f"rdp={own!r} at order {order}, q={q}, sigma={plan.sigma}, steps={plan.steps}: Opacus says "
                    f"{other!r}, must agree to {RELATIVE:g}; report this, and pause the stream"
                )
