"""What the denoiser knows at each level of noise, beside what a linear filter knows: python -m studies.levels --ckpt dit.pt …

Held-out clips are encoded, noised and denoised in one step. *linear* is the best linear guess of θ_0, of the mean and the
covariance of the cached latents (the Wiener filter). A network above it wastes what two moments of the data say; how far
below it comes is what it has learned. Errors are shares of the variance of θ_0.

Then samples are drawn, and the nearest of the cached latents is searched for each. Where samples are further from them than
held-out clips are, they are not yet like the data; where they are much nearer, they are copies, or there is little else to
make, as with Sprites. So the share of samples that are nearer to a held-out clip is counted as well: of copies it is 0, and of
samples like the data it is the share of the held-out clips among all (take all of them: --clips).

A denoiser that predicts frames (dit.py --cond-frames) is measured by the PSNR of the frames that are to come, beside a linear
prediction of θ_0 from the given frames' tokens. A draw from what may happen is not the mean of what may happen: where the mean
is off by a squared error e, a perfect draw is off by 2 e, 3 dB less.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import data
import dit
from common import checkpoints, utils
from common.tables import table
from common.utils import UserError, option
from common.video import to_clip
from vae import clips_of, decode, psnr


@dataclass
class Config:
    ckpt: list = option("input", ["dit.pt"], "checkpoints of dit.py, each with its .latents beside it", nargs="+")
    clips: int = option("input", 128, "held-out clips, spread over their set")
    levels: list = option("input", [0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0], "σ / α", nargs="+", type=float)
    samples: int = option("input", 256, "samples that are compared with the cached latents, spread over the classes")
    draws: int = option("input", 8, "predictions of each clip, where frames are predicted")
    seed: int = option("input", 0, "of the noise")


def linear(tokens):
    """The best linear guess of θ_0 for clips like tokens [B, N, d]: (θ_t [..., N, d], α, σ) -> θ_0."""
    flat = tokens.double().flatten(1)
    mean = flat.mean(0)
    values, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))

    def guess(noised, alpha, sigma):
        along = (noised.double().flatten(1) - alpha * mean) @ vectors  # uncorrelated, of variances α² values + σ²
        return (mean + (along * alpha * values / (alpha**2 * values + sigma**2)) @ vectors.T).view_as(noised)

    return guess


@torch.no_grad()
def errors(model, theta0, labels, known, levels, seed=0):
    """Mean squared errors of θ_0 as shares of its variance: rows (σ / α, linear, model), for held-out theta0 [B, N, d].

    known [n, N, d] are the latents that the linear filter is of.
    """
    (alpha, sigma), generator = dit.noise_schedule(), torch.Generator().manual_seed(seed)
    guess, rows = linear(known), []
    variance = (theta0 - known.mean(0)).square().mean()
    for level in levels:
        t = (sigma / alpha - level).abs().argmin()
        noised = alpha[t] * theta0 + sigma[t] * torch.randn(theta0.shape, generator=generator)
        eps = torch.cat([model(x, t.expand(len(x)), y) for x, y in zip(noised.split(64), labels.split(64))]).float()
        found = guess(noised, alpha[t].double(), sigma[t].double()), (noised - sigma[t] * eps) / alpha[t]
        rows.append((level, *((x - theta0).square().mean().div(variance).item() for x in found)))
    return rows


def nearest(tokens, known):
    """Median squared distance of tokens [B, N, d] to the nearest of known [n, N, d], a share of the variance of known."""
    flat = known.flatten(1)
    distance = torch.cdist(tokens.flatten(1), flat).square().min(1).values
    return (distance.median() / (flat - flat.mean(0)).square().sum(1).mean()).item()


def new(tokens, known, held_out):
    """Share of tokens [B, N, d] that are nearer to one of held_out [m, N, d] than to any of known [n, N, d]."""
    to_known, to_held_out = (torch.cdist(tokens.flatten(1), x.flatten(1)).min(1).values for x in (known, held_out))
    return (to_held_out < to_known).float().mean().item()


def regressions(given, known_given, known, strengths=(0.003, 0.03, 0.3, 3.0)):
    """Linear predictions of θ_0 from the tokens of given frames [B, N, d]: a list of [B, N, d], one of each ridge strength.

    known_given and known [n, N, d] are the latents that they are fitted to.
    """
    x, y, asked = (z.double().flatten(1) for z in (known_given, known, given))
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y, asked = x - x_mean, y - y_mean, asked - x_mean
    covariance, both = x.T @ x, x.T @ y
    ridge = covariance.diagonal().mean() * torch.eye(len(covariance))
    found = [asked @ torch.linalg.solve(covariance + strength * ridge, both) + y_mean for strength in strengths]
    return [z.view_as(given).float() for z in found]


@torch.no_grad()
def predictions(model, vae, scale, clips, labels, latents, draws, refine):
    """Rows (what, PSNR in dB of the frames that are to come, margin over copies of the last given frame), for held-out clips
    [B, T, 3, H, W]; latents [n, 3, N, d] as they are cached."""
    K, T = model.config.cond_frames, clips.shape[1]
    known, known_given = (x if vae.principal is None else vae.principal(x) for x in (latents[:, 0], latents[:, 2]))
    given = torch.cat([dit.encode_given(vae, part, K, refine) for part in clips.split(16)])

    def frames(tokens):
        return decode(vae, tokens, torch.arange(K, T)).clamp(-1, 1)

    real, last = clips[:, K:], clips[:, K - 1 : K]
    drawn = [frames(dit.generate(model, labels, guidance=1, seed=seed, given=scale * given) / scale) for seed in range(draws)]
    linear = [psnr(real, frames(tokens)) for tokens in regressions(given, known_given, known)]
    found = {
        "copies of the last given frame": psnr(real, last.expand_as(real)),
        "the mean of the given frames, standing still": psnr(real, clips[:, :K].mean(1, keepdim=True).expand_as(real)),
        "the clip itself, encoded and decoded": psnr(real, frames(vae.encode(clips)[0])),
        "linear, the best of its strengths": max(linear),
        "one draw": sum(psnr(real, made) for made in drawn) / draws,
        f"the mean of {draws} draws": psnr(real, torch.stack(drawn).mean(0)),
    }
    return [(name, value, value - found["copies of the last given frame"]) for name, value in found.items()]


def cached(path):
    """What dit.py cached beside its checkpoint: latents [n, 2 or 3, N, d] and labels [n], memory-mapped; else UserError."""
    directory = Path(path).with_suffix(".latents")
    cache = directory / "latents.npy"
    if not cache.is_file():
        raise UserError(f"there are no cached latents {cache}: dit.py writes them with --cache-latents")
    return np.load(cache, mmap_mode="r"), np.load(directory / "labels.npy", mmap_mode="r")


def diffused(latents, vae, scale):
    """Cached latents [n, 2 or 3, N, d] -> the θ_0 that stage 2 learns from, without the posterior's noise."""
    known = torch.from_numpy(np.array(latents[:, 0])).float()
    return scale * (known if vae.principal is None else vae.principal(known))


def main(argv=None):
    config = utils.parse_options(Config, __doc__, argv=argv)
    utils.check_positive(config, "clips", "samples")
    for path in config.ckpt:
        ckpt = checkpoints.load(path, "dit", "python dit.py")
        model, vae, scale = dit.load_dit(ckpt)
        latents, _ = cached(path)
        held_out = data.open_dataset(clips_of(ckpt["vae"]), "test", ckpt["classes"])
        chosen = [held_out[i * len(held_out) // config.clips] for i in range(min(config.clips, len(held_out)))]
        labels = torch.tensor([label for _, label in chosen])
        clips, refine = torch.stack([to_clip(frames) for frames, _ in chosen]), dit.refine_steps(ckpt)
        print(f"\n{path}, {len(labels)} held-out clips, {len(latents)} latents\n")
        if model.config.cond_frames:
            whole = torch.from_numpy(np.array(latents)).float()
            rows = predictions(model, vae, scale, clips, labels, whole, config.draws, refine)
            about = f"PSNR of the {clips.shape[1] - model.config.cond_frames} frames to come, dB"
            table(["prediction", about, "over copying, dB"], [[name, f"{a:.2f}", f"{b:+.2f}"] for name, a, b in rows])
            continue
        known = diffused(latents, vae, scale)
        theta0 = torch.cat([dit.encode_batch(vae, part, 0, refine)[:, 0] for part in clips.split(32)])
        rows = errors(model, scale * theta0, labels, known, config.levels, config.seed)
        wanted = torch.arange(config.samples) % len(ckpt["classes"])
        drawn = torch.cat([dit.generate(model, y, guidance=1, seed=config.seed + i) for i, y in enumerate(wanted.split(64))])
        table(["σ / α", "linear", "model"], [[f"{level:g}", *(f"{error:.5f}" for error in found)] for level, *found in rows])
        distances = (
            f"{nearest(drawn, known):.3f} from {len(drawn)} samples, {nearest(scale * theta0, known):.3f} from held-out clips"
        )
        print(f"to the nearest cached latent: {distances}")
        alike = len(theta0) / (len(theta0) + len(known))
        print(
            f"samples nearer to a held-out clip: {new(drawn, known, scale * theta0):.1%}; of samples like the data {alike:.1%}"
        )


if __name__ == "__main__":
    utils.run(main)
