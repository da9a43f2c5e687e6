"""Archives that would run code: a real .pt2 with one part replaced."""

from __future__ import annotations

import io
import json
import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from torch import nn


class Touch:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def statement(path: Path) -> str:
    """An expression that creates a file."""
    return f"__import__('pathlib').Path('{path}').touch()"


def saved(thing: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("shift", torch.ones(3), persistent=False)

    def forward(self, x):
        return (self.layer(x) + self.shift).view(x.shape[0], -1)


def parts_of(path: Path) -> dict[str, bytes]:
    """Members without their root folder."""
    with zipfile.ZipFile(path) as archive:
        return {n.partition("/")[2]: archive.read(n) for n in archive.namelist()}


def write(path: Path, parts: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    # torch's own reader wants these parts aligned, so that its own writer makes them.
    if compression == zipfile.ZIP_STORED and "version" not in parts:
        with torch.export.pt2_archive.PT2ArchiveWriter(str(path)) as writer:
            for name, content in parts.items():
                if not name.startswith(".data/") and name != "byteorder":
                    writer.write_bytes(name, content)
    else:
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in parts.items():
                archive.writestr(name if "version" in parts else f"archive/{name}", content)
    return path


def edited(content: bytes, edit) -> bytes:
    value = json.loads(content)
    edit(value)
    return json.dumps(value).encode()


# torch imports the module of an enum that describes the inputs.
ENUM = (
    '[1, {"type": "builtins.dict", "context": "[{\\"__enum__\\": true, '
    '\\"fqn\\": \\"evil_enum:E\\", \\"name\\": \\"A\\"}]", '
    '"children_spec": [{"type": null, "context": null, "children_spec": []}]}]'
)
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
MODEL = "models/model.json"


def plain(path: Path) -> dict[str, bytes]:
    """Parts of what `torch.export.save` writes of a small model with a free batch size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = torch.export.Dim("batch", min=2)
        program = torch.export.export(
            Net().eval(), (torch.ones(3, 4),), dynamic_shapes=({0: batch},)
        )
        torch.export.save(program, path)
    return parts_of(path)


def hostile(parts: dict[str, bytes], touched: Path) -> dict[str, tuple[str, dict[str, bytes]]]:
    """Name -> (the part to blame, an archive's parts), one for each way to run code by loading."""
    evil = saved(Touch(touched))
    code = statement(touched)

    def use_pickle(table, key, prefix=""):
        entry = table["config"][key]
        entry["use_pickle"] = True
        entry["path_name"] = prefix or entry["path_name"]

    def node(graph_module, index, **changes):
        graph_module["graph_module"]["graph"]["nodes"][index].update(changes)

    def rename(program, old, new):
        """The name of a value, in all places."""
        text = json.dumps(program).replace(json.dumps(old), json.dumps(new))
        program.clear()
        program.update(json.loads(text))

    def size(program):
        values = program["graph_module"]["graph"]["tensor_values"]
        values["x"]["sizes"][0]["as_expr"]["expr_str"] = code

    def described(spec):
        def describe(program):
            program["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = spec

        return edited(parts[MODEL], describe)

    weight = json.loads(parts[WEIGHTS])["config"]["layer.weight"]["path_name"]
    weight = f"data/weights/{weight}"
    constant = json.loads(parts[CONSTANTS])["config"]["shift"]["path_name"]
    constant = f"data/constants/{constant}"
    (touched.parent / "evil_enum.py").write_text(f"{code}\n")
    return {
        "weight": (
            weight,
            {
                **parts,
                weight: evil,
                WEIGHTS: edited(parts[WEIGHTS], lambda t: use_pickle(t, "layer.weight")),
            },
        ),
        "constant": (
            constant,
            {
                **parts,
                constant: evil,
                CONSTANTS: edited(parts[CONSTANTS], lambda t: use_pickle(t, "shift")),
            },
        ),
        "opaque object": (
            "data/constants/opaque_obj_0",
            {
                **parts,
                "data/constants/opaque_obj_0": pickle.dumps(Touch(touched)),
                CONSTANTS: edited(
                    parts[CONSTANTS], lambda t: use_pickle(t, "shift", "opaque_obj_0")
                ),
            },
        ),
        "custom object": (
            "data/constants/custom_obj_0",
            {
                **parts,
                "data/constants/custom_obj_0": evil,
                CONSTANTS: edited(
                    parts[CONSTANTS], lambda t: use_pickle(t, "shift", "custom_obj_0")
                ),
            },
        ),
        "sample inputs": (
            "data/sample_inputs/model.pt",
            {**parts, "data/sample_inputs/model.pt": evil},
        ),
        "sample inputs without a zip": (
            "data/sample_inputs/model.pt",
            {**parts, "data/sample_inputs/model.pt": pickle.dumps(Touch(touched))},
        ),
        "legacy weights": ("data/weights/model.pt", {**parts, "data/weights/model.pt": evil}),
        "legacy constants": ("data/constants/model.pt", {**parts, "data/constants/model.pt": evil}),
        "a second model": (
            "models/other.json",
            {
                **parts,
                "models/other.json": parts[MODEL],
                "data/sample_inputs/other.pt": evil,
                "data/weights/other_weights_config.json": parts[WEIGHTS],
                "data/constants/other_constants_config.json": parts[CONSTANTS],
            },
        ),
        "layout of torch 2.7": (
            "'version'",
            {
                "version": b"8.8",
                "serialized_exported_program.json": parts[MODEL],
                "serialized_state_dict.pt": evil,
                "serialized_constants.pt": evil,
                "serialized_example_inputs.pt": evil,
            },
        ),
        "compiled library": (
            "data/aotinductor/model/model.so",
            {**parts, "data/aotinductor/model/model.so": b"\x7fELF"},
        ),
        "size": (MODEL, {**parts, MODEL: edited(parts[MODEL], size)}),
        "guard": (
            MODEL,
            {
                **parts,
                MODEL: edited(parts[MODEL], lambda p: p["guards_code"].append(f"{code} is None")),
            },
        ),
        "guard in a text": (
            MODEL,
            {
                **parts,
                MODEL: edited(
                    parts[MODEL],
                    lambda p: p["guards_code"].append(
                        "L['x'] != '\" + str({}) + \"'".format(code.replace("'", '"'))
                    ),
                ),
            },
        ),
        "name of a value": (
            MODEL,
            {
                **parts,
                MODEL: edited(parts[MODEL], lambda p: rename(p, "x", f"x=({code})")),
            },
        ),
        "operator": (
            MODEL,
            {
                **parts,
                MODEL: edited(
                    parts[MODEL], lambda p: node(p, 0, target="torch.serialization.os.system")
                ),
            },
        ),
        "operator on files": (
            MODEL,
            {
                **parts,
                MODEL: edited(
                    parts[MODEL], lambda p: node(p, 0, target="torch.ops.aten.from_file.default")
                ),
            },
        ),
        "description of inputs": (MODEL, {**parts, MODEL: described(ENUM)}),
        "description in escapes": (
            MODEL,
            {**parts, MODEL: described(ENUM.replace("__enum__", "\\\\u005f_enum__"))},
        ),
    }
