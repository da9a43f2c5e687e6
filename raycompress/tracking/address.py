"""Checks of a tracking URI that need no MLflow."""

from __future__ import annotations

import re
import socket
from urllib.parse import urlsplit

from raycompress.errors import TrackingError

__all__ = ["check", "masked_uri"]


def masked_uri(uri: str) -> str:
    """The URI without its password."""
    return re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", uri)


def check(uri: str) -> None:
    """Raises a TrackingError, within seconds, if the URI can't be used."""
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            socket.create_connection((parts.hostname or "", port), timeout=5).close()
        except OSError as error:
            raise TrackingError(
                f"tracking.uri: no MLflow server answers at {masked_uri(uri)} "
                f"({error.strerror or error}); start it, or leave tracking.uri out to keep results "
                "below the output"
            ) from error
    elif parts.scheme in ("", "file"):
        raise TrackingError(
            f"tracking.uri: MLflow keeps no runs in plain folders any more, got {uri!r}; use "
            "sqlite:///absolute/path/mlflow.db, a server's http address, or leave it out"
        )
