"""The study of what one would use instead: its rivals, and one small run of each."""

import csv

import numpy as np
import pytest
import torch

import dit
from common import utils
from studies import compare


def test_pixels_lead_back_and_are_patches_in_order_of_time_and_place():
    rival = compare.Rival("pixels", 16, 16, 16)
    assert (rival.nerv_config.num_tokens, rival.nerv_config.token_dim) == (2 * 2 * 2, 8 * 3 * 8 * 8)
    video = torch.rand(3, 16, 3, 16, 16) * 2 - 1
    tokens, logvar = rival.encode(video)
    assert logvar.exp().max() < 1e-6 and torch.equal(rival.decode(tokens, torch.arange(16)), video)
    video[:, 9, 1, 2, 11] += 1  # the second eight frames, upper right
    changed = (rival.encode(video)[0] != tokens).any(2).any(0)
    assert changed.tolist() == [False] * 5 + [True] + [False] * 2


def test_the_denoiser_of_pixels_predicts_the_clean_patch():
    torch.manual_seed(0)
    model = compare.CleanDiT(dit.DiTConfig(num_tokens=3, token_dim=5, num_classes=2, width=24, depth=1, heads=2))
    alpha, sigma = dit.noise_schedule()
    clean, noise, timestep = torch.randn(5), torch.randn(2, 3, 5), torch.tensor([10, 900])
    torch.nn.init.zeros_(model.out.weight)
    model.out.bias.data = clean
    noised = alpha[timestep][:, None, None] * clean + sigma[timestep][:, None, None] * noise
    torch.testing.assert_close(model(noised, timestep, torch.tensor([0, 1])), noise, rtol=1e-4, atol=1e-4)


def test_frames_go_through_the_autoencoder_one_by_one():
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    rival = compare.Rival("frames", 3, 32, 16).eval()
    assert (rival.nerv_config.num_tokens, rival.nerv_config.token_dim) == (3 * 2 * 2, 16)
    video = torch.rand(2, 3, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        tokens, logvar = rival.encode(video)
        made = rival.decode(tokens, torch.arange(3))
        direct = rival.net.decode(rival.net.encode(video[:, 1]).latent_dist.mean).sample
    assert tokens.shape == logvar.shape == (2, 12, 16) and made.shape == video.shape
    torch.testing.assert_close(made[:, 1], direct, rtol=1e-4, atol=1e-5)  # tokens are folded back as they were cut


@pytest.mark.parametrize("seconds, trials, fit", [(60, [30], 120), (2000, [30, 300], 40_000)])
def test_a_trial_finds_how_many_steps_fit_if_it_is_long_enough(seconds, trials, fit, tmp_path, monkeypatch):
    """Seventy steps of half a second, in which clips are drawn for the first time, then twenty a second."""
    done, directory = [], utils.log_directory(tmp_path / "x.pt")
    directory.mkdir(parents=True)
    monkeypatch.setattr("common.checkpoints.load", lambda *args: {"step": done[-1], "config": {"steps": done[-1]}})

    def training(argv):
        done.append(int(argv[argv.index("--steps") + 1]))
        rows = [f"{step},{0.5 * min(step, 70) + 0.05 * max(0, step - 70)}\n" for step in range(10, done[-1] + 1, 10)]
        (directory / "losses.csv").write_text("".join(["step,seconds\n", *rows]))

    assert compare.train_for(seconds, training, [], tmp_path / "x.pt") == done[-1] == pytest.approx(fit, rel=0.01)
    assert done[:-1] == trials


def coarse(frames):
    """Frames [B, T, H, W, 3] as features [B, 12]: a frame of 2 × 2."""
    return np.asarray(frames, np.float32).reshape(len(frames), -1, 2, 16, 2, 16, 3).mean((1, 3, 5)).reshape(len(frames), 12)


coarse.meta = {"features": "random frames"}


@pytest.mark.parametrize("method", compare.METHODS)
def test_a_method_is_trained_judged_and_not_trained_again(method, tmp_path, monkeypatch, few_held_out):
    if method == "frames":
        pytest.importorskip("diffusers")
    small = "--batch-size 4 --num-latents 16 --width 48 --depth 2"
    argv = f"--dataset shapes --resolution 32 --num-frames 8 --minutes 0.02 --seeds 1 --lrs 1 --bf16 off --methods {method}"
    argv = [*argv.split(), *"--lpips none --videos 4".split(), "--out-dir", str(tmp_path)]
    argv += ["--vae-options", "--num-tokens 8 --token-dim 4 --width 8 --batch-size 4 --lpips none --extras basis=4"]
    argv += ["--dit-options", small + " --extras components=2x8", "--rival-options", small + " --extras muon"]
    monkeypatch.setattr(utils.RunLog, "EVERY", 10)  # the study sets it, and it is put back here
    monkeypatch.setattr("demo.nearest_clips", lambda clips, train_set: clips)
    monkeypatch.setattr("evaluate.train_classifier", lambda *args: dit.nn.Module())
    monkeypatch.setattr("evaluate.classify", lambda classifier, clips: torch.zeros(len(clips)))
    monkeypatch.setattr("fvd.load_detector", lambda *args: coarse)  # I3D would take most of the time
    compare.main(argv)
    with open(tmp_path / "runs.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["method"] == method and float(row["gFVD"]) > 0
    assert row["numbers"] == {"ours": "16", "frames": "512", "pixels": "24576"}[method]
    monkeypatch.setattr(compare, "train", lambda *args: pytest.fail("trained again"))
    compare.main(argv)
