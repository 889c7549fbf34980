"""What keeps a long training right: resuming, several processes, steps to skip, checkpoints on a bad day."""

import contextlib
import csv
import datetime
import os
import pathlib
import platform
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, SMALL_DIT, script

import data
import dit
import nerv
import vae
from common import checkpoints, memory, utils
from common.utils import UserError

TINY = "--resolution 16 --num-frames 4 --num-tokens 8 --token-dim 8"  # CPUs without bfloat16 emulate it
ADVERSARIAL = "--gan-weight 0.1 --gan-start 2 --gan-warmup 1 --gan-every 2 --r1-every 1 --gan-width 2"


def losses_of(run_dir):
    with open(run_dir / "losses.csv") as f:
        return [{k: float(v) for k, v in row.items() if v and k != "seconds"} for row in csv.DictReader(f)]


def same(a, b):
    """Whether two nested checkpoints hold the same bits."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ------------------------------------------------------------------------------------------------------------------- resuming


def train_and_kill(cwd, program, *args):
    """Start a training and kill -9 it once it has written a checkpoint; returns the step of that checkpoint."""
    out = cwd / (program[:3] + ".pt")
    with open(cwd / "killed", "w") as log:
        process = subprocess.Popen([sys.executable, str(ROOT / program), *args], cwd=cwd, stdout=log, stderr=log)
    deadline = time.time() + 120
    while not out.exists() and time.time() < deadline:
        assert process.poll() is None, (cwd / "killed").read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return checkpoints.load(out, program[:3], "")["step"]


@pytest.mark.parametrize(
    "program, options",
    [
        ("vae.py", f"--steps 12 --save-every 6 --log-every 2 --num-frames 4 --batch-size 4 --accumulate 2 {ADVERSARIAL}"),
        ("dit.py", "--steps 12 --save-every 6 --log-every 2 --batch-size 4 --num-latents 16 --refine 0 --seed 5"),
    ],
)
def test_a_killed_training_goes_on_exactly(trained, tmp_path, program, options):
    stage, options = program[:3], options.split()
    if stage == "dit":
        options += ["--ckpt", str(trained / "vae.pt"), *SMALL_DIT]
    dirs = whole, killed = tmp_path / "whole", tmp_path / "killed"
    for cwd in dirs:
        cwd.mkdir()
    assert script(program, *options, cwd=whole).returncode == 0
    assert train_and_kill(killed, program, *options) == 6
    done = script(program, *options, "--resume", cwd=killed)
    assert done.returncode == 0 and "going on after step 6" in done.stdout, done.stderr
    a, b = (checkpoints.load(cwd / f"{stage}.pt", stage, "") for cwd in dirs)
    assert a["step"] == b["step"] == 12 and len(a["training"]) == (4 if stage == "vae" else 2)
    for part in ("ema", "training"):
        assert same(a[part], b[part])
    first, second = (losses_of(cwd / "runs" / stage) for cwd in dirs)
    assert first == second and [row["step"] for row in first] == list(range(2, 13, 2))


class Killed(Exception):
    pass


RESUMES = {  # what docs/training.md promises, beside the two kills above
    "stage 1": "vae.py --batch-size 4 --save-every 3",
    "stage 1, pictures": "vae.py --batch-size 4 --save-every 3 --pictures 8",
    "stage 1, bfloat16": f"vae.py {TINY} --batch-size 4 --save-every 3 --bf16 on",
    "stage 1, discriminator": f"vae.py --batch-size 2 --save-every 3 {ADVERSARIAL}",
    "stage 1, discriminator, bfloat16": f"vae.py --num-frames 4 --batch-size 2 --save-every 3 {ADVERSARIAL} --bf16 on",
    "stage 1, blocks computed again": "vae.py --batch-size 4 --save-every 3 --recompute on",
    "stage 2, bfloat16": "dit.py --batch-size 4 --save-every 3 --num-latents 32 --refine 0 --bf16 on",
    "stage 2, clips encoded anew": "dit.py --batch-size 4 --save-every 3 --no-cache-latents --refine 1",
    "stage 2, Muon": "dit.py --batch-size 4 --save-every 3 --num-latents 32 --refine 0 --optimizer muon",
}


def check_it_resumes(call, monkeypatch, program, options, steps):
    """A training of so many steps that is killed right after its first checkpoint and goes on ends as one that never was."""
    stage, command = program[:3], f"{options} --steps {steps} --log-every 1"
    results, rows, save, write = [], [], checkpoints.Saver.__call__, utils.RunLog.write

    def write_and_die(self):
        write(self)
        raise Killed

    for out in ("whole", "killed"):
        with monkeypatch.context() as patch:
            if out == "killed":
                patch.setattr(checkpoints.Saver, "__call__", lambda self, final, **content: save(self, True, **content))
                patch.setattr(utils.RunLog, "write", write_and_die)
                with pytest.raises(Killed):
                    call(program, f"{command} --out killed.pt --run-dir killed")
        assert call(program, f"{command} --out {out}.pt --run-dir {out} --resume") == 0
        results.append(checkpoints.load(f"{out}.pt", stage, ""))
        rows.append(losses_of(pathlib.Path(out)))
    assert rows[0] == rows[1] and len(rows[0]) == steps
    for part in ("ema", "training"):
        assert same(results[0][part], results[1][part])


@pytest.mark.parametrize("name, threads", [*((name, 1) for name in RESUMES), ("stage 1, discriminator, bfloat16", 2)])
def test_what_resumes_to_the_bit(call, trained, few_held_out, monkeypatch, name, threads):
    program, options = RESUMES[name].split(maxsplit=1)
    if program == "dit.py":
        options += f" --ckpt {trained}/vae.pt {' '.join(SMALL_DIT)}"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_it_resumes(call, monkeypatch, program, options, steps=5)
    finally:
        torch.set_num_threads(before)


def test_resume_without_a_checkpoint_starts_and_with_other_options_stops(trained, tmp_path):
    args = ("--steps", 1, "--batch-size", 4, "--num-frames", 4, "--resume")
    assert script("vae.py", *args, cwd=tmp_path).returncode == 0
    done = script("vae.py", *args, "--lr", 0.5, cwd=tmp_path)
    assert done.returncode == 2 and "--lr 0.0015, not 0.5" in done.stderr
    done = script("vae.py", "--steps", 2, *args[2:], cwd=tmp_path)  # longer is fine
    assert done.returncode == 0 and checkpoints.load(tmp_path / "vae.pt", "vae", "")["step"] == 2


# ---------------------------------------------------------------------------------------------------------- several processes


def torchrun(processes, *args, cwd):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launch, *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=150, env=env)
    assert done.returncode == 0, done.stderr
    return done


def test_two_processes_train_as_one(trained, tmp_path):
    # The same global batch: batch norm, R1, noise, data order and the averaged gradient all have a part in this.
    options = f"--steps 6 --batch-size 8 --log-every 1 --num-frames 8 --pictures 4 {ADVERSARIAL}".split()
    for name, processes in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        torchrun(processes, ROOT / "vae.py", *options, cwd=tmp_path / name)
    one, two = (losses_of(tmp_path / name / "runs" / "vae") for name in ("one", "two"))
    assert len(one) == 6 and set(one[-1]) == {"step", "loss", "l2", "kl", "gan"}
    assert {"disc_loss", "disc_margin"} < set(one[2])  # gan_start 2, every second step
    for a, b in zip(one, two):
        margins = [row.pop("disc_margin", 0.0) for row in (a, b)]  # near zero, where rounding is all there is
        assert a == pytest.approx(b, rel=2e-4) and margins[0] == pytest.approx(margins[1], abs=1e-3)
    a, b = (checkpoints.load(tmp_path / name / "vae.pt", "vae", "")["ema"] for name in ("one", "two"))
    assert all(torch.allclose(a[k], b[k], rtol=1e-3, atol=1e-4) for k in a)


@pytest.mark.parametrize("cache", ["--cache-latents", "--no-cache-latents"])
def test_two_processes_train_as_one_in_stage_2(trained, tmp_path, cache):
    options = f"--steps 5 --batch-size 8 --log-every 1 --num-latents 21 --refine 1 --cond-frames 5 {cache}".split()
    options += ["--ckpt", trained / "vae.pt", *SMALL_DIT]
    for name, processes in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        torchrun(processes, ROOT / "dit.py", *options, cwd=tmp_path / name)
    one, two = (losses_of(tmp_path / name / "runs" / "dit") for name in ("one", "two"))
    assert len(one) == 5
    for a, b in zip(one, two):
        assert a == pytest.approx(b, rel=2e-4)


INTERRUPTED = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
import vae
from common import memory, utils
finite_step = utils.FiniteStep.__call__
def slow(self, loss, lr):
    finite_step(self, loss, lr)
    time.sleep(0.5 * utils.rank())  # the second process comes late to each step
utils.FiniteStep.__call__ = slow
utils.run(vae.main)
"""


@pytest.mark.parametrize("whole_group", [True, False])
def test_ctrl_c_reaches_all_processes_at_the_same_step(tmp_path, whole_group):
    """Ctrl-C signals torchrun and its processes, and torchrun signals its processes again; `kill` signals torchrun alone."""
    (tmp_path / "slow.py").write_text(INTERRUPTED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "slow.py")]
    options = f"{ROOT} --steps 1000 --num-frames 4 --batch-size 4 --log-every 1 --save-every 2 --run-dir run".split()
    with open(tmp_path / "log", "w") as log:
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([*launch, *options], cwd=tmp_path, stdout=log, stderr=log, env=env, start_new_session=True)
    try:
        deadline = time.time() + 90
        while not (tmp_path / "vae.pt").exists() and time.time() < deadline:
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        saved = checkpoints.load(tmp_path / "vae.pt", "vae", "")["step"]
        os.killpg(process.pid, signal.SIGINT) if whole_group else process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    said = (tmp_path / "log").read_text()
    steps = int(re.search(r"interrupted after (\d+) steps", said)[1])
    assert checkpoints.load(tmp_path / "vae.pt", "vae", "")["step"] == steps >= saved > 0, said


def test_a_second_ctrl_c_ends_at_once_unless_it_is_an_echo():
    with utils.Interrupt() as interrupt:
        assert not interrupt.stop()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.stop()
        interrupt.asked -= interrupt.GRACE  # some seconds later
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


@pytest.mark.parametrize("program", ["vae", "dit"])
def test_an_echo_does_not_end_the_last_checkpoint(call, trained, few_held_out, monkeypatch, program):
    """The second of two signals may come while the last checkpoint is written, which takes seconds where it is large."""
    save, asked = checkpoints.Saver.__call__, []

    def echo(saver, final, **parts):
        if final:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            asked.append(parts["step"])
        save(saver, final, **parts)

    monkeypatch.setattr(checkpoints.Saver, "__call__", echo)
    monkeypatch.setattr(utils.Interrupt, "stop", lambda self: os.kill(os.getpid(), signal.SIGINT) or True)
    options = {"vae": "--batch-size 2", "dit": f"--ckpt {trained}/vae.pt --batch-size 2 --num-latents 8 --depth 1"}
    assert call(f"{program}.py", f"--steps 5 --out last.pt {options[program]}") == 0
    assert asked == [1] and checkpoints.load("last.pt", program, "")["step"] == 1


def test_processes_wait_for_each_other_without_a_limit(monkeypatch):
    calls = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(utils, "pick_device", torch.device)
    for name, value in (("init_process_group", lambda **kw: calls.append(kw)), ("get_rank", lambda: 1)):
        monkeypatch.setattr(utils.dist, name, value)
    monkeypatch.setattr(utils.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, there in (("cpu", 2), ("cuda:1", 2), ("cuda:0", 3)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(there))
        assert utils.start_processes(name) == (torch.device(name), 1, 2)
    assert all(kw["timeout"] >= datetime.timedelta(days=1) for kw in calls)
    assert calls[0]["backend"] == "gloo" and "device_id" not in calls[0]
    # NCCL for gradients, on the card of this process; gloo for what CPUs tell each other, so that no GPU is waited for.
    assert calls[1]["backend"] == "cpu:gloo,cuda:nccl" and calls[1]["device_id"] == torch.device("cuda:1")
    assert calls[2]["backend"] == "gloo"  # three processes share two cards, which NCCL refuses


@pytest.fixture
def alone(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_the_discriminator_is_not_compiled(tmp_path, monkeypatch):
    """R1 takes a second derivative, and compiled for CUDA its backward pass ended in an error."""
    monkeypatch.chdir(tmp_path)
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    vae.main(f"--steps 3 --batch-size 4 --compile on {ADVERSARIAL}".split())
    assert compiled == ["Encoder", "NeRV"]


def test_batch_norm_compiles_as_a_whole_where_there_are_several_processes(alone):
    torch.manual_seed(0)
    results = []
    for compiled in (False, True):
        norm, x = vae.BatchNorm(3), torch.arange(12.0).view(4, 3).square().requires_grad_()
        if compiled:
            norm.compile(fullgraph=True, backend="aot_eager")
        y = norm(x)
        results.append([y, norm.running_mean, *torch.autograd.grad((y**3).sum(), x)])
    torch.testing.assert_close(*results)


def test_an_error_shows_before_other_processes_are_waited_for(alone, capsys):
    """destroy_process_group may wait for them for ever."""

    def fail():
        raise UserError("it is so")

    with pytest.raises(SystemExit):
        utils.run(fail)
    assert dist.is_initialized() and "error: it is so" in capsys.readouterr().err
    utils.run(lambda: None)
    assert not dist.is_initialized()


def test_accumulated_parts_have_the_gradient_of_the_whole():
    # Without batch norm in training mode a batch in two parts is the batch.
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(3, 1), torch.randn(8, 3)
    layer(x).square().mean().backward()
    whole = layer.weight.grad.clone()
    layer.zero_grad()
    stream = data.Stream(8, 8, parts=2)
    batches = iter(stream)
    for _ in range(2):
        (layer(x[next(batches)]).square().mean() / 2).backward()
    torch.testing.assert_close(layer.weight.grad, whole)


def test_a_batch_that_does_not_divide_is_refused():
    assert utils.rows_per_process(32, 2, 8) == 2
    with pytest.raises(UserError, match="--batch-size 20 .* multiple of 8"):
        utils.rows_per_process(20, 1, 8)


def test_random_numbers_of_a_step_depend_on_seed_and_step_alone():
    draw = [torch.randn(4, generator=utils.step_generator("cpu", *at)) for at in ((0, 1), (0, 1), (0, 2), (1, 1))]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2]) and not torch.equal(draw[0], draw[3])


# ------------------------------------------------------------------------------------------------------------------- the step


def test_batch_norm_is_that_of_torch():
    torch.manual_seed(0)
    ours, theirs = vae.BatchNorm(5), torch.nn.BatchNorm1d(5)
    for norm in (ours, theirs):
        norm.weight.data, norm.bias.data = torch.arange(1.0, 6), torch.arange(5.0)
    x = 3 * torch.randn(64, 5) + 2
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [norm(i) for norm, i in zip((ours, theirs), inputs)]
    torch.testing.assert_close(*outputs)
    probe = torch.randn(64, 5)
    torch.testing.assert_close(*(torch.autograd.grad((o * probe).sum(), i)[0] for o, i in zip(outputs, inputs)))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=0.02, atol=0)  # ours without n / (n - 1)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(broken):
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    norm = vae.BatchNorm(2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1, fused=True)
    step = utils.FiniteStep(layer, optimizer, 1.0)

    def train(x):
        loss = norm(layer(x)).pow(3).mean()
        loss.backward()
        step(loss, 0.1)

    def state():
        return [t.clone() for t in (*layer.parameters(), norm.running_mean, norm.running_var)] + [
            v.clone() for s in optimizer.state.values() for v in s.values()
        ]

    train(torch.randn(4, 3))
    before = state()
    train(torch.tensor([[broken, 0, 0], [1, 2, 3]]))
    assert step.skipped == step.in_a_row == 1 and all(map(torch.equal, before, state()))
    train(torch.randn(4, 3))
    assert step.skipped == 1 and step.in_a_row == 0 and not any(map(torch.equal, before, state()))


def test_a_run_of_skipped_steps_ends_with_the_step_and_the_clips_named():
    layer = torch.nn.Linear(1, 1)
    step = utils.FiniteStep(layer, torch.optim.AdamW(layer.parameters(), fused=True), 1.0)
    shapes, stream = data.Shapes(length=9), data.Stream(9, 2)
    for i in range(step.LIMIT):
        step.check(i, shapes, stream)
        loss = layer(torch.tensor([[float("nan")]])).sum()
        loss.backward()
        step(loss, 0.1)
    named = ".*".join(f"clip {i % 9}" for i in stream.batch(step.LIMIT - 1))
    with pytest.raises(UserError, match=f"20 steps in a row, last in step {step.LIMIT} .*{named}"):
        step.check(step.LIMIT - 1, shapes, stream)


def test_gradients_are_clipped_to_the_largest_norm():
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[30.0, 40.0]])
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, fused=True)
    before = layer.weight.detach().clone()
    utils.FiniteStep(layer, optimizer, 0.5)(torch.tensor(0.0), 1.0)
    torch.testing.assert_close(before - layer.weight, torch.tensor([[0.3, 0.4]]))


def test_ema_is_a_moving_average_of_parameters_and_buffers():
    ema, model = vae.BatchNorm(2), vae.BatchNorm(2)
    model.weight.data.fill_(2.0), model.running_mean.fill_(4.0)
    utils.update_ema(ema, model, 0.75)
    assert ema.weight.tolist() == [1.25, 1.25] and ema.running_mean.tolist() == [1.0, 1.0]


# ----------------------------------------------------------------------------------------------------------------- checkpoints


def test_a_full_disk_is_reported_and_the_old_checkpoint_survives(tmp_path):
    # A limit on the size of files stands for the end of the disk. In the middle of a training it goes on; at the end not.
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); from common import checkpoints, utils\n"
        "def main():\n"
        "    checkpoints.save('vae.pt', stage='vae', step=1)\n"
        "    checkpoints.save('vae.pt', final=False, stage='vae', step=2, x=torch.zeros(100_000))\n"
        "    print('goes on')\n"
        "    checkpoints.save('vae.pt', stage='vae', step=3, x=torch.zeros(100_000))\n"
        "utils.run(main)\n"
    )
    command = [sys.executable, "-c", code, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=small_files)
    assert done.returncode == 2 and done.stdout == "goes on\n"
    assert done.stderr.count("cannot write the checkpoint vae.pt") == 2 and "Traceback" not in done.stderr
    assert "the one from before is as it was; training goes on" in done.stderr and "File too large" in done.stderr
    assert checkpoints.load(tmp_path / "vae.pt", "vae", "")["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["vae.pt"]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    save, go_on, saved = checkpoints.save, threading.Event(), []

    def slow(path, final, **content):
        assert go_on.wait(10)
        saved.append(save(path, final, **content))

    monkeypatch.setattr(checkpoints, "save", slow)
    saver, layer = checkpoints.Saver(tmp_path / "vae.pt"), torch.nn.Linear(2, 2)
    weight, training = layer.weight.detach().clone(), {"model": layer.state_dict(), "counts": [torch.zeros(1), 3]}
    saver(False, stage="vae", ema=layer.state_dict(), training=training)
    assert not saved  # it has returned, and nothing is written yet
    torch.nn.init.zeros_(layer.weight)
    go_on.set()
    saver(True, stage="vae", ema=layer.state_dict(), training={})
    assert len(saved) == 2  # one after the other; the last one is there when it returns
    monkeypatch.setattr(checkpoints, "save", lambda path, final, **content: saved.append(content))
    saver(False, stage="vae", ema={"weight": weight}, training=training)
    saver.writing.result()
    assert torch.equal(saved[-1]["ema"]["weight"], weight) and saved[-1]["training"]["counts"][1] == 3
    assert checkpoints.load(tmp_path / "vae.pt", "vae", "")["ema"]["weight"].abs().sum() == 0


def test_what_is_being_written_is_what_was_there_when_it_was_asked_for(tmp_path, monkeypatch):
    save, go_on = checkpoints.save, threading.Event()
    monkeypatch.setattr(checkpoints, "save", lambda *a, **kw: go_on.wait(10) and save(*a, **kw))
    saver, weight = checkpoints.Saver(tmp_path / "vae.pt"), torch.ones(3)
    saver(False, stage="vae", ema={"weight": weight}, training={"step": [weight]})
    weight.zero_()
    go_on.set()
    saver.writing.result()
    ckpt = checkpoints.load(tmp_path / "vae.pt", "vae", "")
    assert ckpt["ema"]["weight"].tolist() == ckpt["training"]["step"][0].tolist() == [1, 1, 1]


def test_a_preview_that_fails_leaves_the_checkpoint(call, tmp_path, monkeypatch):
    """Previews are the largest maps of a training: it is saved before them."""

    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(vae, "reconstruct", fail)
    for options in ("--steps 2", "--steps 4 --save-every 2 --out early.pt"):
        with pytest.raises(MemoryError):
            call("vae.py", f"{options} --batch-size 2 --decode-frames 1")
    assert checkpoints.load("vae.pt", "vae", "")["step"] == 2
    deadline = time.time() + 10
    while not os.path.exists("early.pt") and time.time() < deadline:
        time.sleep(0.05)  # it is written beside
    assert checkpoints.load("early.pt", "vae", "")["step"] == 2


def test_a_run_of_skipped_steps_is_counted_over_a_resume():
    layer = torch.nn.Linear(1, 1)
    first, second = (utils.FiniteStep(layer, torch.optim.AdamW(layer.parameters(), fused=True), 1.0) for _ in range(2))
    for _ in range(3):
        loss = layer(torch.tensor([[float("nan")]])).sum()
        loss.backward()
        first(loss, 0.1)
    second.load_state_dict(first.state_dict())
    assert second.in_a_row == second.skipped == 3


# -------------------------------------------------------------------------------------------------------- precision and memory


def test_cpus_compute_in_float32_unless_asked_otherwise(monkeypatch):
    """The same command gives the same figures on CPUs with bfloat16 and without; a GPU has it only where it is native."""
    cpu, asked = torch.device("cpu"), []
    for choice, expected in (("auto", False), ("off", False), ("on", True)):
        with utils.autocast(cpu, choice):
            assert torch.is_autocast_enabled("cpu") == expected
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: asked.append(including_emulation))
    utils.autocast(torch.device("cuda"), "auto")
    assert asked == [False]


def test_every_script_that_picks_a_gpu_sets_it_up(monkeypatch):
    """Trainings and sampling alike: TF32 where autocast leaves float32, on the card of this process."""
    chosen, cudnn = [], torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    try:
        torch.set_float32_matmul_precision("highest")
        assert utils.pick_device("auto") == torch.device("cuda:1") and chosen == [torch.device("cuda:1")]
        assert (torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark) == ("high", True, True)
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32, cudnn.benchmark = before[1:]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_large_tensors_stay_with_the_process():
    """After some rounds, in which the heap gets its shape, 64 MB come without a page fault for each page."""
    code = """
import resource, torch
from common import utils
utils.pick_device("cpu")
for _ in range(30):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    env = os.environ | {"MALLOC_MMAP_MAX_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}  # what glibc begins with
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100


def test_blocks_computed_again_give_the_same_gradient_and_keep_less():
    def keeps(recompute):
        torch.manual_seed(0)
        nerv_config = nerv.CONFIGS["nano"]
        encoder = vae.Encoder(vae.EncoderConfig(width=32, depth=6, heads=2, patch=(4, 8, 8)), nerv_config)
        encoder.recompute, kept = recompute, {}

        def pack(x):
            kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes(), x
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            mean, _ = encoder(torch.randn(4, 16, 3, 32, 32))
        mean.square().sum().backward()
        return [p.grad for p in encoder.parameters()], sum(size for size, _ in kept.values())

    (plain, much), (again, little) = keeps(False), keeps(True)
    assert little < 0.5 * much
    for a, b in zip(plain, again):
        torch.testing.assert_close(a, b)


def test_blocks_are_computed_again_where_a_gpu_is_too_small_and_nowhere_else(monkeypatch):
    def make():
        return SimpleNamespace(encoder=SimpleNamespace(recompute=None)), None, None

    def stage1(make, frames, bf16):
        assert (frames, bf16) == (16, True)
        gib = 2**30 * (1 if make()[0].encoder.recompute else 3)  # a clip
        return lambda rows: {"weights": 2**30, "encoder": rows * gib}

    monkeypatch.setattr(memory, "stage1", stage1)

    def choose(recompute, gib, world=1, **options):
        return memory.choose_stage1(vae.Config(recompute=recompute, **options), make, 32, world, int(gib * 2**30))

    assert choose("auto", 120) == (False, "") and choose("on", 120) == (True, "") and choose("off", 120) == (False, "")
    assert choose("auto", 100) == (True, "")  # a tenth of which is not ours; 97 GiB, or 33
    assert choose("off", 100) == (
        False,
        "warning: 32 clips at a time take about 97 GiB, this GPU has 100; --accumulate 2 would fit",
    )
    assert choose("auto", 20, accumulate=3) == (
        True, "warning: 32 clips at a time take about 33 GiB, this GPU has 20; --accumulate 6 would fit"
    )  # fmt: skip
    alone, eight = choose("auto", 2.5), choose("auto", 2.5, world=8)
    assert "no number of parts" in alone[1] and "--accumulate 32 would fit" in eight[1]


# ----------------------------------------------------------------------------------------------------------- a bad day's files


def test_a_kill_at_any_moment_leaves_a_checkpoint_that_loads(tmp_path):
    path = tmp_path / "vae.pt"
    checkpoints.save(path, stage="vae", step=0)
    steps = []
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
    assert max(steps) > 0


def test_checkpoints_hold_the_revision_and_all_of_a_training(trained):
    for stage in ("vae", "dit"):
        ckpt = checkpoints.load(trained / f"{stage}.pt", stage, "")
        assert ckpt["revision"] == utils.git_revision()
        assert {"format", "stage", "step", "config", "classes", "ema", "training"} < set(ckpt)
        optimizer = ckpt["training"]["step"]["optimizer"]  # nano has Muon beside AdamW
        averages = optimizer.pop("averages")
        assert averages and (stage == "dit" or all(average.any() for average in averages))  # dit's gates are zero at first
        assert optimizer.pop("adamw", optimizer)["state"] and ckpt["training"]["step"]["skipped"] == 0
    assert "training" not in ckpt["vae"]  # what using stage 1 does not take


def test_the_log_is_for_tensorboard_too_where_it_is_installed(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = utils.RunLog(tmp_path / "run", 4, 2)
    for step in range(4):
        log.add(loss=torch.tensor(float(step)))
        log.step(step)
    log.video(4, "samples", data.Shapes()[0][0])
    log.close()
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(2, 0.5), (4, 2.5)]
    assert events.Images("samples")[0].encoded_image_string[:6] == b"GIF89a"
    assert [row["loss"] for row in losses_of(tmp_path / "run")] == [0.5, 2.5]


def test_what_comes_after_stage_1_sees_whole_clips(call, folder, monkeypatch):
    where = f"--dataset folder --data-dir {folder} --preset nano --cache off --batch-size 2"
    assert call("vae.py", f"{where} --steps 1 --stride 2 --num-frames 8 --flip --crop-scale 0.5") == 0
    ckpt = checkpoints.load("vae.pt", "vae", "")
    after = vae.clips_of(ckpt, data_dir="", cache_dir="elsewhere", num_frames=12)
    assert ckpt["config"]["crop_scale"] == 0.5 and after.crop_scale == 1 and after.flip
    assert (after.data_dir, after.cache_dir, after.num_frames, after.stride) == (str(folder), "elsewhere", 12, 2)
    seen, read = [], dit.cached_latents
    monkeypatch.setattr(dit, "cached_latents", lambda *args, **kw: seen.append(args[3]) or read(*args, **kw))
    assert call("dit.py", "--steps 1 --batch-size 2 --num-latents 4 --refine 0 --principal 0 0 --ckpt vae.pt") == 0
    assert (seen[0].size, seen[0].resolution, seen[0].flip) == (32, 32, True)
