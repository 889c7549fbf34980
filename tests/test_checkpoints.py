"""Checkpoints on a bad day."""

import os
import signal
import time

import pytest
import torch

from common import checkpoints, utils


def test_a_kill_at_any_moment_leaves_a_checkpoint_that_loads(tmp_path):
    path, steps = tmp_path / "vae.pt", []
    checkpoints.save(path, stage="vae", step=0)
    for delay in (0.02, 0.05, 0.07, 0.11, 0.13):
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)  # the threads of the parent are not here
                for step in range(1, 10**9):  # saves until it is killed
                    checkpoints.save(path, stage="vae", step=step, x=torch.full((300_000,), float(step)))
            finally:
                os._exit(1)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        ckpt = checkpoints.load(path, "vae", "")
        steps.append(ckpt["step"])
        assert ckpt["step"] == 0 or (ckpt["x"] == ckpt["step"]).all()


def test_checkpoints_never_run_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    torch.save({"format": checkpoints.FORMAT, "stage": "vae", "model": Payload()}, tmp_path / "vae.pt")
    with pytest.raises(utils.UserError, match="train it again with `python vae.py`"):
        checkpoints.load(tmp_path / "vae.pt", "vae", "python vae.py")
    assert not (tmp_path / "ran").exists()


def test_a_fingerprint_tells_networks_apart():
    layer = torch.nn.Linear(3, 2)
    before = utils.fingerprint(layer)
    assert utils.fingerprint(layer.state_dict()) == before
    layer.bias.data[0] += 1e-6
    assert utils.fingerprint(layer) != before
