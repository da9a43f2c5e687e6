"""An ONNX file as an MLflow model, which `mlflow.pyfunc` loads with onnxruntime."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import mlflow
import mlflow.models
import mlflow.onnx
import mlflow.pyfunc
import numpy as np
from mlflow.types import Schema, TensorSpec
from torch import Tensor

from raycompress.errors import RaycompressError, VerificationError

__all__ = ["save_onnx_model"]


def save_onnx_model(
    path: Path, example_inputs: tuple[Any, ...], folder: Path, run_id: str, model_id: str
) -> None:
    """Saves an MLflow model, and compares what it answers with what the file answers.

    Args:
        path: Of the file.
        example_inputs: Tensors, examples first.
        folder: Is made.
        run_id: Of the run that it belongs to.
        model_id: Of the logged model.

    Raises:
        RaycompressError: Inputs aren't all tensors.
        VerificationError: The answers differ.
    """
    if not all(isinstance(value, Tensor) for value in example_inputs):
        raise RaycompressError("MLflow keeps only models whose inputs are all tensors of examples")
    onnxruntime = import_module("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    feed = {n: v.numpy() for n, v in zip(names, example_inputs, strict=True)}
    names = [value.name for value in session.get_outputs()]
    answers = dict(zip(names, session.run(None, feed), strict=True))
    mlflow.onnx.save_model(
        import_module("onnx").load(path),
        str(folder),
        mlflow_model=mlflow.models.Model(run_id=run_id, model_id=model_id),
        signature=mlflow.models.ModelSignature(_schema(feed), _schema(answers)),
        pip_requirements=[
            f"onnxruntime=={onnxruntime.__version__}",
            f"onnx=={import_module('onnx').__version__}",
            f"mlflow=={mlflow.__version__}",
        ],
        onnx_execution_providers=["CPUExecutionProvider"],
        save_as_external_data=False,
    )
    loaded = mlflow.pyfunc.load_model(str(folder)).predict(feed)
    for name, answer in answers.items():
        if not np.array_equal(loaded[name], answer):
            raise VerificationError(
                f"MLflow's copy of {path} computes something else than the file; it was not kept"
            )


def _schema(values: dict[str, np.ndarray]) -> Any:
    return Schema([TensorSpec(v.dtype, (-1, *v.shape[1:]), n) for n, v in values.items()])
