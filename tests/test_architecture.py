"""The house rules, read off the source: arrows of import, circles, owners, sizes, names, and what git may not hold.

Each rule takes the root of a tree and yields its breaches, so that the last tests can show it a bad tree.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
# a room may import the rooms of lower floors; neighbours on one floor do not know each other
FLOORS = ["condition", "models diffusion", "checkpoint", "losses", "conditioning", "assemble", "pipeline", "data"]
FLOORS += ["metrics", "training", "cli", "scenes", "__main__ __init__"]
LEAVES = {  # what a leaf may import itself, and the lowest floor that may import it
    "errors": ("", "condition"),
    "config": ("errors", "checkpoint"),
    "pictures": ("errors", "checkpoint"),
    "devices": ("errors", "checkpoint"),
    "draws": ("", "checkpoint"),
    "distributed": ("errors", "checkpoint"),
}
TOP = "scenes"  # which only tables name, as strings
OWNERS = {"omegaconf": "config", "yaml": "config", "lightning": "training", "pytorch_lightning": "nobody"}
TORCH_ONLY = {"condition", "models", "diffusion"}
LATE = {"transformers", "open_clip", "diffusers", "torchmetrics"}  # imported inside the function that needs them
LONGEST, LONGEST_STRAIGHT, LONGEST_FILE, LONGEST_PACKAGE = 60, 80, 350, 18_300
TOO_LONG = f"; expected at most {LONGEST_PACKAGE}; try simpler code, or raise LONGEST_PACKAGE"
LIGHTNING = {"pl", "lightning", "trainer", "fit_loop", "epoch_loop", "strategy", "logger_connector"}  # its objects
LIGHTNING_PRIVATE = "ldm/training/lightning_private.py"  # the one file that may use what Lightning keeps to itself
PRIVATE = re.compile(r"(?<![\w.])/(?:home|root|work|Users)/\w")
REGISTRY = re.compile(r"\b(?:pypi\.org|pythonhosted\.org|download\.pytorch\.org/whl|anaconda\.org|npmjs\.org)\b")


class Import(NamedTuple):
    """One imported module: where, by which room of ldm, as what, and whether it costs something on import."""

    where: str
    room: str
    module: str
    at_once: bool


def modules(root: Path, *folders: str) -> Iterator[tuple[Path, str, ast.Module]]:
    """(file, its name in the tree, its syntax) of the Python files below these folders, and of scripts in the root."""
    for path in sorted({*root.glob("*.py"), *(file for folder in folders for file in (root / folder).rglob("*.py"))}):
        yield path, path.relative_to(root).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def imports(root: Path) -> Iterator[Import]:
    """Every import of every module of ldm, at any depth, with relative ones spelled out."""
    for path, name, tree in modules(root / "ldm", "."):
        package = ["ldm", *path.relative_to(root / "ldm").parts[:-1]]
        room = Path(name).parts[0].removesuffix(".py")
        later = {child for node in ast.walk(tree) if runs_later(node) for child in ast.walk(node)}
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
                base = f"{above}.{node.module or ''}".strip(".")
                names = [f"{base}.{alias.name}" for alias in node.names]
            for imported in names:
                yield Import(f"ldm/{name}:{node.lineno}", room, imported, node not in later)


def runs_later(node: ast.AST) -> bool:
    """A function, or what only a type checker reads."""
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


# --------------------------------------------------------------------------------------------------- the rules


def may_import(room: str) -> set[str]:
    """The rooms that this one may import."""
    if room in LEAVES:
        return set(LEAVES[room][0].split())
    height = next((floor for floor, rooms in enumerate(FLOORS) if room in rooms.split()), -1)
    below = {other for rooms in FLOORS[: max(height, 0)] for other in rooms.split()}
    return below | {leaf for leaf, (_, lowest) in LEAVES.items() if lowest and FLOORS.index(lowest) <= height}


def arrows(root: Path) -> Iterator[str]:
    """Imports inside ldm that point up, sideways, or at the package's own face."""
    for one in imports(root):
        package, *below = one.module.split(".")
        if package != "ldm" or below == ["__version__"]:
            continue
        room = below[0] if below else "__init__"
        if room != one.room and room not in may_import(one.room):
            yield f"{one.where}: {one.room} imports {room}"


def top(root: Path) -> Iterator[str]:
    """Imports of the room that is on top of all others."""
    for one in imports(root):
        if one.module.split(".")[:2] == ["ldm", TOP] and one.room != TOP:
            yield f"{one.where}: {one.room} imports {TOP}"


def circles(root: Path) -> Iterator[str]:
    """Modules that import each other in a ring, were it for a type checker alone or within a function."""
    graph = module_graph(root)
    reached = {name: reachable(graph, name) for name in graph}
    rings = {frozenset(other for other in graph if name in reached[other] and other in reached[name]) for name in graph}
    for ring in sorted(rings - {frozenset()}, key=sorted):
        yield f"{', '.join(sorted(ring))} import each other"


def module_graph(root: Path) -> dict[str, set[str]]:
    """Each module of ldm and those that it imports anywhere; a package is its `__init__`."""
    found = {path.relative_to(root).with_suffix("").as_posix() for path in (root / "ldm").rglob("*.py")}
    graph: dict[str, set[str]] = {module_name(name): set() for name in found}
    for one in imports(root):
        name = one.module
        while name not in graph and "." in name:
            name = name.rpartition(".")[0]  # a class or function of a module
        importer = module_name(one.where.partition(":")[0].removesuffix(".py"))
        if name in graph and (name != importer or name != one.module):
            graph[importer].add(name)
    return graph


def module_name(path: str) -> str:
    """`ldm/models/unet` as it is imported."""
    return path.removesuffix("/__init__").replace("/", ".")


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """What can be reached from a module in one step or more."""
    found: set[str] = set()
    ahead = list(graph[start])
    while ahead:
        if (name := ahead.pop()) not in found:
            found.add(name)
            ahead += graph[name]
    return found


def lightning_private(root: Path) -> Iterator[str]:
    """Uses of what Lightning keeps to itself, outside the one file for them."""
    for _, name, tree in modules(root, "ldm"):
        if name == LIGHTNING_PRIVATE:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and hidden(node.attr) and LIGHTNING & set(chain(node.value)):
                yield f"{name}:{node.lineno}: {node.attr} is Lightning's own"
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lightning":
                for part in (*(node.module or "").split("."), *(alias.name for alias in node.names)):
                    if hidden(part):
                        yield f"{name}:{node.lineno}: {part} is Lightning's own"
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("getattr", "setattr")
            ):
                key = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
                if hidden(str(key)) and LIGHTNING & set(chain(node.args[0])):
                    yield f"{name}:{node.lineno}: {key} is Lightning's own"


def hidden(name: str) -> bool:
    """True for names with one leading underscore."""
    return name.startswith("_") and not name.startswith("__")


def chain(node: ast.AST) -> Iterator[str]:
    """The names of `a.b.c`, through calls and subscripts."""
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        if isinstance(node, ast.Attribute):
            yield node.attr
        node = node.func if isinstance(node, ast.Call) else node.value
    if isinstance(node, ast.Name):
        yield node.id


def package_size(root: Path) -> Iterator[str]:
    """A package that cannot be read in a day: its lines outside the built-in world."""
    files = [path for path in (root / "ldm").rglob("*.py") if path.relative_to(root / "ldm").parts[0] != TOP]
    count = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
    if count > LONGEST_PACKAGE:
        yield f"ldm: {count} lines{TOO_LONG}"


def owners(root: Path) -> Iterator[str]:
    """Packages imported by a room that does not own them, or at import time where they must come late."""
    for one in imports(root):
        package = one.module.split(".")[0]
        if OWNERS.get(package, one.room) != one.room:
            yield f"{one.where}: {package} belongs to {OWNERS[package]}"
        if package in LATE and one.at_once:
            yield f"{one.where}: {package} is imported before it is needed"
        if one.room in TORCH_ONLY and package not in {"ldm", "torch", *sys.stdlib_module_names}:
            yield f"{one.where}: {one.room} needs torch only"


def sizes(root: Path) -> Iterator[str]:
    """Functions and files that are too long to be read in one go."""
    for path, name, tree in modules(root, "ldm", "tests", "benchmarks"):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > (LONGEST_STRAIGHT if node.name in ("__init__", "forward") else LONGEST):
                    yield f"{name}:{node.lineno}: {node.name} has {length} lines"
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        length = sum(line != "" and not line.startswith("#") for line in lines)
        if length > LONGEST_FILE:
            yield f"{name}: {length} lines of code"


def names(root: Path) -> Iterator[str]:
    """Files whose name says nothing, and modules that do not say what they are."""
    for path, name, tree in modules(root, "ldm", "tests", "benchmarks"):
        if path.stem in ("utils", "util", "common", "helpers", "misc"):
            yield f"{name}: a name that says nothing"
        if ast.get_docstring(tree) is None and (tree.body or name.startswith("ldm/")):
            yield f"{name}: no docstring"


def secrets(root: Path) -> Iterator[str]:
    """Files under git that name a folder of one machine, or where packages come from."""
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z"], capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        text = (root / name).read_bytes().decode("utf-8", "replace") if (root / name).is_file() else ""
        for number, line in enumerate(text.splitlines(), 1):
            if found := PRIVATE.search(line) or REGISTRY.search(line):
                yield f"{name}:{number}: {found.group()}"


@pytest.mark.parametrize("rule", [arrows, top, circles, owners, sizes, names, package_size, lightning_private])
def test_the_house_keeps(rule):
    assert list(rule(ROOT)) == []


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_git_holds_no_address_of_a_machine_or_a_registry():
    assert list(secrets(ROOT)) == []


def test_every_room_has_its_floor():
    """A new folder or file of ldm takes its place above before it imports anything."""
    rooms = {path.stem for path in (ROOT / "ldm").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms <= {room for floor in FLOORS for room in floor.split()} | LEAVES.keys()


# ------------------------------------------------------------------------------------- and the rules can fail

DOC = '"""Doc."""\n'


def function(name: str, lines: int) -> str:
    """The source of a function of so many lines."""
    return f"def {name}():\n" + "    x = 1\n" * (lines - 1)


@pytest.mark.parametrize(
    ("rule", "file", "source", "breach"),
    [
        (arrows, "diffusion/a.py", "from ldm.models import unet", "ldm/diffusion/a.py:1: diffusion imports models"),
        (arrows, "models/a.py", "from ldm import diffusion", "ldm/models/a.py:1: models imports diffusion"),
        (arrows, "models/a.py", "from ..diffusion import path", "ldm/models/a.py:1: models imports diffusion"),
        (arrows, "models/a.py", "from .. import config", "ldm/models/a.py:1: models imports config"),
        (arrows, "models/b/c.py", "from ...cli import main", "ldm/models/b/c.py:1: models imports cli"),
        (arrows, "condition.py", "import ldm.diffusion.path", "ldm/condition.py:1: condition imports diffusion"),
        (arrows, "models/a.py", "def f():\n    import ldm.config.parts", "ldm/models/a.py:2: models imports config"),
        (arrows, "data/a.py", "from ldm.training.ema import EMA", "ldm/data/a.py:1: data imports training"),
        (arrows, "training/a.py", "from ldm import cli", "ldm/training/a.py:1: training imports cli"),
        (arrows, "pipeline.py", "from ldm import load", "ldm/pipeline.py:1: pipeline imports load"),
        (arrows, "cli/a.py", "import ldm", "ldm/cli/a.py:1: cli imports __init__"),
        (arrows, "data/a.py", "from ldm.cli import main", "ldm/data/a.py:1: data imports cli"),
        (arrows, "config/schema.py", "from ldm import assemble", "ldm/config/schema.py:1: config imports assemble"),
        (arrows, "errors.py", "from ldm import config", "ldm/errors.py:1: errors imports config"),
        (arrows, "metrics/a.py", "from ldm.scenes import draw", "ldm/metrics/a.py:1: metrics imports scenes"),
        (top, "cli/a.py", "from ldm.scenes import draw", "ldm/cli/a.py:1: cli imports scenes"),
        (top, "__main__.py", "def f():\n    import ldm.scenes", "ldm/__main__.py:2: __main__ imports scenes"),
        (top, "scenes/a.py", "from ldm.scenes import draw", None),
        (top, "config/parts.py", "DATA = {'scenes': 'ldm.scenes:Scenes'}", None),
        (owners, "data/a.py", "import omegaconf", "ldm/data/a.py:1: omegaconf belongs to config"),
        (owners, "cli/a.py", "from yaml import load", "ldm/cli/a.py:1: yaml belongs to config"),
        (
            lightning_private,
            "training/a.py",
            "def f(trainer): trainer.fit_loop._x()",
            "ldm/training/a.py:1: _x is Lightning's own",
        ),
        (
            lightning_private,
            "training/a.py",
            "def f(self): self.trainer.strategy()._x = 1",
            "ldm/training/a.py:1: _x is Lightning's own",
        ),
        (
            lightning_private,
            "training/a.py",
            "def f(trainer): setattr(trainer, '_x', 1)",
            "ldm/training/a.py:1: _x is Lightning's own",
        ),
        (
            lightning_private,
            "cli/a.py",
            "from lightning.pytorch import _x",
            "ldm/cli/a.py:1: _x is Lightning's own",
        ),
        (lightning_private, "training/lightning_private.py", "def f(trainer): trainer._x()", None),
        (lightning_private, "training/a.py", "def f(self, trainer): self._x(trainer.__dict__)", None),
        (package_size, "a.py", "x = 1\n" * (LONGEST_PACKAGE + 1), f"ldm: {LONGEST_PACKAGE + 1} lines{TOO_LONG}"),
        (package_size, "a.py", "x = 1\n" * LONGEST_PACKAGE, None),
        (package_size, "scenes/a.py", "x = 1\n" * (LONGEST_PACKAGE + 1), None),
        (owners, "data/a.py", "import lightning.pytorch as pl", "ldm/data/a.py:1: lightning belongs to training"),
        (
            owners,
            "training/a.py",
            "import pytorch_lightning",
            "ldm/training/a.py:1: pytorch_lightning belongs to nobody",
        ),
        (owners, "metrics/a.py", "import diffusers", "ldm/metrics/a.py:1: diffusers is imported before it is needed"),
        (owners, "models/a.py", "def f():\n    import numpy", "ldm/models/a.py:2: models needs torch only"),
        (sizes, "a.py", function("f", 60) + function("f", 61), "ldm/a.py:61: f has 61 lines"),
        (sizes, "a.py", function("forward", 80) + function("__init__", 81), "ldm/a.py:81: __init__ has 81 lines"),
        (sizes, "a.py", "x = 1\n" * 350 + "# not code\n\n" * 9, None),
        (sizes, "a.py", "x = 1\n" * 351, "ldm/a.py: 351 lines of code"),
        (names, "utils.py", DOC, "ldm/utils.py: a name that says nothing"),
        (names, "models/common.py", DOC, "ldm/models/common.py: a name that says nothing"),
        (names, "a.py", "import math", "ldm/a.py: no docstring"),
        (names, "models/__init__.py", "", "ldm/models/__init__.py: no docstring"),
    ],
)
def test_a_bad_tree_is_seen(rule, file, source, breach, tmp_path):
    path = tmp_path / "ldm" / file
    path.parent.mkdir(parents=True)
    path.write_text(source, encoding="utf-8")
    assert list(rule(tmp_path)) == ([] if breach is None else [breach])


TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "


@pytest.mark.parametrize(
    ("files", "breach"),
    [
        ({"a.py": "import ldm.b", "b.py": "from ldm import a"}, "ldm.a, ldm.b import each other"),
        ({"a.py": "from ldm.b import x", "b.py": TYPES + "from ldm.a import y"}, "ldm.a, ldm.b import each other"),
        ({"a.py": "from ldm import b", "b.py": "def f():\n    from . import a"}, "ldm.a, ldm.b import each other"),
        (
            {"a.py": "import ldm.b", "b.py": "import ldm.c.d", "c/d.py": TYPES + "from ..a import A"},
            "ldm.a, ldm.b, ldm.c.d import each other",
        ),
        (
            {"a/__init__.py": "from ldm.a.b import x", "a/b.py": "from ldm.a import y"},
            "ldm.a, ldm.a.b import each other",
        ),
        ({"a/__init__.py": "from ldm.a.b import x", "a/b.py": "from ldm.a.c import y", "a/c.py": "import torch"}, None),
        ({"a.py": "from ldm import b, c", "b.py": "from ldm.c import x", "c.py": ""}, None),
    ],
)
def test_a_circle_is_seen(files, breach, tmp_path):
    for name, source in files.items():
        path = tmp_path / "ldm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    assert list(circles(tmp_path)) == ([] if breach is None else [breach])


@pytest.mark.parametrize(
    ("line", "breaches"),
    [
        ("see /" + "home/me/data", ["a.txt:2: /" + "home/m"]),
        ("root: /" + "work/runs", ["a.txt:2: /" + "work/r"]),
        ("https://files.python" + "hosted.org/x", ["a.txt:2: python" + "hosted.org"]),
        ("index: https://py" + "pi.org/simple", ["a.txt:2: py" + "pi.org"]),
        ("https://example.org/home/page, framework/work/x and a/root/b", []),
    ],
)
def test_a_bad_line_under_git_is_seen(line, breaches, tmp_path):
    (tmp_path / "a.txt").write_text(f"fine\n{line}\n", encoding="utf-8")
    (tmp_path / "not_added.txt").write_text(line, encoding="utf-8")
    for command in (["init", "-q"], ["add", "a.txt"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    assert list(secrets(tmp_path)) == breaches
