"""How MLflow's UI is started for the output of a job."""

from __future__ import annotations

import sys
from pathlib import Path

from raycompress.errors import TrackingError

__all__ = ["ui_command"]


def ui_command(output: Path, port: int = 5000) -> tuple[list[str], dict[str, str]]:
    """The command that opens MLflow's UI on loopback for an output folder, and its environment."""
    database = output / "mlflow.db"
    if not database.exists():
        raise TrackingError(
            f"{output} holds no MLflow store; it isn't the output of a job, or the job keeps its "
            "results elsewhere (tracking.uri)"
        )
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{database}"]
    command += ["--default-artifact-root", (output / "artifacts").as_uri()]
    return command, {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
