"""`ldm fetch`, without a network: from files at hand."""

import argparse
import hashlib

import pytest

from ldm.cli import fetch
from ldm.errors import DataError, InputError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of torch's that is empty, and weights of which we have the sha256."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    small = fetch.DOWNLOADS["vgg16"]._replace(sha256=hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setitem(fetch.DOWNLOADS, "vgg16", small)
    return tmp_path / "torch" / "hub" / "checkpoints"


def run(*words) -> int:
    parser = argparse.ArgumentParser()
    fetch.options(parser)
    return fetch.run(parser.parse_args([str(word) for word in words]))


def test_the_places_are_torchs_own(cache):
    import torch

    assert fetch.cached(fetch.DOWNLOADS["vgg16"]).parent == cache
    assert torch.hub.get_dir() == str(cache.parent)
    for weights in (fetch.DOWNLOADS["inception"],):  # torch's convention: the name ends with the hash's beginning
        assert weights.file == f"weights-inception-2015-12-05-{weights.sha256[:8]}.pth"


def test_they_are_listed(cache, capsys):
    assert run() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["vgg16", "inception"]
    assert f"not here: {cache}/vgg16-397923af.pth; sha256 " in lines[0]


def test_a_file_at_hand_goes_to_its_place(cache, tmp_path, capsys):
    (tmp_path / "download").write_bytes(b"weights")
    for _ in range(2):  # the second time it is there
        assert run("vgg16", "--file", tmp_path / "download") == 0
        assert capsys.readouterr().out == f"vgg16: {cache}/vgg16-397923af.pth\n"
        assert [path.name for path in cache.iterdir()] == ["vgg16-397923af.pth"]
    assert run() == 0
    assert "vgg16: for the perceptual loss and LPIPS; here: " in capsys.readouterr().out


def test_other_weights_never_get_there(cache, tmp_path):
    (tmp_path / "download").write_bytes(b"other weights")
    digest, expected = (hashlib.sha256(text).hexdigest()[:10] for text in (b"other weights", b"weights"))
    with pytest.raises(DataError) as error:
        run("vgg16", "--file", tmp_path / "download")
    assert str(error.value) == (
        f"not the published weights ({tmp_path}/download); got sha256 {digest}; expected {expected}; "
        "try remove it and fetch again"
    )
    assert list(cache.iterdir()) == []


def test_errors_are_one_line(tmp_path):
    with pytest.raises(InputError) as error:
        run("vgg19")
    assert str(error.value) == "no such weights (NAME); got vgg19; expected vgg16, inception"
    with pytest.raises(InputError) as error:
        run("--file", tmp_path)
    assert str(error.value) == "one file has the weights of one name (--file); got 0 names; expected one"
    with pytest.raises(DataError) as error:
        run("vgg16", "--file", tmp_path / "none")
    assert str(error.value).startswith(f"cannot be fetched ({tmp_path}/none); got [Errno 2] No such file")
