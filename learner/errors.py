"""What can go wrong in the learner.

LearnerError
├── BaseModelError      a base model or its tokenizer cannot be had, or is not what the learner needs
├── AdapterError        an adapter on disk is missing, broken, or does not fit its base
├── PlanError           a round cannot be planned from these settings and blocks
└── RoundError          a round stopped
    └── ResumeRefused   a checkpoint exists, but data, plan, base, code or key are no longer the same

Every message is one line: name, value, bound, way out. It never holds a record's content.
"""


class LearnerError(Exception):
    """Root of everything the learner raises on purpose."""


class BaseModelError(LearnerError):
    """A base model or its tokenizer cannot be had, or is not what the learner needs."""


class AdapterError(LearnerError):
    """An adapter on disk is missing, broken, or does not fit its base."""


class PlanError(LearnerError):
    """A round cannot be planned from these settings and blocks."""


class RoundError(LearnerError):
    """A round stopped."""


class ResumeRefused(RoundError):
    """A checkpoint exists, but data, plan, base, code or key are no longer the same: use a new attempt."""
