"""The study of scheduled sampling: what it shows the denoiser, what it costs, what it brings."""

import pytest
import torch

import dit
from common import utils
from common.tables import read_rows
from studies import exposure

VARIANCES = torch.tensor([4.0, 1.0, 0.01])


def test_without_a_second_pass_the_best_linear_denoiser_is_the_posterior_mean():
    alpha, sigma = (x[:, None] for x in dit.noise_schedule())
    expected = sigma / (alpha.square() * VARIANCES + sigma.square())
    torch.testing.assert_close(exposure.Linear(VARIANCES, 0).c, expected)
    torch.testing.assert_close(exposure.Linear(VARIANCES, 50).c[-50:], expected[-50:])  # nothing leads there


@pytest.mark.parametrize("back", [1, 50])
def test_the_second_pass_shows_the_model_a_share_of_its_error(back):
    (alpha, sigma), step, generator = dit.noise_schedule(), 500, torch.Generator().manual_seed(0)
    theta0, noise, error = torch.randn(3, 7, dtype=torch.float64, generator=generator)
    a, s, a_next, s_next = (x.double() for x in (alpha[step], sigma[step], alpha[step - back], sigma[step - back]))
    landed = dit.reverse_step(a * theta0 + s * noise, noise - error, a, s, a_next, s_next)
    target = (landed - a_next * theta0) / s_next
    torch.testing.assert_close(target - noise, exposure.shown(back, step) * error, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("back", [1, 50])
def test_of_a_second_pass_alone_a_denoiser_learns_the_noise_of_where_it_comes_from(back):
    # Of unit variance x' = cos(Δ) x, with the angles of tan = σ / α, and E[θ_0 | x'] is still α x: ε̂ = σ / cos(Δ) x'.
    alpha, sigma = (x.double() for x in dit.noise_schedule())
    t = torch.arange(dit.NUM_STEPS - 2 * back, dit.NUM_STEPS - back)
    cosine = alpha[t] * alpha[t + back] + sigma[t] * sigma[t + back]
    found = exposure.Linear(torch.ones(1, dtype=torch.float64), back, share=1e9).c[t, 0]
    torch.testing.assert_close(found.double(), sigma[t + back] / cosine, rtol=1e-4, atol=1e-4)


def test_the_linear_denoiser_is_where_the_loss_of_training_is_least():
    (alpha, sigma), back, share, t, n = dit.noise_schedule(), 50, 0.25, 400, 100_000
    c, generator = exposure.Linear(VARIANCES, back, share).c, torch.Generator().manual_seed(0)
    theta0 = VARIANCES.sqrt() * torch.randn(n, 1, 3, generator=generator)
    noise, labels = torch.randn(n, 1, 3, generator=generator), torch.zeros(n, dtype=torch.long)

    def slope(factor):
        """Of the loss, in the logarithm of c[t], where that is `factor` of what it should be."""
        here = (factor * c[t]).requires_grad_()

        def model(x, step, labels, given):
            return (here if step[0] == t else c[step[0]]) * x

        def loss(step, scheduled):
            step = torch.full((n,), step)
            return dit.diffusion_loss(model, theta0, labels, None, step, noise, alpha, sigma, 0, scheduled)

        total = loss(t, 0) + share * loss(t + back, back)  # the first pass of the latter does not depend on c[t]
        return torch.autograd.grad(total, here)[0] * here.detach()

    below, middle, above = slope(0.98), slope(1.0), slope(1.02)
    assert (below < 0).all() and (above > 0).all()
    assert (middle.abs() < 0.3 * (above - below) / 2).all()


def test_a_sampler_keeps_the_variance_but_for_its_steps_and_the_second_pass_takes_some():
    shares = [exposure.Linear(VARIANCES, back).kept_variance("ddim", 1000) for back in (0, 1, 10, 50)]
    torch.testing.assert_close(shares[0][:2], torch.ones(2), atol=0.01, rtol=0)
    for more, less in zip(shares, shares[1:]):
        assert (less < more).all()
    assert (shares[0] - shares[1])[:2].max() < 0.005 < 0.05 < (shares[0] - shares[3]).min()


def test_the_study_trains_and_goes_on(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = f"--ckpt {trained / 'vae.pt'} --batch-size 4 --num-latents 40 --principal 2 4 --width 48 --depth 1 --heads 3"
    dit.main([*options.split(), "--refine", "0", "--bf16", "off", "--run-dir", "run", "--steps", "1"])
    asked = "--ckpt dit.pt --seeds 1 --steps 3 --batch-size 4 --samples 20 --share 1 --out-dir out"
    exposure.main([*asked.split(), "--back", "0", "1"])
    before = read_rows("out/runs.csv", exposure.COLUMNS)
    assert [(row["back"], row["seed"]) for row in before] == [("0", "0"), ("1", "0")]
    assert all(float(row[name]) > 0 for row in before for name in exposure.COLUMNS[5:])
    assert before[0]["ddim_distance"] != before[1]["ddim_distance"]
    capsys.readouterr()
    exposure.main([*asked.split(), "--back", "0", "1", "40"])
    after = read_rows("out/runs.csv", exposure.COLUMNS)
    assert after[:2] == before and after[2]["back"] == "40"
    assert "| 40 " in capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(utils.UserError, match="there are 1000 steps"):
        exposure.main(["--ckpt", "dit.pt", "--back", "1000"])
