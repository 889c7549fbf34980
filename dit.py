"""Stage 2, the implicit diffusion transformer: it denoises weight tokens, so that noise becomes a video's weights (§3.3).

θ_0 = latents: the tokens of a video (nano: their components), at unit variance    [B, N, d]
θ_τ = α_τ θ_0 + σ_τ ε                                                         timesteps τ = 1 … 1000, 0 is clean
DiT(θ_τ, τ, class) predicts ε

python dit.py --ckpt vae.pt
"""

import copy
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import extras
import vae as stage1
from common import checkpoints, utils
from common.utils import UserError, option
from common.video import write_sheet
from extras.muon import make_optimizer


@dataclass
class DiTConfig:
    """Sizes of the denoiser. The defaults are DiT-L (§A.1)."""

    num_tokens: int = 128  # N and d of the latents, which may differ from those of the tokens (extras/components.py)
    token_dim: int = 128
    num_classes: int = 101
    cond_frames: int = 0  # given frames in frame prediction; 0 generates from noise alone
    width: int = 1024
    depth: int = 24
    heads: int = 16


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """A transformer block whose layer norms take shift, scale and gate from the condition; adaLN-zero of DiT."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention = stage1.Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        for p in self.adaln.parameters():  # gates start at zero: every block starts as the identity
            nn.init.zeros_(p)

    def forward(self, x, condition):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(condition).chunk(6, -1)  # each [B, width]
        x = x + gate1[:, None] * self.attention(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DiT(nn.Module):
    """The denoiser. One latent token is one transformer token; no patches, no temporal attention."""

    def __init__(self, config):
        super().__init__()
        self.config, width = config, config.width
        # In frame prediction the latents of the given frames are concatenated along the width (§4.3).
        self.embed = nn.Linear(config.token_dim * (2 if config.cond_frames else 1), width)
        # Not a position in space or time: token n always determines the same entries, so each n has a learned embedding.
        self.position = nn.Parameter(torch.randn(config.num_tokens, width) * 0.5)  # 0.5: not in the paper
        self.step_mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(config.num_classes + 1, width)  # the last one is "no class", for guidance
        nn.init.normal_(self.label.weight, std=0.5)  # not in the paper
        self.blocks = nn.ModuleList(DiTBlock(width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.out = nn.Linear(width, config.token_dim)
        for p in (*self.adaln.parameters(), *self.out.parameters()):
            nn.init.zeros_(p)

    def forward(self, latents, timestep, label, given=None):
        """Noised latents [B, N, d], timesteps [B] in 1 … 1000, labels [B] (num_classes: none) -> ε [B, N, d].

        given: in frame prediction, the latents [B, N, d] of the given frames (`encode_given`); zeros are no frames.
        """
        x, step_code, class_code = self.embed_all(latents, timestep, label, given)
        condition = step_code + class_code
        for block in self.blocks:
            x = block(x, condition)
        return self.read_out(x, condition)

    def embed_all(self, latents, timestep, label, given):
        """The inputs at the transformer's width: latents [B, N, width], timestep and label [B, width]."""
        freq = torch.exp(-math.log(10000) * torch.arange(128, device=latents.device) / 128)
        angle = timestep[:, None].float() * freq
        if self.config.cond_frames:
            latents = torch.cat([latents, torch.zeros_like(latents) if given is None else given], -1)  # [B, N, 2d]
        code = self.step_mlp(torch.cat([angle.cos(), angle.sin()], -1))
        return self.embed(latents) + self.position, code, self.label(label)

    def read_out(self, x, condition):
        """The last layer: x [B, N, width] after the last block, condition [B, width] -> ε [B, N, d]."""
        shift, scale = self.adaln(condition).chunk(2, -1)
        return self.out(modulate(self.norm(x), shift, scale))


# -------------------------------------------------------------------------------------------------------------- diffusion

NUM_STEPS = 1000
DROP_CONDITION = 0.1  # share of clips trained without a condition, for guidance (Ho & Salimans 2022)


@functools.cache  # a training step must not wait for its copy to a GPU
def noise_schedule(device="cpu"):
    """α_τ, σ_τ [1001] of the variance-preserving process with β from 1e-4 to 2e-2 (Ho et al. 2020); index 0 is clean."""
    beta = torch.linspace(1e-4, 2e-2, NUM_STEPS, dtype=torch.float64)
    alpha_bar = F.pad(torch.cumprod(1 - beta, 0), (1, 0), value=1.0)
    return alpha_bar.sqrt().float().to(device), (1 - alpha_bar).sqrt().float().to(device)


def min_snr_weight(alpha, sigma, gamma):
    """Min-SNR-γ adjusted for ε-prediction: min(SNR, γ) / SNR with SNR = α² / σ² (Hang et al. 2023; §3.3)."""
    snr = alpha.square() / sigma.square()
    return snr.clamp(max=gamma) / snr


def reverse_step(x, eps, alpha, sigma, alpha_next, sigma_next, eta=0.0, generator=None):
    """From θ_τ and its noise to a less noisy θ (Song et al. 2021, Eq. 12).

    eta = 0 is the deterministic DDIM step; eta = 1 draws from the DDPM posterior q(θ_next | θ_τ, θ_0).
    """
    x0 = (x - sigma * eps) / alpha
    fresh = eta * sigma_next / sigma * (1 - (alpha / alpha_next).square()).clamp_min(0).sqrt()  # their σ, Eq. 16
    x = alpha_next * x0 + (sigma_next.square() - fresh.square()).clamp_min(0).sqrt() * eps
    return x + fresh * torch.randn(x.shape, generator=generator).to(x) if eta else x


def sampling_times(sampler, steps, alpha, sigma):
    """The timesteps that sampling visits, from 1000, all noise, to 0, clean. UserError where steps are not 1 … 1000.

    DPM-Solver++ takes equal steps in λ = log(α / σ) down to timestep 5 (our choice), then one to clean, where λ is infinite.
    Above about a hundred steps, several of these round to the same timestep, which is visited once.
    """
    if not 1 <= steps <= NUM_STEPS:
        raise UserError(f"--steps {steps}: sampling takes 1 to {NUM_STEPS}")
    if sampler != "dpm":
        return torch.linspace(NUM_STEPS, 0, steps + 1).round().long().tolist()
    lam = torch.log(alpha / sigma)[1:].cpu()
    nearest = (torch.linspace(lam[-1], lam[4], steps)[:, None] - lam).abs().argmin(1) + 1
    return [*nearest.unique().flip(0).tolist(), 0]


@torch.no_grad()
def generate(model, labels, steps=20, guidance=2.0, sampler="dpm", seed=None, given=None):
    """Latents [B, N, d] for labels [B], from noise, and from given frames' latents [B, N, d] in prediction.

    steps: evaluations at most, 1 … 1000; guidance: scale of classifier-free guidance, 1 is none (Ho & Salimans 2022);
    sampler: "dpm" (DPM-Solver++, deterministic, second order), "ddim" (deterministic, first order) or "ddpm" (ancestral).
    """
    device, c = labels.device, model.config
    # On the CPU, by a generator of its own: a seed gives the same noise on every device, and previews do not affect training.
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    x = torch.randn(len(labels), c.num_tokens, c.token_dim, generator=generator).to(device)
    alpha, sigma = noise_schedule(device)
    times = sampling_times(sampler, steps, alpha, sigma)
    lam = torch.log(alpha / sigma)
    none = torch.full_like(labels, c.num_classes)
    given = torch.zeros_like(x) if given is None else given
    before, x0_before = None, None
    for now, then in zip(times[:-1], times[1:]):
        timestep = torch.full_like(labels, now)
        if guidance == 1:
            eps = model(x, timestep, labels, given).float()
        else:  # the second half of the batch has neither class nor given frames
            conditions = torch.cat([labels, none]), torch.cat([given, torch.zeros_like(given)])
            both = model(x.repeat(2, 1, 1), timestep.repeat(2), *conditions).float()
            with_class, without = both.chunk(2)
            eps = without + guidance * (with_class - without)
        if sampler == "dpm":
            # DPM-Solver++(2M) (Lu et al. 2022, Alg. 2) is the DDIM step with θ_0 extrapolated linearly in λ from the last two
            # predictions to the middle of the step. The first step has one prediction; in the last, λ is infinite.
            x0 = (x - sigma[now] * eps) / alpha[now]
            if before is not None and then > 0:
                ratio = (lam[then] - lam[now]) / (lam[now] - lam[before])  # their 1 / r
                halfway = x0 + ratio / 2 * (x0 - x0_before)  # their D
                eps = (x - alpha[now] * halfway) / sigma[now]
            before, x0_before = now, x0
        x = reverse_step(x, eps, alpha[now], sigma[now], alpha[then], sigma[then], float(sampler == "ddpm"), generator)
    return x


def diffusion_loss(model, theta0, labels, given, timestep, noise, gamma, scheduled):
    """Weighted squared error of the predicted noise, mean over the batch (Eq. 2).

    theta0 [B, N, d] at unit variance; given [B, N, d] or None; timesteps [B], from 2 on if scheduled; noise [B, N, d]; gamma
    of Min-SNR, 0 for none; scheduled: whether to add the second pass of scheduled sampling.
    """
    alpha, sigma = (schedule[:, None, None] for schedule in noise_schedule(theta0.device))  # [1001, 1, 1]

    def error(eps, noise, timestep):
        weight = min_snr_weight(alpha[timestep], sigma[timestep], gamma) if gamma else 1.0
        return (weight * (eps.float() - noise).square()).mean()

    x = alpha[timestep] * theta0 + sigma[timestep] * noise
    eps = model(x, timestep, labels, given)
    loss = error(eps, noise, timestep)
    if scheduled:
        # Scheduled sampling (§3.3): go one of the 1,000 steps back with the model's own prediction, and learn from there as
        # well. The target is the noise that leads from the true θ_0 to where the model has got.
        then = timestep - 1
        x = reverse_step(x, eps.detach().float(), alpha[timestep], sigma[timestep], alpha[then], sigma[then])
        loss = loss + error(model(x, then, labels, given), (x - alpha[then] * theta0) / sigma[then], then)
    return loss


def encode_given(vae, video, cond_frames):
    """Tokens [B, N, d] of clips [B, T, 3, H, W] of which only the first frames are given: the others are zero (§4.3)."""
    known = torch.arange(video.shape[1], device=video.device) < cond_frames
    return vae.encode(video * known[:, None, None, None])[0]


def load_dit(ckpt, denoiser=DiT, load_vae=stage1.load_vae):
    """A stage-2 checkpoint -> (DiT with its averaged weights, VAE, map from tokens to latents), in evaluation mode."""
    vae = load_vae(ckpt["vae"])
    with checkpoints.fitting(ckpt["denoiser"], denoiser.__name__):
        model = denoiser(DiTConfig(**ckpt["dit_config"]))
        model.load_state_dict(ckpt["ema"])
        latent_map = extras.latent_map(ckpt["config"]["extras"], (vae.nerv_config.num_tokens, vae.nerv_config.token_dim))
        latent_map.load_state_dict(ckpt["latent_map"])
    return model.eval().requires_grad_(False), vae, latent_map


# --------------------------------------------------------------------------------------------------------------- training


@dataclass
class Config:
    ckpt: str = option("data", "vae.pt", "stage-1 checkpoint, from vae.py")
    data_dir: str = option("data", "", "directory of its data set, if it has moved")
    num_latents: int = option("data", 0, "clips to encode; 0: ten per video, 512 to 200,000 or all videos; nano: 512 to 4,096")
    width: int = option("model", 1024, "width of the transformer")
    depth: int = option("model", 24, "blocks of the transformer")
    heads: int = option("model", 16, "attention heads, a divisor of the width")
    cond_frames: int = option("model", 0, "frame prediction from this many frames (the paper: 5); 0 generates whole clips")
    extras: list = option("model", [], "not in the paper: see extras/; without a name, all are off", nargs="*", metavar="NAME")
    steps: int = option("training", 1_000_000, "optimizer steps")
    batch_size: int = option("training", 64, "clips per step, of all processes together")
    lr: float = option("training", 1e-4, "peak learning rate, reached after the warm-up, then cosine decay")
    warmup: int = option("training", 10_000, "steps of linear warm-up")
    min_snr_gamma: float = option("training", 5.0, "γ of the Min-SNR loss weight; 0 weights all timesteps alike")
    scheduled_sampling: float = option("training", 0.25, "share of steps that train on the model's own prediction too")
    seed: int = option("training", 0, "seed for weights, data order and noise")
    bf16: str = option("machine", "auto", "bfloat16 autocast; auto: with CUDA", choices=["auto", "on", "off"])
    compile: str = option("machine", "auto", "torch.compile; auto: with CUDA", choices=["auto", "on", "off"])
    out: str = option("output", "dit.pt", "the checkpoint, with stage 1; losses and contact sheets go to runs/NAME beside it")
    resume: bool = option("output", False, "continue from the checkpoint --out, if it exists")
    save_every: int = option("output", 500, "steps between checkpoints and contact sheets")


def preset_defaults(args):
    """The defaults that the stage-1 checkpoint implies; without one, those of the paper's sizes."""
    if not (Path(args.ckpt).is_file() and checkpoints.load(args.ckpt, "vae", "python vae.py")["config"]["preset"] == "nano"):
        return {}
    return dict(width=96, depth=6, heads=3, steps=800, batch_size=256, lr=4e-3, warmup=50, extras=["components=4x64", "muon"])


def main(argv=None, denoiser=DiT, load_vae=stage1.load_vae):
    config = utils.parse_options(Config, __doc__, preset_defaults, argv)
    device, rank, world, rows = utils.start_training(config, "width", "depth", "heads")
    mine = slice(rank * rows, (rank + 1) * rows)  # this process's clips in a batch
    vae_ckpt = checkpoints.load(config.ckpt, "vae", "python vae.py")
    vae_ckpt.pop("training", None)  # stage 1 is used, and not trained
    vae, classes, stage1_hash = load_vae(vae_ckpt).to(device), vae_ckpt["classes"], utils.fingerprint(vae_ckpt["ema"])
    c, cond_frames, nano = vae.nerv_config, config.cond_frames, vae_ckpt["config"]["preset"] == "nano"
    if config.width % config.heads or config.num_latents < 0 or not 0 <= cond_frames < c.num_frames:
        raise UserError(f"--heads must divide --width, --cond-frames be below {c.num_frames}, --num-latents not be negative")

    # All clips are encoded once. Up to 16,384 of them, spread over the set, determine the map from tokens to latents.
    source = stage1.data_settings(vae_ckpt, data_dir=config.data_dir)
    videos = len(train_set := data.open_dataset(source, "train", classes))
    count = config.num_latents or min(max(512, 10 * videos), 4096 if nano else max(videos, 200_000))
    clips_of = data.spread(train_set, count) if count < videos else range(count)

    def encode(indices):
        clips, labels = data.clips(train_set, [clips_of[i] for i in indices])
        mean, logvar = vae.encode(clips.to(device))
        given = [encode_given(vae, clips.to(device), cond_frames)] if cond_frames else []
        return torch.stack([mean, torch.exp(0.5 * logvar), *given], 1), labels

    ckpt = checkpoints.resume(config, "dit", denoiser=denoiser.__name__, stage1=stage1_hash)
    key = {"stage1": stage1_hash, "data": train_set.identity(), "stride": source.stride, "flip": source.flip}
    key, shape = key | {"cond_frames": cond_frames}, (3 if cond_frames else 2, c.num_tokens, c.token_dim)
    latent_map = extras.latent_map(config.extras, shape[1:]).to(device)
    tokens, labels = checkpoints.cached(utils.log_directory(config.out), key, count, shape, encode, rank, world)
    latent_map.fit(*tokens[:: math.ceil(count / 16384), :2].float().to(device).unbind(1))
    utils.from_first_rank(latent_map)  # rounding may flip the sign of an eigenvector

    dit_config = DiTConfig(*latent_map.shape, len(classes), cond_frames, config.width, config.depth, config.heads)
    model = denoiser(dit_config).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer_step = utils.FiniteStep(model, make_optimizer(model, muon="muon" in config.extras))
    trained = {"model": model, "optimizer_step": optimizer_step, "latent_map": latent_map}  # what a checkpoint resumes
    start = checkpoints.restore(ckpt, trained, ema) if ckpt else 0
    stream = data.Stream(count, config.batch_size, config.seed)
    log = utils.RunLog(config.out, config.steps, start, rank)
    log.print(f"{utils.millions(model):.2f} M parameters, {count} clips of {len(classes)} classes, from step {start} on")
    if utils.wants_compile(device, config.compile):
        model.compile()

    # Previews: a sample of every class, of ten at most; in frame prediction, how held-out clips go on.
    shown, known = torch.linspace(0, len(classes) - 1, min(10, len(classes)), device=device).round().long(), None
    if cond_frames:
        real, shown = (x.to(device) for x in data.fixed_clips(data.open_dataset(source, "test", classes), 6))
        known = latent_map(encode_given(vae, real, cond_frames))

    def save(step):
        checkpoints.save(
            config.out, stage="dit", step=step, config=config, classes=classes, vae=vae_ckpt, stage1=stage1_hash,
            dit_config=dit_config, denoiser=denoiser.__name__, latent_map=latent_map, ema=ema, training=trained,
        )  # fmt: skip
        log.write()
        samples = latent_map.inverse(generate(ema, shown, seed=config.seed, given=known))
        clips = stage1.decode_all(vae, samples, torch.arange(c.num_frames))
        write_sheet(log.directory / f"step{step:07d}.png", clips, [classes[i] for i in shown])

    for step in utils.training_steps(start, config, save):
        lr = utils.learning_rate(step, config.steps, config.lr, config.warmup)
        # The random numbers of the whole batch, of which this process uses its rows. The coin comes from the CPU, to avoid
        # synchronizing a GPU, and with another seed: on a CPU the same one would repeat the first number below.
        coin = torch.rand((), generator=utils.step_generator("cpu", config.seed - 1, step)).item()
        scheduled = coin < config.scheduled_sampling
        random = utils.step_generator(device, config.seed, step)
        posterior_noise, noise = torch.randn(2, config.batch_size, *latent_map.shape, generator=random, device=device)
        timestep = torch.randint(1 + scheduled, NUM_STEPS + 1, (config.batch_size,), generator=random, device=device)[mine]
        drop = torch.rand(config.batch_size, generator=random, device=device)[mine]

        chosen = torch.tensor(stream.batch(step)[mine]) % count
        mean, deviation, *given = tokens[chosen].to(device).float().unbind(1)  # each [B, N, d]
        theta0 = latent_map(mean) + latent_map.deviation(deviation) * posterior_noise[mine]  # drawn from the posterior
        # For guidance, a tenth of the clips has no condition; in prediction, another tenth has frames and no class.
        given = latent_map(given[0]) * (drop >= DROP_CONDITION)[:, None, None] if given else None
        no_class = drop < DROP_CONDITION * (2 if cond_frames else 1)
        label = torch.where(no_class, len(classes), labels[chosen].to(device))
        with utils.autocast(device, config.bf16):
            loss = diffusion_loss(model, theta0, label, given, timestep, noise[mine], config.min_snr_gamma, scheduled)
        loss.backward()
        log.add(loss=loss / 2 if scheduled else loss)  # the mean of both passes

        log.add(skipped=optimizer_step(loss, lr))
        utils.update_ema(ema, model, 0.99 if nano else 0.9999, step)
        log.step(step)
    log.close()


if __name__ == "__main__":
    utils.run(main)
