import math
from types import SimpleNamespace

import pytest
import torch

import dit
from dit import NUM_STEPS, DiT, DiTConfig, diffusion_loss, generate, min_snr_weight, noise_schedule, reverse_step

TINY = DiTConfig(num_tokens=6, token_dim=5, num_classes=3, width=24, depth=2, heads=2)
SMALLEST = SimpleNamespace(num_tokens=1, token_dim=1, num_classes=3)  # for denoisers that are formulas


def trained_like(config=TINY):
    """A DiT whose gates and output are not zero any more."""
    torch.manual_seed(0)
    model = DiT(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def beta_and_alpha_bar():
    """Ho et al. 2020 in double precision, index 0 is their t = 1."""
    beta = [1e-4 + (2e-2 - 1e-4) * t / 999 for t in range(1000)]
    alpha_bar, product = [], 1.0
    for b in beta:
        product *= 1 - b
        alpha_bar.append(product)
    return torch.tensor(beta, dtype=torch.float64), torch.tensor(alpha_bar, dtype=torch.float64)


# --------------------------------------------------------------------------------------------------------------------- model


def test_blocks_start_as_the_identity_and_the_output_at_zero():
    torch.manual_seed(0)
    model = DiT(TINY)
    x, condition = torch.randn(2, 6, 24), torch.randn(2, 24)
    assert torch.equal(model.blocks[0](x, condition), x)
    assert (model(torch.randn(2, 6, 5), torch.tensor([0, 999]), torch.tensor([0, 3])) == 0).all()


def test_every_input_matters_once_trained():
    model = trained_like()
    x, step, label = torch.randn(1, 6, 5), torch.tensor([500]), torch.tensor([0])
    out = model(x, step, label)
    assert out.shape == x.shape
    for other in (model(x, step - 1, label), model(x, step, label + 3), model(x.roll(1, 1), step, label).roll(-1, 1)):
        assert (other - out).abs().max() > 1e-4


def test_the_matrices_of_attention_and_mlps_are_muons():
    model = DiT(TINY)
    names = {name for name, p in model.named_parameters() if any(p is matrix for matrix in model.matrices())}
    parts = ("attention.qkv", "attention.out", "mlp.0", "mlp.2")
    assert names == {f"blocks.{i}.{part}.weight" for i in range(2) for part in parts}


def test_gradient_reaches_all_parameters_after_a_step():
    model = trained_like().train()
    model(torch.randn(4, 6, 5), torch.arange(4), torch.arange(4)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("preset", ["S", "B", "L"])
def test_the_denoiser_of_the_paper_is_dit_l(preset):
    with torch.device("meta"):
        model = DiT(DiTConfig(**dit.SIZES[preset]))
    assert (len(model.blocks), model.blocks[0].attention.heads, model.config.width) == (24, 16, 1024)
    assert 450e6 < sum(p.numel() for p in model.parameters()) < 470e6
    assert model.label.weight.shape == (102, 1024)


# -------------------------------------------------------------------------------------------------------------------- process


def test_noise_schedule():
    alpha, sigma = noise_schedule()
    _, alpha_bar = beta_and_alpha_bar()
    assert alpha.shape == sigma.shape == (NUM_STEPS,)
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones(NUM_STEPS))
    torch.testing.assert_close(alpha.double(), alpha_bar.sqrt(), rtol=1e-5, atol=1e-7)
    assert (alpha.diff() < 0).all() and (sigma.diff() >= 0).all()
    assert sigma[0] == pytest.approx(0.01, rel=1e-3) and alpha[-1] < 0.01


def test_min_snr_weight():
    alpha, sigma = noise_schedule()
    for step in (0, 10, 300, 999):
        snr = (alpha[step] / sigma[step]).item() ** 2
        assert min_snr_weight(alpha[step], sigma[step], 5.0).item() == pytest.approx(min(snr, 5) / snr, rel=1e-5)
    weight = min_snr_weight(alpha, sigma, 5.0)
    assert weight.max() == 1 and (weight.diff() >= 0).all()


def test_ddim_step_with_the_true_noise_stays_on_the_line():
    theta0, noise = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha, sigma = (x.double() for x in noise_schedule())
    for now, then in ((999, 998), (999, 500), (500, 499), (20, 0)):
        x = alpha[now] * theta0 + sigma[now] * noise
        landed = reverse_step(x, noise, alpha[now], sigma[now], alpha[then], sigma[then])
        torch.testing.assert_close(landed, alpha[then] * theta0 + sigma[then] * noise, rtol=0, atol=1e-10)
    clean = reverse_step(alpha[20] * theta0 + sigma[20] * noise, noise, alpha[20], sigma[20], 1.0 + 0 * alpha[0], 0 * alpha[0])
    torch.testing.assert_close(clean, theta0, rtol=0, atol=1e-10)


@pytest.mark.parametrize("t", [2, 10, 500, 1000])
def test_ddpm_step_has_the_posterior_of_ho_et_al(t, monkeypatch):
    beta, alpha_bar = beta_and_alpha_bar()
    beta, now, before = beta[t - 1], alpha_bar[t - 1], alpha_bar[t - 2]
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


# ------------------------------------------------------------------------------------------------------------------- sampling


class Formula:
    """A denoiser given by a function of (x, alpha, sigma, label), with a record of the labels that it was asked for."""

    def __init__(self, function, config=SMALLEST):
        self.function, self.config, self.steps, self.labels = function, config, [], []
        self.alpha, self.sigma = noise_schedule()

    def __call__(self, x, step, label, given=None):
        assert step.min() >= 0 and step.max() < NUM_STEPS and len(x) == len(step) == len(label)
        self.steps.append(step[0].item())
        self.labels.append(label.clone())
        return self.function(x, self.alpha[step][:, None, None], self.sigma[step][:, None, None], label[:, None, None])


@pytest.mark.parametrize("sampler, steps", [("dpm", 20), ("ddim", 100), ("ddpm", 250)])
def test_samples_of_a_gaussian_have_its_mean_and_deviation(sampler, steps):
    # Where θ_0 ~ N(μ, s²), the best prediction of the noise is known.
    mu, s = 0.7, 0.5
    oracle = Formula(lambda x, a, sd, label: sd * (x - a * mu) / (a * a * s * s + sd * sd))
    x = generate(oracle, torch.zeros(20_000, dtype=torch.long), steps=steps, guidance=1, sampler=sampler, seed=0)
    assert x.mean().item() == pytest.approx(mu, abs=0.015)
    assert x.std().item() == pytest.approx(s, rel=0.03)
    standard = ((x - x.mean()) / x.std()).flatten()
    assert standard.pow(4).mean().item() == pytest.approx(3, abs=0.15)


@pytest.mark.parametrize("sampler", ["dpm", "ddim", "ddpm"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
def test_steps_go_from_all_noise_to_clean(sampler, steps):
    model = Formula(lambda x, a, sd, label: sd * (x - a * 0.5) / (a * a + sd * sd))
    x = generate(model, torch.zeros(2, dtype=torch.long), steps=steps, guidance=1, sampler=sampler, seed=0)
    assert (len(model.steps) == steps or (sampler == "dpm" and steps == 1000)) and model.steps[0] == NUM_STEPS - 1
    assert all(a > b for a, b in zip(model.steps, model.steps[1:]))
    assert x.isfinite().all()
    if steps == 1000:
        assert model.steps[-1] == (4 if sampler == "dpm" else 0)


def test_data_of_one_point_is_found_exactly():
    point = torch.tensor([[1.0, -2.0, 3.0]])
    config = SimpleNamespace(num_tokens=1, token_dim=3, num_classes=3)
    model = Formula(lambda x, a, sd, label: (x - a * point) / sd, config)
    for sampler in ("dpm", "ddim", "ddpm"):
        x = generate(model, torch.zeros(4, dtype=torch.long), steps=20, guidance=1, sampler=sampler, seed=0)
        torch.testing.assert_close(x, point.expand(4, 1, 3), rtol=0, atol=1e-3)


@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("dpm", 2)])
def test_order_of_the_solvers(sampler, order):
    # Where θ_0 ~ N(μ, s²), the path of each noise z is known too: α μ + z √(α² s² + σ²). Where it is for the last time asked
    # for the noise, at the same place for every number of steps of one sampler, the error falls with its order.
    mu, s, errors = 0.7, 0.5, []
    for steps in (25, 50):
        asked = []

        def function(x, a, sd, label, asked=asked):
            asked.append((x, a, sd))
            return sd * (x - a * mu) / (a * a * s * s + sd * sd)

        model = Formula(function)
        generate(model, torch.zeros(64, dtype=torch.long), steps=steps, guidance=1, sampler=sampler, seed=0)
        (x, a, sd), (x_last, a_last, sd_last) = asked[0], asked[-1 if sampler == "dpm" else -steps // 25]
        z = (x - a * mu) / (a * a * s * s + sd * sd).sqrt()
        exact = a_last * mu + z * (a_last * a_last * s * s + sd_last * sd_last).sqrt()
        errors.append((x_last - exact).square().mean().sqrt().item())
    assert 2 ** (order - 0.3) < errors[0] / errors[1] < 2 ** (order + 0.4), errors


def test_second_order_steps_of_dpm_solver_as_published():
    # Algorithm 2 of Lu et al. 2022, with a coefficient for each of its letters, in double precision.
    model, labels = trained_like(), torch.tensor([0, 2])
    alpha, sigma = (torch.cat([torch.tensor([edge]), x]).double() for edge, x in zip((1.0, 0.0), noise_schedule()))
    times = dit.sampling_times("dpm", 5, alpha, sigma)
    lam = torch.log(alpha / sigma)
    x = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(4)).double()
    buffer = []
    for i, (s, t) in enumerate(zip(times[:-1], times[1:])):
        with_class, without = (model(x.float(), torch.full((2,), s - 1), k).double() for k in (labels, labels * 0 + 3))
        eps = without + 2 * (with_class - without)
        buffer.append((x - sigma[s] * eps) / alpha[s])
        h = lam[t] - lam[s]
        if 0 < i < len(times) - 2:
            r = (lam[s] - lam[times[i - 1]]) / h
            D = (1 + 1 / (2 * r)) * buffer[i] - 1 / (2 * r) * buffer[i - 1]
        else:
            D = buffer[i]
        x = sigma[t] / sigma[s] * x - alpha[t] * torch.expm1(-h) * D
    torch.testing.assert_close(generate(model, labels, steps=5, seed=4), x.float(), rtol=1e-3, atol=1e-3)


def test_dpm_solver_is_nearer_than_ddim_at_more_than_twice_the_steps():
    m, s = 1.0, 0.3  # θ_0 is around m or around -m

    def function(x, a, sd, label):
        v = a * a * s * s + sd * sd
        x0 = torch.tanh(a * x * m / v) * m * sd * sd / v + a * s * s / v * x  # E[θ_0 | x]
        return (x - a * x0) / sd

    def tokens(sampler, steps):
        return generate(Formula(function), torch.zeros(512).long(), steps=steps, guidance=1, sampler=sampler, seed=0)

    true = tokens("ddim", 1000)
    dpm, ddim, coarse = ((tokens(*way) - true).norm() for way in (("dpm", 20), ("ddim", 50), ("ddim", 20)))
    assert dpm < ddim < coarse


def test_guidance_of_one_asks_for_the_class_only():
    model = Formula(lambda x, a, sd, label: 0.1 * x + label)
    labels = torch.tensor([0, 2])
    plain = generate(model, labels, steps=5, guidance=1, seed=0)
    assert all(torch.equal(asked, labels) for asked in model.labels)
    # The long way, with both predictions, ends at the same place.
    nearly = generate(model, labels, steps=5, guidance=1 + 1e-6, seed=0)
    assert torch.equal(model.labels[-1], torch.tensor([0, 2, 3, 3]))  # the classes, and "no class"
    torch.testing.assert_close(nearly, plain, rtol=1e-3, atol=1e-2)


def test_guidance_of_one_equals_the_conditional_model():
    model, labels = trained_like(), torch.tensor([0, 2])
    alpha, sigma = noise_schedule()
    x = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(4))
    for now, then in ((999, 499), (499, -1)):
        eps = model(x, torch.full((2,), now), labels)
        x0 = (x - sigma[now] * eps) / alpha[now]
        x = alpha[then] * x0 + sigma[then] * eps if then >= 0 else x0
    torch.testing.assert_close(generate(model, labels, steps=2, guidance=1, sampler="ddim", seed=4), x, rtol=1e-3, atol=1e-3)


def test_guidance_extrapolates_from_no_class_to_the_class():
    model = Formula(lambda x, a, sd, label: label.float().expand_as(x))  # predicts the label's number: 3 is no class
    x = generate(model, torch.tensor([1]), steps=1, guidance=2.5, seed=0)
    start = torch.randn(1, 1, 1, generator=torch.Generator().manual_seed(0))
    eps = 3 + 2.5 * (1 - 3)
    torch.testing.assert_close(x, (start - model.sigma[-1] * eps) / model.alpha[-1], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("sampler", ["dpm", "ddim", "ddpm"])
def test_same_seed_same_tokens(sampler):
    model, labels = trained_like(), torch.tensor([0, 1])
    a, again, other = (generate(model, labels, steps=5, sampler=sampler, seed=seed) for seed in (3, 3, 4))
    assert a.shape == (2, 6, 5) and torch.equal(a, again) and not torch.allclose(a, other)
    assert not torch.equal(a[0], a[1])


# ----------------------------------------------------------------------------------------------------------------------- loss


def loss_of(function, gamma=5.0, scheduled=True, B=64):
    torch.manual_seed(0)
    theta0 = torch.randn(B, 6, 5)
    alpha, sigma = noise_schedule()
    calls = []

    def model(x, step, label, given):
        eps = function(x, alpha[step][:, None, None], sigma[step][:, None, None], theta0, len(calls))
        calls.append((x, step, eps))
        return eps

    step, noise, labels = torch.randint(1, NUM_STEPS, (B,)), torch.randn_like(theta0), torch.zeros(B).long()
    loss = diffusion_loss(model, theta0, labels, None, step, noise, alpha, sigma, gamma, scheduled)
    return loss, calls, theta0


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_perfect_denoiser_has_no_loss(scheduled):
    loss, calls, _ = loss_of(lambda x, a, s, theta0, call: (x - a * theta0) / s, scheduled=scheduled)
    assert len(calls) == 1 + scheduled
    assert 0 <= loss.item() < 1e-6
    assert calls[0][1].min() >= scheduled  # a step back must be left
    if scheduled:
        assert torch.equal(calls[1][1], calls[0][1] - 1)


def test_loss_without_weights_is_the_mean_squared_error_of_the_noise():
    loss, ((x, step, _),), theta0 = loss_of(lambda x, *_: torch.zeros_like(x), gamma=0, scheduled=False)
    alpha, sigma = noise_schedule()
    noise = (x - alpha[step][:, None, None] * theta0) / sigma[step][:, None, None]
    assert loss.item() == pytest.approx(noise.square().mean().item(), rel=1e-4)
    assert 0.9 < loss.item() < 1.1


def test_second_pass_starts_where_the_model_got_and_aims_at_the_true_theta0():
    # A model that is wrong at its first call: the second target must make up for that.
    loss, ((x1, step1, eps1), (x2, step2, eps2)), theta0 = loss_of(
        lambda x, a, s, theta0, call: torch.sin(3 * x) if call == 0 else torch.cos(x)
    )
    alpha, sigma = (x.double() for x in noise_schedule())

    def at(schedule, step):
        return schedule[step][:, None, None]

    a1, s1, a2, s2 = (at(schedule, step) for step in (step1, step2) for schedule in (alpha, sigma))
    x0 = (x1 - s1 * eps1) / a1
    torch.testing.assert_close(x2.double(), a2 * x0 + s2 * eps1, rtol=1e-3, atol=1e-3)
    noise, target = (x1 - a1 * theta0) / s1, (x2 - a2 * theta0) / s2
    torch.testing.assert_close((x2 - s2 * target) / a2, theta0.double(), rtol=1e-6, atol=1e-6)  # recovers θ_0
    expected = 0
    for eps, goal, a, s in ((eps1, noise, a1, s1), (eps2, target, a2, s2)):
        snr = a.flatten().square() / s.flatten().square()
        expected += (snr.clamp(max=5) / snr * (eps - goal).square().mean((1, 2))).mean().item()
    assert loss.item() == pytest.approx(expected, rel=1e-3)


def test_second_pass_does_not_send_a_gradient_through_its_input():
    weight = torch.zeros((), requires_grad=True)
    second_inputs = []

    def model(x, a, s, theta0, call):
        if call == 1:
            second_inputs.append(x)
        return weight * x

    loss, _, _ = loss_of(model)
    loss.backward()
    assert weight.grad.isfinite() and not second_inputs[0].requires_grad


def test_the_averaged_weights_keep_no_graph(tmp_path, monkeypatch, trained):
    # An average that requires gradients links every training step to the one before, and memory grows without end.
    seen, generate_tokens = [], dit.generate

    def keep_model(model, labels, **options):
        seen.append(model)
        return generate_tokens(model, labels, steps=1)

    def sheet(path, clips, titles):
        assert not torch.is_grad_enabled()  # without gradients the decoder takes as few frames as fit a gigabyte

    monkeypatch.setattr(dit, "write_sheet", sheet)
    monkeypatch.setattr(dit, "generate", keep_model)
    options = f"--ckpt {trained}/vae.pt --steps 2 --batch-size 4 --num-latents 8 --out {tmp_path}/dit.pt --run-dir {tmp_path}"
    monkeypatch.setattr("sys.argv", ["dit.py", *options.split()])
    dit.main()
    assert seen and not any(p.requires_grad for p in seen[-1].parameters())


def test_tokens_reach_the_denoiser_at_unit_deviation(tmp_path, monkeypatch, trained):
    scales = []

    def keep_deviation(model, theta0, *args):
        scales.append(theta0.std().item())
        return model.out.bias.sum()

    monkeypatch.setattr(dit, "diffusion_loss", keep_deviation)
    options = f"--ckpt {trained}/vae.pt --steps 2 --batch-size 16 --num-latents 64 --out {tmp_path}/dit.pt --run-dir {tmp_path}"
    monkeypatch.setattr("sys.argv", ["dit.py", *options.split()])
    dit.main()
    assert len(scales) == 2
    assert all(math.isclose(scale, 1, abs_tol=0.05) for scale in scales)


@pytest.mark.parametrize("sampler", ["dpm", "ddim", "ddpm"])
def test_a_seeded_preview_leaves_the_random_numbers_of_a_training_alone(sampler):
    model = trained_like()
    before = torch.random.get_rng_state()
    generate(model, torch.zeros(1, dtype=torch.long), steps=3, sampler=sampler, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)
