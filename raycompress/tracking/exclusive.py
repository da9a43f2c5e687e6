"""One job at a time where jobs that start together would make the same thing in a store twice."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import sqlalchemy

__all__ = ["alone"]

SECONDS = 120
"""How long a job waits for another that opens the same database."""


@contextmanager
def alone(uri: str) -> Iterator[None]:
    """Holds a database for its opening; of a fresh one MLflow makes the tables then, unlocked.

    For SQLite it is a file beside the database, for PostgreSQL an advisory lock. Elsewhere nothing
    is held: a server makes its tables when it starts; in other databases one job is to make them.

    Raises:
        OSError: The file can't be made.
        sqlalchemy.exc.SQLAlchemyError: The database doesn't answer, or another job holds it.
    """
    kind = uri.split(":")[0].split("+")[0]
    if kind == "sqlite":
        path = Path(urlsplit(uri).path[1:])
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f"{path.name}.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    elif kind in ("postgresql", "mysql", "mssql"):
        # Connects once; MLflow itself would try ten times, over minutes.
        engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)
        with engine.connect() as connection:
            if kind == "postgresql":
                connection.execute(sqlalchemy.text(f"SET lock_timeout = '{SECONDS}s'"))
                connection.execute(sqlalchemy.text("SELECT pg_advisory_lock(hashtext('mlflow'))"))
            yield
    else:
        yield
