"""The sabotages of mutate.py can be carried out."""

from tests.mutate import ROOT, SABOTAGES


def test_each_sabotage_finds_its_line():
    found = {change.name: (ROOT / change.file).read_text(encoding="utf-8").count(change.old) for change in SABOTAGES}
    assert {name: count for name, count in found.items() if count != 1} == {}
    assert [change.tests for change in SABOTAGES if not (ROOT / change.tests).exists()] == []
