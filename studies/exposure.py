"""Does scheduled sampling pay? What it shows the denoiser, what it costs and brings: python -m studies.exposure --ckpt dit.pt

Scheduled sampling (§3.3) takes a step back with the model's own prediction, and the model learns from where that leads. How
far back? The paper says from t to t-1, a thousandth of the way, where a sampler of 20 steps goes fifty times as far.

- *How much of its own errors does the model see?* With ε̂ for ε, a step from (α, σ) to (α', σ') leads to where the noise, as
  seen from the true θ_0, is ε + (r - 1) (ε - ε̂), with r = (σ / α) / (σ' / α'). So r - 1 is the share of its error it sees.
- *What does it cost?* A model's own step tells nothing about θ_0 that was not known before it, and passes for less noisy. So
  the model learns to see too much noise, and samples get too little variance (Huszár 2015 has the same of language). Of
  normally distributed data the best model is linear, and the share of the variance that is left can be computed.
- *What does it bring?* Denoisers are trained on the cached latents of a dit.pt, from the same start and on the same clips,
  without the second pass and with it so many steps back. Their samples are compared with the latents: the Fréchet distance
  of tokens, and their variance as a share of the latents'. A run that is done is a row of runs.csv, and is not done again.
"""

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import data
import dit
import fvd
from common import checkpoints, progress, utils
from common.optim import make_optimizer
from common.tables import add_row, read_rows, table
from common.utils import UserError, option
from studies.levels import cached, diffused

LEVELS = (100, 300, 500, 900)  # steps of the schedule that are shown
SAMPLERS = {"dpm": 20, "ddim": 20, "ddpm": 50}  # sampler -> steps
COLUMNS = ["back", "seed", "settings", "revision", "seconds"] + [f"{n}_{m}" for n in SAMPLERS for m in ("distance", "variance")]


@dataclass
class Config:
    ckpt: str = option("input", "dit.pt", "checkpoint of dit.py, with its .latents beside it")
    back: list = option("what", [0, 1, 50], "steps of the schedule that the second pass is back; 0: none", nargs="+", type=int)
    seeds: int = option("what", 3, "runs of each")
    steps: int = option("training", 500, "of each run")
    batch_size: int = option("training", 128, "clips per step")
    lr: float = option("training", 4e-3, "peak learning rate")
    share: float = option("training", 0.25, "of the steps that have a second pass")
    samples: int = option("judging", 1024, "of each run and sampler, spread over the classes")
    out_dir: str = option("output", "out/exposure", "runs.csv goes here")


def shown(back, step):
    """r - 1 of a second pass that is so many steps back from a step of the schedule: the share of its error the model sees."""
    alpha, sigma = dit.noise_schedule()
    return (sigma[step] / alpha[step] / (sigma[step - back] / alpha[step - back]) - 1).item()


class Linear:
    """The best denoiser of normally distributed numbers, trained with a second pass: ε̂ = c x, for dit.generate.

    variances [d] of θ_0, whose mean is 0; back, 0 for none, and share as in Config. The second pass is of this denoiser's own
    prediction, so the coefficients follow from the noisiest level on.
    """

    def __init__(self, variances, back, share=0.25):
        self.config, self.variances = SimpleNamespace(num_tokens=1, token_dim=len(variances), num_classes=1), variances
        alpha, sigma = dit.noise_schedule()
        total = alpha.square()[:, None] * variances + sigma.square()[:, None]  # [1000, d], the variance of x
        self.c = torch.zeros_like(total)
        for t in reversed(range(dit.NUM_STEPS)):
            product, square = sigma[t].expand_as(variances), total[t]  # E[x ε] and E[x²] of the first pass
            if back and t + back < dit.NUM_STEPS:
                u = t + back
                kept = dit.reverse_step(torch.ones_like(variances), self.c[u], alpha[u], sigma[u], alpha[t], sigma[t])
                again = kept.square() * total[u]
                product = product + share * (again - alpha[t] * kept * alpha[u] * variances) / sigma[t]
                square = square + share * again
            self.c[t] = product / square

    def __call__(self, x, step, label, given):
        return self.c[step][:, None] * x

    def kept_variance(self, sampler, steps):
        """Variance of what a deterministic sampler makes with it, as a share of variances [d]: [d]."""
        made = dit.generate(self, torch.zeros(1, dtype=torch.long), steps, 1, sampler, seed=0)[0, 0]
        begun = torch.randn(len(made), generator=torch.Generator().manual_seed(0))  # which the sampler scales
        return (made / begun).square() / self.variances


def train(config, like, theta0, labels, back, seed):
    """A denoiser of the sizes and classes of the model `like`, trained on theta0 [n, N, d]: its averaged weights."""
    torch.manual_seed(seed)
    model = dit.DiT(like.config)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    step_of = utils.FiniteStep(model, make_optimizer(model, model.matrices(), 0.01), 1.0)
    (alpha, sigma), stream = dit.noise_schedule(), data.Stream(len(theta0), config.batch_size, seed)
    for step in progress.bar(range(config.steps), f"{back} back, seed {seed}", unit="step"):
        random = utils.step_generator("cpu", seed, step)
        scheduled = back if torch.rand((), generator=random).item() < config.share else 0
        uniform, drop = torch.rand(2, config.batch_size, generator=random)
        noise = torch.randn(config.batch_size, *theta0.shape[1:], generator=random)
        t = scheduled + (uniform * (dit.NUM_STEPS - scheduled)).long()
        chosen = torch.tensor(stream.batch(step)) % len(theta0)
        label = torch.where(drop < 0.1, like.config.num_classes, labels[chosen])
        loss = dit.diffusion_loss(model, theta0[chosen], label, None, t, noise, alpha, sigma, 5.0, scheduled)
        loss.backward()
        step_of(loss, utils.learning_rate(step, config.steps, config.lr, 50))
        utils.update_ema(ema, model, min(0.99, (1 + step) / (10 + step)))
    return ema


def judge(model, known, labels, samples):
    """{column: value} of samples of a model beside the latents known [n, N, d], of labels [n]."""
    flat, found = known.flatten(1).double().numpy(), {}
    wanted = labels[torch.linspace(0, len(labels) - 1, samples).long()]
    for sampler, steps in SAMPLERS.items():
        parts = [dit.generate(model, y, steps, 1, sampler, seed=i) for i, y in enumerate(wanted.split(256))]
        made = torch.cat(parts).flatten(1).double().numpy()
        found[f"{sampler}_distance"] = round(fvd.frechet_distance_of(made, flat), 4)
        found[f"{sampler}_variance"] = round(float(made.var(0).sum() / flat.var(0).sum()), 4)
    return found


def main(argv=None):
    config = utils.parse_options(Config, __doc__, argv=argv)
    utils.check_positive(config, "seeds", "steps", "batch_size", "samples")
    if not all(0 <= back < dit.NUM_STEPS for back in config.back):
        raise UserError(f"--back {config.back}: there are {dit.NUM_STEPS} steps")

    print("r - 1, the share of its error that the second pass shows the model:\n")
    rows = [[b, *(f"{shown(b, t):.3f}" if t >= b else "" for t in LEVELS)] for b in config.back if b]
    table(["steps back", *(f"at {t}" for t in LEVELS)], rows)
    print("\nvariance of samples of the best model of normal data, as a share of the data's:\n")
    which, variances = [("dpm", 20), ("ddim", 20), ("ddim", 1000)], torch.tensor([1.0, 0.1, 0.01])
    header = [f"{name} {steps}: {v:g}" for name, steps in which for v in variances.tolist()]
    best = {b: Linear(variances, b, config.share) for b in config.back}
    rows = [[b, *(f"{value:.3f}" for w in which for value in linear.kept_variance(*w))] for b, linear in best.items()]
    table(["steps back", *header], rows)

    ckpt = checkpoints.load(config.ckpt, "dit", "python dit.py")
    like, vae, scale = dit.load_dit(ckpt)
    latents, labels = cached(config.ckpt)
    known, labels = diffused(latents, vae, scale), torch.from_numpy(np.array(labels))
    settings = f"{config.steps} steps of {config.batch_size}, lr {config.lr:g}, share {config.share:g}"
    out = Path(config.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    for seed in range(config.seeds):
        for back in config.back:
            asked = {"back": str(back), "seed": str(seed), "settings": settings}
            if any(asked.items() <= row.items() for row in read_rows(out / "runs.csv", COLUMNS)):
                continue
            begin = time.time()
            model = train(config, like, known, labels, back, seed)
            about = {"revision": utils.git_revision(), "seconds": round(time.time() - begin)}
            add_row(out / "runs.csv", COLUMNS, asked | about | judge(model, known, labels, config.samples))
    print("\nFréchet distance of samples' tokens to the latents, and their variance as a share of the latents':\n")
    done = [row for row in read_rows(out / "runs.csv", COLUMNS) if row["settings"] == settings]
    table(["steps back", "seed", *COLUMNS[5:]], [[row[name] for name in ("back", "seed", *COLUMNS[5:])] for row in done])


if __name__ == "__main__":
    utils.run(main)
