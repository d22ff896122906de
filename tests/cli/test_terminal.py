from __future__ import annotations

import io
import logging
import re
import signal
import subprocess
import sys
import time
import warnings

import pytest
import typer
from rich.console import Console

from cellstill.cli._terminal import Terminal, terminal
from cellstill.errors import CellstillWarning, InvalidArgumentError


def run(action, *, verbose=False):
    """Exit code of a command that does ``action``."""
    try:
        with terminal(verbose=verbose) as term:
            action(term)
    except typer.Exit as stop:
        return stop.exit_code
    except SystemExit as stop:
        return stop.code
    return 0


def fail(error):
    def action(term):
        raise error

    return action


def test_our_error_is_one_line_and_exit_code_1(capsys):
    assert run(fail(InvalidArgumentError("n_latent=0 has to be at least 1."))) == 1
    captured = capsys.readouterr()
    assert captured.err == "error: --n-latent 0 has to be at least 1.\n"
    assert captured.out == ""


def test_a_long_error_stays_on_one_line(capsys):
    assert run(fail(InvalidArgumentError("word " * 100))) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_unexpected_error_names_its_type_and_the_way_to_its_trace(capsys):
    assert run(fail(ZeroDivisionError("division by zero\nmore"))) == 1
    line = capsys.readouterr().err
    assert line.startswith("error: ZeroDivisionError: division by zero.")
    assert "run again with --verbose" in line
    assert "Traceback" not in line


@pytest.mark.parametrize("error", [ZeroDivisionError("division by zero"), InvalidArgumentError("no.")])
def test_verbose_gives_the_trace(capsys, error):
    assert run(fail(error), verbose=True) == 1
    captured = capsys.readouterr().err
    assert "Traceback" in captured
    assert "raise error" in captured


def test_markup_in_a_message_is_text(capsys):
    assert run(fail(InvalidArgumentError("obs['[bold]x'] and [/] are not."))) == 1
    assert capsys.readouterr().err == "error: obs['[bold]x'] and [/] are not.\n"


def test_our_warnings_are_lines_once_and_others_are_not_shown(capsys):
    kept = []

    def action(term):
        for _ in range(2):
            warnings.warn("depths differ: consider pca_method='pearson_residuals'.", CellstillWarning, stacklevel=1)
        warnings.warn("of a library", FutureWarning, stacklevel=1)
        logging.getLogger("scvi").warning("chatter of a library")
        kept.extend(term.warnings)

    assert run(action) == 0
    assert capsys.readouterr().err == "warning: depths differ: consider --pca-method pearson_residuals.\n"
    assert kept == ["depths differ: consider --pca-method pearson_residuals."]


def test_verbose_lets_the_warnings_of_libraries_through():
    def action(term):
        warnings.simplefilter("default")
        warnings.warn("of a library", FutureWarning, stacklevel=1)

    with pytest.warns(FutureWarning, match="of a library"):
        assert run(action, verbose=True) == 0


def test_a_table_in_a_warning_is_kept_and_indented(capsys):
    assert run(lambda term: term.warn("Cells per combination:\na b\n1 2")) == 0
    assert capsys.readouterr().err == "warning: Cells per combination:\n  a b\n  1 2\n"


def test_warning_filters_and_loggers_are_given_back():
    before, show, level = list(warnings.filters), warnings.showwarning, logging.getLogger("scvi").level
    run(lambda term: None)
    assert list(warnings.filters) == before
    assert warnings.showwarning is show
    assert logging.getLogger("scvi").level == level


def test_interrupts_exit_with_130(capsys):
    assert run(fail(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted: nothing was written.\n"


@pytest.mark.parametrize("code", [130, 143], ids=["sigint", "sigterm"])
def test_signals_exit_with_their_number(code, capsys):
    assert run(fail(SystemExit(code))) == code
    assert capsys.readouterr().err == "interrupted: nothing was written.\n"


def test_other_exits_pass_through(capsys):
    assert run(fail(SystemExit(3))) == 3
    assert run(fail(typer.Exit(4))) == 4
    assert capsys.readouterr().err == ""


def test_stages_are_timed():
    seconds = {}

    def action(term):
        for _ in range(2):
            with term.stage("sleep", "Sleeping"):
                time.sleep(0.02)
        seconds.update(term.seconds)

    run(action)
    assert 0.04 <= seconds["sleep"] < 1


def walk(force_terminal: bool, *steps: float) -> str:
    """What is shown of a stage that says how far it is after so many seconds each."""
    err = Console(file=io.StringIO(), force_terminal=force_terminal, width=80)
    term = Terminal(Console(file=io.StringIO()), err)
    with term.stage("walk", "Walking") as say:
        for number, seconds in enumerate(steps):
            time.sleep(seconds)
            say(f"{number + 1} of 9")
        time.sleep(0.2)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", err.file.getvalue())


def test_a_stage_says_how_far_it_is_where_somebody_watches():
    shown = walk(True, 0, 0)
    assert "Walking: 2 of 9" in shown
    assert re.search(r"✓ Walking 0\.\d s\n$", shown)


def test_a_log_has_lines_of_each_stage_with_its_time(monkeypatch):
    monkeypatch.setattr("cellstill.cli._terminal._SECONDS_PER_LINE", 0.5)
    begun, *told, ended = walk(False, 0, 0, 0.6, 0, 0.6).splitlines()
    assert begun == "stage: Walking"
    assert [line.split(",")[0] for line in told] == ["stage: Walking: 3 of 9", "stage: Walking: 5 of 9"]
    assert told[-1].endswith(", after 1 s")
    assert re.fullmatch(r"stage: Walking: 1\.[4-9] s", ended)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_process_leaves_nothing(tmp_path, number, code):
    # A command that has begun its folder and then waits, with handlers as the console script sets them.
    script = (
        "import cellstill.cli.app as a, time, typer\n"
        "from cellstill.cli._terminal import terminal\n"
        "from cellstill.io.store import atomic_directory\n"
        "@a.app.command()\n"
        "def wait():\n"
        "    with terminal(verbose=False), atomic_directory('out') as folder:\n"
        "        (folder / 'half').write_text('x')\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
        "a.run()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, "wait"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    assert len(list(tmp_path.iterdir())) == 1
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert err == "interrupted: nothing was written.\n"
    assert list(tmp_path.iterdir()) == []


def test_version_and_module_entry_point():
    import cellstill

    done = subprocess.run([sys.executable, "-m", "cellstill", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"cellstill {cellstill.__version__}\n"


@pytest.mark.parametrize(
    "args",
    [
        ["integrate", "--help"],
        ["--help"],
    ],
)
def test_help_exits_with_0(cellstill, args):
    assert cellstill(*args).exit_code == 0


@pytest.mark.parametrize(
    "args",
    [
        ["integrate"],
        ["integrate", "in.h5ad"],
        ["integrate", "in.h5ad", "--batch-key", "b", "--no-such-option"],
        ["integrate", "in.h5ad", "--batch-key", "b", "--pca-method", "other"],
        ["integrate", "in.h5ad", "--batch-key", "b", "--n-latent", "0"],
        ["integrate", "in.h5ad", "--batch-key", "b", "--target-batch", "x"],
        ["integrate", "in.h5ad", "--batch-key", "b", "--teacher", "latent"],
        ["integrate", "in.h5ad", "--batch-key", "b", "--obsm-key", "X_pca"],
        ["integrate", "in.h5ad", "--batch-key", "b", "--teacher-setting", "theta"],
        ["inspect"],
        ["nothing"],
    ],
)
def test_usage_errors_exit_with_2_and_touch_nothing(cellstill, here, args):
    assert cellstill(*args).exit_code == 2
    assert list(here.iterdir()) == []
