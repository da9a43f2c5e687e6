"""Models as programs (.pt2): they run without the code that made them."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_leaves_with_path

import raycompress
from raycompress.artifacts.archive import clean_archive
from raycompress.artifacts.export import (
    ExampleInputs,
    Inputs,
    Saved,
    compare,
    exported,
    first_line,
    portable,
)
from raycompress.artifacts.program import namespaces_of
from raycompress.errors import ArtifactError

__all__ = ["load_program", "load_pt2", "save_program", "save_pt2"]


def save_pt2(
    model: nn.Module,
    example_inputs: ExampleInputs,
    path: str | Path,
    *,
    kept: Mapping[str, int] | None = None,
) -> Saved:
    """Exports a model in evaluation mode, and compares what is loaded at another batch size.

    The file holds no pickle, no example inputs and no path of this machine. It loads with
    `load_pt2`, and with `torch.export.load` alone.

    Args:
        model: any module; stays as it is.
        example_inputs: positional arguments (a tuple, or one tensor) or keyword arguments (a
            mapping). The first dim of the first tensor, and of all tensors of that size, is the
            batch.
        path: of the file, ending in .pt2.
        kept: kept channels of each group, stored in the metadata.

    Raises:
        ArtifactError: torch.export can't export the model.
        VerificationError: the program computes something else.
    """
    model = portable(model)
    program, inputs, reason = exported(model, Inputs.of(example_inputs))
    return save_program(
        program, inputs, path, model, name=type(model).__name__, reason=reason, kept=kept
    )


def save_program(
    program: torch.export.ExportedProgram,
    inputs: Inputs,
    path: str | Path,
    model: nn.Module,
    *,
    name: str,
    reason: str = "",
    kept: Mapping[str, int] | None = None,
) -> Saved:
    """Writes a program as `save_pt2` does, and compares what is loaded with `model`.

    Args:
        program: its example inputs are dropped.
        inputs: that it was traced with.
        path: of the file, ending in .pt2.
        model: computes the same.
        name: of the model's class, for the metadata.
        reason: why the batch size is fixed, "" if it isn't.
        kept: as for `save_pt2`.

    Raises:
        VerificationError: what is loaded computes something else.
    """
    path = Path(path)
    metadata = json.dumps(
        {
            "format": 1,
            "raycompress": raycompress.__version__,
            "torch": torch.__version__,
            "model": name,
            "dynamic_batch": not reason,
            "inputs": [
                {
                    "name": keystr(key),
                    "shape": [
                        "batch" if not reason and dim == 0 and inputs.is_batched(value) else size
                        for dim, size in enumerate(value.shape)
                    ],
                    "dtype": str(value.dtype).removeprefix("torch."),
                }
                for key, value in tree_leaves_with_path((inputs.args, inputs.kwargs))
                if isinstance(value, Tensor)
            ],
            "kept": {group: int(count) for group, count in (kept or {}).items()},
        }
    )
    namespaces = namespaces_of(program)
    program.example_inputs = None  # torch would pickle them
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    clean, _ = clean_archive(buffer, path, namespaces, metadata)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(clean.getbuffer())
    try:
        _, loaded = _load(partial, path, namespaces)
        compare(model, loaded, inputs, dynamic_batch=not reason)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return Saved(path, not reason, reason)


def load_pt2(path: str | Path, *, operators: Collection[str] = ()) -> nn.Module:
    """Loads a program, after a check that nothing in the file is unpickled or run by loading it.

    Takes what `save_pt2`, `torch.export.save` and MLflow write of plain tensors. Example inputs,
    which torch pickles, aren't read. `result.meta["raycompress"]` is the metadata.

    Args:
        path: of the file.
        operators: namespaces of your own operators that the program may call ("mylib" for
            `torch.ops.mylib`).

    Raises:
        ArtifactError: the file is damaged, would be unpickled, or could run other code.
    """
    _, module = _load(Path(path), Path(path), operators)
    return module


def load_program(path: str | Path) -> torch.export.ExportedProgram:
    """As `load_pt2`: the program, with its arithmetic as it was traced.

    Raises:
        ArtifactError: as for `load_pt2`.
    """
    program, _ = _load(Path(path), Path(path), ())
    return program


def _load(
    path: Path, shown: Path, operators: Collection[str]
) -> tuple[torch.export.ExportedProgram, nn.Module]:
    clean, metadata = clean_archive(path, shown, operators)
    try:
        program = torch.export.load(clean)
        module = program.module()
    except Exception as error:  # torch raises all kinds for a program that makes no sense
        raise ArtifactError(
            f"{shown}: torch can't load the program: {first_line(error)}"
        ) from error
    module.meta["raycompress"] = metadata
    return program, module
