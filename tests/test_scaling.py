"""The study of sizes: FLOPs against what is known, the law on points of a known one, and a small run that is done once."""

import csv

import pytest
import torch

import dit
import vae
import vin
from common import utils
from common.utils import UserError
from nerv import NeRVConfig
from studies import scaling

TINY = "--preset nano --resolution 16 --num-frames 4 --num-tokens 8 --token-dim 32 --pos-size 4 --mixing 0 --lpips none"
TINY += " --batch-size 4"


def test_the_law_is_found_where_there_is_one():
    points = [(flops, clips, 1e5 * flops**-0.3 * clips**-0.5) for flops in (1e6, 3e6, 9e6) for clips in (100, 1000)]
    law = scaling.Law(points)
    assert law.found[1:].tolist() == pytest.approx([0.3, 0.5], abs=1e-6)
    assert law(1e8, 1e4) == pytest.approx([1e5 * 1e8**-0.3 * 1e4**-0.5] * 3, rel=1e-4)  # all are on it: no interval
    points[2] = (*points[2][:2], 1.2 * points[2][2])
    value, least, most = scaling.Law(points)(1e8, 1e4)
    near = scaling.Law(points)(3e6, 300)
    assert least < value < most and most / least > near[2] / near[1] > 1  # less is known far away


def test_flops_grow_as_products_do():
    sizes = NeRVConfig(resolution=16, num_frames=4, num_tokens=8, token_dim=8, width=8, last_factor=1, block=8, pos_size=4)
    encoder = vae.EncoderConfig(width=16, depth=1, heads=2, patch=(4, 8, 8))
    one, two = (scaling.stage1_flops(vae.VAE(sizes, encoder), frames) for frames in (1, 2))
    four = scaling.stage1_flops(vae.VAE(sizes, encoder), 4)
    assert four - two == pytest.approx(2 * (two - one))  # kernels and encoder are made once, frames each by itself
    config = dit.DiTConfig(num_tokens=4, token_dim=64, width=96, depth=6, heads=3)
    assert scaling.stage2_flops(config, 0) == 3 * vin.dit_flops(config, 4)
    assert scaling.stage2_flops(config, 0.25) == 1.25 * scaling.stage2_flops(config, 0)


def test_a_small_study_runs_is_drawn_and_is_not_run_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "WIDTHS", {"width 16": 16, "width 32": 32})
    monkeypatch.setattr(scaling, "DENOISERS", {"tiny": (24, 1, 2)})
    monkeypatch.setattr(scaling, "LARGER", {1: {"width 48": 48}, 2: {"small": (48, 1, 2)}})
    argv = ["--larger", "--vae-steps", "1", "2", "--dit-steps", "1", "--clips", "2", "--features", "random"]
    argv += ["--vae-options", TINY, "--dit-options", "--num-latents 16 --refine 0 --batch-size 4 --principal 0 0"]
    argv += ["--out-dir", str(tmp_path / "out")]
    scaling.main(argv)
    printed = capsys.readouterr().out
    assert "FVD falls as" in printed and printed.count("width 48, ") == 2 and "not yet" not in printed
    assert (tmp_path / "out" / "scaling.png").is_file()
    with open(tmp_path / "out" / "runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["stage"], row["size"], row["clips"]) for row in rows] == [
        ("1", "width 16", "4"), ("1", "width 32", "4"), ("1", "width 16", "8"), ("1", "width 32", "8"), ("2", "tiny", "4"),
        ("2", "small", "4"), ("2", "small", "40"), ("1", "width 48", "8"), ("1", "width 48", "80"),
    ]  # fmt: skip
    assert all(float(row["fvd"]) > 0 and float(row["flops"]) > 0 for row in rows)
    paths = {scaling.stage1_path(scaling.Config(seed=seed, vae_options=o), 32, 2) for seed in (0, 1) for o in ("", "--ema 0")}
    assert len(paths) == 4  # a stage 2 stands on a stage 1 of its own seed and options
    monkeypatch.setattr(scaling.Study, "train1", None)
    monkeypatch.setattr(scaling.Study, "train2", None)
    scaling.main(argv)  # reads what is done


def test_a_training_that_a_signal_cut_short_is_no_row(tmp_path, monkeypatch):
    monkeypatch.setattr(utils.Interrupt, "stop", lambda self: True)  # as SIGTERM in the first step
    argv = ["--stages", "1", "--vae-steps", "2", "--clips", "2", "--features", "random", "--vae-options", TINY]
    with pytest.raises(UserError, match="interrupted after 1 of 2 steps; start again"):
        scaling.main([*argv, "--out-dir", str(tmp_path)])
    assert not (tmp_path / "runs.csv").is_file()


def test_a_denoiser_has_the_size_asked_for_and_heads_divide_it(tmp_path):
    options = TINY.split() + ["--dataset", "shapes", "--steps", "1", "--out", str(tmp_path / "vae.pt")]
    vae.main([*options, "--run-dir", str(tmp_path / "vae")])
    argv = ["--ckpt", str(tmp_path / "vae.pt"), "--num-latents", "8", "--refine", "0", "--steps", "1", "--batch-size", "2"]
    argv += ["--out", str(tmp_path / "dit.pt"), "--run-dir", str(tmp_path / "dit"), "--width", "24"]
    with pytest.raises(UserError, match="--width 24 --depth 6 --heads 5: all are positive, and heads divide"):
        dit.main([*argv, "--heads", "5"])
    dit.main([*argv, "--depth", "1"])
    config = torch.load(tmp_path / "dit.pt", weights_only=True)["dit_config"]
    assert (config["width"], config["depth"], config["heads"]) == (24, 1, 6)
