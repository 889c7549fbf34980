"""The study of long videos: its measures on shapes whose truth is known, and its rows."""

import csv
import sys

import numpy as np
import pytest
import torch

import data
import dit
import fvd
import vin
from studies import long


@pytest.fixture(scope="module")
def shapes():
    return data.Shapes(num_frames=64, period=64)


def test_the_shape_is_tracked(shapes):
    for i in range(9):
        colour, side, centre = long.track(shapes[i][0])
        assert np.isfinite(centre).all() and np.ptp(side) < 0.1 and np.ptp(colour, 0).max() < 0.05
        assert long.path_error(centre, 64) < 0.02  # a third of a pixel
        assert np.ptp(centre, 0).max() > 0.4
        wrong = np.roll(centre, 20, 0) * (np.arange(64) < 32)[:, None] + centre * (np.arange(64) >= 32)[:, None]
        assert long.path_error(wrong, 64) > 0.05
    assert np.isnan(long.track(np.zeros((4, 32, 32, 3), np.uint8))[2]).all()
    assert np.isnan(long.path_error(np.full((9, 2), np.nan), 64))


def test_another_subject_is_seen(shapes):
    frames = shapes[0][0]
    same = long.subject(frames, 16)
    other = np.concatenate([frames[:16], *(shapes[i][0][16:32] for i in (9, 18, 27))])
    assert max(same) < 0.03 and long.subject(other, 16)[0] > same[0] + 0.02 and long.subject(other, 16)[1] > same[1] + 0.02


def test_windows_and_shapes_of_chunks(monkeypatch):
    frames = np.arange(32).repeat(2 * 2 * 3).reshape(1, 32, 2, 2, 3)
    found = {name: clip[0, :, 0, 0, 0].tolist() for name, clip in long.windows(frames, 8).items()}
    assert found == {"start": list(range(8)), "middle": list(range(16, 24)), "across": list(range(12, 20))}
    monkeypatch.setattr(long, "classify", lambda judge, clips: torch.tensor([0, 2, 3, 1, 8, 8, 8, 0])[: len(clips)])
    assert long.same_shape(None, np.zeros((2, 32, 2, 2, 3), np.uint8), 8) == pytest.approx((2 + 2) / 6)


def test_full_attention_starts_as_a_denoiser_of_all_tokens():
    torch.manual_seed(0)
    sizes = dit.DiTConfig(num_tokens=6, token_dim=5, num_classes=3, width=24, depth=2, heads=2)
    model = long.FullAttention(sizes, vin.VINConfig())
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x, step, label = torch.randn(2, 3, 6, 5), torch.full((2, 3), 7), torch.zeros(2, 3).long()
    eps = model(x, step, label)
    x[0, 0] += 1
    changed = (model(x, step, label) - eps).abs().amax((2, 3)) > 1e-6
    assert eps.shape == x.shape and changed.tolist() == [[True] * 3, [False] * 3]


def test_rows_train_sample_and_are_not_done_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(dit.SIZES, "nano", {"depth": 2})
    monkeypatch.setattr(dit, "generate", lambda *args, generate=dit.generate, **kw: generate(*args, **kw | {"steps": 1}))
    monkeypatch.setattr(long.Study, "steps_within", lambda *args, **kw: 1)
    monkeypatch.setattr(long, "train_classifier", lambda *args: None)
    monkeypatch.setattr(long, "classify", lambda judge, clips: torch.arange(len(clips)) % 9)
    monkeypatch.setattr(fvd, "load_detector", lambda *args, **kw: lambda clips: clips.reshape(len(clips), -1)[:, ::999])
    rows = ["reconstructed", "one after the other", "one network", "full attention", "interface, all three"]
    tiny = ["--stage1-options=--resolution 16 --num-frames 12 --batch-size 2 --steps 1 --decode-frames 1"]
    tiny += ["--stage2-options=--batch-size 2 --num-latents 4 --refine 0", "--dit-options=--width 48 --heads 3"]
    tiny += ["--chunks", "3", "--train-chunks", "2"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["long.py", "--only", *rows, *tiny, "--videos", "2", "--steps", "1"])
    long.main()
    with open("out/long/runs.csv", newline="") as f:
        found = list(csv.DictReader(f))
    assert [row["row"] for row in found] == rows
    assert all(np.isfinite(float(row[name])) for row in found for name in ("seam", "fvd start", "fvd across", "shape"))
    assert all(float(row["gflop"]) > 0 for row in found[1:])
    assert (tmp_path / "out/long/interface__all_three.png").is_file()
    capsys.readouterr()
    first, other = (long.Study(long.Config(seconds=seconds)) for seconds in (400, 1200))
    assert first.path("vae") != other.path("vae") and first.path("vae") == long.Study(long.Config(seconds=400)).path("vae")
    monkeypatch.setattr(long.Study, "prepare", lambda self: pytest.fail("done again"))
    long.main()
    assert "| interface, all three |" in capsys.readouterr().out
