"""The command line itself: exit statuses, one line for each error, and what it costs to ask for help."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from ldm import __version__, cli
from ldm.cli import main
from ldm.errors import CheckpointError, DataError, DivergedError, InputError, LdmError

ROOT = Path(__file__).parent.parent.parent
HEAVY = {"torch", "torchvision", "numpy", "omegaconf", "yaml", "transformers", "diffusers", "open_clip", "lightning"}


def python(*arguments: str, **options) -> subprocess.CompletedProcess:
    """A fresh interpreter that finds this checkout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, **options)


@pytest.fixture
def failing(monkeypatch):
    """`failing(error)` makes `ldm fail` raise it."""

    def fail_with(error: BaseException) -> None:
        def run(arguments):
            raise error

        command = types.SimpleNamespace(__doc__="Fail.", options=lambda parser: None, run=run)
        monkeypatch.setitem(cli.COMMANDS, "fail", cli.Command("ldm.cli.fail", "fail"))
        monkeypatch.setitem(sys.modules, "ldm.cli.fail", command)

    return fail_with


PLEASE = "error: internal, please report it: {}; try --debug for the traceback\n"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("a", "b:1", "c", "d", "e"), 2, "error: a (b:1); got c; expected d; try e\n"),
        (DataError("no images", "folder"), 3, "error: no images (folder)\n"),
        (CheckpointError("a hash differs", got="1"), 4, "error: a hash differs; got 1\n"),
        (DivergedError("loss is not finite\nat step 3"), 5, "error: loss is not finite at step 3\n"),
        (LdmError("ours"), 1, "error: ours\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (RuntimeError("two\nlines"), 1, PLEASE.format("RuntimeError: two lines")),
        (KeyError("seed"), 1, PLEASE.format("KeyError: 'seed'")),
        (OSError(28, "No space left on device"), 1, PLEASE.format("OSError: [Errno 28] No space left on device")),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
class TestErrors:
    """Each kind has its status and its line; the traceback is for --debug alone."""

    def test_one_line_and_the_status_of_its_kind(self, error, code, line, failing, capsys):
        failing(error)
        assert main(["fail"]) == code
        assert capsys.readouterr() == ("", line)

    @pytest.mark.parametrize("arguments", [["fail", "--debug"], ["--debug", "fail"]])
    def test_debug_adds_the_traceback_above_the_same_line(self, arguments, error, code, line, failing, capsys):
        failing(error)
        assert main(arguments) == code
        said = capsys.readouterr().err
        assert said.startswith("Traceback (most recent call last):")
        assert ", in run\n" in said
        assert said.endswith(f"\n{line}")


def test_a_device_that_is_too_small_is_no_bug_of_ours(failing, capsys):
    failing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"))
    assert main(["fail"]) == 2
    said = "error: the device has too little memory; got CUDA out of memory. Tried to allocate 2 GiB.; try a smaller"
    assert capsys.readouterr().err.startswith(said)


def test_who_reads_the_beginning_alone_is_told_nothing_else():
    command = f"{sys.executable} -m ldm reference | head -1; echo ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, cwd=ROOT)
    assert found.stdout.splitlines()[0].startswith("# ")
    assert found.stdout.splitlines()[1] in ("0", "141")  # it may have been read before head went
    assert found.stderr == ""


def test_a_command_that_returns_nothing_has_succeeded(failing, monkeypatch):
    failing(RuntimeError())
    monkeypatch.setattr(sys.modules["ldm.cli.fail"], "run", lambda arguments: None)
    assert main(["fail"]) == 0


@pytest.mark.parametrize(
    ("arguments", "start", "hint"),
    [
        ([], "the following arguments are required: COMMAND", "ldm --help"),
        (["--stpes"], "the following arguments are required: COMMAND", "ldm --help"),
        (["demo", "--stpes", "3"], "unrecognized arguments: --stpes", "ldm demo --help"),
        (["sample", "--stpes", "3"], "unrecognized arguments: --stpes", "--steps"),
        (["sample", "--hieght=64"], "unrecognized arguments: --hieght=64", "--height"),
        (["demo", "--config"], "argument --config: expected one argument", "ldm demo --help"),
    ],
)
def test_a_wrong_command_line_is_answered_in_one_line(arguments, start, hint, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {start}")
    assert err.endswith(f"(command line); try {hint}\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "start", "hint"),
    [
        (["dmeo"], "no such command (command line); got dmeo; expected one of train-autoencoder, train-ldm, ", "demo"),
        (["evalute"], "no such command (command line); got evalute; expected one of train-", "evaluate"),
        (
            ["sample", "--precision", "fp8"],
            "--precision: unknown (command line); got fp8; expected one of auto, ",
            "fp32",
        ),
        (["convert", "a", "b", "--to", "difusers"], "--to: unknown (command line); got difusers; exp", "diffusers"),
        (["train-ldm", "--config", "scnes"], "no such configuration (scnes); expected a .yaml file, or one", "scenes"),
    ],
)
def test_a_mistyped_name_is_answered_with_the_one_that_was_meant(arguments, start, hint, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {start}")
    assert err.endswith(f"; try {hint}\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["roll.jpg", "no_such_folder/roll.png", ".", ""])
def test_a_picture_that_cannot_be_written_is_refused_before_training(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--out", name]) == 2
    where = Path(name)
    expected = f"error: cannot write the picture ({where}); expected a .png file in a folder that exists\n"
    assert capsys.readouterr() == ("", expected)


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["--version"]])
def test_help_and_version_end_with_0(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    assert capsys.readouterr().err == ""


def test_help_lists_every_command_and_every_option():
    ended = python("-m", "ldm", "--help")
    assert ended.returncode == 0
    assert all(f"  {name:17} {each.help}\n" in ended.stdout for name, each in cli.COMMANDS.items())
    ended = python("-m", "ldm", "demo", "--help")
    assert ended.returncode == 0
    assert all(word in ended.stdout for word in ("--config", "--print-config", "--plugin", "--out", "key=value"))


def test_version_is_the_package_s():
    ended = python("-m", "ldm", "--version")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"{__version__}\n", "")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_a_module_with_options_and_run(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    module = sys.modules[cli.COMMANDS[name].module]
    assert capsys.readouterr().out.startswith(f"usage: ldm {name} ")
    assert callable(module.options)
    assert callable(module.run)


# --------------------------------------------------------------------------------------------------- signals


def test_ctrl_c_ends_a_running_command_with_130_and_leaves_nothing_behind(tmp_path):
    """A real signal while the demo is learning."""
    command = [sys.executable, "-m", "ldm", "demo", "--out", str(tmp_path / "roll.png"), "steps=1000000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes: dict = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE}
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 (a shell's background jobs ignore it)
    with subprocess.Popen(command, env=environment, preexec_fn=heard, **pipes) as process:
        said = b""
        while b"learning" not in said:  # the progress bar: torch is here and the loop runs
            said += process.stderr.read(1) or pytest.fail(said.decode())
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate()
    assert process.returncode == 130
    assert rest.decode().endswith("error: interrupted\n")
    assert "Traceback" not in rest.decode()
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- costs


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [
        ("import ldm", set()),
        ("from ldm.cli import main; main(['--help'])", set()),
        ("from ldm.cli import main; main(['--version'])", set()),
        ("from ldm.cli import main; main([])", set()),
        ("from ldm.cli import main; main(['demo', '--help'])", {"omegaconf", "yaml"}),
        ("from ldm.cli import main; main(['demo', '--config', 'no.yaml'])", {"omegaconf", "yaml"}),
        ("from ldm.cli import main; main(['demo', 'stepz=3'])", {"omegaconf", "yaml"}),
    ],
)
def test_what_needs_no_network_imports_none_of_the_heavy_packages(statement, allowed):
    ended = python("-c", f"import atexit, sys\natexit.register(lambda: print('NAMES', *sys.modules))\n{statement}")
    names = ended.stdout.rpartition("NAMES ")[2].split()
    assert "ldm" in names
    assert HEAVY & set(names) <= allowed


def test_importing_ldm_imports_little():
    """How long it takes, `python -m benchmarks.start_up` measures."""
    ended = python("-c", "import sys; before = {*sys.modules}; import ldm; print(*{*sys.modules} - before)")
    names = ended.stdout.split()
    assert {name for name in names if name.split(".")[0] not in {"ldm", *sys.stdlib_module_names}} == set()
    assert [name for name in names if name.startswith("ldm")] == ["ldm"]
