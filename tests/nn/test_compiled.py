"""Where loops cannot be compiled, and what is said where they are."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from cellstill import AmbientRegularizedSCVI, Distiller
from cellstill.data import SimulationConfig, simulate_counts
from cellstill.errors import InvalidArgumentError
from cellstill.nn import compiled as module
from cellstill.nn.compiled import WORTH_COMPILING, compiled, kernels
from cellstill.teachers import LatentTeacher

CPU = torch.device("cpu")


@pytest.fixture
def no_compiler(monkeypatch):
    def fail(*names):
        raise RuntimeError("cannot cache function '_softmax': no locator available")

    module._found.cache_clear()
    monkeypatch.setattr(module, "_load", fail)
    yield
    module._found.cache_clear()


def test_auto_goes_without_a_compiler_and_says_so_once(no_compiler, caplog):
    with caplog.at_level(logging.WARNING, logger="cellstill"), compiled("auto", n_values=WORTH_COMPILING):
        assert kernels(CPU) is None
        assert kernels(CPU) is None
    assert caplog.messages == [
        "Loops of the CPU cannot be compiled (RuntimeError: cannot cache function '_softmax': no locator available). "
        "Torch's operations are used, which take longer."
    ]


def test_without_a_compiler_true_is_refused_where_loops_are_needed(no_compiler):
    with compiled(True), pytest.raises(InvalidArgumentError, match=r"compile=True, but .* '_softmax'.*NUMBA_CACHE_DIR"):
        kernels(CPU)
    with compiled(False):
        assert kernels(CPU) is None


def test_auto_compiles_from_a_number_of_values_on():
    with compiled("auto", n_values=WORTH_COMPILING - 1):
        assert kernels(CPU) is None
    with compiled("auto", n_values=WORTH_COMPILING):
        assert kernels(CPU) is not None
        assert kernels(torch.device("meta")) is None


def test_auto_inside_another_choice_leaves_it_to_that():
    with compiled(False), compiled("auto", n_values=WORTH_COMPILING):
        assert kernels(CPU) is None
    with compiled(True), compiled("auto"):
        assert kernels(CPU) is not None
    with compiled("auto", n_values=WORTH_COMPILING), compiled("auto"):
        assert kernels(CPU) is not None
    with compiled("auto"), compiled("auto", n_values=WORTH_COMPILING):
        assert kernels(CPU) is None


def run(code, **variables):
    """What another interpreter prints, with the environment changed."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True, check=True
    )
    return done.stdout.strip(), done.stderr


def test_an_interpreter_whose_compiler_is_switched_off_trains_with_torch():
    code = (
        "import torch\nfrom cellstill.nn.compiled import compiled, kernels\n"
        "with compiled('auto', n_values=1e10):\n    print(kernels(torch.device('cpu')))"
    )
    printed, said = run(code, NUMBA_DISABLE_JIT="1")
    assert printed == "None"
    assert "Loops of the CPU cannot be compiled (AttributeError" in said


def test_compiling_is_said_for_each_part_that_is_not_on_disk_and_for_no_other(tmp_path):
    code = (
        "import numpy as np\nfrom cellstill.nn.compiled import _load, more_loops\n"
        "more_loops('_row_kernels').totals(0, 1, np.ones(1, 'f'), np.array([0, 1], 'i'), np.empty(1, 'f'))\n"
        "print('called', flush=True)\nmore_loops('_product_kernels')"
    )
    announced = "Compiling loops of the CPU: some seconds, once on this machine."
    said = [run(code, NUMBA_CACHE_DIR=str(tmp_path))[1].count(announced) for _ in range(2)]
    # The first time neither is there; the second, only what was not called then is not.
    assert said == [2, 1]


def test_getters_of_many_cells_use_the_loops(monkeypatch):
    """Latents of a Distiller and of regularised VI, as of few cells."""
    data = simulate_counts(SimulationConfig(n_obs=90, n_vars=40), seed=0)
    AmbientRegularizedSCVI.setup_anndata(data, batch_key="batch")
    vi = AmbientRegularizedSCVI(data, n_hidden=8, n_latent=3, background=False).train(
        max_epochs=1, progress=False, accelerator="cpu"
    )
    data.obsm["X_pca"] = np.random.default_rng(0).normal(size=(90, 4))
    distiller = Distiller(data, batch_key="batch", teacher=LatentTeacher("X_pca"), n_latent=4)
    distiller.train(1, 1, progress=False, accelerator="cpu")
    layers = module._found().layers
    used = Mock(wraps=layers.normed_relu)
    monkeypatch.setattr(layers, "normed_relu", used)
    for getter in (vi.get_latent_representation, distiller.get_latent_representation):
        few, before = getter(), used.call_count
        with monkeypatch.context() as patched:
            patched.setattr(module, "WORTH_COMPILING", 0)
            many = getter()
        assert used.call_count > before
        np.testing.assert_allclose(many, few, rtol=1e-4, atol=1e-5)
