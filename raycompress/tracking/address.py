"""Checks of a tracking URI that need no MLflow."""

from __future__ import annotations

import os
import re
import socket
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from raycompress.errors import TrackingError
from raycompress.storage import Place

__all__ = ["artifact_place", "check", "masked", "masked_uri"]

TIMEOUT = 5.0
"""Seconds within which a server must answer."""
SQLITE = "sqlite:///absolute/path/mlflow.db"
DATABASES = ("postgresql", "mysql", "mssql", "sqlite")


def masked_uri(uri: str) -> str:
    """The URI without its password."""
    # Up to the last @ of the authority: passwords may hold one.
    uri = re.sub(r"(://[^:/?#]*):[^?#\s]*@", r"\1:***@", uri)
    return re.sub(r"([?&](?:password|passwd|pwd|token|secret)=)[^&#\s]*", r"\1***", uri, flags=re.I)


def masked(text: str, uri: str) -> str:
    """A message's first line, without the URI's password."""
    text = text.replace(uri, masked_uri(uri)).strip() or "no reason given"
    password = re.search(r"://[^:/?#]*:([^?#\s]*)@", uri)
    if password is not None and password[1]:
        text = text.replace(password[1], "***")
    return masked_uri(text.splitlines()[0].strip())


def artifact_place(uri: str, output: Place) -> str | None:
    """Where a new experiment keeps its files; None: the server decides.

    MLflow's own choice for a database is a folder below the current one, which in a submitted job
    is thrown away.
    """
    scheme = _scheme(uri)
    if scheme not in DATABASES:
        return None
    folder = Path(urlsplit(uri).path[1:]).parent if scheme == "sqlite" else Path(str(output))
    return (folder / "artifacts").absolute().as_uri()


def check(uri: str) -> None:
    """Raises a TrackingError, within seconds, if the URI can't be used."""
    try:
        parts = urlsplit(uri)
        port = parts.port
    except ValueError as error:
        raise TrackingError(f"tracking.uri: {masked(str(error), uri)}: {masked_uri(uri)}") from None
    scheme = _scheme(uri)
    if scheme in ("http", "https"):
        _check_server(uri, parts)
    elif scheme in ("", "file"):
        raise TrackingError(
            f"tracking.uri: MLflow keeps no runs in plain folders any more, got {uri!r}; use "
            f"{SQLITE}, a server's http address, or leave it out"
        )
    elif scheme == "sqlite":
        _check_file(uri, Path(parts.path[1:]))
    elif scheme in DATABASES and parts.hostname:
        ports = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
        try:
            socket.create_connection((parts.hostname, port or ports[scheme]), TIMEOUT).close()
        except OSError as error:
            raise _silent("database", uri, error) from error


def _scheme(uri: str) -> str:
    return urlsplit(uri).scheme.split("+")[0].lower()


def _check_server(uri: str, parts: SplitResult) -> None:
    host = parts.netloc.rpartition("@")[2]
    try:
        urllib.request.urlopen(f"{parts.scheme}://{host}/health", timeout=TIMEOUT).close()
    except urllib.error.HTTPError:
        return  # it answers; whether it lets us in is MLflow's business
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLError):
            return  # MLflow has settings of its own for certificates
        reason = error.reason
        raise _silent("MLflow server", uri, reason if isinstance(reason, OSError) else error) from (
            error
        )
    except (OSError, ValueError) as error:
        raise _silent("MLflow server", uri, error) from error


def _silent(what: str, uri: str, error: Exception) -> TrackingError:
    reason = getattr(error, "strerror", None) or error
    return TrackingError(
        f"tracking.uri: no {what} answers at {masked_uri(uri)} ({reason}); start it, or leave "
        "tracking.uri out to keep results below the output"
    )


def _check_file(uri: str, path: Path) -> None:
    if not path.is_absolute():
        raise TrackingError(
            f"tracking.uri: {uri} is relative to the current folder, which a submitted job loses; "
            f"use sqlite:////absolute/path/mlflow.db, or leave it out"
        )
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if (there.is_dir() if there == path else not there.is_dir()) or not os.access(there, os.W_OK):
        raise TrackingError(f"tracking.uri: {uri} can't be written: no permission for {there}")
