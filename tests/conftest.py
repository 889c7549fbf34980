"""What the tests share: the repository on the path, tiny videos, and one tiny trained pair of checkpoints."""

import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path

# On a machine with GPUs the suite is that of one without: exact figures are those of CPUs, and two processes may share no card.
# A test that needs a GPU is run with NERV_TEST_GPU=1.
if not os.environ.get("NERV_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Scripts that the tests start have a thread each: two would wait for each other wherever a core has other work.
THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", "1"))

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import dit  # noqa: E402
import vae  # noqa: E402
from common import utils, video  # noqa: E402

SMALL = "--resolution 16 --num-frames 4 --num-tokens 8 --token-dim 8 --width 8"  # of vae.py; sizes that dit.py takes over
SMALL_DIT = ("--width", "48", "--depth", "2")  # for tests that are not about the denoiser


def pytest_configure(config):
    config.addinivalue_line("markers", "browser: takes Chromium and playwright; make test-page runs it")
    config.addinivalue_line("markers", "weights: takes pretrained weights, which make test-weights fetches first")


torch.set_num_threads(THREADS)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def torchrun(*args, cwd):
    """Run a script as two processes, to its end."""
    done = subprocess.run([*TORCHRUN, *args], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def few_held_out(monkeypatch):
    """Trainings of this process measure nine held-out clips, not 64, which take a second."""
    fixed_clips = data.fixed_clips
    monkeypatch.setattr(data, "fixed_clips", lambda dataset, count: fixed_clips(dataset, min(count, 9)))


def run(program, options=""):
    """Run a script in this process: run("vae.py", "--steps 2"), run("siblings.codec", "info a.nerv"); returns the exit status.

    Options may be a list, where one has a space.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [program, *(options.split() if isinstance(options, str) else map(str, options))])
        try:
            utils.run(importlib.import_module(program.removesuffix(".py")).main)
        except SystemExit as stop:
            return stop.code
    return 0


@pytest.fixture
def call(monkeypatch, tmp_path):
    """`run` in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    return run


def same(a, b):
    """Whether two nested checkpoints hold the same bits."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def losses_of(run_dir):
    """The rows of losses.csv, but for the seconds."""
    with open(f"{run_dir}/losses.csv") as f:
        return [{k: float(v) for k, v in row.items() if v and k != "seconds"} for row in csv.DictReader(f)]


def write_mp4(path, clip):
    video.write_mp4(path, [clip])
    return Path(f"{path}.mp4")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A data set on disk: train/ has 3 clips each of the classes ring_circle and square_updown, test/ has one each."""
    root, shapes = tmp_path_factory.mktemp("videos"), data.Shapes(length=72)
    for name in ("ring_circle", "square_updown"):
        for i in range(4):
            frames, label = shapes[shapes.classes.index(name) + 9 * i]
            assert shapes.classes[label] == name
            write_mp4(root / ("test" if i == 3 else "train") / name / f"{i}", video.to_clip(frames))
    return root


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A directory in which vae.py and dit.py have run for two steps: vae.pt, dit.pt, runs/vae, runs/dit."""
    cwd, tiny = tmp_path_factory.mktemp("trained"), "--steps 2 --batch-size 4 --seed 1".split()
    vae.main([*tiny, "--out", f"{cwd}/vae.pt"])
    dit.main([*tiny, "--num-latents", "80", *SMALL_DIT, "--ckpt", f"{cwd}/vae.pt", "--out", f"{cwd}/dit.pt"])
    return cwd


@pytest.fixture(scope="session")
def predictor(trained, tmp_path_factory):
    """A dit.pt of two steps that goes on from 5 frames."""
    out = tmp_path_factory.mktemp("predictor") / "dit.pt"
    options = f"--ckpt {trained}/vae.pt --cond-frames 5 --steps 2 --batch-size 4 --num-latents 80 {' '.join(SMALL_DIT)}"
    dit.main([*options.split(), "--out", str(out)])
    return out
