"""Parts: what the tables may hold, how nodes become objects, and a user's own."""

from __future__ import annotations

import copy
import inspect
import json
import types
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest
import torch

from ldm.cli import main
from ldm.config import parts, schema
from ldm.config.schema import Part
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.path import Flow
from ldm.diffusion.prediction import LearnedRange, Prediction, V
from ldm.diffusion.spacing import Trailing
from ldm.errors import InputError

SHIPPED = [
    pytest.param(axis, target, id=f"{axis}.{name}")
    for axis, table in parts.TABLES.items()
    if axis != "recipe"  # a recipe builds itself from the whole configuration
    for name, target in ({"": table} if isinstance(table, str) else table).items()
]
PLAIN = (int, float, bool, str, types.NoneType)
LATER = {  # what a part is called with when training or sampling goes on
    "solver": ["denoise", "x", "grid", "noise"],
    "optimizer": ["parameters"],
    "discriminator_optimizer": ["parameters"],
    "schedule": ["step", "steps"],
    "ema": ["parameters"],
}


class Bag:
    """A part made of parts."""

    def __init__(
        self,
        *,
        items: Sequence[Part],
        name: str = "bag",
        pair: tuple[int, float] | None = None,
        size: float | list[float] = 1.0,
    ):
        if len(items) > 2:
            raise ValueError(f"items: must be at most 2, got {len(items)}; try one bag in another")
        self.items, self.name, self.pair, self.size = items, name, pair, size


@dataclass(kw_only=True)
class Schema:
    """Nodes that the demo does not have."""

    bag: Part | None = None
    solver: Part | None = None
    guidance: Part | None = None
    prediction: Part | None = None


@pytest.fixture(autouse=True)
def tables(tmp_path, monkeypatch):
    """Tables that a test may change, with an axis of parts that hold parts; c.yaml goes to a folder of its own."""
    monkeypatch.setattr(parts, "TABLES", copy.deepcopy(parts.TABLES) | {"bag": {"bag": f"{__name__}:Bag"}})
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def loaded(text: str, *overrides: str) -> schema.Config:
    """A configuration of the nodes above."""
    Path("c.yaml").write_text(text, encoding="utf-8")
    return schema.load("c.yaml", list(overrides), Schema)


def refused(text: str) -> str:
    """What is said against it."""
    with pytest.raises(InputError) as caught:
        loaded(text)
    return str(caught.value)


# ----------------------------------------------------------------------------------------------- the tables


def is_plain(kind: Any) -> bool:
    """Whether a YAML can say it: a plain type, a choice of words, a list, tuple or union of these, or a part."""
    if get_origin(kind) is Literal:
        return all(isinstance(choice, PLAIN) for choice in get_args(kind))
    if get_origin(kind) in (list, tuple, Sequence, Union, types.UnionType):
        return all(is_plain(item) for item in get_args(kind))
    return kind in PLAIN or (isinstance(kind, type) and kind.__module__.startswith("ldm."))


@pytest.mark.parametrize(("axis", "target"), SHIPPED)
def test_a_shipped_part_has_a_schema_that_a_yaml_can_meet(axis, target):
    """Keyword-only; what is not given is plain or a part, with a plain default."""
    rows = inspect.signature(parts.load(target), eval_str=True).parameters.values()
    called_with = [row.name for row in rows if row.kind is not row.KEYWORD_ONLY]
    assert called_with == LATER.get(axis, [])
    for row in rows:
        if row.kind is row.KEYWORD_ONLY and row.name not in parts.GIVEN.get(axis, {}):
            assert is_plain(row.annotation), row
            assert row.default is row.empty or json.dumps(row.default), row


def test_the_judge_of_schemas_can_say_no():
    no = [inspect.Parameter.empty, object, Any, dict[str, int], list[object], torch.Tensor, int | torch.Tensor]
    assert not any(is_plain(kind) for kind in no)


def test_what_is_given_are_parameters_that_exist():
    for axis, owners in parts.GIVEN.items():
        table = parts.TABLES[axis]
        targets = [table] if isinstance(table, str) else table.values()
        schemas = [inspect.signature(parts.load(target)).parameters for target in targets]
        assert owners.keys() <= set().union(*schemas)


# ------------------------------------------------------------------------------------ from nodes to objects


def test_lists_of_parts_are_built_and_overridden():
    text = "bag: {type: bag, items: [{type: bag, items: [], name: inner}, {type: bag, items: []}], pair: [1, 2]}"
    built = loaded(text, "bag.items.1.name=second", "bag.pair.0=7").build("bag")
    assert [type(item) for item in built.items] == [Bag, Bag]
    assert [item.name for item in built.items] == ["inner", "second"]
    assert built.pair == [7, 2.0]


@pytest.mark.parametrize(("text", "size"), [("2", 2.0), ("[2, 3]", [2.0, 3.0]), ("[]", [])])
def test_a_setting_may_be_a_number_or_a_list(text, size):
    assert loaded(f"bag: {{type: bag, items: [], size: {text}}}").build("bag").size == size


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (
            "{type: bag, items: [], size: big}",
            'bag.size: wrong value (c.yaml:1); got "big"; expected a finite number or a list, each a finite number',
        ),
        (
            "{type: bag, items: [], size: [1, [2]]}",
            "bag.size.1: wrong value (c.yaml:1); got [2]; expected a finite number",
        ),
        ("3", "bag: wrong value (c.yaml:1); got 3; expected a node {type: NAME, ...}"),
        (
            "{type: bag, items: {type: bag}}",
            'bag.items: wrong value (c.yaml:1); got {"type": "bag"}; expected a list, each a node {type: NAME, ...}',
        ),
        (
            "{type: bag, items: [], pair: [1]}",
            "bag.pair: wrong value (c.yaml:1); got [1]; expected [an integer, a finite number] or null",
        ),
        (
            "{type: bag, items: [{type: bag, items: [{type: bga}]}]}",
            'bag.items.0.items.0.type: unknown name (c.yaml:1); got "bga"; expected one of bag; try bag',
        ),
    ],
)
def test_mistakes_inside_nested_parts_are_named(node, message):
    assert refused(f"bag: {node}") == message


def test_a_constructor_is_quoted_with_the_line_of_its_argument():
    empty = "{type: bag, items: []}"
    checked = loaded(f"bag:\n  type: bag\n  items: [{empty}, {empty}, {empty}]\n")
    with pytest.raises(InputError) as caught:
        checked.build("bag")
    assert str(caught.value) == "bag.items: must be at most 2 (c.yaml:3); got 3; try one bag in another"


def test_an_error_that_names_no_argument_is_our_own():
    with pytest.raises(ValueError, match=r"^nobody is to blame$"), loaded("bag: null").blame("bag"):
        raise ValueError("nobody is to blame")


def test_a_prediction_holds_another():
    built = loaded("prediction: {type: learned_range, of: {type: v}, bound_weight: 1}").build("prediction")
    assert isinstance(built, LearnedRange)
    assert isinstance(built.of, V)
    assert built.bound_weight == 1.0


def test_what_is_given_reaches_parts_inside_parts():
    checked = loaded("prediction: {type: learned_range, of: {type: edm}}")
    assert checked.build("prediction", sigma_data=0.25).of.sigma_data == 0.25


def test_an_axis_with_one_target_has_no_type():
    built = loaded("guidance: {cfg: 4, interval: [0.5, 3]}").build("guidance")
    assert isinstance(built, Guidance)
    assert (built.cfg, built.interval, built.rescale) == (4.0, [0.5, 3.0], 0.0)
    assert refused("guidance: {type: cfg}").startswith("guidance.type: unknown key (c.yaml:1); expected one of cfg, ")


@pytest.mark.parametrize("name", parts.TABLES["solver"])
def test_a_solver_is_built_for_a_later_call(name):
    """Where the data are a single point, every solver ends there."""
    solver = loaded(f"solver: {{type: {name}}}").build("solver")
    assert isinstance(solver, partial)

    def denoise(x, level):
        x0 = torch.full_like(x, 0.5)
        return Prediction(x0, (x - level.alpha * x0) / level.sigma)

    *_, last = solver(denoise, torch.ones(3, 2), Trailing(steps=6).grid(Flow()), lambda: torch.ones(3, 2))
    torch.testing.assert_close(last.x, torch.full((3, 2), 0.5))


def test_a_solver_keeps_its_arguments():
    assert loaded("solver: {type: ddpm, noise_var: learned}").build("solver").keywords == {"noise_var": "learned"}
    assert loaded("solver: {type: ddim, eta: 1}").build("solver").keywords == {"eta": 1.0, "noise_var": "small"}
    assert refused("solver: {type: euler, eta: 1}") == "solver.eta: unknown key (c.yaml:1); expected one of noise_var"


# ----------------------------------------------------------------------------------------- parts of one's own

OWN = """
class Spiral:
    def __init__(self, *, in_channels: int, turns: int = 3):
        self.in_channels, self.turns = in_channels, turns


PARTS = {"backbone": {"spiral": f"{__name__}:Spiral"}, "shape": {"round": f"{__name__}:Spiral"}}
"""


def test_a_plugin_adds_parts(capsys):
    Path("own_parts.py").write_text(OWN, encoding="utf-8")
    assert main(["demo", "--plugin", "own_parts", "--print-config", "backbone.type=spiral", "backbone.turns=5"]) == 0
    assert json.loads(capsys.readouterr().out)["backbone"] == {"type": "spiral", "turns": 5}
    assert parts.TABLES["shape"] == {"round": "own_parts:Spiral"}
    assert "mlp" in parts.TABLES["backbone"]


def test_a_configuration_cannot_plug_in_anything(capsys):
    Path("own_parts.py").write_text(OWN, encoding="utf-8")
    assert main(["demo", "--print-config", "backbone.type=spiral"]) == 2
    assert capsys.readouterr().err == (
        'error: backbone.type: unknown name (command line); got "spiral"; expected one of unet, dit, mlp; '
        "try --plugin MODULE, if it is your own\n"
    )
    assert main(["demo", "--print-config", "plugin=own_parts"]) == 2
    assert capsys.readouterr().err.startswith("error: plugin: unknown key (command line); ")


def test_a_plugin_that_is_not_found_says_how_it_is_found(capsys):
    assert main(["demo", "--plugin", "nowhere.py", "--print-config"]) == 2
    assert capsys.readouterr().err.endswith("; try PYTHONPATH=FOLDER, and its name without .py\n")


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        (
            "own_mlp",
            'PARTS = {"backbone": {"mlp": "x:Y"}}',
            "backbone: this name is taken (own_mlp); got mlp",
        ),
        (
            "own_cfg",
            'PARTS = {"guidance": {"cfg": "x:Y"}}',
            "guidance: this name is taken (own_cfg); got cfg",
        ),
        ("own_none", "", "cannot plug in (own_none); got module 'own_none' has no attribute 'PARTS'"),
        ("own_oops", "import own_gone", "cannot plug in (own_oops); got No module named 'own_gone'"),
    ],
)
def test_a_plugin_that_does_not_fit_is_refused(module, source, message, capsys):
    Path(f"{module}.py").write_text(source, encoding="utf-8")
    before = copy.deepcopy(parts.TABLES)
    assert main(["demo", "--plugin", module, "--print-config"]) == 2
    hint = "try another name" if "taken" in message else "expected a module with PARTS = {axis: {...}}"
    assert capsys.readouterr().err == f"error: {message}; {hint}\n"
    assert before == parts.TABLES


def test_installed_packages_bring_their_parts(monkeypatch):
    Path("own_installed.py").write_text(OWN, encoding="utf-8")
    entry = types.SimpleNamespace(value="own_installed")
    monkeypatch.setattr(parts, "entry_points", lambda group: [entry] if group == "ldm.parts" else [])
    for _ in range(2):  # a command and `ldm.load` in it both look
        parts.plug_installed()
        assert parts.TABLES["backbone"]["spiral"] == "own_installed:Spiral"
