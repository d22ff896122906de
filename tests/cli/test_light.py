"""Nothing heavy is imported before it is needed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "scanpy", "scvi", "lightning", "matplotlib.pyplot", "jax", "sklearn", "anndata", "pandas", "scipy"}
REPORT = "; import json, sys; print(json.dumps(sorted(sys.modules)))"


def modules(code: str, *args: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", code + REPORT, *args], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("code", ["import cellstill", "import cellstill.cli", "import cellstill.cli.app"])
def test_import_is_light(code):
    assert not modules(code) & HEAVY


@pytest.mark.parametrize("command", ["", "integrate", "vi", "condense", "de", "inspect", "demo"])
def test_help_is_light(command):
    code = (
        "from typer.testing import CliRunner; from cellstill.cli.app import app; "
        f"assert CliRunner().invoke(app, {[*command.split(), '--help']}).exit_code == 0"
    )
    assert not modules(code) & HEAVY


def test_inspect_does_without_torch(cells, write):
    code = (
        "from typer.testing import CliRunner; from cellstill.cli.app import app; "
        f"assert CliRunner().invoke(app, ['inspect', {str(write(cells))!r}]).exit_code == 0"
    )
    assert not modules(code) & {"torch", "scanpy", "scvi", "lightning", "matplotlib.pyplot", "jax"}


def test_help_names_the_teachers_there_are(cellstill):
    from cellstill.teachers import TEACHERS

    words = set(cellstill("integrate", "--help").output.replace(",", " ").replace(".", " ").split())
    assert words >= set(TEACHERS)
