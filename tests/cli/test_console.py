"""Warnings that people read."""

import warnings

import pytest

from ldm.cli import cache, evaluate, main
from ldm.cli.console import count_truncations
from tests.conditioning.conditions import small_joint

SAID = "warning: 3 captions truncated to the text encoder's length\n"


def cut_three() -> None:
    """Captions that are too long, with the same ends, one of them twice."""
    text, end = small_joint(), " on a floor" * 30
    text.tokenize(["a cube", *(f"{number}{end}" for number in (1, 2, 1))])
    text.tokenize([f"3{end}"])


def test_captions_that_are_cut_off_are_counted_and_said_once(capsys):
    before = warnings.showwarning
    with count_truncations():
        cut_three()
        warnings.warn("another", stacklevel=1)
        assert capsys.readouterr().err == "warning: another\n"
    assert capsys.readouterr().err == SAID
    assert warnings.showwarning is before
    with count_truncations():
        pass
    assert capsys.readouterr().err == ""


def test_they_are_said_also_where_something_fails(capsys):
    with pytest.raises(ZeroDivisionError), count_truncations():
        cut_three() or 1 / 0
    assert capsys.readouterr().err == SAID


def test_evaluate_and_cache_count_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "prepare", lambda *_: cut_three() or 1 / 0)
    monkeypatch.setattr(cache, "prepare", lambda *_: cut_three() or 1 / 0)
    assert main(["evaluate", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(SAID)
    autoencoder = "autoencoder=ldm/pretrained/scenes.safetensors"
    assert main(["cache", "--config", "scenes", autoencoder, "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(SAID)
