"""Which layers are meant, and what is asked of them: NNI's config_list, and more."""

import pytest

import raycompress
from raycompress.errors import ConfigError
from raycompress.targets import Target, config_list, select_groups, select_layers
from raycompress.testing import ToyNet, ToyTask


def test_targets_as_nni_users_know_them():
    model = ToyNet()
    chosen = select_layers(
        model,
        [
            Target(op_types=("Conv2d",), sparsity=0.5),
            Target(op_names=("conv1",), sparsity=0.2),
            Target(op_names=("conv3",), exclude=True),
        ],
    )
    assert {name: choice.sparsity for name, choice in chosen.items()} == {
        "conv2": 0.5,
        "conv1": 0.2,
    }
    with pytest.raises(ConfigError, match=r"no layer 'conv9'; did you mean 'conv"):
        select_layers(model, [Target(op_names=("conv9",))])
    with pytest.raises(ConfigError, match="no layer of type 'Conv1d', only Conv2d, Linear"):
        select_layers(model, [Target(op_types=("Conv1d",))])


def test_coupled_layers_cant_disagree():
    task = ToyTask()
    model = task.build_model().eval()
    structure = raycompress.analyze(model, task.example_inputs())
    with pytest.raises(ConfigError, match="share their channels"):
        select_groups(
            model,
            structure,
            [
                Target(op_names=("conv1",), sparsity=0.5),
                Target(op_names=("conv2",), sparsity=0.25),
            ],
        )


def test_regular_expressions_match_whole_names():
    model = ToyNet()
    assert list(select_layers(model, [Target(op_names_re=(r"conv[12]",))])) == ["conv1", "conv2"]
    with pytest.raises(ConfigError, match=r"'conv' matches no layer \(it must match"):
        select_layers(model, [Target(op_names_re=("conv",))])
    with pytest.raises(ConfigError, match=r"'conv\[' is no regular expression"):
        Target(op_names_re=("conv[",))


def test_all_that_an_entry_names_must_match():
    model = ToyNet()
    both = Target(op_types=("Conv2d",), op_names_re=(r".*1|fc",))
    assert list(select_layers(model, [both])) == ["conv1"]
    with pytest.raises(ConfigError, match="no layer matches op_types Linear and op_names conv1"):
        select_layers(model, [Target(op_types=("Linear",), op_names=("conv1",))])


def test_default_is_every_type_and_later_entries_win():
    chosen = select_layers(
        ToyNet(),
        [
            Target(op_types=("default",), sparsity=0.5),
            Target(op_types=("Linear",), exclude=True),
            Target(op_names=("fc",), sparsity=0.1),
        ],
    )
    assert {n: c.sparsity for n, c in chosen.items()} == {
        "conv1": 0.5,
        "conv2": 0.5,
        "conv3": 0.5,
        "fc": 0.1,
    }


def test_entries_of_one_id_compete_together():
    entries = [
        {"op_names": ["conv1"], "global_group_id": "a", "total_sparsity": 0.5},
        {"op_names": ["conv3"], "global_group_id": "a", "max_sparsity_per_layer": 0.8},
        {"op_types": ["Linear"], "total_sparsity": 0.3},
    ]
    chosen = select_layers(ToyNet(), config_list(entries))
    assert chosen["conv1"].pool == chosen["conv3"].pool != chosen["fc"].pool
    assert chosen["conv3"].sparsity == 0.5 and chosen["conv3"].max_sparsity == 0.8


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"sparsty": 0.5}, r"config_list\[0\]: no key 'sparsty'; did you mean 'sparsity'"),
        ({"sparsity": 0.5}, "must name op_types, op_names or op_names_re"),
        ({"op_types": ["Conv2d"], "sparsity": 1}, r"targets.sparsity must be in \[0, 1\), got 1"),
        (
            {"op_types": ["Conv2d"], "sparsity": 0.5, "total_sparsity": 0.5},
            "can't have both sparsity and total_sparsity",
        ),
        (
            {"op_types": ["Conv2d"], "exclude": True, "frequency": 1},
            "a target with exclude can't have frequency as well",
        ),
        (
            {"op_types": ["Conv2d"], "sparsity": 0.5, "max_sparsity_per_layer": 0.9},
            "is for layers that compete",
        ),
        ({"op_types": ["Conv2d"], "frequency": 0}, "targets.frequency must be above 0, got 0"),
        ({"op_types": ["Conv2d"], "prune_iterations": 0}, "must be at least 1, got 0"),
        (
            {"op_types": ["Conv2d"], "sparsity": "0.5"},
            r"sparsity must be a number in \[0, 1\), got '0.5'",
        ),
        ({"op_types": "Conv2d"}, r"op_types must be a list of names, got 'Conv2d'"),
        ("Conv2d", r"config_list\[0\] must be a mapping, got 'Conv2d'"),
    ],
)
def test_mistakes_name_the_key(entry, message):
    with pytest.raises(ConfigError, match=message):
        config_list([entry])


def test_a_list_is_asked_for_and_targets_stay_as_they_are():
    target = Target(op_types=("Conv2d",), sparsity=0.5)
    assert config_list([target, {"op_types": ["Conv2d"], "sparsity": 0.5}]) == (target, target)
    with pytest.raises(ConfigError, match="config_list must be a list of entries, got"):
        config_list({"op_types": ["Conv2d"]})


def test_why_nothing_that_targets_select_can_be_pruned():
    task = ToyTask()
    model = task.build_model()
    structure = raycompress.analyze(model, task.example_inputs())
    with pytest.raises(ConfigError, match="the outputs of 'fc': reaches the model's output"):
        select_groups(model, structure, [Target(op_names=("fc",))])
