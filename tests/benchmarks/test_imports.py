"""Benchmarks run by hand, so a test imports each: a rename in the package must not break them unseen."""

import importlib
from pathlib import Path

import pytest

import benchmarks

NAMES = sorted(file.stem for file in Path(benchmarks.__path__[0]).glob("*.py") if file.stem != "__init__")


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_can_be_imported(name):
    assert importlib.import_module(f"benchmarks.{name}").__doc__
