"""Every error that a user of gradent can cause, as one tree.

    GradentError
    ├── InputError               what was handed in cannot be measured
    │   ├── PairError            one pair of the batch or file is unusable
    │   └── DataFileError        a file of pairs cannot be read (names file and line)
    ├── ModelError               the model cannot be measured
    │   ├── NothingTrainableError
    │   ├── NotCausalError
    │   └── UncoveredParameterError
    ├── NonFiniteError           a nan or an inf appeared (names where first)
    └── MemoryBudgetError        the budget is malformed or too small (names the least that works)

Each message says what was received, what is accepted, where, and what to do next.
"""

from __future__ import annotations


class GradentError(Exception):
    """Base class of every error that gradent raises on purpose."""


class InputError(GradentError, ValueError):
    """An argument has the wrong shape, type or value."""


class PairError(InputError):
    """A preference pair is unusable: empty completion, no room after the prompt, chosen equal to rejected."""


class DataFileError(InputError):
    """A file of preference pairs cannot be read; the message names the file and the line."""


class ModelError(GradentError):
    """The model, as it stands, cannot be measured."""


class NothingTrainableError(ModelError):
    """No parameter of the model has `requires_grad`."""


class NotCausalError(ModelError):
    """The model is not a causal language model: a later token changes an earlier prediction."""


class UncoveredParameterError(ModelError):
    """Trainable parameters that could not be measured, each with its reason."""


class NonFiniteError(GradentError, ArithmeticError):
    """A nan or an inf in the logits or in a gradient; the message names where it first appeared."""


class MemoryBudgetError(InputError):
    """`memory_budget` is malformed, or smaller than the least that works."""


class GradentWarning(UserWarning):
    """A fallback, or something about the model that a reader of the results should know, announced once."""
