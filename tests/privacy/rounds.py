"""Values the tests of the ledger share."""

from privacy.ledger import Charge
from privacy.policy import Policy

POLICY = Policy("record", 8.0, 1e-5)
PLAN = "a" * 64
ADAPTER = "b" * 64


def charge(block="b1", q=0.25, sigma=2.2, steps=30):
    return Charge(block, q, sigma, steps)


def run_round(ledger, name, charges, attempt=1):
    ledger.reserve("s", name, attempt, PLAN, charges)
    ledger.start(name, attempt, PLAN)
    return ledger.commit(name, attempt, PLAN, ADAPTER)
