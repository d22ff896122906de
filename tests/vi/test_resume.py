"""A killed training goes on from its checkpoint, in every precision and with and without compiled loops."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

SCRIPT = textwrap.dedent(
    """
    import os, signal, sys, warnings
    from cellstill import AmbientRegularizedSCVI
    from cellstill.data import simulate_counts

    def train(progress=False, **settings):
        adata = simulate_counts(n_obs=200, n_vars=80, n_batches=2, n_cell_types=2, seed=3)
        AmbientRegularizedSCVI.setup_anndata(adata, batch_key="batch", nn_conditioning_covariate_keys=["batch"])
        model = AmbientRegularizedSCVI(adata, n_hidden=16, n_latent=4, ambient_rate=0.1, dropout_rate=0.1)
        return model.train(max_epochs=6, batch_size=64, lr=4e-3, kl_warmup=4, progress=progress, **settings)

    def kill(phase, epoch, losses):
        if epoch == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    if __name__ == "__main__":
        warnings.simplefilter("ignore")
        train(progress=kill, **eval(sys.argv[1]))
    """
)


parts = {"__name__": "script"}
exec(SCRIPT, parts)
train = parts["train"]


def assert_same_end(found, expected, bound=0.0):
    for name, tensor in expected.module.state_dict().items():
        np.testing.assert_allclose(found.module.state_dict()[name], tensor, rtol=bound, atol=bound, err_msg=name)
    assert found.history.keys() == expected.history.keys()
    for term, frame in expected.history.items():
        np.testing.assert_allclose(found.history[term], frame, rtol=bound, err_msg=term)


@pytest.mark.parametrize("compile", [False, True], ids=["torch", "compiled"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_an_interrupted_run_goes_on_and_ends_as_if_it_had_not_been(accelerator, precision, compile, tmp_path):
    def interrupt(phase, epoch, losses):
        if epoch == 2:
            raise KeyboardInterrupt

    settings = {"accelerator": accelerator, "precision": precision, "compile": compile}
    whole = train(**settings)
    settings["checkpoint"] = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(interrupt, **settings)
    # Sums over cells have no order on a GPU.
    assert_same_end(train(**settings, resume=True), whole, 0.0 if accelerator == "cpu" else 1e-3)


def test_a_process_that_was_killed_in_lower_precision_is_resumed_to_the_same_end(tmp_path):
    settings = {"accelerator": "cpu", "precision": "bf16-mixed"}
    whole = train(**settings)
    # The precision that was asked for is that of the training.
    assert not train(accelerator="cpu").history["elbo_train"].equals(whole.history["elbo_train"])
    settings["checkpoint"] = str(tmp_path / "run.safetensors")
    killed = subprocess.run([sys.executable, "-c", SCRIPT, repr(settings)], check=False)
    assert killed.returncode == -signal.SIGKILL
    epochs = []
    resumed = train(lambda phase, epoch, losses: epochs.append(epoch), **settings, resume=True)
    assert epochs == [4, 5]
    assert_same_end(resumed, whole)
