"""What the README says is true: its commands, its Python and its tree."""

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


@pytest.mark.parametrize("line", DEMOS)
def test_a_demo_of_the_readme_is_understood(line, capsys, monkeypatch, tmp_path):
    """It runs as written, or ends in the very error that is shown below it."""
    monkeypatch.chdir(tmp_path)
    said = README[README.index(f"$ {line}\n") + len(line) + 3 :].split("\n")[0]
    expected = 2 if said.startswith("error: ") else 0
    assert main([*shlex.split(line)[1:], "--print-config"]) == expected
    if expected:
        assert capsys.readouterr().err == said + "\n"


def test_every_command_of_the_readme_exists():
    names = {shlex.split(line)[1] for line in CONSOLE if line.startswith("ldm ")}
    assert names
    assert names <= set(COMMANDS)
    assert len(DEMOS) >= 3
    assert all((ROOT / line.split()[1]).is_file() for line in CONSOLE if line.startswith("python "))


def test_the_core_example_runs():
    """The second Python block, with small things in the place of the reader's own."""
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[1]
    seen = []

    def my_network(x, t, tokens):
        return torch.tanh(x) + tokens.mean()

    class Network(torch.nn.Module):
        forward = staticmethod(my_network)

    told, nothing = torch.ones(4, 2, 3), torch.zeros(4, 2, 3)
    exec(code, {"my_network": Network(), "told": told, "nothing": nothing, "show": seen.append})
    assert len(seen) == 30
    assert seen[-1].shape == (4, 3, 32, 32)


def test_the_results_are_those_of_the_shipped_model():
    found = json.loads((ROOT / "docs/evaluation.json").read_text(encoding="utf-8"))
    assert found["about"]["checkpoint"]["sha256"] == checkpoint.open(SHIPPED).hash
    cfg = found["about"]["sampling"]["guidance"]["cfg"]
    right = next(row for row in found["prompts"] if row["cfg"] == cfg)["alignment"]
    shares = {kind: "{:.0%}".format(counts["whole"][0] / counts["whole"][1]) for kind, counts in right.items()}
    shares["autoencoder"] = f"{found['first_stage']['psnr']['mean']:.1f} dB"
    shares["Frechet"] = f"{found['samples']['frechet'] / found['yardsticks']['one object and two']:.0%}"
    table = README[README.index("## Results") : README.index("## Documentation")]
    for beginning, share in shares.items():
        (cells,) = re.findall(rf"^\| {beginning}[^|]*\| ([^|]*) \|", table, re.MULTILINE)
        assert cells.split()[: len(share.split())] == share.split(), beginning


def test_the_tree_names_what_there_is():
    tree = README[README.index("```\nldm/") :].split("```")[1]
    missing = [
        name for name in re.findall(r"^\s*(\w+\.py)\s", tree, re.MULTILINE) if not list(ROOT.rglob(f"**/{name}"))
    ]
    assert missing == []
