"""A Distiller trained by two processes, which Fabric starts from a script."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from cellstill import Distiller
from cellstill.errors import InvalidArgumentError

SCRIPT = textwrap.dedent(
    """
    import sys, warnings
    import torch
    from cellstill import Distiller
    from cellstill.data import simulate_counts
    from cellstill.teachers import HarmonyTeacher

    def train(devices, method, n_epochs, checkpoint=None):
        adata = simulate_counts(n_obs=600, n_vars=120, n_batches=3, n_cell_types=4, library_size_median=3000, seed=11)
        teacher = HarmonyTeacher(max_iter=3)
        settings = {"covariate_keys": ["condition"], "pca_method": method}
        model = Distiller(adata, "batch", n_latent=8, teacher=teacher, dropout=0.0, **settings)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Harmony stopped at max_iter")
            model.train(
                n_epochs, 4, batch_size=65, accelerator="cpu", devices=devices, progress=False, compile=False,
                checkpoint=checkpoint, resume=checkpoint is not None,
            )
        return {"history": model.history_, "tensors": model._fit_result.tensors()}

    if __name__ == "__main__":
        asked = 2, sys.argv[2], int(sys.argv[3]), sys.argv[1] + "/checkpoint"
        end, again = train(*asked), train(*asked)
        torch.save([end, again], f"{sys.argv[1]}/{torch.distributed.get_rank()}.pt")
    """
)


# Losses of the encoder are 0.007 on scaled counts, of targets of order 1, whose rounding is 1e-7. Two epochs agree to
# 1e-9, to 1e-7 with another number of threads; by the fourth, training has made 3e-6 of that.
@pytest.mark.slow
@pytest.mark.parametrize(("method", "n_epochs", "atol"), [("standard", 4, 0.0), ("scaled_residuals", 2, 1e-6)])
def test_two_processes_train_a_distiller_as_one(tmp_path, method, n_epochs, atol):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path), method, str(n_epochs)], env=environment, start_new_session=True
    )
    try:
        assert process.wait(300) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    parts = {"__name__": "script"}
    exec(SCRIPT, parts)
    expected = parts["train"](1, method, n_epochs)
    first, again = torch.load(tmp_path / "0.pt", weights_only=False)
    second, _ = torch.load(tmp_path / "1.pt", weights_only=False)
    for phase in ("encoder", "decoder"):
        assert len(first["history"][phase]) == (n_epochs if phase == "encoder" else 4)
        for other in (second, again):
            assert other["history"][phase].equals(first["history"][phase])
        found, one = first["history"][phase].to_numpy(), expected["history"][phase].to_numpy()
        np.testing.assert_allclose(found, one, rtol=1e-5, atol=atol)
    assert first["tensors"].keys() == expected["tensors"].keys()
    for name, tensor in expected["tensors"].items():
        one, two, resumed = (np.asarray(end["tensors"][name]) for end in (first, second, again))
        np.testing.assert_array_equal(one, two, err_msg=name)
        np.testing.assert_array_equal(one, resumed, err_msg=name)
        np.testing.assert_allclose(one, tensor, rtol=1e-4, atol=1e-4, err_msg=name)


def test_more_devices_than_there_are_are_refused_before_the_teacher_works(simulated, monkeypatch):
    model = Distiller(simulated.copy(), "batch", n_latent=5)
    monkeypatch.setattr(type(model.teacher), "teach", lambda *_: pytest.fail("the teacher works"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InvalidArgumentError, match="accelerator='gpu', devices=2: torch finds 1 CUDA devices"):
        model.train(1, 1, accelerator="gpu", devices=2)
    with pytest.raises(InvalidArgumentError, match="devices=0 has to be an integer of at least 1"):
        model.train(1, 1, devices=0)
