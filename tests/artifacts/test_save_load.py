"""Each form, of slim models of each kind, loaded in a process that never pruned anything."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nets import KINDS
from safetensors.torch import load_file, save_file

import raycompress
from raycompress.errors import ArtifactError
from raycompress.structure import analyze, slim

# In graph form a slim model has no class; it is saved as a program alone.
GRAPHS = ("Attention graph", "Recurrent graph")


def halved(name):
    """A slim model with random weights and about half of each group, not the leading half."""
    name, _, form = name.partition(" ")
    torch.manual_seed(len(name))
    kind, example = KINDS[name]
    model = kind().eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.1)
    structure = analyze(model, example, form=form or "module")
    kept = {}
    for group in structure.groups:
        count = max(group.min_kept, group.num_channels // 2 // group.multiple * group.multiple)
        kept[group.name] = range(group.num_channels - count, group.num_channels)
    small = slim(model, structure, kept).eval()
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    return small, example


PREPARE = """
import sys
from pathlib import Path
from safetensors.torch import load_file, save_file
folder = Path(sys.argv[1])
inputs = load_file(folder / "inputs.safetensors")
"""
FINISH = """
save_file(answers, sys.argv[2])
"""
WAYS = {
    "recipe": """
sys.path.insert(0, sys.argv[3])
import raycompress
from nets import KINDS
answers = {}
for name, (kind, _) in KINDS.items():
    if name == "Multihead":  # whose class for odd sizes lies there
        loaded = [m for m in sys.modules if m.startswith("raycompress.structure")]
        assert len(answers) == len(KINDS) - 1 and not loaded, loaded
    model = raycompress.load(folder / f"{name}.safetensors", kind()).eval()
    answers[name] = model(inputs[name]).detach()
assert not {"ray", "mlflow", "raycompress.pruning"} & set(sys.modules)
""",
    "pt2": """
import raycompress
answers = {n: raycompress.load(folder / f"{n}.pt2")(x).detach() for n, x in inputs.items()}
assert "nets" not in sys.modules
loaded = [m for m in sys.modules if m.startswith(("raycompress.structure", "raycompress.pruning"))]
assert not loaded, loaded
""",
    "pt2 with torch alone": """
import torch
answers = {
    n: torch.export.load(folder / f"{n}.pt2").module()(x).detach() for n, x in inputs.items()
}
assert not any(m.startswith("raycompress") for m in sys.modules)
""",
    "onnx": """
import onnxruntime, torch
answers = {}
for name, x in inputs.items():
    session = onnxruntime.InferenceSession(folder / f"{name}.onnx")
    feed = {session.get_inputs()[0].name: x.numpy()}
    answers[name] = torch.from_numpy(session.run(None, feed)[0])
assert not any(m.startswith("raycompress") for m in sys.modules)
""",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with all kinds in all forms, inputs of another batch size, and the answers."""
    folder = tmp_path_factory.mktemp("saved")
    inputs, answers = {}, {}
    for name in (*KINDS, *GRAPHS):
        small, example = halved(name)
        for suffix in ("pt2", "onnx") if name in GRAPHS else ("safetensors", "pt2", "onnx"):
            result = raycompress.save(small, folder / f"{name}.{suffix}", example)
            assert result.dynamic_batch, result
        inputs[name] = torch.cat([example, example.flip(0), example])[:5]
        answers[name] = small(inputs[name]).detach()
    save_file(inputs, folder / "inputs.safetensors")
    return folder, answers


@pytest.mark.parametrize("way", WAYS)
def test_slim_models_answer_the_same_in_a_fresh_process(way, saved, tmp_path):
    folder, answers = saved
    code = PREPARE + WAYS[way] + FINISH
    command = [sys.executable, "-c", code, folder, tmp_path / "y", Path(__file__).parent]
    subprocess.run(command, check=True, timeout=200)
    got = load_file(tmp_path / "y")
    assert set(got) == (set(KINDS) if way == "recipe" else {*KINDS, *GRAPHS})
    for name, y in got.items():
        answer = answers[name]
        if way == "recipe":
            assert torch.equal(y, answer), name
        else:
            torch.testing.assert_close(y, answer, rtol=1e-4, atol=1e-5, msg=name)


def test_a_loaded_recipe_trains(saved):
    folder, _ = saved
    for name, (kind, example) in KINDS.items():
        model = raycompress.load(folder / f"{name}.safetensors", kind()).train()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(example).square().sum().backward()
        optimizer.step()
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert moved, name
        assert not any(n in moved for n, p in model.named_parameters() if not p.requires_grad)


def test_suffixes_and_arguments(tmp_path):
    model, example = halved("Odd")
    with pytest.raises(ArtifactError, match=r"the suffix must be \.safetensors"):
        raycompress.save(model, tmp_path / "model.pth", example)
    with pytest.raises(ArtifactError, match=r"the suffix must be \.safetensors"):
        raycompress.load(tmp_path / "model.pth")
    for suffix in ("safetensors", "pt2", "onnx"):
        with pytest.raises(ArtifactError, match=r"there is no folder .*nowhere"):
            raycompress.save(model, tmp_path / "nowhere" / f"model.{suffix}", example)
    for suffix in ("pt2", "onnx"):
        with pytest.raises(ArtifactError, match=r"is traced, which needs example_inputs"):
            raycompress.save(model, tmp_path / f"model.{suffix}")
    with pytest.raises(ArtifactError, match=r"onnxruntime\.InferenceSession"):
        raycompress.load(tmp_path / "model.onnx")
    with pytest.raises(ArtifactError, match=r"pass `model`"):
        raycompress.load(tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"loads without `model`"):
        raycompress.load(tmp_path / "model.pt2", model)
    assert not list(tmp_path.iterdir())


def test_without_the_extra_onnx_the_error_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    model, example = halved("Odd")
    with pytest.raises(ArtifactError, match=r"pip install 'raycompress\[onnx\]'.*onnxscript"):
        raycompress.save(model, tmp_path / "model.onnx", example)


def test_the_lines_in_the_readme(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (lines,) = (b for b in text.split("```python\n")[1:] if "raycompress.save(" in b)
    monkeypatch.chdir(tmp_path)
    small, example = halved("ConvNet")
    names = {"small": small, "MyModel": KINDS["ConvNet"][0], "example_inputs": example}
    exec(lines.split("```")[0], names)
    assert {p.name for p in tmp_path.iterdir()} == {"small.safetensors", "small.pt2", "small.onnx"}
    assert names["small"] is not small
    expected = small(example)
    assert torch.equal(names["small"].eval()(example), expected)
    torch.testing.assert_close(names["program"](example), expected, rtol=1e-4, atol=1e-5)
