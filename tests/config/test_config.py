"""Configurations: what is understood, and the whole line that answers each mistake."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ldm.cli import demo, main
from ldm.config import files, schema, yaml_text
from ldm.errors import InputError

ROOT = Path(__file__).parent.parent.parent
BASE = """\
seed: 0
path: {type: flow}
prediction: {type: flow}
draw: {type: uniform}
weight: {type: constant}
backbone: {type: mlp, width: 8, layers: 1}
spacing: {type: trailing, steps: 4}
steps: 2
batch_size: 4
lr: 2e-3
"""


def cases(kind: str) -> list:
    """What is written after `kind:` in wrong_configs.txt, each with its answer."""
    text = (ROOT / "tests" / "config" / "wrong_configs.txt").read_text(encoding="utf-8")
    found = re.findall(rf"^{kind}: (.*)\n(error: .*\n)", text, re.MULTILINE)
    return [pytest.param(written, line, id=written) for written, line in found]


def edited(change: str) -> str:
    """The base with OLD => NEW."""
    old, new = (side.replace("\\n", "\n").replace("\\t", "\t") for side in f"{change} ".split(" => "))
    assert BASE.count(old) == 1
    return BASE.replace(old, new.rstrip(" "))


def loaded(text: str, *overrides: str) -> schema.Config:
    """The configuration of a demo, from c.yaml in the working directory."""
    Path("c.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    return schema.load("c.yaml", list(overrides), demo.Schema)


def refused(text: str, *overrides: str) -> str:
    """What is said against it."""
    with pytest.raises(InputError) as caught:
        loaded(text, *overrides)
    return str(caught.value)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test writes its c.yaml in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ------------------------------------------------------------------------------------------------ mistakes


def demo_says(capsys, *arguments: str) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of `ldm demo --config c.yaml ARGUMENTS`."""
    code = main(["demo", "--config", "c.yaml", *arguments])
    return (code, *capsys.readouterr())


@pytest.mark.parametrize(("change", "line"), cases("yaml"))
def test_a_wrong_file_is_answered_in_one_line(change, line, capsys):
    Path("c.yaml").write_text(edited(change), encoding="utf-8")
    assert demo_says(capsys) == (2, "", line)


@pytest.mark.parametrize(("overrides", "line"), cases("args"))
def test_a_wrong_override_is_answered_in_one_line(overrides, line, capsys):
    Path("c.yaml").write_text(BASE, encoding="utf-8")
    assert demo_says(capsys, *shlex.split(overrides)) == (2, "", line)


def test_there_are_many_mistakes():
    """The two tests above read a file: it must not be empty, and each of its cases must have been found."""
    text = (ROOT / "tests" / "config" / "wrong_configs.txt").read_text(encoding="utf-8")
    assert len(cases("yaml")) + len(cases("args")) == text.count("\nerror: ") > 100


TEXTS = {
    "empty": (b"", "configuration is empty (c.yaml)"),
    "comments": (b"# nothing\n\n# here\n", "configuration is empty (c.yaml)"),
    "no document": (b"---\n", "configuration is empty (c.yaml)"),
    "list": (b"- 1\n- 2\n", "configuration is not a mapping (c.yaml); got [1, 2]; expected lines of key: value"),
    "word": (b"flow\n", 'configuration is not a mapping (c.yaml); got "flow"; expected lines of key: value'),
    "latin-1": (b"seed: 0\n# caf\xe9\n", "configuration is not UTF-8 text (c.yaml:2); got byte 0xe9"),
    "utf-16": ("seed: 0".encode("utf-16"), "configuration is not UTF-8 text (c.yaml:1); got byte 0xff"),
    "nul": (b"a: \0", "not valid YAML: special characters are not allowed (c.yaml); got character 0x00"),
    "bomb": (b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b]\n", "YAML aliases are refused (c.yaml:2); got *a; try ${KEY}"),
    "deep": (b"seed: 0\npath: " + b"{a: " * 500 + b"}" * 500, "YAML is nested deeper than 16 levels (c.yaml:2)"),
    "deeper": (b"seed: " + b"[" * 5000 + b"]" * 5000, "YAML is nested deeper than 16 levels (c.yaml:1)"),
    "newer": (b"seed: 0\nformat: 2", "format: unknown (c.yaml:2); got 2; expected at most 1; try a newer ldm"),
    "format one": (b"format: one", 'format: unknown (c.yaml:1); got "one"; expected at most 1'),
    "format true": (b"format: true", "format: unknown (c.yaml:1); got true; expected at most 1"),
    "format 0": (b"format: 0", "format: unknown (c.yaml:1); got 0; expected at most 1"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_that_is_no_configuration_is_answered_in_one_line(name, capsys):
    text, message = TEXTS[name]
    Path("c.yaml").write_bytes(text)
    assert demo_says(capsys) == (2, "", f"error: {message}\n")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("runs/c.yaml", "cannot read the configuration: No such file or directory (runs/c.yaml)"),
        ("rolll.yaml", "cannot read the configuration: No such file or directory (rolll.yaml); try roll.yaml"),
        ("folder.yaml", "cannot read the configuration: Is a directory (folder.yaml)"),
        (".", "cannot read the configuration: Is a directory (.)"),
        (
            "swiss_rol",
            "no such configuration (swiss_rol); expected a .yaml file, or one of gallery, scenes, swiss_roll; "
            "try swiss_roll",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_answered_in_one_line(name, message, capsys):
    Path("roll.yaml").write_text(BASE, encoding="utf-8")
    Path("folder.yaml").mkdir()
    assert demo_says(capsys, "--config", name) == (2, "", f"error: {message}\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('seed: 0 => seed: !!python/object/apply:os.system ["touch owned"]', "YAML tags are refused (c.yaml:1); "),
        ("seed: 0 => env: oc\\nseed: ${${env}.env:SECRET}", "only ${KEY} references are allowed (c.yaml:2); "),
        ("steps: 2 => stepz: 2", "stepz: unknown key (c.yaml:8); "),
        ("steps: 4 => steps: 0", "spacing.steps: must be at least 1 (c.yaml:7); "),
    ],
)
def test_a_process_ends_with_2_and_one_line(change, message, elsewhere):
    """As a user meets it: nothing runs, nothing of the machine is told, no traceback."""
    Path("c.yaml").write_text(edited(change), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SECRET": "swordfish"}
    command = [sys.executable, "-m", "ldm", "demo", "--config", "c.yaml"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"error: {message}")
    assert ended.stderr.count("\n") == 1
    assert "swordfish" not in ended.stderr
    assert [path.name for path in elsewhere.iterdir()] == ["c.yaml"]


def test_the_mistakes_in_the_readme_are_answered_as_it_says(capsys):
    shown = re.findall(r"^\$ ldm (.*)\n(error: .*\n)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert shown
    for command, line in shown:
        assert main(shlex.split(command)) == 2
        assert capsys.readouterr() == ("", line)


PIECES = [*"{}[]:,.#&*!|>'\"%@`$-?~=_e0\n\t \0\r\x85\u2028\ufeff\ud83d", "${seed}", "${", "<<: ", "---", "path", "type"]
SCRAPS = st.lists(st.sampled_from(PIECES) | st.characters(), max_size=8).map("".join)
KEYS = st.sampled_from(["path", "path.type", "backbone.width", "spacing", "seed", "a.b", ""])


def understood(text: str, *overrides: str) -> None:
    """A configuration of plain values, or an InputError of one line, and nothing else."""
    try:
        json.dumps(loaded(text, *overrides).values, allow_nan=False)
    except InputError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017 to be refused is as good


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(BASE)), st.integers(0, 12), SCRAPS)
@example(len(BASE), 0, "{\x85")
def test_a_damaged_file_is_understood_or_refused(start, length, scrap):
    understood(BASE[:start] + scrap + BASE[start + length :])


@settings(max_examples=200, deadline=None)
@given(KEYS, SCRAPS, SCRAPS)
@example("path", "", "{\r")
def test_a_random_override_is_understood_or_refused(key, more, value):
    understood(BASE, f"{key}{more}={value}")


# --------------------------------------------------------------------------------------- what is understood


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("3e-4", 3e-4), ("1E3", 1e3), ("-.5", -0.5), ("2.", 2.0), ("1_000.5", 1000.5), ("-2.5e+3", -2500.0)],
        *[("50_000", 50_000), ("0", 0), ("-3", -3), ("+3", 3), ("true", True), ("false", False)],
        *[("null", None), ("~", None), ("", None), ("'3'", "3"), ("[1, 2.0]", [1, 2.0]), ("{a: b}", {"a": "b"})],
        *[(word, word) for word in ("on", "off", "yes", "No", "y", "True", "2024-01-01", "12:30:00", "1:30", "007")],
        *[(word, word) for word in ("0x10", "1e", "e3", "1.2.3", "=", "nan", "inf", "3d", "bf16-mixed")],
    ],
)
def test_values_are_what_people_mean(text, value):
    read = yaml_text.parse(f"key: {text}", "c.yaml", {})["key"]
    assert read == value
    assert type(read) is type(value)


def test_whole_floats_are_integers_and_integers_are_floats_where_asked():
    values = loaded(BASE, "steps=4e3", "lr=1").values
    assert (type(values["steps"]), values["steps"]) == (int, 4000)
    assert (type(values["lr"]), values["lr"]) == (float, 1.0)


def test_defaults_are_filled_in():
    values = loaded(BASE.replace("seed: 0\n", "")).values
    assert values["seed"] == 0
    assert values["spacing"] == {"type": "trailing", "steps": 4, "shift": 1.0, "end": "zero"}
    assert values["path"] == {"type": "flow", "last": 1.0}


def test_a_reference_is_the_value_of_its_key_after_overrides():
    text = BASE.replace("batch_size: 4", "batch_size: ${steps}").replace("width: 8", 'width: "${batch_size}"')
    values = loaded(text, "steps=6").values
    assert (values["batch_size"], values["backbone"]["width"]) == (6, 6)
    assert loaded(BASE, "seed=7", "steps=${seed}")["steps"] == 7


def test_a_reference_may_be_to_a_node():
    assert loaded(BASE, "prediction=${path}", "weight.type=snr")["prediction"] == {"type": "flow"}


def orders(*overrides: str) -> list[tuple[str, ...]]:
    """All orders of them."""
    return list(itertools.permutations(overrides))


def test_of_the_same_override_the_last_wins():
    values = loaded(BASE, "steps=3", "path.type=ve", "steps=5", "path.type=cosine").values
    assert (values["steps"], values["path"]["type"]) == (5, "cosine")


@pytest.mark.parametrize("overrides", orders("path.type=linear", "path.steps=50", "path.end=0.03"))
def test_a_new_type_drops_the_old_arguments_whatever_the_order(overrides):
    text = BASE.replace("path: {type: flow}", "path: {type: cosine, steps: 7, offset: 0.1}")
    expected = {"type": "linear", "start": 1e-4, "end": 0.03, "steps": 50, "zero_terminal_snr": False}
    assert loaded(text, *overrides)["path"] == expected


def test_the_same_type_again_keeps_the_arguments():
    text = BASE.replace("path: {type: flow}", "path: {type: flow, last: 0.5}")
    assert loaded(text, "path.type=flow")["path"] == {"type": "flow", "last": 0.5}


@pytest.mark.parametrize(
    "overrides", orders("prediction.type=learned_range", "prediction.of.type=v", "path={type: ve}")
)
def test_outer_overrides_come_before_inner_ones(overrides):
    values = loaded(BASE, "path.sigma_max=9", *overrides).values
    assert values["prediction"] == {"type": "learned_range", "of": {"type": "v"}, "bound_weight": 1e-3}
    assert (values["path"]["type"], values["path"]["sigma_max"]) == ("ve", 9.0)


def test_an_override_reaches_into_lists():
    times = loaded(BASE, "spacing={type: explicit, times: [900, 500, 1]}", "spacing.times.1=300")["spacing"]["times"]
    assert times == [900.0, 300.0, 1.0]


def test_an_override_makes_the_node_it_needs():
    values = loaded(BASE.replace("path: {type: flow}\n", ""), "path.type=flow", "path.last=0.5").values
    assert values["path"] == {"type": "flow", "last": 0.5}


def test_print_config_is_json_that_says_the_same(capsys):
    Path("c.yaml").write_text(BASE, encoding="utf-8")
    overrides = ["path.type=linear", "path.start=1e-5", "lr=1e-7", "spacing={type: explicit, times: [900, 1.5]}"]
    code, printed, _ = demo_says(capsys, "--print-config", *overrides)
    assert code == 0
    assert json.loads(printed) == loaded(BASE, *overrides).values
    assert json.loads(printed)["format"] == files.FORMAT
    Path("again.json").write_text(printed, encoding="utf-8")
    assert demo_says(capsys, "--config", "again.json", "--print-config") == (0, printed, "")


def test_a_shipped_configuration_goes_by_its_name(capsys):
    """A name is the shipped file's; a path is the file at it, whatever its name."""
    by_name = demo_says(capsys, "--config", "swiss_roll", "--print-config")
    shipped = ROOT / "configs" / "demo" / "swiss_roll.yaml"
    assert by_name == demo_says(capsys, "--config", str(shipped), "--print-config")
    Path("swiss_roll.json").write_text(BASE, encoding="utf-8")
    assert json.loads(demo_says(capsys, "--config", "swiss_roll.json", "--print-config")[1])["batch_size"] == 4


# ---------------------------------------------------------------------------------------------- old formats


@pytest.fixture
def two_renames(monkeypatch):
    """A history: format 1 had `net.size` and `rate`, format 2 `speed`, and format 3 is the base."""
    monkeypatch.setattr(files, "RENAMES", {1: {"net.size": "backbone.width", "rate": "speed"}, 2: {"speed": "lr"}})
    monkeypatch.setattr(files, "FORMAT", 3)


OLD = BASE.replace("width: 8, ", "").replace("lr: 2e-3", "rate: 2e-3\nnet: {size: 8}")
HISTORY = {1: OLD, 2: BASE.replace("lr:", "speed:"), 3: BASE}


@pytest.mark.usefixtures("two_renames")
@pytest.mark.parametrize("number", HISTORY)
def test_an_old_file_opens_as_a_new_one(number):
    opened = loaded(f"format: {number}\n{HISTORY[number]}")
    assert opened.values == loaded(BASE).values
    assert opened["format"] == 3


@pytest.mark.usefixtures("two_renames")
def test_an_old_file_takes_new_overrides():
    overrides = ["backbone.width=16", "lr=1"]
    assert loaded(f"format: 1\n{OLD}", *overrides).values == loaded(BASE, *overrides).values


@pytest.mark.usefixtures("two_renames")
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("size: 8", "size: true", "backbone.width: wrong value (c.yaml:12); got true; expected an integer"),
        ("{size: 8}", "8", "net: unknown key (c.yaml:12); expected one of seed, "),
        ("{type: flow}", "{type: flow, net: 3}", "path.net: unknown key (c.yaml:3); expected one of last"),
    ],
)
def test_an_old_file_is_answered_with_its_own_lines(old, new, message):
    assert refused(f"format: 1\n{OLD.replace(old, new, 1)}").startswith(message)


@dataclass(kw_only=True)
class OnlyPath:
    """A schema of one axis."""

    path: schema.Part


def test_amending_leaves_the_original_alone(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("path: {type: linear, steps: 10}\n")

    first = schema.load(file, [], OnlyPath)
    second = first.amended(["path.type=ve", "path.sigma_max=50"])
    assert first["path"]["steps"] == 10
    assert second["path"] == {"type": "ve", "sigma_min": 0.002, "sigma_max": 50.0, "sigma_data": 0.5}
    assert second.amended([]).values == second.values
