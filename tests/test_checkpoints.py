"""Checkpoints on a bad day, and for others: `python -m common.checkpoints` writes small ones without paths of this machine."""

import dataclasses
import os
import signal
import time

import pytest
import torch
from conftest import SMALL
from test_cli import check_error

import dit
import vae
from common import checkpoints, utils
from siblings import vin


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


def test_an_export_is_small_private_and_as_good(trained, call, capsys, tmp_path):
    for stage in ("vae", "dit"):
        assert call("common.checkpoints", f"{trained}/{stage}.pt {stage}.pt") == 0
        whole, small = checkpoints.load(trained / f"{stage}.pt", stage, ""), checkpoints.load(f"{stage}.pt", stage, "")
        parts = [(whole, small)] + ([(whole["vae"], small["vae"])] if stage == "dit" else [])
        numbers = sum(x.numel() for _, part in parts for x in part["ema"].values())
        assert (tmp_path / f"{stage}.pt").stat().st_size < 4 * numbers and "training" not in small
        content = (tmp_path / f"{stage}.pt").read_bytes()
        assert str(trained).encode() not in content and b"data_dir" not in content
        for before, part in parts:
            assert all(part[name] == before[name] for name in ("step", "classes", "revision"))
            for name, x in part["ema"].items():  # float16 has eleven bits
                assert x.dtype == torch.float32 or "running_" not in name, name
                assert (x.float() - before["ema"][name]).norm() <= 2**-11 * before["ema"][name].norm(), name
        capsys.readouterr()
        assert call(f"{stage}.py", f"{SMALL if stage == 'vae' else f'--ckpt {trained}/vae.pt'} --out {stage}.pt --resume") == 2
        check_error(capsys.readouterr().err, f"{stage}.pt", "export", "original")
        assert call("common.checkpoints", f"{stage}.pt ./{stage}.pt") == 2  # nor any other file that is there
        check_error(capsys.readouterr().err, f"{stage}.pt", "already")
    assert call("sample.py", "--classes 0 --steps 1") == 0
    assert call("common.checkpoints", "dit.pt") == 2


def test_float32_stays_where_float16_does_not_hold_it():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    ema = {"weight": x, "large": 1e5 * x, "small": 1e-6 * x, "norm.running_var": x.square(), "zero": 0 * x, "none": x[:0]}
    ema["broken"] = torch.tensor([1.0, float("nan")])
    found = checkpoints.exported({"config": {}, "ema": ema, "training": {}})["ema"]
    assert {name for name, y in found.items() if y.dtype == torch.float16} == {"weight", "zero", "none"}
    assert all(torch.equal(found[name], ema[name]) for name in ("large", "small", "norm.running_var"))


def test_every_setting_that_may_name_a_place_is_private():
    fields = [field for stage in (vae, dit, vin) for field in dataclasses.fields(stage.Config)]
    assert {f.name for f in fields if f.type is str and not f.metadata.get("choices")} == checkpoints.PRIVATE
