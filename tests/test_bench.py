"""Costs against counting by hand; each measurement once, small; bench.gpu on a CPU."""

import dataclasses
import re
import shlex
import sys
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import data
import dit
import evaluate
import sample
import vae
from bench import costs, gpu, load, speed
from common import utils
from siblings import codec, rivals, vin


def test_costs_of_a_layer_and_of_attention():
    layer, x = torch.nn.Linear(6, 4), torch.randn(5, 6)
    flops, kept = costs.forward_costs(lambda: layer(x).relu())
    assert flops == 2 * 5 * 6 * 4 and kept == x.nbytes + 5 * 4 * 4  # the input, and what ReLU gives
    with FakeTensorMode():
        q, k = torch.empty(2, 3, 7, 8), torch.empty(2, 3, 9, 8)
        flops, _ = costs.forward_costs(partial(torch.nn.functional.scaled_dot_product_attention, q, k, k))
    assert flops == 2 * (2 * 2 * 3 * 7 * 9 * 8)


def test_costs_of_s(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["costs", "costs", "--presets", "S"])
    costs.main()
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[2].split("|")[1:]]
    assert cells[:8] == ["S", "16 × 128²", "3.52 M", "4.18 M", "178.0 M", "457.3 M", "128 × 128", "48 : 1"]


def test_formulas_of_long_videos_are_what_pytorch_counts():
    c, config = dit.DiTConfig(num_tokens=6, token_dim=5, width=24, depth=3, heads=4), vin.VINConfig(global_tokens=7, heads=2)
    with FakeTensorMode():
        near, far = vin.VIN(c, config), vin.VIN(c, dataclasses.replace(config, neighbours=False))
        one, whole = dit.DiT(c), dit.DiT(dataclasses.replace(c, num_tokens=30))
        x, step = torch.empty(5, 6, 5), torch.ones(5, dtype=torch.long)
        runs = [partial(one, x, step, step), *(partial(net, x, step, step, chunks=5) for net in (far, near))]
        runs.append(partial(whole, x.view(1, 30, 5), step[:1], step[:1]))
        counted = [costs.forward_costs(run)[0] for run in runs]
    assert counted == list(vin.flops(c, config, 5).values())


@pytest.mark.parametrize("topic", ["sample", "growth"])
def test_speed_prints_its_table(topic, trained, capsys, monkeypatch):
    monkeypatch.setattr(speed.dit, "generate", lambda model, labels, **kw: torch.zeros(len(labels), 4, model.config.token_dim))
    monkeypatch.setattr(speed, "machine", lambda config: (torch.device("cpu"), 1e9))
    monkeypatch.setattr(sys, "argv", f"speed {topic} --repeats 1 --ckpt {trained}/dit.pt".split())
    utils.run(speed.main)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) > 4 and len({line.count("|") for line in lines}) == 1


def test_loading_prints_its_table_and_decodes_what_was_encoded(capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setitem(codec.ENCODERS, "fastnerv", vae.EncoderConfig(width=24, depth=1, heads=2, patch=(8, 64, 64)))
    monkeypatch.setattr(sys, "argv", "load --videos 1 2 --threads 1 2 --repeats 1".split())
    load.main()
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 8 and {len(line) for line in lines} == {6}
    frames, _ = data.Shapes(resolution=256, num_frames=8)[0]
    assert abs(load.h264(rivals.encode("x264", frames, 25, crf=10)).astype(float) - frames).mean() < 4


def test_gpu_runs_its_programs_and_what_fails_is_a_row(tmp_path, monkeypatch, capsys):
    pattern, out = "x=.*", tmp_path / "a b"
    programs = [("steps", name, f'-c "{code}"', pattern) for name, code in (("good", "print('x=1')"), ("bad", "1 / 0"))]
    monkeypatch.setattr(gpu, "programs", lambda *args: [*programs, ("tests", "not wanted", "-c 1", pattern)])
    monkeypatch.setattr(sys, "argv", ["gpu", "--only", "steps", "train", "--out-dir", str(out)])
    gpu.main()
    good, bad = (out / "table.md").read_text().splitlines()[4:]
    assert "| good | x=1 |" in good and "**failed**: ZeroDivisionError" in bad and "1 failed" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="no end within"):
        gpu.run("-c 'import time; time.sleep(99)'", out / "late.log", 0.5, stop=False)


def test_gpu_names_programs_and_options_that_exist(monkeypatch):
    """Every command, as on a GPU."""
    scripts = {"vae.py": (vae.Config, vae.preset_defaults), "dit.py": (dit.Config, dit.preset_defaults)}
    scripts |= {"sample.py": (sample.Config, None), "evaluate.py": (evaluate.Config, None), "bench.speed": (speed.Config, None)}
    for _, _, command, pattern in gpu.programs(gpu.Config(data_dir="a b"), gpu=True):
        words = shlex.split(command)
        place = next((k for k, word in enumerate(words) if word.split("/")[-1] in scripts), None)
        if place is not None:
            cls, presets = scripts[name := words[place].split("/")[-1]]
            assert name != "bench.speed" or words[place + 1] in speed.TOPICS
            utils.parse_options(cls, "", presets, words[place + 1 + (name == "bench.speed") :])
        re.compile(pattern)
