"""A recipe that only a table names: a line is learned, saved and resumed, and its batches are made in the workers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ldm import draws
from ldm.cli import main
from ldm.conditioning.tokenizer import BPE
from ldm.config import parts
from ldm.config.schema import Part
from ldm.data.sampler import SampleId
from ldm.distributed import full_state
from ldm.draws import draw, stream
from ldm.training import cost
from ldm.training.loop import Loop
from ldm.training.recipe import Network, Recipe, TrainingSchema
from ldm.training.setup import prepare
from tests.training import second_stage
from tests.training.killing import manifest

NAME, INPUTS = "tests.training.test_recipe", 3
PARTS = {
    "recipe": {"regression": f"{NAME}:Regression"},
    "data": {"points": f"{NAME}:Points"},
    "network": {"line": f"{NAME}:line"},
}
YAML = """
seed: 3
recipe: {type: regression, decay: 0.75}
network: {type: line}
optimizer: {type: sgd, lr: 0.1}
schedule: {type: constant}
ema: {decay: 0.5}
data: {type: points}
trainer: {steps: 4, log_every: 1, save_every: 1, keep: 9}
"""


class Points:
    """Vectors."""

    buckets = groups = None
    sizes = ((1, INPUTS),)

    def __init__(self, *, batch_size: int = 8, workers: int = 0):
        self.batch_size, self.workers = batch_size, workers

    def __len__(self) -> int:
        return 40

    def batch(self, sample_ids: Sequence[SampleId], seed: int) -> dict[str, Any]:
        u, _ = draw(stream(0, "points"), [sample_id.index for sample_id in sample_ids], INPUTS, ())  # (B, D)
        return {"x": u.float(), "number": torch.tensor([sample_id.number for sample_id in sample_ids])}


def line(*, bias: bool = True) -> nn.Module:
    """An affine function of a vector."""
    return nn.Linear(INPUTS, 1, bias=bias)


@dataclass(kw_only=True)
class Schema(TrainingSchema):
    """Its YAML has one axis more."""

    recipe: Part = "regression"  # type: ignore[assignment]
    network: Part


@dataclass(frozen=True)
class Noise:
    """What the workers add to a batch."""

    seed: int

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        _, noise = draw(stream(self.seed, "loss"), batch["number"].tolist(), 0, (1,))  # (B, 1)
        return {**batch, "noise": noise}


class Regression(Recipe):
    """A line learns another line with noise; a third follows it."""

    Schema = Schema

    def __init__(self, setup, network: nn.Module, *, decay: float = 0.9):
        super().__init__(setup)
        self.network, self.teacher, self.decay = network, line(), decay
        self.average = copy.deepcopy(network).requires_grad_(False)
        self.teacher.requires_grad_(False)

    @classmethod
    def build(cls, config, loaded, start, settings) -> Regression:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(config["seed"], "init"))
            return config.build("recipe")(prepare(config, settings), config.build("network"))

    def networks(self) -> dict[str, Network]:
        return {
            "network": Network(self.network, "trained"),
            "average": Network(self.average, "average", of="network", decay=self.decay),
            "teacher": Network(self.teacher, "frozen"),
        }

    def preparation(self) -> Noise:
        return Noise(self.seed)

    def loss(self, batch, turn):
        loss = (self.network(batch["x"]) - self.teacher(batch["x"]) - 0.1 * batch["noise"]).square().mean()
        return loss, {"loss/loss": loss}

    def export(self):
        return self.config, full_state(self.network.state_dict(), self.rank)


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    """The tables as they were, afterwards."""
    monkeypatch.delenv("RANK", raising=False)
    before = {axis: list(table) for axis, table in parts.TABLES.items()}
    yield
    for axis in [*parts.TABLES]:
        if axis not in before:
            del parts.TABLES[axis]
        for name in [*parts.TABLES.get(axis, ())]:
            if isinstance(parts.TABLES[axis], dict) and name not in before[axis]:
                del parts.TABLES[axis][name]


@pytest.fixture
def train(tmp_path):
    """`ldm train` in a run folder, with overrides; returns its exit status."""
    (tmp_path / "line.yaml").write_text(YAML)
    command = ["train", "--config", str(tmp_path / "line.yaml"), "--plugin", NAME]
    return lambda run, *overrides: main([*command, "--run", str(tmp_path / run), *overrides])


def states(run) -> list[dict[str, torch.Tensor]]:
    """All of its checkpoints."""
    return [load_file(file) for file in sorted(run.glob("checkpoints/*/state.safetensors"))]


def test_a_recipe_of_a_plugin_learns_and_resumes_exactly(train, tmp_path, capsys):
    assert train("once") == 0
    assert f"wrote {tmp_path / 'once' / 'model.safetensors'}\n" in capsys.readouterr().out
    for steps in (2, 4):
        assert train("twice", f"trainer.steps={steps}") == 0
    assert "resumes from step 2" in capsys.readouterr().out
    assert manifest(tmp_path / "once") == manifest(tmp_path / "twice")
    once, twice = (states(tmp_path / name)[-1] for name in ("once", "twice"))
    assert once.keys() == twice.keys()
    assert all(torch.equal(x, twice[name]) for name, x in once.items())
    exported = load_file(tmp_path / "once" / "model.safetensors")
    assert all(torch.equal(x, once[f"ema/network.{name}"]) for name, x in exported.items())
    assert exported.keys() == {"weight", "bias"}


def test_its_average_network_follows_and_its_frozen_network_is_not_stored(train, tmp_path):
    """w_0 d^n + the sum of (1 - d) d^(n - k) w_k, from the weights of each step."""
    assert train("run", "trainer.steps=5") == 0
    found = states(tmp_path / "run")
    torch.manual_seed(stream(3, "init"))
    weights = [line().weight.detach(), *(state["model/network.weight"] for state in found)]
    for n, state in enumerate(found, 1):
        expected = 0.75**n * weights[0] + sum(0.25 * 0.75 ** (n - k) * weights[k] for k in range(1, n + 1))
        torch.testing.assert_close(state["model/average.weight"], expected)
        assert not torch.equal(state["model/average.weight"], weights[n])
        names = {name.split(".")[0] for name in state}
        assert names == {"model/network", "model/average", "ema/network"}  # descent without momentum remembers nothing


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("recipe.decya=1", "recipe.decya: unknown key (command line); expected one of decay; try decay"),
        ("network.bais=false", "network.bais: unknown key (command line); expected one of bias; try bias"),
        ("network=null", "network: wrong value (command line); got null; expected a node {type: NAME, ...}"),
        ("network.type=lime", 'network.type: unknown name (command line); got "lime"; expected one of line; try line'),
        ("netwrok.type=line", "netwrok: unknown key (command line); expected one of seed, recipe, "),
        (
            "recipe.type=regresion",
            'recipe.type: unknown name (command line); got "regresion"; expected one of autoencoder, ',
        ),
    ],
)
def test_its_settings_are_checked(override, line, train, tmp_path, capsys):
    assert train("run", override) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {line}")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_nothing_names_is_refused(tmp_path, capsys):
    (tmp_path / "line.yaml").write_text(YAML)
    assert main(["train", "--config", str(tmp_path / "line.yaml")]) == 2
    error = capsys.readouterr().err
    assert f'recipe.type: unknown name ({tmp_path / "line.yaml"}:3); got "regression"; ' in error
    assert error.endswith("; try --plugin MODULE\n")


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_prepared_in_the_workers(workers, tmp_path, monkeypatch):
    """From the first step on, the training process draws no number of a sample and tokenises no caption.

    Workers come from a fork server, which knows nothing of these watches. Without workers the process does it all.
    """
    drawn, read, counts = [], [], []
    keyed, encode, step = draws.keyed, BPE.encode, Loop.training_step

    def watched(loop, batch, index):
        for _ in range(2):  # before and after
            counts.append((len(drawn), len(read)))
            if len(counts) % 2:
                step(loop, batch, index)

    monkeypatch.setattr(draws, "keyed", lambda *given: drawn.append(given) or keyed(*given))
    monkeypatch.setattr(BPE, "encode", lambda self, text: read.append(text) or encode(self, text))
    monkeypatch.setattr(Loop, "training_step", watched)
    monkeypatch.setattr(cost, "flops_by_phase", lambda loop: {})  # takes a sample before the first step
    plan = (f"data.workers={workers}", "trainer.steps=4", "trainer.validate_every=9")
    assert main(second_stage.command(tmp_path / "run", *plan)[:-1]) == 0
    assert len(counts) == 8
    assert len({*counts[1:]}) == (1 if workers else 4)  # the first step tokenises the empty text
    assert all(counts[-1]) or workers
