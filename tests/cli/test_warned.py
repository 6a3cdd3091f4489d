"""Warnings that people read."""

import warnings

from ldm.cli.warned import counting_cuts
from ldm.conditioning.text import CutOff


def test_texts_that_are_cut_off_are_counted_and_said_once(monkeypatch, capsys):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back afterwards
    with counting_cuts():
        for text, kind in (("one", CutOff), ("another", UserWarning), ("two", CutOff)):
            warnings.warn(text, kind, stacklevel=1)
        assert capsys.readouterr().err == "warning: another\n"
    said = "warning: the end of a text is cut off in 2 captions, as the text encoder reads no more\n"
    assert capsys.readouterr().err == said
    with counting_cuts():
        pass
    assert capsys.readouterr().err == ""
