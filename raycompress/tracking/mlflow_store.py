"""What goes wrong with an MLflow store, as one kind of error; and how long to wait for it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import sqlalchemy
from mlflow.exceptions import MlflowException

from raycompress.errors import TrackingError
from raycompress.tracking.address import masked, masked_uri
from raycompress.tracking.base import Refused

__all__ = ["guard", "impatient"]

REFUSALS = (
    "BAD_REQUEST",
    "CUSTOMER_UNAUTHORIZED",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "PERMISSION_DENIED",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
    "UNAUTHENTICATED",
)
"""MLflow's codes for what it would answer again."""


@contextmanager
def guard(uri: str) -> Iterator[None]:
    """Turns what goes wrong in the store into a TrackingError that shows no password."""
    try:
        with impatient({"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}):
            yield
    except ImportError as error:
        raise TrackingError(
            f"MLflow at {masked_uri(uri)} needs a package that isn't installed: {error}"
        ) from error
    except (MlflowException, sqlalchemy.exc.SQLAlchemyError, OSError) as error:
        refused = getattr(error, "error_code", None) in REFUSALS
        raise (Refused if refused else TrackingError)(
            f"MLflow at {masked_uri(uri)} can't be used: {masked(str(error), uri)}"
        ) from None


@contextmanager
def impatient(settings: Mapping[str, str]) -> Iterator[None]:
    """Sets MLflow's variables where the user didn't: its own retries take minutes."""
    ours = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)
