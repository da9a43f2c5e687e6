"""Models as ONNX, for runtimes other than torch; needs the extra `onnx`."""

from __future__ import annotations

import os
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from raycompress.artifacts.export import (
    ExampleInputs,
    Inputs,
    Saved,
    compare,
    exported,
    first_line,
    portable,
)
from raycompress.errors import ArtifactError

__all__ = ["save_onnx"]

_LARGEST = 2**31 - 2**20  # bytes of one protobuf message; weights beyond lie in a file beside it


def save_onnx(model: nn.Module, example_inputs: ExampleInputs, path: str | Path) -> Saved:
    """Exports a model in evaluation mode, and compares onnxruntime at another batch size.

    Args:
        model: any module; stays as it is.
        example_inputs: as for `save_pt2`.
        path: of the file, ending in .onnx. Weights above 2 GB are written to `<path>.data`.

    Raises:
        ArtifactError: the extra isn't installed, or the model can't be exported.
        VerificationError: onnxruntime computes something else, or doesn't run it.
    """
    try:
        # torch would import the others much later, and say less.
        _, _, onnxruntime = map(import_module, ("onnx", "onnxscript", "onnxruntime"))
    except ImportError as error:
        raise ArtifactError(
            f"saving .onnx needs the extra `onnx` (pip install 'raycompress[onnx]'): {error}"
        ) from error
    path, model = Path(path), portable(model)
    program, inputs, reason = exported(model, Inputs.of(example_inputs))
    size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    partial = path.with_name(f"{path.stem}.partial.onnx")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                program,
                inputs.args,
                partial,
                kwargs=inputs.kwargs,
                dynamo=True,
                verbose=False,
                external_data=size > _LARGEST,
            )
    except Exception as error:  # the exporter raises all kinds
        partial.unlink(missing_ok=True)
        raise ArtifactError(
            f"torch.onnx can't export {type(model).__name__}: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    try:
        session = onnxruntime.InferenceSession(partial, providers=["CPUExecutionProvider"])

        def run(*args: Any, **kwargs: Any) -> list[Tensor]:
            values = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
            names = [value.name for value in session.get_inputs()]
            feed = {n: v.numpy() for n, v in zip(names, values, strict=True)}
            return [torch.from_numpy(answer) for answer in session.run(None, feed)]

        compare(model, run, inputs, dynamic_batch=not reason)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return Saved(path, not reason, reason)
