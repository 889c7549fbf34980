"""What keeps a long training right: resuming, several processes, compiling, signals, steps to skip, a full disk."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, SMALL, SMALL_DIT, TORCHRUN, losses_of, same, torchrun
from pytest import approx

import data
import losses
import vae
from common import checkpoints, utils
from common.utils import UserError

SMALL_STAGE2 = f"--extras components=2x8 muon --num-latents 21 --batch-size 4 {' '.join(SMALL_DIT)}"


def small_gan(setattr=setattr):
    """A discriminator that is small, takes 16 x 16 pixels and learns every second step, with R1 each time."""
    whole = losses.Discriminator
    setattr(losses, "Discriminator", lambda width: whole(2, blocks=4))
    setattr(vae, "GAN_EVERY", 2), setattr(vae, "R1_EVERY", 1)


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    """The vae.pt of a few steps at SMALL sizes."""
    path = tmp_path_factory.mktemp("stage1") / "vae.pt"
    vae.main([*SMALL.split(), "--steps", "2", "--batch-size", "4", "--out", str(path)])
    return path


RESUMES = {
    "stage 1, basis, recomputed": f"vae.py {SMALL} --batch-size 4 --extras basis=8 muon --recompute",
    "stage 1, discriminator, accumulated": f"vae.py {SMALL} --gan-weight 0.1 --batch-size 4 --accumulate 2",
    "stage 1, discriminator, no extras, bfloat16": f"vae.py {SMALL} --gan-weight 0.1 --batch-size 2 --extras --bf16 on",
    "stage 2": f"dit.py {SMALL_STAGE2}",
    "stage 2, prediction, bfloat16": f"dit.py {SMALL_STAGE2} --extras --cond-frames 2 --bf16 on",
}


@pytest.mark.parametrize("name", RESUMES)
def test_what_resumes_to_the_bit(call, stage1, few_held_out, monkeypatch, name):
    """A training that ends right after its first checkpoint and goes on is one that never ended."""
    program, options = RESUMES[name].split(maxsplit=1)
    stage, options = program.removesuffix(".py"), f"{options} --save-every 3 --steps 5"
    options += f" --ckpt {stage1}" if stage == "dit" else ""
    small_gan(monkeypatch.setattr)
    monkeypatch.setattr(utils.RunLog, "EVERY", 1)
    with monkeypatch.context() as patch:
        patch.setattr(utils.RunLog, "write", Mock(side_effect=KeyboardInterrupt))
        assert call(program, f"{options} --out killed.pt") == 130
    assert checkpoints.load("killed.pt", stage, "")["step"] == 3
    for out in ("killed", "whole"):
        assert call(program, f"{options} --out {out}.pt --resume") == 0
    killed, whole = (checkpoints.load(f"{out}.pt", stage, "") for out in ("killed", "whole"))
    assert same(killed["ema"], whole["ema"]) and same(killed["training"], whole["training"])
    rows = losses_of("runs/whole")
    assert losses_of("runs/killed") == rows[3:] and len(rows) == 5  # the log was not written before it ended
    assert ("disc_loss" in rows[-1]) == ("discriminator" in name) == ("discriminator" in whole["training"])


def test_resuming_refuses_other_options_and_takes_other_places(call, few_held_out, folder, capsys):
    tiny = f"{SMALL} --batch-size 2 --dataset folder --preset nano --resume"
    assert call("vae.py", f"{tiny} --data-dir {folder} --steps 1") == 0
    assert call("vae.py", f"{tiny} --data-dir {os.path.relpath(folder)} --out ./vae.pt --steps 2 --save-every 9") == 0
    assert checkpoints.load("vae.pt", "vae", "")["step"] == 2
    for other, words in (("--lr 0.5", "--lr 0.0015, not 0.5"), ("--extras muon", "--extras")):
        capsys.readouterr()
        assert call("vae.py", f"{tiny} --data-dir {folder} --steps 3 {other}") == 2
        assert words in capsys.readouterr().err
    dit = f"--resume {SMALL_STAGE2} --num-latents 4 --batch-size 2"
    assert call("dit.py", f"{dit} --steps 1") == 0
    Path("moved.pt").write_bytes(Path("vae.pt").read_bytes())
    assert call("dit.py", f"{dit} --steps 2 --ckpt moved.pt --data-dir {os.path.relpath(folder)}") == 0  # stage 1 elsewhere
    cache = Path("runs/dit/values.npy").read_bytes()
    # Stage 1 trained anew under the same name: refused before its clips take the place of those that were encoded.
    Path("vae.pt").unlink()
    assert call("vae.py", f"{tiny} --data-dir {folder} --steps 1 --seed 1") == 0
    capsys.readouterr()
    assert call("dit.py", f"{dit} --steps 3") == 2 and "with stage1 " in capsys.readouterr().err
    assert Path("runs/dit/values.npy").read_bytes() == cache


def test_an_interrupted_encoding_goes_on_and_another_key_starts_anew(call, few_held_out, stage1, monkeypatch, capsys):
    encode, encoded, stop = vae.VAE.encode, [], []

    def count(self, video):
        if stop and len(encoded) == stop[0]:
            raise KeyboardInterrupt
        encoded.append(len(video))
        return encode(self, video)

    monkeypatch.setattr(vae.VAE, "encode", count)
    options = f"--ckpt {stage1} --num-latents 100 --extras --batch-size 4 --steps 1 {' '.join(SMALL_DIT)}"
    stop.append(1)
    assert call("dit.py", options) == 130 and encoded == [64]
    stop.clear(), encoded.clear()
    assert call("dit.py", options) == 0 and encoded == [36]  # what is left
    first, ckpt = checkpoints.load("dit.pt", "dit", "")["latent_map"], checkpoints.load(stage1, "vae", "")
    train_set = data.open_dataset(vae.data_settings(ckpt), "train")
    mean, _ = vae.load_vae(ckpt).encode(data.clips(train_set, [data.spread(train_set, 100)[50]])[0])
    torch.testing.assert_close(torch.from_numpy(np.load("runs/dit/values.npy"))[50, 0].float(), mean[0], rtol=1e-2, atol=1e-2)
    encoded.clear()
    assert call("dit.py", f"{options} --steps 2 --seed 3") == 0 and encoded == []  # all there
    Path("runs/dit").rename("elsewhere")
    assert call("dit.py", options) == 0 and encoded == [64, 36]
    assert same(checkpoints.load("dit.pt", "dit", "")["latent_map"], first)  # as if never interrupted
    encoded.clear()
    assert call("dit.py", f"{options} --cond-frames 2") == 0 and sum(encoded[:-1]) == 200  # and those of the preview


@pytest.mark.parametrize("name", ["stage 1, discriminator, accumulated", "stage 2"])
def test_two_processes_train_as_one(call, few_held_out, stage1, monkeypatch, tmp_path, name):
    # The same global batch: batch norm, R1, noise, data order and the averaged gradient all have a part in this.
    program, options = RESUMES[name].split(maxsplit=1)
    options += " --batch-size 8 --steps 6"
    if program == "dit.py":
        options += f" --ckpt {stage1} --cond-frames 2"
    else:
        options += " --extras mixing=8 renorm=0.3 edges filter muon basis=8"
    monkeypatch.setattr(utils.RunLog, "EVERY", 2)
    small_gan(monkeypatch.setattr)
    (tmp_path / "two.py").write_text(
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        f"import {program[:3]}; from common import utils; from test_training import small_gan\n"
        f"small_gan(); utils.RunLog.EVERY = 2\nutils.run({program[:3]}.main)\n"
    )
    torchrun("two.py", *options.split(), "--out", "two.pt", cwd=tmp_path)
    assert call(program, f"{options} --out one.pt") == 0
    one, two = losses_of("runs/one"), losses_of("runs/two")
    assert len(one) == 3 and ("disc_loss" in one[-1]) == (program == "vae.py")
    for a, b in zip(one, two):
        margins = [row.pop("disc_margin", 0.0) for row in (a, b)]  # near zero, where rounding is all there is
        assert a == approx(b, rel=5e-4) and margins[0] == approx(margins[1], abs=1e-3)
    a, b = (checkpoints.load(f"{name}.pt", program[:3], "")["ema"] for name in ("one", "two"))
    assert all(torch.allclose(a[k], b[k], rtol=1e-3, atol=1e-3) for k in a)


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile for CPUs takes a C++ compiler")
def test_compiled_is_eager_with_the_defaults_of_nano(call, few_held_out, monkeypatch):
    """A real compilation, of an encoder of one block: a C++ compiler takes a second for each of some forty kernels."""
    small = vae.EncoderConfig(width=128, depth=1, heads=4, patch=(4, 8, 8))
    monkeypatch.setattr(vae, "encoder_sizes", lambda *preset: small)
    monkeypatch.setattr(utils.RunLog, "EVERY", 1)
    torch._dynamo.utils.counters.clear()
    for choice in ("off", "on"):
        assert call("vae.py", f"{SMALL} --steps 2 --batch-size 2 --compile {choice} --out {choice}.pt") == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # encoder and decoder
    assert len(checkpoints.load("on.pt", "vae", "")["config"]["extras"]) == 5
    for eager, compiled in zip(losses_of("runs/off"), losses_of("runs/on"), strict=True):
        assert compiled == approx(eager, rel=1e-4)


SLOW = """
import importlib, sys, time
sys.path.insert(0, sys.argv.pop(1))
stage = importlib.import_module(sys.argv.pop(1))
from common import utils
finite_step = utils.FiniteStep.__call__
def slow(self, loss, lr):
    time.sleep(0.1 + 0.4 * utils.rank())  # the second process comes late to each step
    return finite_step(self, loss, lr)
utils.FiniteStep.__call__ = slow
utils.run(stage.main)
"""


def train_and_signal(cwd, stage, options, number, launch=(), group=False):
    """Start a slow training, signal it after its first checkpoint: (exit status, step of the checkpoint, output)."""
    (cwd / "slow.py").write_text(SLOW)
    command = [sys.executable, *launch, str(cwd / "slow.py"), str(ROOT), stage, *options.split(), "--save-every", "2"]
    with open(cwd / "log", "w") as log:
        process = subprocess.Popen(
            command, cwd=cwd, stdout=log, stderr=log, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what a background job would ignore
        )  # fmt: skip
    try:
        out, deadline = cwd / f"{stage}.pt", time.monotonic() + 120
        while not out.exists() and time.monotonic() < deadline:
            assert process.poll() is None, (cwd / "log").read_text()
            time.sleep(0.05)
        os.killpg(process.pid, number) if group else process.send_signal(number)
        process.wait(120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, checkpoints.load(out, stage, "")["step"], (cwd / "log").read_text()


@pytest.mark.parametrize("stage, number", [("vae", signal.SIGTERM), ("dit", signal.SIGINT)])
def test_a_signal_leaves_a_checkpoint_that_goes_on_exactly(call, few_held_out, stage1, tmp_path, stage, number):
    options = f"{SMALL} --batch-size 4" if stage == "vae" else f"{SMALL_STAGE2} --ckpt {stage1}"
    options += " --steps 20"
    status, step, output = train_and_signal(tmp_path, stage, options, number)
    assert status == 0 and 2 <= step < 20 and f"wrote {stage}.pt" in output and "Traceback" not in output, output
    for out in (stage, "whole"):
        assert call(f"{stage}.py", f"{options} --out {out}.pt --resume") == 0
    a, b = (checkpoints.load(name, stage, "") for name in (f"{stage}.pt", "whole.pt"))
    assert a["step"] == b["step"] == 20 and same(a["ema"], b["ema"]) and same(a["training"], b["training"])
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("group", [True, False], ids=["Ctrl-C", "SIGTERM"])
def test_under_torchrun_all_processes_end_at_the_same_step(tmp_path, group):
    """Ctrl-C signals torchrun and its processes, and torchrun signals its processes again; `kill` signals torchrun alone."""
    number, launch = signal.SIGINT if group else signal.SIGTERM, TORCHRUN[1:]
    _, step, output = train_and_signal(tmp_path, "vae", f"{SMALL} --batch-size 4 --steps 1000", number, launch, group)
    assert 2 <= step < 1000 and output.count("wrote vae.pt") == 1, output
    assert len(checkpoints.load(tmp_path / "vae.pt", "vae", "")["training"]) == 2


def test_on_a_full_disk_the_old_checkpoint_stays(call, few_held_out, monkeypatch, tmp_path):
    """A limit on the size of files stands for the end of the disk."""
    options = f"{SMALL} --batch-size 2 --steps"
    assert call("vae.py", f"{options} 2") == 0
    before = sorted(path.name for path in tmp_path.rglob("*"))
    done = subprocess.run(
        [sys.executable, str(ROOT / "vae.py"), *options.split(), "4", "--resume", "--save-every", "1"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "File too large" in done.stderr.replace("\r", "\n").split("\nerror: cannot write vae.pt: ")[1]
    assert checkpoints.load("vae.pt", "vae", "")["step"] == 2 and sorted(p.name for p in tmp_path.rglob("*")) == before
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(UserError, match="cannot write runs/values.npy"):  # and no SIGBUS when it is filled
            checkpoints.cached(Path("runs"), {}, 10**6, (3, 4), None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("compiled", [False, True])
def test_batch_norm_is_that_of_torch(compiled, tmp_path):
    """Compiled, it is one of several processes, whose exchange is part of the graph."""
    torch.manual_seed(0)
    ours, theirs = utils.BatchNorm(5), torch.nn.BatchNorm1d(5)
    for norm in (ours, theirs):
        norm.weight.data, norm.bias.data = torch.arange(1.0, 6), torch.arange(5.0)
    x, probe, results = 3 * torch.randn(64, 5) + 2, torch.randn(64, 5), []
    if compiled:
        ours.compile(fullgraph=True, backend="aot_eager")
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        for norm in (ours, theirs):
            y = norm(copy := x.clone().requires_grad_())
            results.append([y, torch.autograd.grad((y * probe).sum(), copy)[0], norm.running_mean])
    finally:
        if compiled:
            dist.destroy_process_group()
    torch.testing.assert_close(*results)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=0.02, atol=0)  # ours without n / (n - 1)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=0.02, atol=0.02)


def test_a_step_that_is_not_finite_changes_nothing():
    torch.manual_seed(0)
    layer, norm = torch.nn.Linear(3, 2), utils.BatchNorm(2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1, fused=True)
    step = utils.FiniteStep(layer, optimizer)

    def train(x):
        loss = norm(layer(x)).pow(3).mean()
        loss.backward()
        return step(loss, 0.1)

    def state():
        moments = [v.clone() for s in optimizer.state.values() for v in s.values()]
        return [t.clone() for t in (*layer.parameters(), norm.running_mean, norm.running_var)] + moments

    train(torch.randn(4, 3))
    for broken in (float("nan"), float("inf")):
        before = state()
        assert train(torch.tensor([[broken, 0, 0], [1, 2, 3]])) == 1 and all(map(torch.equal, before, state()))
        assert train(torch.randn(4, 3)) == 0 and not any(map(torch.equal, before, state()))


def test_a_log_has_means_goes_on_and_ends_a_training_that_skips_every_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(utils.RunLog, "EVERY", 5)
    for start in (0, 10):
        log = utils.RunLog(tmp_path / "vae.pt", 20, start)
        for step in range(start, start + 10):
            late = {"late": torch.tensor(2.0)} if step >= 10 else {}
            log.add(loss=torch.tensor(1.0 + step), skipped=torch.tensor(float(step % 5 > 2)), **late)
            log.step(step)
        log.write(), log.print("a message")
    rows = [list(row.values()) for row in losses_of(tmp_path / "runs/vae")]
    assert rows == [[5, 3, approx(0.4)], [10, 8, approx(0.4)], [15, 13, approx(0.4), 2], [20, 18, approx(0.4), 2]]
    assert capsys.readouterr().out.count("s: a message\n") == 2
    log.add(loss=torch.tensor(float("nan")), skipped=torch.tensor(1.0))
    with pytest.raises(UserError, match="no finite loss or gradient to step 25: .*smaller --lr"):
        log.step(24)


def test_gradients_are_clipped_averages_move_rates_decay_and_each_step_has_its_noise():
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.grad, before = torch.tensor([[30.0, 40.0]]), layer.weight.detach().clone()
    utils.FiniteStep(layer, torch.optim.SGD(layer.parameters(), lr=1.0, fused=True))(torch.tensor(0.0), 1.0)
    torch.testing.assert_close(before - layer.weight, torch.tensor([[0.6, 0.8]]))
    ema, model = utils.BatchNorm(2), utils.BatchNorm(2)
    model.weight.data.fill_(2.0), model.running_mean.fill_(4.0)
    utils.update_ema(ema, model, 0.75, 10**6)
    assert ema.weight.tolist() == [1.25, 1.25] and ema.running_mean.tolist() == [1.0, 1.0]
    utils.update_ema(ema, model, 0.75, 0)  # a tenth of the random start is left after the first step
    torch.testing.assert_close(ema.weight.data, torch.full((2,), 1.925))
    rates = [utils.learning_rate(step, 100, 2.0, 10) for step in range(100)]
    assert rates[0] == approx(0.2) and rates[9] == max(rates) == approx(2)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:])) and rates[55] == approx(1) and rates[99] < 0.01
    places = (0, 1), (0, 1), (0, 2), (1, 1)  # seed and step
    a, again, *others = (torch.randn(4, generator=utils.step_generator("cpu", *place)) for place in places)
    assert torch.equal(a, again) and not any(torch.equal(a, other) for other in others)


def test_blocks_computed_again_give_the_same_gradient_and_keep_less():
    def keeps(recompute):
        torch.manual_seed(0)
        config = vae.EncoderConfig(width=32, depth=6, heads=2, patch=(4, 8, 8), recompute=recompute)
        encoder, kept = vae.Encoder(config, vae.nerv.CONFIGS["nano"]), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            mean, _ = encoder(torch.randn(4, 16, 3, 32, 32))
        mean.square().sum().backward()
        return [p.grad for p in encoder.parameters()], sum(kept)

    (plain, much), (again, little) = keeps(False), keeps(True)
    assert little < 0.5 * much
    torch.testing.assert_close(plain, again)


@pytest.mark.parametrize("choice, expected", [("auto", False), ("off", False), ("on", True)])
def test_cpus_compute_in_float32_unless_asked_otherwise(choice, expected):
    """The same command gives the same figures on CPUs with bfloat16 and without."""
    with utils.autocast(torch.device("cpu"), choice):
        assert torch.is_autocast_enabled("cpu") == expected
