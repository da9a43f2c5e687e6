"""An MLflow store to copy: making one takes seconds."""

from pathlib import Path

import mlflow
import pytest


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that has been through MLflow's migrations, without any run."""
    folder = tmp_path_factory.mktemp("migrated")
    mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db").search_experiments()
    return folder / "mlflow.db"
