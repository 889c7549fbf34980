"""The study of what one would use instead: its rivals, and one small run of each."""

import csv
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from conftest import ROOT

import dit
from common.tables import read_rows
from studies import compare


def test_pixels_lead_back_and_are_patches_in_order_of_time_and_place():
    rival = compare.Pixels(16, 16)
    assert rival.token_shape == (2 * 2 * 2, 8 * 3 * 8 * 8)
    video = torch.rand(3, 16, 3, 16, 16) * 2 - 1
    tokens, logvar = rival.encode(video)
    assert tokens.shape == (3, 8, 1536) and logvar.exp().max() < 1e-6
    assert torch.equal(rival.decode(tokens, torch.arange(16)), video)
    other = video.clone()
    other[:, 9, 1, 2, 11] += 1  # the second eight frames, upper right
    changed = (rival.encode(other)[0] != tokens).any(2).any(0)
    assert changed.tolist() == [False] * 5 + [True] + [False] * 2


def test_latte_looks_within_a_frame_and_across_frames_in_turns():
    torch.manual_seed(0)
    model = compare.latte(2)(dit.DiTConfig(num_tokens=8, token_dim=4, num_classes=2, width=24, depth=2, heads=2)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x, condition = torch.randn(1, 8, 24), torch.randn(1, 24)
    other = x.clone()
    other[:, 5] += 1  # token 1 of frame 1
    within, across = ((block(x, condition) != block(other, condition)).any(2)[0].tolist() for block in model.blocks)
    assert within == [False] * 4 + [True] * 4
    assert across == [i in (1, 5) for i in range(8)]


def test_the_denoiser_of_pixels_says_the_clean_patch():
    torch.manual_seed(0)
    model = compare.CleanDiT(dit.DiTConfig(num_tokens=3, token_dim=5, num_classes=2, width=24, depth=1, heads=2))
    alpha, sigma = dit.noise_schedule()
    clean, noise, step = torch.randn(5), torch.randn(2, 3, 5), torch.tensor([10, 900])
    torch.nn.init.zeros_(model.out.weight)
    model.out.bias.data = clean  # it knows the answer
    noised = alpha[step][:, None, None] * clean + sigma[step][:, None, None] * noise
    torch.testing.assert_close(model(noised, step, torch.tensor([0, 1])), noise, rtol=1e-4, atol=1e-4)


def test_frames_go_through_the_autoencoder_one_by_one():
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    rival = compare.Frames(3, 32, 16).eval()
    assert rival.token_shape == (3 * 2 * 2, 16)
    video = torch.rand(2, 3, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        tokens, logvar = rival.encode(video)
        made = rival.decode(tokens, torch.arange(3))
        alone, _ = compare.Frames.encode(rival, video[:, 2:3])
        direct = rival.net.decode(rival.net.encode(video[:, 1]).latent_dist.mean).sample
    assert tokens.shape == logvar.shape == (2, 12, 16) and made.shape == video.shape
    torch.testing.assert_close(made[:, 1], direct, rtol=1e-4, atol=1e-5)  # tokens are folded back as they were cut
    torch.testing.assert_close(alone, tokens[:, 8:12], rtol=1e-4, atol=1e-5)


def coarse(frames, names=None):
    """Frames [B, T, H, W, 3] as features [B, 12]: a frame of 2 × 2."""
    return np.asarray(frames, np.float32).reshape(len(frames), -1, 2, 16, 2, 16, 3).mean((1, 3, 5)).reshape(len(frames), 12)


coarse.meta = {"features": "random frames"}


@pytest.mark.parametrize("seconds,trials,fit", [(60, [30], 120), (2000, [30, 300], 40_000)])
def test_a_trial_tells_how_many_steps_fit_if_it_is_no_moment(seconds, trials, fit, tmp_path):
    """Seventy steps of half a second, in which clips are drawn for the first time, then twenty a second."""
    done = []

    def training(argv):
        done.append(int(argv[argv.index("--steps") + 1]))
        rows = [f"{step},{0.5 * min(step, 70) + 0.05 * max(0, step - 70)}\n" for step in range(10, done[-1] + 1, 10)]
        (tmp_path / "losses.csv").write_text("".join(["step,seconds\n", *rows]))

    assert compare.steps_within(seconds, training, [], tmp_path) == pytest.approx(fit, rel=0.01)
    assert done == trials


def test_a_trial_too_short_for_its_clock_is_followed_by_a_longer_one(tmp_path):
    """A thousand steps a second after half a second, which losses.csv has in tenths of a second."""

    def training(argv):
        steps = int(argv[argv.index("--steps") + 1])
        rows = [f"{step},{0.5 + round(step / 1000, 1)}\n" for step in range(10, steps + 1, 10)]
        (tmp_path / "losses.csv").write_text("".join(["step,seconds\n", *rows]))

    assert compare.steps_within(10, training, [], tmp_path) == pytest.approx(10_000, rel=0.5)


def test_the_committed_runs_of_the_comparison_can_be_gone_on_with():
    rows = read_rows(ROOT / "docs" / "compare.csv", compare.COLUMNS)

    def found(bf16="off", **options):
        config = compare.Config(bf16=bf16, **options)
        return {(row["method"], row["lr"]) for row in rows if row["settings"] == compare.settings(config, row["method"])}

    rivals = {("frames", "1"), ("frames", "2"), ("frames", "4"), *(("pixels", lr) for lr in "1248")}
    assert found() == {("ours", "1")} | rivals
    plain = "--num-tokens 64 --token-dim 64 --lpips alex --kl-weight 2e-8"
    assert found(vae_options=plain) == {("ours", "1"), ("ours", "2"), ("ours", "4")} | rivals
    at_four = {("frames", "4"), ("pixels", "4")}
    assert found(minutes=12, bf16="on") == {("ours", "1")} | at_four
    assert found(minutes=12, bf16="on", vae_options=plain) == {("ours", "1"), ("ours", "2")} | at_four
    assert found(minutes=12, bf16="on", first=0.35) == found(minutes=12, bf16="on", first=0.75) == {("frames", "4")}
    assert found(minutes=24, bf16="on", frames_width=32) == {("ours", "1")} | at_four
    assert found(minutes=24, bf16="on", vae_options=plain) == {("ours", "2"), ("pixels", "4")}
    assert found(minutes=60, bf16="on", vae_options=plain) == {("ours", "2"), ("pixels", "4")}
    assert found(minutes=60, bf16="on", frames_width=32) == at_four
    person = {"dataset": "folder", "data_dir": "grid/train", "num_frames": 16, "videos": 120, "minutes": 12, "bf16": "on"}
    person["vae_options"] = "--num-tokens 64 --token-dim 32 --pictures 256 --lpips alex --kl-weight 2e-8 "
    person["vae_options"] += "--renorm 0 --warmup 100"
    person["dit_options"] = "--num-latents 2640 --refine 0 --principal 4 128"
    person["rival_options"] = "--num-latents 880 --principal 0 0 --batch-size 32 --scheduled-sampling 0"
    assert found(**person) == {*(("ours", lr) for lr in ("0.5", "1", "2")), *(("pixels", lr) for lr in "248"), ("frames", "4")}
    assert found(**person, first=0.35) == {("frames", lr) for lr in "248"}
    assert found(minutes=30) == {("frames", "1"), ("pixels", "1")}
    assert found(minutes=30, frames_width=32) == {("frames", "0.5"), ("frames", "1"), ("frames", "2"), ("pixels", "1")}


@pytest.mark.parametrize("method", compare.METHODS)
def test_a_method_is_trained_judged_and_not_trained_again(method, tmp_path, monkeypatch, capsys):
    if method == "frames":
        pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    small = "--batch-size 4 --num-latents 16 --log-every 10 --width 48 --depth 2"
    argv = f"--dataset shapes --resolution 32 --num-frames 8 --minutes 0.05 --seeds 1 --lrs 1 --bf16 off --methods {method}"
    argv = [*argv.split(), *"--features random --lpips none --videos 4 --judge-clips 32".split()]
    argv += ["--vae-options", "--num-tokens 8 --token-dim 4 --width 8 --batch-size 4 --lpips none", "--dit-options", small]
    argv += ["--rival-options", small + " --principal 0 0 --scheduled-sampling 0", "--frames-width", "16"]
    monkeypatch.setattr(compare, "nearest_clips", lambda clips, train_set: (clips * 0, None))
    monkeypatch.setattr("fvd.load_detector", lambda *args: coarse)  # I3D would take most of the time
    compare.main(argv)
    with open("out/compare/runs.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["method"] == method and float(row["gFVD"]) > 0
    assert row["numbers"] == {"ours": "32", "frames": "512", "pixels": "24576"}[method]
    assert (tmp_path / "out/compare/sheet.png").is_file()
    monkeypatch.setattr(compare, "train", lambda *args: pytest.fail("trained again"))
    capsys.readouterr()
    compare.main(argv)
    assert method in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    (tmp_path / "other/runs.csv").write_bytes((tmp_path / "out/compare/runs.csv").read_bytes())  # of runs made elsewhere
    compare.main([*argv, "--out-dir", "other"])
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["runs.csv"]
    (tmp_path / "out/compare/runs.csv").unlink()  # as if it had been stopped while it was judged
    compare.main(argv)
    with open("out/compare/runs.csv", newline="") as file:
        assert next(csv.DictReader(file)) == row | {"seconds a clip": ANY}
    with pytest.raises(pytest.fail.Exception):
        compare.main([*argv, "--minutes", "0.06"])  # other settings are another training
