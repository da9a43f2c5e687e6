"""Models as files that outlive the code that made them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from raycompress.artifacts.export import ExampleInputs, Saved
from raycompress.errors import ArtifactError

__all__ = ["Saved", "load", "save"]

_SUFFIXES = ".safetensors (onto your class), .pt2 (a program) or .onnx"


def save(
    model: nn.Module,
    path: str | Path,
    example_inputs: ExampleInputs | None = None,
    *,
    kept: Mapping[str, int] | None = None,
) -> Saved:
    """Saves a model in the form that the path's suffix names.

    `.safetensors`: tensors and sizes, for a new instance of the model's class; trainable.
    `.pt2`: a program of torch that runs without the class, in evaluation mode.
    `.onnx`: the same for other runtimes; needs the extra `onnx`.

    Programs are loaded and compared with the model at another batch size before they are kept.

    Args:
        model: a slim model, or any other.
        path: of the file.
        example_inputs: for programs: positional arguments (a tuple, or one tensor) or keyword
            arguments (a mapping), of any batch size.
        kept: kept channels of each group, stored in the metadata of .safetensors and .pt2.

    Returns:
        The file, and whether it takes any batch size.

    Raises:
        ArtifactError: the suffix is another one, or the model can't be saved in this form.
        VerificationError: what was written computes something else.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ArtifactError(f"{path}: there is no folder {path.parent}")
    if path.suffix == ".safetensors":
        from raycompress.artifacts.recipe import save_recipe

        return save_recipe(model, path, kept=kept)
    if path.suffix not in (".pt2", ".onnx"):
        raise ArtifactError(f"{path}: the suffix must be {_SUFFIXES}")
    if example_inputs is None:
        raise ArtifactError(f"{path}: a {path.suffix} is traced, which needs example_inputs")
    if path.suffix == ".onnx":
        from raycompress.artifacts.onnx import save_onnx

        return save_onnx(model, example_inputs, path)
    # Imported here since it takes a second, which a recipe doesn't need.
    from raycompress.artifacts.pt2 import save_pt2

    return save_pt2(model, example_inputs, path, kept=kept)


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Loads what `save` wrote, without running anything that the file could say.

    Args:
        path: a .safetensors or .pt2 file.
        model: for .safetensors, a new (dense) instance of the class; it is changed in place.

    Returns:
        The model. A program is for inference, and has its metadata in `meta["raycompress"]`.

    Raises:
        ArtifactError: the file is damaged, doesn't fit the model, or would be unpickled or run.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        from raycompress.artifacts.recipe import load_recipe

        if model is None:
            raise ArtifactError(f"{path} is loaded onto a new instance of its class: pass `model`")
        return load_recipe(path, model)
    if path.suffix == ".pt2":
        from raycompress.artifacts.pt2 import load_pt2

        if model is not None:
            raise ArtifactError(f"{path} is a program, which loads without `model`")
        return load_pt2(path)
    if path.suffix == ".onnx":
        raise ArtifactError(f"{path} is for other runtimes: onnxruntime.InferenceSession(path)")
    raise ArtifactError(f"{path}: the suffix must be {_SUFFIXES}")
