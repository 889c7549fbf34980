"""Stage 2: the denoiser, closed forms of diffusion and of each sampler, the losses."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL_DIT

import dit
from common import utils
from dit import NUM_STEPS, DiT, DiTConfig, diffusion_loss, generate, noise_schedule, reverse_step

TINY = DiTConfig(num_tokens=6, token_dim=5, num_classes=3, width=24, depth=2, heads=2)
ALPHA, SIGMA = noise_schedule()


def trained_like(**changes):
    """A DiT whose gates and output are not zero any more."""
    torch.manual_seed(0)
    model = DiT(DiTConfig(**{**vars(TINY), **changes}))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def test_blocks_start_as_the_identity_and_the_output_at_zero():
    torch.manual_seed(0)
    model = DiT(TINY)
    x, condition = torch.randn(2, 6, 24), torch.randn(2, 24)
    assert torch.equal(model.blocks[0](x, condition), x)
    assert (model(torch.randn(2, 6, 5), torch.tensor([1, 1000]), torch.tensor([0, 3])) == 0).all()
    with torch.device("meta"):
        assert 450 < utils.millions(DiT(DiTConfig())) < 470  # DiT-L, as in the paper
    assert (dit.Config.width, dit.Config.depth, dit.Config.heads) == (1024, 24, 16)


@torch.no_grad()
def test_given_latents_go_in_beside_the_noised_ones_and_guidance_drops_both_conditions():
    model, x, timestep, label = trained_like(cond_frames=5), torch.randn(2, 6, 5), torch.tensor([3, 700]), torch.tensor([0, 2])
    given, seen = torch.randn(2, 6, 5), []
    model.embed.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    with_given, without = model(x, timestep, label, given), model(x, timestep, label)
    assert torch.equal(seen[0], torch.cat([x, given], -1)) and torch.equal(seen[1], torch.cat([x, torch.zeros_like(x)], -1))
    assert (with_given - without).abs().max() > 1e-3
    asked = []
    model.register_forward_pre_hook(lambda model, args: asked.append(args[2:]))
    generate(model, label, steps=1, guidance=2.0, seed=0, given=given)
    ((labels, both),) = asked
    assert labels.tolist() == [0, 2, 3, 3] and torch.equal(both[:2], given) and not both[2:].any()


@pytest.mark.parametrize("t", [2, 10, 500, 1000])
def test_the_schedule_and_the_posterior_of_a_ddpm_step_are_those_of_ho_et_al(t, monkeypatch):
    betas = torch.tensor([1e-4 + (2e-2 - 1e-4) * i / 999 for i in range(1000)], dtype=torch.float64)
    alpha_bar = torch.cat([torch.ones(1), torch.cumprod(1 - betas, 0)])  # index 0 is clean
    torch.testing.assert_close(ALPHA.double(), alpha_bar.sqrt(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(SIGMA.double(), (1 - alpha_bar).sqrt(), rtol=1e-5, atol=1e-7)
    beta, now, before = betas[t - 1], alpha_bar[t], alpha_bar[t - 1]
    x0, noise = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = now.sqrt() * x0 + (1 - now).sqrt() * noise
    # Their Eq. 7, q(x_{t-1} | x_t, x_0).
    mean = before.sqrt() * beta / (1 - now) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - now) * x
    variance = (1 - before) / (1 - now) * beta

    def step_with_noise(value):
        monkeypatch.setattr(torch, "randn", lambda shape, generator: torch.full(shape, value))
        return reverse_step(x, noise, now.sqrt(), (1 - now).sqrt(), before.sqrt(), (1 - before).sqrt(), eta=1.0)

    torch.testing.assert_close(step_with_noise(0.0), mean, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(step_with_noise(1.0) - mean, variance.sqrt().expand(4), rtol=1e-8, atol=1e-10)


MU, S = 0.7, 0.5


class Gaussian:
    """The best denoiser where θ_0 ~ N(MU, S²), for any class; it keeps the timesteps and labels that it was called for."""

    config = SimpleNamespace(num_tokens=1, token_dim=1, num_classes=3)

    def __init__(self):
        self.timesteps, self.labels = [], []

    def __call__(self, x, timestep, label, given=None):
        self.timesteps.append(timestep[0].item())
        self.labels.append(label)
        a, sd = ALPHA[timestep][:, None, None], SIGMA[timestep][:, None, None]
        return sd * (x - a * MU) / (a * a * S * S + sd * sd)


@pytest.mark.parametrize("sampler, steps", [("dpm", 20), ("ddim", 100), ("ddpm", 250)])
def test_samples_of_a_gaussian_have_its_mean_and_deviation(sampler, steps):
    labels, before, model = torch.ones(20_000).long(), torch.random.get_rng_state(), Gaussian()
    x, other = generate(model, labels, steps, 1, sampler, 0), generate(Gaussian(), labels, steps, 1, sampler, 1)
    assert torch.equal(x, generate(Gaussian(), labels, steps, 1, sampler, 0)) and not torch.equal(x, other)
    assert torch.equal(torch.random.get_rng_state(), before)  # a preview does not move a training's random numbers
    assert x.mean().item() == pytest.approx(MU, abs=0.015) and x.std().item() == pytest.approx(S, rel=0.03)
    assert ((x - x.mean()) / x.std()).pow(4).mean().item() == pytest.approx(3, abs=0.15)
    assert len(model.labels) == steps and all(torch.equal(seen, labels) for seen in model.labels)  # without guidance, one each
    for count in (1, 2, 1000):
        generate(model := Gaussian(), labels[:1], count, 1, sampler)
        visited = model.timesteps
        assert visited[0] == NUM_STEPS and all(a > b > 0 for a, b in zip(visited, visited[1:]))
        assert len(visited) == count or (sampler == "dpm" and count == 1000)
    assert visited[-1] == (5 if sampler == "dpm" else 1)


def test_second_order_steps_of_dpm_solver_as_published():
    # Algorithm 2 of Lu et al. 2022, with a coefficient for each of its letters, in double precision.
    model, labels, alpha, sigma = trained_like(), torch.tensor([0, 2]), ALPHA.double(), SIGMA.double()
    times, lam = dit.sampling_times("dpm", 5, alpha, sigma), torch.log(alpha / sigma)
    x, buffer = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(4)).double(), []
    for i, (s, t) in enumerate(zip(times[:-1], times[1:])):
        with_class, without = (model(x.float(), torch.full((2,), s), k).double() for k in (labels, labels * 0 + 3))
        buffer.append((x - sigma[s] * (without + 2 * (with_class - without))) / alpha[s])
        h, D = lam[t] - lam[s], buffer[i]
        if 0 < i < len(times) - 2:
            r = (lam[s] - lam[times[i - 1]]) / h
            D = (1 + 1 / (2 * r)) * buffer[i] - 1 / (2 * r) * buffer[i - 1]
        x = sigma[t] / sigma[s] * x - alpha[t] * torch.expm1(-h) * D
    torch.testing.assert_close(generate(model, labels, steps=5, seed=4), x.float(), rtol=1e-3, atol=1e-3)


def test_the_loss_weights_both_passes_and_the_second_aims_at_the_true_theta0():
    # A model that is wrong at its first call: the second target must make up for that.
    torch.manual_seed(0)
    theta0, noise, calls, weight = torch.randn(64, 6, 5), torch.randn(64, 6, 5), [], torch.ones((), requires_grad=True)

    def model(x, timestep, label, given):
        eps = weight * (torch.cos(x) if calls else torch.sin(3 * x))
        calls.append((x, timestep, eps))
        return eps

    timestep, labels = torch.randint(2, NUM_STEPS + 1, (64,)), torch.zeros(64).long()
    loss = diffusion_loss(model, theta0, labels, None, timestep, noise, 5.0, True)
    loss.backward()
    (x1, step1, eps1), (x2, step2, eps2) = calls
    assert weight.grad.isfinite() and not x2.requires_grad and torch.equal(step2, step1 - 1)
    a1, s1, a2, s2 = (x.double()[step][:, None, None] for step in (step1, step2) for x in (ALPHA, SIGMA))
    torch.testing.assert_close(x1.double(), a1 * theta0 + s1 * noise, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(x2.double(), a2 * (x1 - s1 * eps1) / a1 + s2 * eps1, rtol=1e-3, atol=1e-3)
    target, expected = (x2 - a2 * theta0) / s2, 0  # with which x2 leads to θ_0
    for eps, goal, a, s in ((eps1, noise, a1, s1), (eps2, target, a2, s2)):
        snr = (a / s).square().flatten()
        expected += (snr.clamp(max=5) / snr * (eps - goal).square().mean((1, 2))).mean().item()
    assert loss.item() == pytest.approx(expected, rel=1e-3)
    calls.clear()
    loss = diffusion_loss(model, theta0, labels, None, timestep, noise, 0.0, False)
    assert len(calls) == 1 and loss.item() == pytest.approx((calls[0][2] - noise).square().mean().item(), rel=1e-4)


def test_a_training_has_latents_of_unit_deviation_and_drops_the_class_alone_and_both_together(call, trained, monkeypatch):
    seen, loss = [], dit.diffusion_loss

    def keep(model, theta0, labels, given, *args):
        seen.append((theta0.std().item(), labels, given.flatten(1).any(1)))
        assert not torch.is_inference_mode_enabled() and theta0.shape[1:] == (4, 64)
        return loss(model, theta0, labels, given, *args)

    monkeypatch.setattr(dit, "diffusion_loss", keep)
    monkeypatch.setattr(dit, "generate", lambda ema, labels, **_: (
        seen.append(any(p.requires_grad for p in ema.parameters())) or torch.zeros(len(labels), 4, 64)))  # fmt: skip
    options = f"--ckpt {trained}/vae.pt --cond-frames 5 --steps 1 --batch-size 512 --num-latents 300 {' '.join(SMALL_DIT)}"
    assert call("dit.py", options) == 0
    (deviation, labels, given), graph = seen
    assert deviation == pytest.approx(1, abs=0.1) and graph is False  # an average with a graph would keep every step
    assert set(labels[~given].tolist()) == {9}  # no frames: no class either
    assert (~given).float().mean() == pytest.approx(0.1, abs=0.05) and F.one_hot(labels).shape[1] == 10
    assert (labels == 9).float().mean() == pytest.approx(0.2, abs=0.07)
