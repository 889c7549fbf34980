"""The demo: it ends with its trainings, and judges what they leave."""

import os
import re
import signal
import subprocess
import sys

import pytest
import torch

import data
import demo
import dit
import sample
import vae
from common import utils, video
from common.utils import UserError


def test_a_script_that_fails_ends_the_demo(monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(UserError, match="sample.py failed"):
        demo.call("sample.py")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_the_start_of_a_training_and_all_else_ends_it_too(monkeypatch, number):
    started, original = [], subprocess.Popen

    def popen(command):
        started.append(original([sys.executable, "-c", "import time; time.sleep(600)"]))
        os.kill(os.getpid(), number)
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(KeyboardInterrupt):
        demo.call("vae.py")
    assert started[0].returncode == -signal.SIGTERM


@pytest.mark.parametrize("weights", [True, False])
def test_its_commands_are_those_of_the_scripts(monkeypatch, tmp_path, weights):
    def missing(name):
        raise UserError("no weights")

    commands = []
    monkeypatch.setattr(demo, "weights", str if weights else missing)
    monkeypatch.setattr(demo, "call", lambda script, *args: commands.append((script, list(map(str, args)))))
    demo.train(tmp_path)
    assert [script for script, _ in commands] == ["vae.py", "dit.py", *["sample.py"] * 4]
    for script, args in commands:
        module = {"vae.py": vae, "dit.py": dit, "sample.py": sample}[script]
        config = utils.parse_options(module.Config, "", getattr(module, "preset_defaults", None), args)
        assert script != "vae.py" or (config.lpips, config.preset) == ("alex" if weights else "none", "nano")


def test_what_is_there_is_judged(trained, monkeypatch, capsys):
    monkeypatch.setattr(demo, "TRAIN_CLIPS", 32)
    monkeypatch.setattr(demo, "PER_CLASS", 1)
    monkeypatch.setattr(data.Shapes, "__len__", lambda self: 36)
    monkeypatch.setattr("sys.argv", ["demo.py", "--skip-training", "--out-dir", str(trained)])
    demo.main()
    out = capsys.readouterr().out
    for line in (
        r"PSNR of held-out reconstructions +\d+\.\d\d dB", r"PSNR between the frames, never trained on +\d+\.\d\d dB",
        r"classifier accuracy, 36 reconstructions +\d+\.\d %", r"classifier accuracy, 9 generated clips +\d+\.\d %",
    ):  # fmt: skip
        assert re.search(line, out), line
    assert (trained / "nearest.png").is_file()


def test_the_nearest_training_clip_is_found():
    train = [data.Shapes(length=36)[i] for i in range(36)]
    few = torch.stack([video.to_clip(train[i][0]) for i in (5, 30)])
    found = demo.nearest_clips(few + 0.02, train)
    assert torch.equal(found, few)
