"""Models as ONNX, for runtimes other than torch; needs the extra `onnx`."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_leaves, tree_unflatten

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

__all__ = ["OnnxModel", "check_onnx", "save_onnx", "write_onnx"]

_LARGEST = 2**31 - 2**20  # bytes of one protobuf message; weights beyond lie in a file beside it


class OnnxModel(nn.Module):
    """A file on onnxruntime's CPU kernels, called as the module that it was made of.

    As many threads as torch has now.

    Args:
        path: Of the file.
        spec: How answers are nested; None: a list of tensors.
        optimized: Where to write the graph that really runs.
    """

    def __init__(
        self, path: Path, spec: TreeSpec | None = None, optimized: Path | None = None
    ) -> None:
        super().__init__()
        onnxruntime = import_module("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        self.spec = spec
        self.session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Tensors on the CPU."""
        values = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        names = [value.name for value in self.session.get_inputs()]
        feed = {n: v.detach().numpy() for n, v in zip(names, values, strict=True)}
        answers = [torch.from_numpy(answer) for answer in self.session.run(None, feed)]
        return answers if self.spec is None else tree_unflatten(answers, self.spec)


def check_onnx(what: str) -> None:
    """Raises an ArtifactError, which begins with `what`, without the extra `onnx`."""
    try:
        # torch would import the others much later, and say less.
        for name in ("onnx", "onnxscript", "onnxruntime"):
            import_module(name)
    except ImportError as error:
        raise ArtifactError(
            f"{what} needs the extra `onnx` (pip install 'raycompress[onnx]'): {error}"
        ) from error


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without a line for each operator of packages that aren't installed."""
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def write_onnx(program: torch.export.ExportedProgram, inputs: Inputs, path: Path) -> None:
    """Writes a program, unchecked.

    Args:
        program: Of a model in evaluation mode.
        inputs: That it was traced with.
        path: Of the file. Weights above 2 GB are written to `<path>.data`.

    Raises:
        ArtifactError: torch.onnx can't export it.
    """
    tensors = [*program.state_dict.values(), *program.constants.values()]
    size = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
    try:
        with warnings.catch_warnings(), _quiet_exporter():
            warnings.simplefilter("ignore")
            written = torch.onnx.export(
                program, inputs.args, kwargs=inputs.kwargs, dynamo=True, verbose=False
            )
            assert written is not None  # what it is without dynamo
            # Where in whose source each node comes from.
            written.model.metadata_props.clear()
            graph = written.model.graph
            graph.metadata_props.clear()
            for node in graph.all_nodes():
                node.metadata_props.clear()
            for value in graph.inputs:
                value.metadata_props.clear()
            written.save(path, external_data=size > _LARGEST)
    except Exception as error:  # the exporter raises all kinds
        path.unlink(missing_ok=True)
        raise ArtifactError(
            f"torch.onnx can't export the model: {type(error).__name__}: {first_line(error)}"
        ) from error


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
    check_onnx("saving .onnx")
    path, model = Path(path), portable(model)
    program, inputs, reason = exported(model, Inputs.of(example_inputs))
    partial = path.with_name(f"{path.stem}.partial.onnx")
    write_onnx(program, inputs, partial)
    try:
        compare(model, OnnxModel(partial), inputs, dynamic_batch=not reason)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return Saved(path, not reason, reason)
