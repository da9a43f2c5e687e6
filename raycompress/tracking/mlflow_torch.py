"""A module as an MLflow model: an exported program with a free batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import mlflow.models
import mlflow.pytorch
import torch
from mlflow.exceptions import MlflowException
from mlflow.types import Schema, TensorSpec
from torch import Tensor, nn

from raycompress.artifacts.export import Inputs, compare, first_line
from raycompress.errors import RaycompressError

__all__ = ["check_inputs", "save_torch_model"]


def save_torch_model(
    model: nn.Module, example_inputs: tuple[Any, ...], folder: Path, run_id: str, model_id: str
) -> None:
    """Saves an MLflow model, and compares what it answers once loaded.

    Args:
        model: Is exported; `portable`.
        example_inputs: Such as `check_inputs` takes.
        folder: Is made.
        run_id: Of the run that it belongs to.
        model_id: Of the logged model.

    Raises:
        RaycompressError: torch.export can't export the model.
        VerificationError: The answers differ.
    """
    inputs = Inputs.of(example_inputs)
    # torch takes a size of 0 or 1 for a constant.
    inputs = inputs.resized(max(2, inputs.batch or 0))
    _export(model, inputs, folder, run_id, model_id)
    compare(model, mlflow.pytorch.load_model(str(folder)), inputs, dynamic_batch=True)


def check_inputs(example_inputs: tuple[Any, ...]) -> None:
    """Raises a RaycompressError unless all are tensors of examples."""
    for value in example_inputs:
        if not isinstance(value, Tensor) or not value.dim():
            raise RaycompressError(
                "MLflow keeps only models whose inputs are all tensors of examples, got "
                f"{type(value).__name__}"
            )


def _export(model: nn.Module, inputs: Inputs, folder: Path, run_id: str, model_id: str) -> None:
    def schema(values: list[Tensor] | tuple[Tensor, ...]) -> Any:
        names = [None] if len(values) == 1 else [str(i) for i in range(len(values))]
        return Schema(
            [
                TensorSpec(v.numpy().dtype, (-1, *v.shape[1:]), name)
                for v, name in zip(values, names, strict=True)
            ]
        )

    args, outputs = inputs.args, inputs.call(model)
    described = bool(outputs) and all(o.dim() and o.dtype != torch.bfloat16 for o in outputs)
    try:
        mlflow.pytorch.save_model(
            model,
            str(folder),
            mlflow_model=mlflow.models.Model(run_id=run_id, model_id=model_id),
            signature=mlflow.models.ModelSignature(
                schema(args), schema(outputs) if described else None
            ),
            input_example=args[0].numpy() if len(args) == 1 else args,
            pip_requirements=[
                f"torch=={torch.__version__.split('+')[0]}",
                f"mlflow=={mlflow.__version__}",
            ],
            serialization_format="pt2",
        )
    except MlflowException:
        raise
    except Exception as error:  # torch.export raises whatever the model's own code raises
        raise RaycompressError(
            f"torch.export can't export {type(model).__name__}, so that MLflow can't keep it: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
