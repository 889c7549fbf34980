"""Costs against counting by hand; each measurement once, small; bench.gpu on a CPU."""

import re
import shlex

import pytest
import torch
from test_readme import problem

import dit
import vae
from bench import costs, gpu, speed
from siblings import codec, vin


def test_costs_of_a_layer_and_of_s(call, capsys):
    layer, x = torch.nn.Linear(6, 4), torch.randn(5, 6)
    flops, kept = costs.forward_costs(lambda: layer(x).relu())
    assert flops == 2 * 5 * 6 * 4 and kept == x.nbytes + 5 * 4 * 4  # the input, and what ReLU gives
    assert call("bench.costs", "costs --presets S") == 0
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[2].split("|")[1:]]
    assert cells[:8] == ["S", "16 × 128²", "3.52 M", "4.18 M", "178.0 M", "457.3 M", "128 × 128", "48 : 1"]


def test_costs_of_long_videos_are_those_of_formulas():
    c, C = dit.DiTConfig(num_tokens=6, token_dim=5, width=24, depth=3, heads=4), 5
    config = vin.VINConfig(global_tokens=7, heads=2)
    w, N, M, inner = c.width, c.num_tokens, config.global_tokens, config.heads * c.width // c.heads

    def blocks(tokens, depth):
        return depth * (24 * tokens * w**2 + 4 * tokens**2 * w + 12 * w**2)  # maps of 12 w² a token, attention, condition

    def denoise(tokens):
        return blocks(tokens, c.depth) + 2 * 256 * w + 6 * w**2 + 4 * tokens * c.token_dim * w

    interface = 4 * (M + C * N) * w**2 + 4 * M * C * N * w + blocks(M, config.depth)  # the global tokens
    interface += C * denoise(N) + 4 * c.depth * inner * (M * w + C * N * (w + M))  # keys, queries, attention
    near = 8 * c.depth * C * N * inner * (w + N)  # keys and values of two sides, attention to them
    assert costs.long_costs(c, config, C) == [C * denoise(N), interface, interface + near, denoise(C * N)]


@pytest.mark.parametrize("topic", ["sample", "growth"])
def test_speed_prints_its_table(topic, trained, call, capsys, monkeypatch):
    monkeypatch.setattr(speed.dit, "generate", lambda model, labels, **kw: torch.zeros(len(labels), 4, model.config.token_dim))
    monkeypatch.setattr(speed, "machine", lambda config: torch.device("cpu"))
    assert call("bench.speed", f"{topic} --repeats 1 --ckpt {trained}/dit.pt") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) > 4 and len({line.count("|") for line in lines}) == 1


def test_loading_prints_its_table_and_decodes_what_was_encoded(call, capsys, monkeypatch):
    seen, dequantize, made, encode = [], codec.NeRVDec.dequantize, [], codec.encode_clips
    monkeypatch.setattr(codec, "encode_clips", lambda *args, **kw: made.append(encode(*args, **kw)) or made[-1])
    monkeypatch.setattr(codec.NeRVDec, "dequantize", lambda self, *args: seen.append(args[0]) or dequantize(self, *args))
    monkeypatch.setitem(codec.ENCODERS, "fastnerv", vae.EncoderConfig(width=24, depth=1, heads=2, patch=(8, 64, 64)))
    assert call("bench.load", "--videos 1 2 --repeats 1") == 0
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4 and {len(line) for line in lines} == {5}
    assert all(any(torch.equal(row, one[0]) for one in made) for numbers in seen for row in numbers)
    assert {len(numbers) for numbers in seen} == {1, 2}  # both videos of a batch in one call


def test_gpu_runs_its_programs_and_what_fails_is_a_row(call, tmp_path, monkeypatch, capsys):
    pattern, out = "x=.*", tmp_path / "a b"
    programs = [("steps", name, f'-c "{code}"', pattern) for name, code in (("good", "print('x=1')"), ("bad", "1 / 0"))]
    monkeypatch.setattr(gpu, "programs", lambda *args: [*programs, ("tests", "not wanted", "-c 1", pattern)])
    assert call("bench.gpu", ["--only", "steps", "train", "--out-dir", out]) == 0
    good, bad = (out / "table.md").read_text().splitlines()[4:]
    assert "| good | x=1 |" in good and "**failed**: ZeroDivisionError" in bad and "1 failed" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="not done within"):
        gpu.run("-c 'import time; time.sleep(99)'", out / "late.log", 0.5, stop=False)


def test_gpu_names_programs_and_options_that_exist():
    """Every command, as on a GPU."""
    for _, _, command, pattern in gpu.programs(gpu.Config(data_dir="a b"), gpu=True):
        words = shlex.split(re.sub(r".*(?=\b(vae|dit|sample|evaluate)\.py)|^-m (?=bench\.(speed|load))", "", command))
        if words[0] != "-m":  # pytest, and the comparison of two checkpoints
            assert problem(words[0].removesuffix(".py"), words[1:]) == ""
        re.compile(pattern)
