"""What can go wrong in evaluation.

EvaluationError
└── GateSetError    a gate set's file is missing, malformed, or cannot be scored

A candidate that does badly, or a scorer that breaks, is no error: it is an outcome, with its reason.
"""


class EvaluationError(Exception):
    """Root of everything evaluation raises on purpose."""


class GateSetError(EvaluationError):
    """A gate set's file is missing, malformed, or cannot be scored."""
