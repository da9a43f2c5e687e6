"""The error tree: everything that raycompress raises on purpose.

RaycompressError
├── InputError              what the user gave can't work; nothing expensive has started
│   ├── ConfigError         a job key, a value or a file
│   ├── TaskError           the user's Task broke its contract
│   ├── BudgetError         no candidate can meet the budget
│   ├── ClusterError        the cluster can't host what the job asks for
│   └── TrackingError       the tracking server can't be reached or used
├── StructureError          masks or example inputs that don't fit the model
├── ArtifactError           a saved model is damaged, hostile, or of another class
├── VerificationError       the slim model doesn't compute what the masked one does
├── StorageError            the output's disk is full
├── EvaluationError         candidates failed, or their replicas were lost too often
├── InterruptedJob          stopped by a signal; the same command continues
└── UnpublishedJob          done, but not logged; the same command logs it
"""

from __future__ import annotations

__all__ = [
    "ArtifactError",
    "BudgetError",
    "ClusterError",
    "ConfigError",
    "EvaluationError",
    "InputError",
    "InterruptedJob",
    "RaycompressError",
    "StorageError",
    "StructureError",
    "TaskError",
    "TrackingError",
    "UnpublishedJob",
    "VerificationError",
]


class RaycompressError(Exception):
    """Base of all errors raised on purpose. Exit code 1."""

    exit_code = 1


class InputError(RaycompressError):
    """What the user gave can't work; nothing expensive has started. Exit code 2."""

    exit_code = 2


class ConfigError(InputError):
    """A job key, a value or a file is wrong."""


class TaskError(InputError):
    """The user's Task broke its contract."""


class BudgetError(InputError):
    """No candidate can meet the budget."""


class ClusterError(InputError):
    """The cluster can't host what the job asks for."""


class TrackingError(InputError):
    """The tracking server can't be reached or used."""


class StructureError(RaycompressError):
    """Masks, kept channels or example inputs that don't fit the model."""


class ArtifactError(RaycompressError):
    """A model can't be saved, or a saved one is damaged, hostile, or of another class."""


class VerificationError(RaycompressError):
    """The slim model doesn't compute what the masked one does."""


class StorageError(RaycompressError):
    """The output's disk is full; what was finished is kept, and with room the job continues."""


class EvaluationError(RaycompressError):
    """Candidates failed, or the replicas that evaluated them were lost too often."""


class InterruptedJob(RaycompressError):
    """Stopped by a signal; the same command continues. Exit code 75 (EX_TEMPFAIL)."""

    exit_code = 75


class UnpublishedJob(RaycompressError):
    """Done, but the tracking store lacks results; the same command logs them. Exit code 75."""

    exit_code = 75
