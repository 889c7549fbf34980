"""The study of what the denoiser knows at each level of noise."""

import shutil

import pytest
import torch

import dit
from common import utils
from studies import levels


def test_the_linear_guess_is_the_posterior_mean_of_a_gaussian():
    torch.manual_seed(0)
    mix = torch.randn(6, 6, dtype=torch.float64)
    mean, covariance = torch.arange(6.0, dtype=torch.float64), mix @ mix.T
    known = mean + torch.randn(20_000, 6, dtype=torch.float64) @ mix.T
    alpha, sigma = torch.tensor([0.8, 0.6], dtype=torch.float64)
    noised = torch.randn(5, 6, dtype=torch.float64)
    gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(6))
    expected = mean + (noised - alpha * mean) @ gain.T
    found = levels.linear(known.view(-1, 2, 3))(noised.view(-1, 2, 3), alpha, sigma)
    torch.testing.assert_close(found.flatten(1), expected, rtol=0.05, atol=0.1)


def test_a_denoiser_that_knows_the_variances_is_as_good_as_the_linear_guess():
    torch.manual_seed(0)
    deviation = torch.tensor([[3.0, 1.0, 0.1], [0.5, 2.0, 0.01]])
    known, theta0 = deviation * torch.randn(20_000, 2, 3), deviation * torch.randn(4000, 2, 3)

    def wiener(x, step, labels):
        alpha, sigma = (schedule[step][:, None, None] for schedule in dit.noise_schedule())
        return sigma / (alpha.square() * deviation.square() + sigma.square()) * x

    rows = levels.errors(wiener, theta0, torch.zeros(4000, dtype=torch.long), known, [0.1, 1.0, 10.0])
    for level, linear, ours in rows:
        assert ours == pytest.approx(linear, rel=0.02), level
    assert rows[0][1] < 0.01 < rows[1][1] < rows[2][1] < 1


def test_the_nearest_latent_of_a_copy_is_itself_and_of_others_a_share_of_the_variance():
    known = torch.randn(1000, 2, 3, generator=torch.Generator().manual_seed(0)) + 5
    assert levels.nearest(known[:9], known) < 1e-3
    middle, variance = known.mean(0, keepdim=True), (known - known.mean(0)).square().sum((1, 2)).mean()
    far = middle + torch.tensor([100.0, 0, 0, 0, 0, 0]).view(1, 2, 3)
    assert levels.nearest(far, known) == pytest.approx(100**2 / variance.item(), rel=0.1)


def test_samples_are_new_where_they_are_nearer_to_what_was_held_out():
    known, held_out = torch.randn(2, 500, 2, 3, generator=torch.Generator().manual_seed(0))
    assert levels.new(known[:9] + 1e-3, known, held_out) == 0 and levels.new(held_out[:9] + 1e-3, known, held_out) == 1
    like = torch.randn(2000, 2, 3, generator=torch.Generator().manual_seed(1))
    assert levels.new(like, known, held_out) == pytest.approx(0.5, abs=0.05)
    assert levels.new(like, known, held_out[:125]) == pytest.approx(0.2, abs=0.05)


def test_the_study_reads_a_checkpoint_and_its_latents(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = f"--ckpt {trained / 'vae.pt'} --batch-size 4 --num-latents 80 --refine 0 --bf16 off --run-dir run --steps 2"
    dit.main(options.split())
    capsys.readouterr()
    levels.main("--ckpt dit.pt --clips 8 --levels 0.1 10 --samples 6".split())
    lines = capsys.readouterr().out.splitlines()
    assert "8 held-out clips, 80 latents" in lines[1] and lines[-4].startswith("| 0.1") and lines[-3].startswith("| 10")
    assert "from 6 samples" in lines[-2] and lines[-1].endswith("of samples like the data 9.1%")  # 8 of 80 + 8
    with pytest.raises(utils.UserError, match="no cached latents"):
        levels.main(["--ckpt", shutil.copy("dit.pt", "alone.pt")])


def test_the_linear_prediction_finds_what_is_linear():
    generator = torch.Generator().manual_seed(0)
    given, map_ = torch.randn(200, 2, 3, generator=generator) + 1, torch.randn(6, 6, generator=generator)
    theta0 = (given.flatten(1) @ map_ + 4).view_as(given)
    weak, *_, strong = levels.regressions(given[:7], given[7:], theta0[7:], (1e-6, 1e6))
    torch.testing.assert_close(weak, theta0[:7], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(strong, theta0[7:].mean(0).expand(7, -1, -1), atol=1e-2, rtol=1e-2)  # knows the mean alone


def test_predictions_are_beside_copies_and_a_linear_one(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = (
        f"--ckpt {trained / 'vae.pt'} --batch-size 4 --num-latents 40 --principal 2 4 --cond-frames 3 --refine 0 --bf16 off"
    )
    dit.main([*options.split(), "--run-dir", "run", "--steps", "2"])
    capsys.readouterr()
    levels.main("--ckpt dit.pt --clips 4 --draws 2".split())
    rows = [line.split("|")[1:4] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    found = {name.strip(): (float(value), float(margin)) for name, value, margin in rows[2:]}
    assert len(found) == 6 and found["copies of the last given frame"][1] == 0
    assert found["the mean of 2 draws"][0] >= found["one draw"][0] - 1e-6  # squared error is convex
    for value, margin in found.values():
        assert margin == pytest.approx(value - found["copies of the last given frame"][0], abs=0.011)
