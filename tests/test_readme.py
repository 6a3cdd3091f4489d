"""What the README says is true: its commands, its Python, its tree and its numbers."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from ldm import checkpoint
from ldm.cli import COMMANDS, main
from ldm.pipeline import SHIPPED

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONSOLE = [line[2:] for line in re.findall(r"^\$ .*$", README, re.MULTILINE)]
DEMOS = [line for line in CONSOLE if line.startswith("ldm demo")]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_readme_is_short():
    assert README.count("\n") <= 200


@pytest.mark.parametrize("line", DEMOS)
def test_a_demo_of_the_readme_runs(line, capsys, monkeypatch, tmp_path):
    """It is accepted as written, or ends in the very error that is shown below it."""
    monkeypatch.chdir(tmp_path)
    shown = README[README.index(f"$ {line}\n") + len(line) + 3 :].split("\n")[0]
    expected = 2 if shown.startswith("error: ") else 0
    assert main([*shlex.split(line)[1:], "--print-config"]) == expected
    if expected:
        assert capsys.readouterr().err == shown + "\n"


def test_every_command_of_the_readme_exists():
    names = {shlex.split(line)[1] for line in CONSOLE if line.startswith("ldm ")}
    assert names
    assert names <= set(COMMANDS)
    assert len(DEMOS) >= 3
    assert all((ROOT / line.split()[1]).is_file() for line in CONSOLE if line.startswith("python "))


def test_the_picture_example_runs():
    """The first Python block, as printed."""
    names: dict = {}
    exec(PYTHON[0], names)
    assert [picture.size for picture in names["pictures"]] == [(64, 64)] * 4


def test_the_core_example_runs():
    """The second Python block, as printed, with a small network."""
    seen = []

    class Network(torch.nn.Module):
        def forward(self, x, t, tokens):
            return torch.tanh(x) + tokens.mean()

    reader = {"tokens": torch.ones(4, 2, 3), "null_tokens": torch.zeros(4, 2, 3)}
    exec(PYTHON[1], {"my_network": Network(), "show": seen.append, **reader})
    assert len(seen) == 30
    assert seen[-1].shape == (4, 3, 32, 32)


def test_the_training_example_runs():
    """The third Python block, as printed; tests/test_extending.py sees it learn."""
    network = torch.nn.Conv2d(3, 3, 1)

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = network

        def forward(self, x, t):
            return self.layer(x)

    before = network.weight.detach().clone()
    exec(PYTHON[2], {"my_network": Network(), "my_batches": [(torch.randn(4, 3, 8, 8), None)] * 2})
    assert not torch.equal(network.weight, before)


def test_the_results_are_those_of_the_shipped_model():
    found = json.loads((ROOT / "docs/evaluation.json").read_text(encoding="utf-8"))
    assert found["about"]["checkpoint"]["sha256"] == checkpoint.open(SHIPPED).hash
    cfg = found["about"]["sampling"]["guidance"]["cfg"]
    right = next(row for row in found["prompts"] if row["cfg"] == cfg)["alignment"]
    shares = {kind: "{:.0%}".format(counts["whole"][0] / counts["whole"][1]) for kind, counts in right.items()}
    shares["autoencoder"] = f"{found['first_stage']['psnr']['mean']:.1f} dB"
    shares["Frechet"] = f"{found['samples']['frechet'] / found['yardsticks']['one object and two']:.0%}"
    table = README[README.index("## Results") : README.index("## Comparison")]
    for row, share in shares.items():
        (cells,) = re.findall(rf"^\| {row}[^|]*\| ([^|]*) \|", table, re.MULTILINE)
        assert cells.split()[: len(share.split())] == share.split(), row


def test_the_tree_names_every_folder():
    """Each folder of ldm/ with Python in it, and each folder of the repository, and nothing else."""
    tree = README[README.index("```\nldm/\n") :].split("```")[1]
    package = set(re.findall(r"(\w+)/", " ".join(re.findall(r"^  ((?:\w+/ )+)", tree, re.MULTILINE))))
    top = set(re.findall(r"(\w+)/", " ".join(re.findall(r"^((?:\w+/ ?)+)", tree, re.MULTILINE))))
    folders = {path.name for path in (ROOT / "ldm").iterdir() if path.is_dir() and list(path.glob("*.*"))}
    assert package == folders
    assert top == {"ldm", "configs", "tests", "benchmarks", "docs"}
    assert all((ROOT / name).is_dir() for name in top)


def test_the_number_of_lines_is_true():
    """If this fails: `find ldm -name '*.py' | xargs cat | wc -l`, rounded to 500, goes into the README's comparison."""
    (stated,) = re.findall(r"^\| lines of Python \| ([\d,]+) \(`ldm/`\)", README, re.MULTILINE)
    lines = sum(file.read_text(encoding="utf-8").count("\n") for file in (ROOT / "ldm").rglob("*.py"))
    assert abs(int(stated.replace(",", "")) - lines) <= 500
