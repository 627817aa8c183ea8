"""What can go wrong in evaluation.

EvaluationError
├── GateSetError    a gate set's file is missing, malformed, or cannot be scored
├── PolicyError     a gate asks for a metric that does not exist, or for something the metric cannot be asked
└── NotMeasured     a metric could not be measured: what it needs is missing, or ran out of its time

A candidate that does badly, or a scorer that breaks, is no error: it is an outcome, with its reason. `NotMeasured` is
raised by a metric and never leaves evaluation: its gate is undecided, and the verdict says why.
"""


class EvaluationError(Exception):
    """Root of everything evaluation raises on purpose."""


class GateSetError(EvaluationError):
    """A gate set's file is missing, malformed, or cannot be scored."""


class PolicyError(EvaluationError):
    """A gate asks for a metric that does not exist, or for something the metric cannot be asked."""


class NotMeasured(EvaluationError):
    """A metric could not be measured; the message is the reason, for a person."""
