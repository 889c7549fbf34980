"""The demo: it ends with its trainings, and judges what they leave."""

import os
import re
import signal
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from test_readme import problem

import data
import demo
from common import video
from common.utils import UserError


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
    commands = []
    monkeypatch.setattr(demo, "weights", Mock(side_effect=None if weights else UserError))
    monkeypatch.setattr(demo, "call", lambda script, *args: commands.append((script.removesuffix(".py"), list(map(str, args)))))
    demo.train(tmp_path)
    assert len(commands) == 6 and ("alex" in commands[0][1]) == weights
    assert [problem(*command) for command in commands] == [""] * 6


def test_what_is_there_is_judged(trained, monkeypatch, capsys):
    monkeypatch.setattr(demo, "TRAIN_CLIPS", 32)
    monkeypatch.setattr(demo, "PER_CLASS", 1)
    monkeypatch.setattr(data.Shapes, "__len__", lambda self: 36)
    monkeypatch.setattr("sys.argv", ["demo.py", "--skip-training", "--out-dir", str(trained)])
    demo.main()
    assert re.search(r"classifier accuracy, 9 generated clips +\d+\.\d %", capsys.readouterr().out)
    assert (trained / "nearest.png").is_file()


def test_the_nearest_training_clip_is_found():
    train = [data.Shapes(length=36)[i] for i in range(36)]
    few = torch.stack([video.to_clip(train[i][0]) for i in (5, 30)])
    found = demo.nearest_clips(few + 0.02, train)
    assert torch.equal(found, few)
