"""Stage 2, the implicit diffusion transformer: it denoises weight tokens, so that noise becomes a video's weights (§3.3).

θ_0 = tokens of a video from stage 1, scaled to unit deviation     [B, N, d]
θ_t = α_t θ_0 + σ_t ε                                              t = 0 … 999, from almost clean to almost noise
DiT(θ_t, t, class) predicts ε

python dit.py --ckpt vae.pt
"""

import copy
import dataclasses
import math
import time
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import utils
from utils import UserError, option
from vae import Attention, load_vae

# ------------------------------------------------------------------------------------------------------------------ model


@dataclass
class DiTConfig:
    """Sizes of the denoiser. The defaults are DiT-L (§A.1)."""

    num_tokens: int = 128
    token_dim: int = 128
    num_classes: int = 101
    width: int = 1024
    depth: int = 24
    heads: int = 16


SIZES = {"nano": {"width": 192, "depth": 6, "heads": 6}, "S": {}, "B": {}, "L": {}}  # the paper's denoiser is always DiT-L


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """A transformer block whose layer norms take shift, scale and gate from the condition; adaLN-zero of DiT."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        nn.init.zeros_(self.adaln[1].weight)  # gates start at zero: every block starts as the identity
        nn.init.zeros_(self.adaln[1].bias)

    def forward(self, x, condition):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(condition).chunk(6, -1)  # each [B, width]
        x = x + gate1[:, None] * self.attention(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DiT(nn.Module):
    """The denoiser. One weight token is one transformer token; no patches, no temporal attention."""

    def __init__(self, config):
        super().__init__()
        self.config, width = config, config.width
        self.embed = nn.Linear(config.token_dim, width)
        # Tokens have no place in space or time; which part of the kernels a token is, the transformer learns.
        self.position = nn.Parameter(torch.randn(config.num_tokens, width) * 0.5)
        self.step_mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(config.num_classes + 1, width)  # the last one is "no class", for guidance
        nn.init.normal_(self.label.weight, std=0.5)
        self.blocks = nn.ModuleList(DiTBlock(width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.out = nn.Linear(width, config.token_dim)
        for layer in (self.adaln[1], self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens, step, label):
        """Noised tokens [B, N, d], diffusion steps [B] in 0 … 999, labels [B] (num_classes: none) -> ε [B, N, d]."""
        freq = torch.exp(-math.log(10000) * torch.arange(128, device=tokens.device) / 128)
        angle = step[:, None].float() * freq
        condition = self.step_mlp(torch.cat([angle.cos(), angle.sin()], -1)) + self.label(label)  # [B, width]
        x = self.embed(tokens) + self.position
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.adaln(condition).chunk(2, -1)
        return self.out(modulate(self.norm(x), shift, scale))


# -------------------------------------------------------------------------------------------------------------- diffusion

NUM_STEPS = 1000


def noise_schedule(device="cpu"):
    """α_t, σ_t [1000] of the variance-preserving process with β from 1e-4 to 2e-2 (Ho et al. 2020), α² + σ² = 1."""
    beta = torch.linspace(1e-4, 2e-2, NUM_STEPS, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - beta, 0)
    return alpha_bar.sqrt().float().to(device), (1 - alpha_bar).sqrt().float().to(device)


def min_snr_weight(alpha, sigma, gamma):
    """Min-SNR-γ adjusted for ε-prediction: min(SNR, γ) / SNR with SNR = α² / σ² (Hang et al. 2023; §3.3)."""
    snr = alpha.square() / sigma.square()
    return snr.clamp(max=gamma) / snr


def reverse_step(x, eps, alpha, sigma, alpha_next, sigma_next, eta=0.0, generator=None):
    """From θ_t and its noise to the less noisy θ_s (Song et al. 2021, Eq. 12).

    eta = 0 is the deterministic DDIM step; eta = 1 draws from the DDPM posterior q(θ_s | θ_t, θ_0).
    """
    x0 = (x - sigma * eps) / alpha
    fresh = eta * sigma_next / sigma * (1 - (alpha / alpha_next).square()).clamp_min(0).sqrt()
    x = alpha_next * x0 + (sigma_next.square() - fresh.square()).clamp_min(0).sqrt() * eps
    return x + fresh * torch.randn(x.shape, generator=generator).to(x) if eta else x


@torch.no_grad()
def generate(model, labels, steps=50, guidance=2.0, sampler="ddim", seed=None):
    """Tokens [B, N, d] at unit deviation for labels [B], from noise.

    steps: evaluations of the model, 1 … 1000, evenly spaced; guidance: scale of classifier-free guidance, 1 is none (Ho &
    Salimans 2022); sampler: "ddim" (deterministic) or "ddpm" (ancestral).
    """
    device, c = labels.device, model.config
    # Noise is drawn on the CPU, so that a seed means the same videos on every device, and from a generator of its own, so
    # that a preview leaves the random numbers of a training alone.
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    x = torch.randn(len(labels), c.num_tokens, c.token_dim, generator=generator).to(device)
    alpha, sigma = noise_schedule(device)
    alpha, sigma = F.pad(alpha, (1, 0), value=1.0), F.pad(sigma, (1, 0), value=0.0)  # index 0 is clean, t sits at t + 1
    times = torch.linspace(NUM_STEPS, 0, steps + 1).round().long().tolist()
    none = torch.full_like(labels, c.num_classes)
    for now, then in zip(times[:-1], times[1:]):
        step = torch.full_like(labels, now - 1)
        if guidance == 1:
            eps = model(x, step, labels)
        else:
            both = model(x.repeat(2, 1, 1), step.repeat(2), torch.cat([labels, none]))
            with_class, without = both.chunk(2)
            eps = without + guidance * (with_class - without)
        eta = 1.0 if sampler == "ddpm" else 0.0
        x = reverse_step(x, eps, alpha[now], sigma[now], alpha[then], sigma[then], eta, generator)
    return x


def load_dit(ckpt):
    """A stage-2 checkpoint -> (DiT with its averaged weights, VAE, latent scale), in evaluation mode."""
    with utils.fitting_checkpoint():
        model = DiT(DiTConfig(**ckpt["dit_config"]))
        model.load_state_dict(ckpt["ema"])
    return model.eval().requires_grad_(False), load_vae(ckpt["vae"]), ckpt["latent_scale"]


# --------------------------------------------------------------------------------------------------------------- training


@dataclass
class Config:
    ckpt: str = option("data", "vae.pt", "stage-1 checkpoint, from vae.py")
    dataset: str = option("data", "", "default: the one the checkpoint was trained on", choices=["", *data.DATASETS])
    data_dir: str = option("data", "", "default: the one the checkpoint was trained on")
    num_latents: int = option("data", 0, "clips to encode once, before training; 0 encodes anew at every step")
    workers: int = option("data", 0, "data loading processes")
    preset: str = option("model", "", "size of the denoiser; that of stage 1 unless named", choices=list(SIZES))
    steps: int = option("training", 1_000_000, "optimizer steps")
    batch_size: int = option("training", 64, "clips per step")
    lr: float = option("training", 1e-4, "peak learning rate of AdamW, reached after the warm-up, then cosine decay")
    warmup: int = option("training", 10_000, "steps of linear warm-up")
    weight_decay: float = option("training", 0.01, "of AdamW")
    grad_clip: float = option("training", 1.0, "largest norm of the gradient")
    min_snr_gamma: float = option("training", 5.0, "γ of the Min-SNR loss weight; 0 weights all steps alike")
    scheduled_sampling: float = option("training", 0.25, "share of steps that train on the model's own prediction too")
    drop_label: float = option("training", 0.1, "share of labels replaced by no class, for guidance")
    ema: float = option("training", 0.9999, "decay of the averaged weights that sampling uses")
    seed: int = option("training", 0, "of weights, data order and noise")
    device: str = option("machine", "auto", "cpu, cuda, cuda:1, …; auto: CUDA where there is one")
    bf16: str = option("machine", "auto", "bfloat16 autocast; auto: where the hardware has it", choices=["auto", "on", "off"])
    out: str = option("output", "dit.pt", "the checkpoint; it carries stage 1 too")
    run_dir: str = option("output", "runs/dit", "losses.csv, losses.png and sample sheets go here")
    log_every: int = option("output", 50, "steps between rows of losses.csv")
    save_every: int = option("output", 500, "steps between checkpoints and sample sheets")


def preset_defaults(args):
    """The defaults that the stage-1 checkpoint implies; without one, those of the paper's sizes."""
    try:
        preset = args.preset or utils.load_checkpoint(args.ckpt, "vae", "python vae.py")["config"]["preset"]
    except UserError:
        preset = "S"
    if preset == "nano":
        return dict(preset=preset, steps=500, batch_size=32, lr=1e-3, warmup=50, ema=0.995, num_latents=4096)
    return dict(preset=preset)


@torch.no_grad()
def encode_clips(vae, batches, count, device):
    """Posterior means, deviations [count, N, d] and labels [count] of the next clips of the data set, kept on the device."""
    means, deviations, labels = [], [], []
    while sum(map(len, labels)) < count:
        video, label = next(batches)
        mean, logvar = vae.encode(video.to(device))
        means.append(mean)
        deviations.append(torch.exp(0.5 * logvar))
        labels.append(label.to(device))
    return torch.cat(means)[:count], torch.cat(deviations)[:count], torch.cat(labels)[:count]


def diffusion_loss(model, theta0, labels, alpha, sigma, gamma, scheduled):
    """Weighted squared error of the predicted noise, mean over the batch (Eq. 2).

    theta0 [B, N, d] at unit deviation; gamma of Min-SNR, 0 for none; scheduled adds the second pass of scheduled sampling.
    """

    def error(eps, noise, step):
        weight = min_snr_weight(alpha[step], sigma[step], gamma) if gamma else 1.0
        return (weight * (eps.float() - noise).square().mean((1, 2))).mean()

    def at(schedule, step):
        return schedule[step][:, None, None]  # [B, 1, 1]

    step = torch.randint(1 if scheduled else 0, NUM_STEPS, (len(theta0),), device=theta0.device)
    noise = torch.randn_like(theta0)
    x = at(alpha, step) * theta0 + at(sigma, step) * noise
    eps = model(x, step, labels)
    loss = error(eps, noise, step)
    if scheduled:
        # Scheduled sampling (§3.3): take one step back with the model's own prediction, as sampling will, and learn from
        # there as well. The target is the noise that leads from the true θ_0 to where the model has got.
        a, s = at(alpha, step - 1), at(sigma, step - 1)
        x = reverse_step(x, eps.detach().float(), at(alpha, step), at(sigma, step), a, s)
        loss = loss + error(model(x, step - 1, labels), (x - a * theta0) / s, step - 1)
    return loss


def main():
    config = utils.parse_options(Config, __doc__, preset_defaults)
    utils.check_positive(config, "steps", "batch_size", "log_every", "save_every")
    utils.make_parent(config.out)
    vae_ckpt = utils.load_checkpoint(config.ckpt, "vae", "python vae.py")
    stage1 = vae_ckpt["config"]
    config.dataset, config.data_dir = config.dataset or stage1["dataset"], config.data_dir or stage1["data_dir"]
    device = utils.pick_device(config.device)
    torch.manual_seed(config.seed)
    vae = load_vae(vae_ckpt).to(device)
    c, classes = vae.nerv_config, vae_ckpt["classes"]
    train_set = data.open_dataset(
        config.dataset, config.data_dir, "train", c.resolution, c.num_frames, stage1["stride"], classes=classes
    )
    if list(train_set.classes) != classes:
        raise UserError(f"{config.ckpt} was trained on the classes {classes}, and {config.dataset} has {train_set.classes}")
    dit_config = DiTConfig(c.num_tokens, c.token_dim, len(classes), **SIZES[config.preset])
    model = DiT(dit_config).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True
    )
    alpha, sigma = noise_schedule(device)

    # Latents: encoded once, or anew at every step. The first ones set the scale that brings them to unit deviation.
    batches = data.endless(train_set, min(config.batch_size, len(train_set)), config.workers, config.seed)
    print(f"encoding {max(config.num_latents, 8 * config.batch_size)} clips …", flush=True)
    means, deviations, labels = encode_clips(vae, batches, max(config.num_latents, 8 * config.batch_size), device)
    latent_scale = 1 / (means.var() + deviations.square().mean()).sqrt().item()
    order = torch.Generator().manual_seed(config.seed)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(classes)} classes, "
        f"{len(means)} clips encoded, latent scale {latent_scale:.4f}"
    )
    log = utils.RunLog(config.run_dir, config.steps, config.log_every)

    def save(step):
        utils.save_checkpoint(
            config.out, stage="dit", step=step, config=dataclasses.asdict(config), classes=classes,
            dit_config=dataclasses.asdict(dit_config), latent_scale=latent_scale,
            model=model.state_dict(), ema=ema.state_dict(), vae=vae_ckpt,
        )  # fmt: skip
        log.write()

    def preview(step):
        """A sheet with one sample per class, of ten classes at most."""
        shown = torch.linspace(0, len(classes) - 1, min(10, len(classes)), device=device).round().long()
        tokens = generate(ema, shown, seed=config.seed) / latent_scale
        clips = vae.decode(tokens, torch.arange(c.num_frames, device=device))
        data.write_sheet(f"{config.run_dir}/step{step:07d}.png", clips.cpu(), [classes[i] for i in shown])

    done = 0  # finished steps
    try:
        for step in range(config.steps):
            for group in optimizer.param_groups:
                group["lr"] = utils.learning_rate(step, config.steps, config.lr, config.warmup)
            if config.num_latents:
                i = torch.randint(len(means), (config.batch_size,), generator=order).to(device)
                mean, deviation, label = means[i], deviations[i], labels[i]
            else:
                mean, deviation, label = encode_clips(vae, batches, config.batch_size, device)
            theta0 = latent_scale * (mean + deviation * torch.randn_like(mean))  # a draw from the posterior, unit deviation
            label = torch.where(torch.rand(len(label), device=device) < config.drop_label, len(classes), label)
            scheduled = torch.rand((), generator=order).item() < config.scheduled_sampling
            with utils.autocast(device, config.bf16):
                loss = diffusion_loss(model, theta0, label, alpha, sigma, config.min_snr_gamma, scheduled)

            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            optimizer.step()
            decay = min(config.ema, (1 + step) / (10 + step))  # forgets the random start quickly
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
            done = step + 1
            log.log(step, loss=loss / 2 if scheduled else loss)

            if done % config.save_every == 0 and done < config.steps:
                preview(done)
                save(done)
    except KeyboardInterrupt:
        print(f"\ninterrupted after {done} steps", flush=True)
    save(done)
    preview(done)
    log.close()
    print(f"wrote {config.out} after {done} steps, {time.time() - log.start:.0f} s; sheets are in {config.run_dir}")


if __name__ == "__main__":
    utils.run(main)
