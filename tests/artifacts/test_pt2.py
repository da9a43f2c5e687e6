import io
import json
import logging
import struct
import subprocess
import sys
import warnings
import zipfile
from contextlib import suppress

import hostile
import pytest
import torch
from hostile import CONSTANTS, MODEL, WEIGHTS, Net, edited, parts_of, write
from torch import nn

from raycompress.artifacts.pt2 import load_pt2, save_pt2
from raycompress.errors import ArtifactError, VerificationError

NAMES = (
    *("weight", "constant", "opaque object", "custom object", "sample inputs"),
    *("sample inputs without a zip", "legacy weights", "legacy constants", "a second model"),
    *("layout of torch 2.7", "compiled library", "size", "guard", "guard in a text"),
    *("name of a value", "operator", "operator on files", "description of inputs"),
    "description in escapes",
)
# torch 2.13 stops at these for another reason; they are refused because others may not.
STOPPED_BY_TORCH = {"custom object", "compiled library", "operator", "operator on files"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return hostile.plain(tmp_path_factory.mktemp("plain") / "plain.pt2")


def test_all_attacks_are_named_here(parts, tmp_path):
    assert tuple(hostile.hostile(parts, tmp_path / "x")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_what_would_run_code_is_refused_before_it_does(name, parts, tmp_path, monkeypatch):
    touched = tmp_path / "touched"
    monkeypatch.syspath_prepend(tmp_path)
    blamed, content = hostile.hostile(parts, touched)[name]
    archive = write(tmp_path / "hostile.pt2", content)
    with pytest.raises(ArtifactError) as error:
        load_pt2(archive)
    assert not touched.exists()
    assert "hostile.pt2" in str(error.value) and blamed in str(error.value)
    assert "nothing was loaded" in str(error.value) or "isn't what torch.save" in str(error.value)

    # The same archive does run code in torch: the test above can fail.
    logging.getLogger("torch.export").setLevel(logging.CRITICAL)
    sys.modules.pop("evil_enum", None)
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.load(archive).module()(torch.ones(3, 4))
    assert touched.exists() == (name not in STOPPED_BY_TORCH)


def test_what_torch_itself_saves_loads_without_its_pickled_inputs(parts, tmp_path):
    assert parts["data/sample_inputs/model.pt"]
    archive = write(tmp_path / "torch.pt2", parts)
    expected = torch.export.load(archive).module()(torch.ones(5, 4))
    torch.testing.assert_close(load_pt2(archive)(torch.ones(5, 4)), expected)


def test_saved_archives_hold_no_pickle_no_paths_and_their_metadata(tmp_path):
    example = torch.randn(1, 4)
    saved = save_pt2(Net(), example, tmp_path / "net.pt2", kept={"layer": 3})
    assert saved.dynamic_batch and saved.reason == "" and saved.path == tmp_path / "net.pt2"
    parts = parts_of(saved.path)
    assert parts["data/sample_inputs/model.pt"] == b""
    assert not any(b"hostile.py" in content for content in parts.values())
    metadata = json.loads(parts["extra/raycompress.json"])
    assert metadata["inputs"] == [{"name": "[0][0]", "shape": ["batch", 4], "dtype": "float32"}]
    assert metadata["kept"] == {"layer": 3} and metadata["dynamic_batch"] is True
    assert metadata["model"] == "Net" and metadata["torch"] == torch.__version__
    loaded = load_pt2(saved.path)
    assert loaded.meta["raycompress"] == metadata
    assert list(tmp_path.iterdir()) == [saved.path]


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x).reshape(2, -1)


class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_batch_size_that_is_written_into_the_code_is_kept_and_said(tmp_path):
    model = Fixed().eval()
    saved = save_pt2(model, torch.randn(2, 4), tmp_path / "fixed.pt2")
    assert not saved.dynamic_batch and saved.reason
    x = torch.randn(2, 4)
    torch.testing.assert_close(load_pt2(saved.path)(x), model(x))
    metadata = json.loads(parts_of(saved.path)["extra/raycompress.json"])
    assert metadata["inputs"][0]["shape"] == [2, 4] and metadata["dynamic_batch"] is False


class Named(nn.Module):
    """Two inputs by keyword, a third that has no batch dim, and nested outputs."""

    def forward(self, a, *, b, table):
        return {"sum": a + b, "rest": [a @ table]}


def test_keyword_inputs_and_inputs_without_a_batch(tmp_path):
    inputs = {"a": torch.randn(2, 5), "b": torch.randn(2, 5), "table": torch.randn(5, 3)}
    saved = save_pt2(Named(), inputs, tmp_path / "named.pt2")
    assert saved.dynamic_batch
    other = {"a": torch.ones(7, 5), "b": torch.ones(7, 5), "table": torch.ones(5, 3)}
    got = load_pt2(saved.path)(**other)
    assert got["sum"].tolist() == [[2.0] * 5] * 7 and got["rest"][0].tolist() == [[5.0] * 3] * 7


class Anything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Named()

    def forward(self, scale, **inputs):
        return scale * self.inner(**inputs)["sum"]


def test_keywords_that_forward_does_not_name(tmp_path):
    inputs = {"scale": torch.ones(2, 5), "b": torch.randn(2, 5), "a": torch.randn(2, 5)}
    model = Anything()
    saved = save_pt2(model, {**inputs, "table": torch.randn(5, 3)}, tmp_path / "any.pt2")
    assert saved.dynamic_batch, saved.reason
    other = {n: torch.full((7, 5), 3.0) for n in inputs}
    assert load_pt2(saved.path)(**other, table=torch.ones(5, 3)).tolist() == [[18.0] * 5] * 7
    assert "forward" not in vars(model)


class Unusual(nn.Module):
    """Names with hyphens and blanks, keys beyond ASCII."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"conv-1": nn.Linear(3, 3), "the second": nn.Linear(3, 3)})

    def forward(self, x):
        return {"été": self.parts["conv-1"](x), "it's": self.parts["the second"](x)}


def test_unusual_names_are_no_attack(tmp_path):
    model = Unusual()
    program = load_pt2(save_pt2(model, torch.ones(2, 3), tmp_path / "unusual.pt2").path)
    for key, value in model(torch.ones(5, 3)).items():
        torch.testing.assert_close(program(torch.ones(5, 3))[key], value)


def test_a_model_that_cannot_be_exported_is_an_error_and_leaves_no_file(tmp_path):
    with pytest.raises(ArtifactError, match=r"torch\.export can't export Branch"):
        save_pt2(Branch(), torch.randn(2, 3), tmp_path / "branch.pt2")
    assert not list(tmp_path.iterdir())


def test_the_program_is_compared_with_the_model(tmp_path):
    class Drifting(nn.Module):
        def forward(self, x):
            # Differs outside of export: what was written isn't what the model computes.
            return x if torch.compiler.is_exporting() else x * 1.01

    with pytest.raises(VerificationError, match=r"differs from the slim one by"):
        save_pt2(Drifting(), torch.ones(2, 3), tmp_path / "drifting.pt2")
    assert not list(tmp_path.iterdir())


def test_operators_of_ones_own_need_to_be_named(tmp_path):
    @torch.library.custom_op("raycompress_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @twice.register_fake
    def _(x):
        return torch.empty_like(x)

    class Own(nn.Module):
        def forward(self, x):
            return twice(x)

    saved = save_pt2(Own(), torch.ones(2, 3), tmp_path / "own.pt2")
    with pytest.raises(ArtifactError, match=r"raycompress_test\.twice"):
        load_pt2(saved.path)
    assert load_pt2(saved.path, operators=["raycompress_test"])(torch.ones(1, 3)).sum() == 6


def damaged(parts, tmp_path):
    whole = write(tmp_path / "whole.pt2", parts).read_bytes()
    weight = json.loads(parts[WEIGHTS])["config"]["layer.weight"]["path_name"]
    at = whole.index(parts[f"data/weights/{weight}"])
    flipped = bytearray(whole)
    flipped[at] ^= 1
    without = {n: c for n, c in parts.items() if n != MODEL}
    yield "nothing", b"", "no .pt2 archive"
    yield "garbage", b"\x80\x02" + b"garbage" * 100, "no .pt2 archive"
    yield "half", whole[: len(whole) // 2], "no .pt2 archive"
    yield "a flipped bit", bytes(flipped), "Bad CRC-32"
    yield "no program", without, "models/model.json is missing"
    yield "no JSON", {**parts, MODEL: b"{"}, "models/model.json is no JSON"
    yield "deep JSON", {**parts, MODEL: b"[" * 10**6}, "models/model.json is no JSON"
    yield "a list", {**parts, WEIGHTS: b"[]"}, "model_weights_config.json is no JSON object"
    yield "a format", {**parts, "archive_format": b"pt3"}, "archive_format isn't 'pt2'"
    yield "a version", {**parts, "archive_version": b"9"}, "archive_version isn't '0'"
    yield "no graph", {**parts, MODEL: b"{}"}, "can't load the program"

    def far(table):
        table["config"]["layer.weight"]["path_name"] = "../../../etc/passwd"

    def missing(table):
        table["config"]["layer.weight"]["path_name"] = "weight_77"

    def large(table):
        table["config"]["shift"]["tensor_meta"]["sizes"] = [{"as_int": 10**12}]

    def inner(table):
        table["config"]["layer.__class__.weight"] = table["config"].pop("layer.weight")

    yield "a class", {**parts, WEIGHTS: edited(parts[WEIGHTS], inner)}, "layer.__class__.weight"
    yield "a path", {**parts, WEIGHTS: edited(parts[WEIGHTS], far)}, "etc/passwd"
    yield "a missing tensor", {**parts, WEIGHTS: edited(parts[WEIGHTS], missing)}, "weight_77 is mi"
    tensor = json.loads(parts[CONSTANTS])["config"]["shift"]["path_name"]
    empty = {**parts, f"data/constants/{tensor}": b"", CONSTANTS: edited(parts[CONSTANTS], large)}
    yield "an empty tensor", empty, f"{tensor} is empty"
    yield "a large tensor", {**parts, CONSTANTS: edited(parts[CONSTANTS], large)}, "can't load"


def test_damaged_files_are_errors_that_name_the_part(parts, tmp_path):
    for name, content, message in damaged(parts, tmp_path):
        path = tmp_path / "damaged.pt2"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            write(path, content)
        with pytest.raises(ArtifactError) as error:
            load_pt2(path)
        assert "damaged.pt2" in str(error.value) and message in str(error.value), name
    with pytest.raises(ArtifactError, match=r"nowhere\.pt2: there is no such file"):
        load_pt2(tmp_path / "nowhere.pt2")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_tricks_are_refused(parts, tmp_path):
    path = tmp_path / "tricks.pt2"

    def refused(message):
        with pytest.raises(ArtifactError, match=message):
            load_pt2(path)

    write(path, {**parts, "extra/zeros.txt": bytes(10**6)}, zipfile.ZIP_DEFLATED)
    refused("is compressed")
    for name in ("archive/../../evil", "other/extra/x", "/etc/passwd", "archive/extra/../../x"):
        write(path, parts)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, "x")
        refused("folder")
    root = zipfile.ZipFile(write(path, parts)).namelist()[0].partition("/")[0]
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{root}/{MODEL}", parts[MODEL])
    refused(f"{MODEL} is there twice")
    with zipfile.ZipFile(write(path, parts), "a") as archive:
        archive.writestr(f"{root}/data/notes.txt", "x")
    refused(r"data/notes\.txt is of unknown kind")

    # A directory that declares a terabyte, without one.
    content = bytearray(write(path, parts).read_bytes())
    entry = content.index(b"PK\x01\x02")
    for offset in (20, 24):
        struct.pack_into("<I", content, entry + offset, 2**31)
    path.write_bytes(content)
    refused("declares more than the file's|damaged")


def test_torch_alone_loads_it_in_a_fresh_process(tmp_path):
    model = Net().eval()
    saved = save_pt2(model, torch.randn(2, 4), tmp_path / "net.pt2")
    code = (
        "import sys, torch;"
        "y = torch.export.load(sys.argv[1]).module()(torch.ones(7, 4)).detach();"
        "assert not any(m.startswith('raycompress') for m in sys.modules);"
        "torch.save(y, sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, saved.path, tmp_path / "y.pt"], check=True)
    got = torch.load(io.BytesIO((tmp_path / "y.pt").read_bytes()), weights_only=True)
    torch.testing.assert_close(got, model(torch.ones(7, 4)).detach())
