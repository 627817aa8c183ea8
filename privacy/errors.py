"""What can go wrong with budgets, keys and proofs.

PrivacyError
├── PolicyError             a policy or mechanism parameter is impossible
├── SignatureError          a signature, key or signed value does not hold
├── RandomnessError         a round key is missing, unsafe or not what it was
├── ExportBroken            an audit's export does not match itself, or cannot be written
├── LedgerError             the ledger cannot do what was asked
│   ├── BudgetExceeded      a block cannot pay; the message has the missing amount and the choices
│   ├── LedgerConflict      the same id with another content, or a step out of order
│   ├── LedgerBroken        the hash chain does not verify
│   └── LedgerBehindReceipt the ledger is older than a receipt: a backup was restored

Every message is one line: name, value, bound, way out.
"""


class PrivacyError(Exception):
    """Root of everything this package raises on purpose."""


class PolicyError(PrivacyError):
    """A policy or mechanism parameter is impossible."""


class SignatureError(PrivacyError):
    """A signature, key or signed value does not hold."""


class RandomnessError(PrivacyError):
    """A round key is missing, unsafe or not what it was."""


class ExportBroken(PrivacyError):
    """An audit's export does not match itself, or cannot be written."""


class LedgerError(PrivacyError):
    """The ledger cannot do what was asked."""


class BudgetExceeded(LedgerError):
    """A block cannot pay for a round."""


class LedgerConflict(LedgerError):
    """The same id with another content, or a step out of order."""


class LedgerBroken(LedgerError):
    """The hash chain of the rows does not verify."""


class LedgerBehindReceipt(LedgerError):
    """The ledger is older than a receipt: an old backup was restored."""
