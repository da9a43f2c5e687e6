import json

import pytest
import torch
from nets import Attention, ConvNet, LastBatch, Odd, Recurrent, Tied
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from raycompress.artifacts.recipe import load_recipe, save_recipe
from raycompress.errors import ArtifactError
from raycompress.structure import analyze, slim


def small_of(model, example, count=lambda n: n // 2):
    structure = analyze(model, example, form="module")
    kept = {g.name: range(max(g.min_kept, count(g.num_channels))) for g in structure.groups}
    return slim(model, structure, kept).eval()


def test_everything_of_a_tensor_comes_back(tmp_path):
    small = small_of(Odd().eval(), torch.randn(2, 6)).bfloat16()
    small.steps.fill_(7)
    save_recipe(small, tmp_path / "odd.safetensors", kept={"body": 5})
    dense = Odd()
    loaded = load_recipe(tmp_path / "odd.safetensors", dense)
    assert loaded is dense and loaded.training
    assert loaded.body.weight.shape == (5, 6) and loaded.body.weight.dtype == torch.bfloat16
    assert loaded.also is loaded.body and loaded.nothing is None
    assert loaded.body.out_features == 5 and loaded.head.in_features == 5
    assert torch.equal(loaded.shift, small.shift) and loaded.shift.shape == (5,)
    assert int(loaded.steps) == 7
    assert [g.shape for g in loaded.gains] == [(5,), (5,)]
    assert not loaded.head.bias.requires_grad and loaded.head.weight.requires_grad
    assert set(loaded.state_dict()) == set(small.state_dict())
    with safe_open(tmp_path / "odd.safetensors", "pt") as file:
        recipe = json.loads(file.metadata()["raycompress"])
    assert recipe["format"] == 1 and recipe["model"] == "Odd" and recipe["kept"] == {"body": 5}


def test_tied_weights_stay_one_and_move_together(tmp_path):
    small = small_of(Tied().eval(), torch.randint(0, 11, (2, 5)))
    save_recipe(small, tmp_path / "tied.safetensors")
    with safe_open(tmp_path / "tied.safetensors", "pt") as file:
        assert "head.weight" not in file.keys()
    loaded = load_recipe(tmp_path / "tied.safetensors", Tied())
    assert loaded.head.weight is loaded.embed.weight
    assert loaded.embed.embedding_dim == 6 and loaded.head.weight.shape == (11, 6)

    untied = Tied()
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    assert load_recipe(tmp_path / "tied.safetensors", untied).head.weight is untied.embed.weight
    untied = Tied()
    untied.head.weight = nn.Parameter(torch.ones(11, 12))
    save_recipe(untied, tmp_path / "untied.safetensors")
    loaded = load_recipe(tmp_path / "untied.safetensors", Tied())
    assert loaded.head.weight is not loaded.embed.weight
    assert loaded.head.weight.sum() == 11 * 12


def test_attributes_follow_and_recurrent_weights_are_the_ones_used(tmp_path):
    x = torch.randn(2, 5, 16)
    small = small_of(Attention().eval(), x)
    assert small.num_heads == 2
    save_recipe(small, tmp_path / "attention.safetensors")
    loaded = load_recipe(tmp_path / "attention.safetensors", Attention()).eval()
    assert loaded.num_heads == 2 and loaded.head_dim == 4
    assert loaded.norm.normalized_shape == small.norm.normalized_shape
    assert torch.equal(loaded(x), small(x))

    x = torch.randn(2, 5, 6)
    small = small_of(Recurrent().eval(), x)
    save_recipe(small, tmp_path / "rnn.safetensors")
    loaded = load_recipe(tmp_path / "rnn.safetensors", Recurrent()).eval()
    assert loaded.rnn.hidden_size == small.rnn.hidden_size == 5
    assert torch.equal(loaded(x), small(x))
    with torch.no_grad():
        loaded.rnn.weight_hh_l0.zero_()
    assert not torch.equal(loaded(x), small(x))


def test_a_bias_that_the_class_makes_without_is_added(tmp_path):
    x = torch.randn(2, 3, 8, 8)
    small = small_of(ConvNet().eval(), x)
    small[0].bias = nn.Parameter(torch.rand(len(small[0].weight)))
    save_recipe(small, tmp_path / "net.safetensors")
    loaded = load_recipe(tmp_path / "net.safetensors", ConvNet()).eval()
    assert torch.equal(loaded(x), small(x)) and isinstance(loaded[0].bias, nn.Parameter)


def test_a_model_on_the_meta_device_costs_nothing(tmp_path):
    x = torch.randn(2, 3, 8, 8)
    small = small_of(ConvNet().eval(), x)
    save_recipe(small, tmp_path / "net.safetensors")
    with torch.device("meta"):
        empty = ConvNet()
    loaded = load_recipe(tmp_path / "net.safetensors", empty).eval()
    assert torch.equal(loaded(x), small(x))


def test_what_a_call_left_behind_is_neither_restored_nor_stale(tmp_path):
    x = torch.randn(4, 6)
    small = small_of(LastBatch().eval(), x).eval()
    small(x)
    save_recipe(small, tmp_path / "last.safetensors")
    fresh = LastBatch().eval()
    fresh(x[:1])
    assert fresh.cached.shape == (8, 6)
    loaded = load_recipe(tmp_path / "last.safetensors", fresh)
    assert loaded.last_batch == 4 and loaded.cached is None and not loaded.training
    assert torch.equal(loaded(x), small(x))
    assert not hasattr(load_recipe(tmp_path / "last.safetensors", LastBatch()), "last_batch")


def test_other_classes_and_other_arguments_are_errors_before_anything_changes(tmp_path):
    save_recipe(Odd(width=8), tmp_path / "odd.safetensors")

    def refused(model, message):
        before = {n: t.clone() for n, t in model.state_dict().items()}
        with pytest.raises(ArtifactError, match=message):
            load_recipe(tmp_path / "odd.safetensors", model)
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())

    refused(Tied(), r"was saved from a Odd, not from a Tied")
    refused(Odd(width=7), r"'body\.bias' has shape \(8,\), which is no part of the model's \(7,\)")
    more = Odd()
    more.extra = nn.Linear(2, 2)
    refused(more, r"lacks 'extra\.weight', 'extra\.bias'")
    fewer = Odd()
    fewer.gains = nn.ParameterList(list(fewer.gains)[:1])
    refused(fewer, r"holds 'gains\.1', which the model lacks")
    flat = Odd()
    flat.head.weight = nn.Parameter(torch.ones(30))
    refused(flat, r"'head\.weight' has shape \(3, 8\), which is no part of the model's \(30,\)")
    with pytest.raises(ArtifactError, match="no such file"):
        load_recipe(tmp_path / "nowhere.safetensors", Odd())
    with pytest.raises(ArtifactError, match=r"save it as \.pt2"):
        save_recipe(torch.fx.symbolic_trace(Odd()), tmp_path / "graph.safetensors")
    with torch.device("meta"), pytest.raises(ArtifactError, match="Odd"):
        save_recipe(Odd(), tmp_path / "meta.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["odd.safetensors"]


def test_damaged_and_hostile_recipes(tmp_path):
    path = tmp_path / "odd.safetensors"
    save_recipe(Odd(), path)
    content = path.read_bytes()
    tensors = {n: t.clone() for n, t in Odd().state_dict().items() if not n.startswith("also")}
    with safe_open(path, "pt") as file:
        recipe = json.loads(file.metadata()["raycompress"])

    def refused(message, **changes):
        save_file(tensors, path, {"raycompress": json.dumps({**recipe, **changes})})
        with pytest.raises(ArtifactError, match=message):
            load_recipe(path, Odd())

    for damaged in (b"", b"garbage" * 99, content[: len(content) // 2], b"\xff" * 8 + content[8:]):
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=r"odd\.safetensors is damaged"):
            load_recipe(path, Odd())
    save_file(tensors, path)
    with pytest.raises(ArtifactError, match="holds tensors alone"):
        load_recipe(path, Odd())
    refused(r"is of format 2, this version reads 1", format=2)
    refused(r"holds no recipe", numbers=[])
    refused(r"holds no recipe", numbers={"": [1]})
    refused(r"'head\.weight' is tied to 'nothing', which it lacks", tied={"head.weight": "nothing"})

    refused(r"holds no recipe", frozen=[["head.bias"]])
    refused(r"holds no recipe", model=None)
    refused(r"'head\.bias' has dtype torch\.int64", tied={**recipe["tied"], "head.bias": "steps"})

    # Numbers alone are set, and only where the class has a number of its own.
    numbers = {"": {"forward": 1, "training": 0, "evil": 3, "steps": 2, "gains": [1]}}
    numbers["body"] = {"in_features": "6", "out_features": [1], "weight": 1, "_parameters": 1}
    save_file(tensors, path, {"raycompress": json.dumps({**recipe, "numbers": numbers})})
    loaded = load_recipe(path, Odd())
    assert callable(loaded.forward) and loaded.training is True and not hasattr(loaded, "evil")
    assert loaded.body.in_features == 6 and loaded.body.out_features == 10
    assert loaded.steps.dtype == torch.int64 and len(loaded.gains) == 2
    assert loaded(torch.ones(2, 6)).shape == (2, 3)
