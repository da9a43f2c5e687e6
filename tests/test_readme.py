"""What README says: its Python runs as written, and its tables are complete."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from jobs.tasks.digits import Digits, DigitsNet
from raycompress.criteria import CRITERIA
from raycompress.loading import pruner_types
from raycompress.quantization import QUANTIZERS

README = (Path(__file__).parents[1] / "README.md").read_text()


class HardCoded(nn.Module):
    """A model with sizes written into its code, as graph form is for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 64, 3, padding=1), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = torch.split(self.conv(x), 32, dim=1)
        return self.head((gate * value).mean((2, 3)))


def run(snippet: str, names: dict[str, object]) -> None:
    exec(compile(snippet, "README.md", "exec"), names)


def test_every_snippet_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    task = Digits()
    model = task.build_model().eval()
    names: dict[str, object] = {
        "task": task,
        "model": model,
        "MyModel": DigitsNet,
        "example_inputs": task.example_inputs(),
        "my_model": DigitsNet,
        "my_datasets": {"train": [1]},
    }
    for snippet in snippets:
        if "masks_of" in snippet:
            other = task.build_model().eval()
            prune.ln_structured(other.down[0], "weight", 0.5, n=2, dim=0)
            run(snippet, {**names, "model": other})
        elif 'form="graph"' in snippet:
            hard = HardCoded().eval()
            run(snippet, {**names, "model": hard})
        else:
            run(snippet, names)
    assert names["verify"] and names["small"] is not model
    assert (tmp_path / "small.onnx").exists() and len(snippets) >= 7


def test_tables_have_every_pruner_and_criterion():
    section = README.split("### Pruners and criteria")[1].split("\n### ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(named) == sorted([*pruner_types(), *CRITERIA])
    kinds = {n: row.split("|")[2].strip() for row in rows for n in re.findall(r"`(\w+)`", row)}
    assert {name: kinds[name] for name in CRITERIA} == {
        name: each.kind for name, each in CRITERIA.items()
    }


def test_table_has_every_quantizer():
    section = README.split("### Quantizers")[1].split("\n### ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| `")]
    said = {row[1].strip(" `"): row[3].strip() for row in rows}
    assert said == {name: each.trains for name, each in QUANTIZERS.items()}
