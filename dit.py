"""Stage 2, the implicit diffusion transformer: it denoises weight tokens, so that noise becomes a video's weights (§3.3).

θ_0 = tokens of a video from stage 1, scaled to unit deviation     [B, N, d]
θ_t = α_t θ_0 + σ_t ε                                              t = 0 … 999, from almost clean to almost noise
DiT(θ_t, t, class) predicts ε

python dit.py --ckpt vae.pt
"""

import copy
import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import nerv
from common import checkpoints, progress, utils
from common.optim import make_optimizer
from common.principal import Principal
from common.utils import UserError, option
from common.video import tile, to_clip, to_frames, write_sheet
from vae import Attention, clips_of, load_vae

# ------------------------------------------------------------------------------------------------------------------ model


@dataclass
class DiTConfig:
    """Sizes of the denoiser. The defaults are DiT-L (§A.1)."""

    num_tokens: int = 128
    token_dim: int = 128
    num_classes: int = 101
    cond_frames: int = 0  # of frame prediction: given frames, as tokens beside the noised ones; 0 is generation from noise
    width: int = 1024
    depth: int = 24
    heads: int = 16


SIZES = {name: {} for name in nerv.CONFIGS}  # the paper's denoiser is always DiT-L
SIZES["nano"] = {"width": 192, "depth": 6, "heads": 6}
COMPONENTS = {"nano": (4, 64)}  # principal components that a preset diffuses, as tokens, unless --principal says otherwise


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
        # In frame prediction the tokens of the given frames come along, concatenated along the width (§4.1).
        self.embed = nn.Linear(config.token_dim * (2 if config.cond_frames else 1), width)
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

    def forward(self, tokens, step, label, given=None):
        """Noised tokens [B, N, d], diffusion steps [B] in 0 … 999, labels [B] (num_classes: none) -> ε [B, N, d].

        given: in frame prediction, the tokens [B, N, d] of the given frames (`encode_given`); zeros are no frames.
        """
        x, step_code, label = self.embed_all(tokens, step, label, given)
        condition = step_code + label
        for block in self.blocks:
            x = block(x, condition)
        return self.read_out(x, condition)

    def embed_all(self, tokens, step, label, given):
        """What goes in, at the transformer's width: tokens [B, N, width], diffusion step and label [B, width]."""
        freq = torch.exp(-math.log(10000) * torch.arange(128, device=tokens.device) / 128)
        angle = step[:, None].float() * freq
        if self.config.cond_frames:
            tokens = torch.cat([tokens, torch.zeros_like(tokens) if given is None else given], -1)  # [B, N, 2d]
        step = self.step_mlp(torch.cat([angle.cos(), angle.sin()], -1))
        return self.embed(tokens) + self.position, step, self.label(label)

    def read_out(self, x, condition):
        """What comes out: x [B, N, width] after the last block, condition [B, width] -> ε [B, N, d]."""
        shift, scale = self.adaln(condition).chunk(2, -1)
        return self.out(modulate(self.norm(x), shift, scale))

    def matrices(self):
        """The weights of attention and MLPs: what Muon is for. Modulations begin at zero, and are AdamW's."""
        layers = [layer for block in self.blocks for layer in (block.attention.qkv, block.attention.out, *block.mlp[::2])]
        return [layer.weight for layer in layers]


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


def sampling_times(sampler, steps, alpha, sigma):
    """The noise levels that sampling visits, as indices into the schedule: from 1000, all noise, to 0, clean.

    DPM-Solver++ takes even steps in λ = log(α / σ), half the log signal-to-noise ratio, as far as index 5, and from there
    one to clean, where λ is infinite. Beyond a hundred steps or so the schedule is coarser than that, and there are fewer.
    """
    if sampler != "dpm":
        return torch.linspace(NUM_STEPS, 0, steps + 1).round().long().tolist()
    lam = torch.log(alpha / sigma)[1:].cpu()
    nearest = (torch.linspace(lam[-1], lam[4], steps)[:, None] - lam).abs().argmin(1) + 1
    return [*nearest.unique().flip(0).tolist(), 0]


def check_steps(steps):
    """UserError where --steps is not a number of evaluations that there can be."""
    if not 1 <= steps <= NUM_STEPS:
        raise UserError(f"--steps {steps}: the denoiser has 1 to {NUM_STEPS}")


@torch.no_grad()
def generate(model, labels, steps=20, guidance=2.0, sampler="dpm", seed=None, given=None):
    """Tokens [B, N, d] at unit deviation for labels [B], from noise, and for given frames' tokens [B, N, d] in prediction.

    steps: evaluations of the model, 1 … 1000; guidance: scale of classifier-free guidance, 1 is none (Ho & Salimans 2022);
    sampler: "dpm" (DPM-Solver++, deterministic, second order), "ddim" (deterministic, first order) or "ddpm" (ancestral).
    """
    device, c = labels.device, model.config
    # Noise is drawn on the CPU, so that a seed means the same videos on every device, and from a generator of its own, so
    # that a preview leaves the random numbers of a training alone.
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    x = torch.randn(len(labels), c.num_tokens, c.token_dim, generator=generator).to(device)
    alpha, sigma = noise_schedule(device)
    alpha, sigma = F.pad(alpha, (1, 0), value=1.0), F.pad(sigma, (1, 0), value=0.0)  # index 0 is clean, t sits at t + 1
    times = sampling_times(sampler, steps, alpha, sigma)
    lam = torch.log(alpha / sigma)
    none = torch.full_like(labels, c.num_classes)
    given = torch.zeros_like(x) if given is None else given
    before, x0_before = None, None
    for now, then in zip(times[:-1], times[1:]):
        step = torch.full_like(labels, now - 1)
        if guidance == 1:
            eps = model(x, step, labels, given).float()
        else:  # the second half knows neither the class nor the given frames
            conditions = torch.cat([labels, none]), torch.cat([given, torch.zeros_like(given)])
            both = model(x.repeat(2, 1, 1), step.repeat(2), *conditions).float()
            with_class, without = both.chunk(2)
            eps = without + guidance * (with_class - without)
        if sampler == "dpm":
            # DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2) is the DDIM step with another θ_0: the line through the last two
            # predictions, read halfway through the step in λ. The first step has one prediction only, the last has no half.
            x0 = (x - sigma[now] * eps) / alpha[now]
            if before is not None and then > 0:
                ratio = (lam[then] - lam[now]) / (lam[now] - lam[before])  # their 1 / r
                halfway = x0 + ratio / 2 * (x0 - x0_before)  # their D
                eps = (x - alpha[now] * halfway) / sigma[now]
            before, x0_before = now, x0
        eta = 1.0 if sampler == "ddpm" else 0.0
        x = reverse_step(x, eps, alpha[now], sigma[now], alpha[then], sigma[then], eta, generator)
    return x


def refine_steps(ckpt, asked=-1):
    """Gradient steps on the tokens of a video: as many as asked for, or below 0 those that stage 2 learned from."""
    return asked if asked >= 0 else ckpt["config"].get("refine", 0)


def load_dit(ckpt, denoiser=DiT, load_vae=load_vae):
    """A stage-2 checkpoint -> (DiT with its averaged weights, VAE, latent scale), in evaluation mode."""
    with checkpoints.fitting(ckpt, denoiser=denoiser):
        model = denoiser(DiTConfig(**ckpt["dit_config"]))
        model.load_state_dict(ckpt["ema"])
    return model.eval().requires_grad_(False), load_vae(ckpt["vae"]), ckpt["latent_scale"]


# --------------------------------------------------------------------------------------------------------------- training


@dataclass
class Config:
    ckpt: str = option("data", "vae.pt", "stage-1 checkpoint, from vae.py")
    dataset: str = option("data", "", "default: the one the checkpoint was trained on", choices=["", *data.DATASETS])
    data_dir: str = option("data", "", "default: the one the checkpoint was trained on")
    cache_latents: bool = option("data", False, "encode clips once, into a cache on disk beside --out, not anew at every step")
    principal: list = option(
        "data", [-1, -1], "diffuse principal components of the cached latents, as so many tokens; 0 0: tokens as they are; "
        "-1 -1: in preset nano 4 64, where there are as many cached latents",
        nargs=2, type=int, metavar=("TOKENS", "WIDTH"),
    )  # fmt: skip
    refine: int = option("data", 0, "gradient steps on the tokens of a clip after the encoder's guess")
    num_latents: int = option("data", 0, "clips in the cache; 0: ten of every video")
    cache_dir: str = option("data", "data/cache", "directory of the caches of decoded frames")
    workers: int = option("data", -1, "threads that decode where there is no cache; -1 is all cores")
    preset: str = option("model", "", "size of the denoiser; that of stage 1 unless named", choices=list(SIZES))
    width: int = option("model", 0, "of the transformer; 0 is the preset's, 1024 and in nano 192")
    depth: int = option("model", 0, "its blocks; 0 is the preset's, 24 and in nano 6")
    heads: int = option("model", 0, "heads of its attention, which divide the width; 0 is the preset's, 16 and in nano 6")
    cond_frames: int = option("model", 0, "frame prediction from so many given frames (the paper: 5); 0 generates whole clips")
    steps: int = option("training", 1_000_000, "optimizer steps")
    batch_size: int = option("training", 64, "clips per step, of all processes together")
    accumulate: int = option("training", 1, "parts of the batch that go through one after another, to save memory")
    optimizer: str = option(
        "training", "adamw", "muon: for the matrices of attention and MLPs, AdamW for the rest", choices=["adamw", "muon"]
    )
    lr: float = option("training", 1e-4, "peak learning rate, reached after the warm-up, then cosine decay")
    warmup: int = option("training", 10_000, "steps of linear warm-up")
    weight_decay: float = option("training", 0.01, "of the optimizer")
    grad_clip: float = option("training", 1.0, "largest norm of the gradient")
    min_snr_gamma: float = option("training", 5.0, "γ of the Min-SNR loss weight; 0 weights all steps alike")
    scheduled_sampling: float = option("training", 0.25, "share of steps that train on the model's own prediction too")
    drop_condition: float = option("training", 0.1, "share of clips without class and given frames, for guidance")
    ema: float = option("training", 0.9999, "decay of the averaged weights that sampling uses")
    seed: int = option("training", 0, "of weights, data order and noise")
    device: str = option("machine", "auto", "cpu, cuda, cuda:1, …; auto: CUDA where there is one")
    bf16: str = option("machine", "auto", "bfloat16 autocast; auto: with CUDA", choices=["auto", "on", "off"])
    compile: str = option("machine", "auto", "torch.compile; auto: with CUDA", choices=["auto", "on", "off"])
    out: str = option("output", "dit.pt", "the checkpoint; it carries stage 1 too")
    resume: bool = option("output", False, "go on from the checkpoint --out where it exists, exactly as if never stopped")
    run_dir: str = option("output", "runs/dit", "losses.csv, losses.png and sample sheets go here")
    log_every: int = option("output", 50, "steps between rows of losses.csv")
    save_every: int = option("output", 500, "steps between checkpoints and sample sheets")


def preset_defaults(args):
    """The defaults that the stage-1 checkpoint implies; without one, those of the paper's sizes."""
    try:
        preset = args.preset or checkpoints.load(args.ckpt, "vae", "python vae.py")["config"]["preset"]
    except UserError:
        preset = "S"
    if preset != "nano":
        return {"preset": preset}
    return dict(
        preset=preset,
        steps=400,
        batch_size=256,
        optimizer="muon",  # see docs/sharp.md for this and the components
        lr=4e-3,
        warmup=50,
        ema=0.99,
        cache_latents=True,
        num_latents=4096,
        refine=3,
    )


def encode_given(vae, video, cond_frames, refine=0):
    """Tokens [B, N, d] of clips [B, T, 3, H, W] of which only the first frames are given: the others are zero (§4.1)."""
    given = torch.arange(video.shape[1], device=video.device) < cond_frames
    return vae.encode(video * given[:, None, None, None], refine, cond_frames)[0]


@torch.no_grad()
def encode_batch(vae, video, cond_frames, refine=0):
    """Clips [B, T, 3, H, W] -> [B, 2, N, d]: the posterior's mean, refined in so many steps (VAE.encode), and deviation;
    [B, 3, N, d] with the given frames' tokens."""
    mean, logvar = vae.encode(video, refine)
    given = [encode_given(vae, video, cond_frames, refine)] if cond_frames else []
    return torch.stack([mean, torch.exp(0.5 * logvar), *given], 1)


def cached_latents(directory, key, vae, train_set, count, cond_frames, device, rank=0, world=1, batch_size=16, refine=0):
    """encode_batch of clips 0 … count - 1 (data.Stream numbers them past len) and their labels, from a cache on disk.

    Returns memory-mapped (latents [count, 2 or 3, N, d] in half precision, labels [count]). The files are plain .npy, without
    pickles. Each process encodes its share. `key` says what is in the cache; one with another key is written anew.
    """
    directory = Path(directory)
    latents_file, labels_file, key_file = (directory / name for name in ("latents.npy", "labels.npy", "key.json"))
    key = json.dumps(key, indent=1)
    if utils.max_over_ranks(not (key_file.is_file() and key_file.read_text() == key)) > 0:
        if rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            key_file.unlink(missing_ok=True)
            np.lib.format.open_memmap(latents_file, "w+", np.float16, (count, 3 if cond_frames else 2, *vae.token_shape))
            np.lib.format.open_memmap(labels_file, "w+", np.int64, (count,))
        utils.wait_for_all()
        latents, labels = np.load(latents_file, mmap_mode="r+"), np.load(labels_file, mmap_mode="r+")
        shares = [range(count)[r * count // world : (r + 1) * count // world] for r in range(world)]
        bar = progress.bar(total=count, desc="encoding", unit="clip", disable=rank > 0)
        for i in range(shares[rank].start, shares[rank].stop, batch_size):
            clips = [train_set[j] for j in range(i, min(i + batch_size, shares[rank].stop))]
            video = torch.stack([to_clip(frames) for frames, _ in clips]).to(device)
            latents[i : i + len(clips)] = encode_batch(vae, video, cond_frames, refine).half().cpu().numpy()
            labels[i : i + len(clips)] = [label for _, label in clips]
            bar.update(len(clips) * world)
        bar.close()
        latents.flush(), labels.flush()
        utils.wait_for_all()
        if rank == 0:
            key_file.write_text(key)
    return tuple(torch.from_numpy(np.load(file, mmap_mode="c")) for file in (latents_file, labels_file))


def diffusion_loss(model, theta0, labels, given, step, noise, alpha, sigma, gamma, scheduled, further=None):
    """Weighted squared error of the predicted noise, mean over the batch (Eq. 2).

    theta0 [B, N, d] at unit deviation; given [B, N, d] or None; diffusion steps [B]; noise [B, N, d]; gamma of Min-SNR, 0 for
    none; scheduled: so many steps back is the second pass of scheduled sampling, for which steps are at least that, 0 for none.
    further(θ_0 that the model predicts [B, N, d], diffusion steps [B]) is added to each pass (vin.py).
    """

    def error(x, eps, noise, step):
        weight = min_snr_weight(alpha[step], sigma[step], gamma) if gamma else 1.0
        loss = (weight * (eps.float() - noise).square().mean((1, 2))).mean()
        if further:
            loss = loss + further((x - at(sigma, step) * eps.float()) / at(alpha, step), step)
        return loss

    def at(schedule, step):
        return schedule[step][:, None, None]  # [B, 1, 1]

    x = at(alpha, step) * theta0 + at(sigma, step) * noise
    eps = model(x, step, labels, given)
    loss = error(x, eps, noise, step)
    if scheduled:
        # Scheduled sampling (§3.3): take one step back with the model's own prediction, as sampling will, and learn from
        # there as well. The target is the noise that leads from the true θ_0 to where the model has got.
        then = step - int(scheduled)
        a, s = at(alpha, then), at(sigma, then)
        x = reverse_step(x, eps.detach().float(), at(alpha, step), at(sigma, step), a, s)
        loss = loss + error(x, model(x, then, labels, given), (x - a * theta0) / s, then)
    return loss


def main(argv=None, denoiser=DiT, load_vae=load_vae):
    config = utils.parse_options(Config, __doc__, preset_defaults, argv)
    utils.check_positive(config, "steps", "batch_size", "accumulate", "log_every", "save_every", "grad_clip")
    device, rank, world = utils.start_processes(config.device)
    rows = utils.rows_per_process(config.batch_size, config.accumulate, world)  # clips that this process takes at a time
    utils.make_parent(config.out)
    vae_ckpt = checkpoints.load(config.ckpt, "vae", "python vae.py")
    vae_ckpt.pop("training", None)  # stage 2 uses stage 1 and does not go on with it
    classes = vae_ckpt["classes"]
    vae = load_vae(vae_ckpt).to(device)
    c, cond_frames = vae.nerv_config, config.cond_frames
    if not 0 <= cond_frames < c.num_frames:
        raise UserError(f"--cond-frames {cond_frames}: stage 1 has clips of {c.num_frames} frames, use 0 … {c.num_frames - 1}")
    # The clips of stage 1, but for what was said otherwise here.
    source = clips_of(vae_ckpt, dataset=config.dataset, data_dir=config.data_dir, cache_dir=config.cache_dir)
    config.dataset, config.data_dir = source.dataset, source.data_dir
    train_set = data.open_dataset(source, "train", classes)
    if list(train_set.classes) != classes:
        raise UserError(f"{config.ckpt} was trained on the classes {classes}, and {config.dataset} has {train_set.classes}")
    torch.manual_seed(config.seed)
    count = (config.num_latents or 10 * len(train_set)) if config.cache_latents else len(train_set)
    if min(config.principal) < 0:
        usual = COMPONENTS.get(config.preset, (0, 0))
        enough = config.cache_latents and min(count, math.prod(vae.token_shape)) >= math.prod(usual)
        config.principal = list(usual) if enough else [0, 0]
    components = any(config.principal)
    size = tuple(config.principal) if components else vae.token_shape  # N and d of what is diffused
    if components:
        asked = f"--principal {size[0]} {size[1]}"
        if min(size) < 1 or math.prod(size) > math.prod(vae.token_shape):
            raise UserError(f"{asked}: videos have {math.prod(vae.token_shape)} components, and it takes one or more")
        if not config.cache_latents or count < math.prod(size):
            raise UserError(f"{asked} takes --cache-latents, and {math.prod(size)} --num-latents or more")
    own = {name: getattr(config, name) for name in ("width", "depth", "heads") if getattr(config, name)}
    dit_config = DiTConfig(*size, len(classes), cond_frames, **SIZES[config.preset] | own)
    if min(own.values(), default=1) < 1 or dit_config.width % dit_config.heads:
        asked = f"--width {dit_config.width} --depth {dit_config.depth} --heads {dit_config.heads}"
        raise UserError(f"{asked}: all are positive, and heads divide the width")
    model = denoiser(dit_config).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = make_optimizer(model, model.matrices() if config.optimizer == "muon" else [], config.weight_decay)
    parts = {"model": model, "step": utils.FiniteStep(model, optimizer, config.grad_clip)}  # what goes on, beside ema
    start, latent_scale = 0, None
    if ckpt := checkpoints.resume(config, "dit", denoiser=denoiser):
        ema.load_state_dict(ckpt["ema"])
        for name, part in parts.items():
            part.load_state_dict(ckpt["training"][name])
        start, latent_scale = ckpt["step"], ckpt["latent_scale"]
    alpha, sigma = noise_schedule(device)

    # Latents: encoded once, or anew at every step. The first ones set the scale that brings them to unit deviation.
    stream = data.Stream(count, config.batch_size, config.seed, start, config.accumulate, rank, world)
    if config.cache_latents:
        names = ("dataset", "data_dir", "split", "stride", "fps", "flip", "crop_scale")
        key = {name: getattr(source, name) for name in names} | {"vae": utils.fingerprint(vae), "videos": len(train_set)}
        key |= {"count": count, "cond_frames": cond_frames, "refine": config.refine}
        directory = Path(config.out).with_suffix(".latents")
        latents, labels = cached_latents(
            directory, key, vae, train_set, count, cond_frames, device, rank, world, refine=config.refine
        )
        if components:
            principal = load_vae(ckpt["vae"]).principal if start else Principal(size, vae.token_shape)
            kept = None if start else principal.fit(latents[:, 0])
            for buffer in principal.buffers():  # another machine's rounding may turn a direction round
                utils.from_first_rank(buffer)
            mean, deviation, *given = latents.float().unbind(1)
            latents = torch.stack([principal(mean), principal.spread(deviation), *map(principal, given)], 1)
            vae.principal = principal.to(device)
            vae_ckpt["ema"] = vae.state_dict()
        first = latents[:1024].float()
    else:
        batches = data.endless(train_set, stream, config.workers, device)
        first = torch.cat([encode_batch(vae, to_clip(train_set[i][0])[None].to(device), 0) for i in range(256)])
    if latent_scale is None:
        latent_scale = 1 / (first[:, 0].var() + first[:, 1].square().mean()).sqrt().item()
    log = utils.RunLog(config.run_dir, config.steps, config.log_every, start, rank)
    log.print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(classes)} classes, "
        f"latent scale {latent_scale:.4f}"
        + (f", {math.prod(size)} components with {100 * kept:.2f} % of the variance" if components and not start else "")
        + (f"; going on after step {start}" if start else "")
    )
    if utils.wants_compile(device, config.compile):
        model.compile()
        vae.encoder.compile()

    saver = checkpoints.Saver(config.out)

    def save(step, final=False):
        training = {name: part.state_dict() for name, part in parts.items()}
        saver(
            final, stage="dit", step=step, config=dataclasses.asdict(config), classes=classes,
            dit_config=dataclasses.asdict(dit_config), denoiser=denoiser.__name__, latent_scale=latent_scale,
            ema=ema.state_dict(), training=training, vae=vae_ckpt,
        )  # fmt: skip
        log.write()

    # What previews show: a sample of every class, of ten at most; in frame prediction, held-out clips and how they go on.
    shown, real, known = torch.linspace(0, len(classes) - 1, min(10, len(classes)), device=device).round().long(), [], None
    titles = [classes[i] for i in shown]
    if cond_frames:
        test_set = data.open_dataset(source, "test", classes)
        real, shown = (x.to(device) for x in data.fixed_clips(test_set, 6))
        with torch.no_grad():
            known = latent_scale * encode_given(vae, real, cond_frames, config.refine)
        titles = ["real", f"from {cond_frames} frames"] * len(real)

    @torch.no_grad()
    def preview(step):
        """A sheet with one sample per class; in frame prediction, below the real clips."""
        tokens = generate(ema, shown, seed=config.seed, given=known) / latent_scale
        clips = vae.decode(tokens, torch.arange(c.num_frames, device=device))
        if cond_frames:
            clips = torch.stack([real, clips], 1).flatten(0, 1)
        write_sheet(f"{config.run_dir}/step{step:07d}.png", clips.cpu(), titles)
        log.video(step, "samples", to_frames(tile(clips)))

    done = start  # finished steps
    with utils.Interrupt() as interrupt:
        for step in range(start, config.steps):
            lr = utils.learning_rate(step, config.steps, config.lr, config.warmup)
            # The random numbers of the whole batch, of which this process uses its rows.
            # The coin is drawn on the CPU, so that nothing waits for a GPU, and by another seed than the noise.
            coin = torch.rand((), generator=utils.step_generator("cpu", config.seed - 1, step)).item()
            scheduled = coin < config.scheduled_sampling
            random = utils.step_generator(device, config.seed, step)
            posterior_noise = torch.randn(config.batch_size, *size, generator=random, device=device)
            noise = torch.randn(config.batch_size, *size, generator=random, device=device)
            t = torch.randint(1 if scheduled else 0, NUM_STEPS, (config.batch_size,), generator=random, device=device)
            drop = torch.rand(config.batch_size, generator=random, device=device)
            if config.cache_latents:
                chosen = torch.tensor(stream.batch(step)) % len(latents)

            for turn in range(config.accumulate):
                place = (turn * world + rank) * rows
                mine = slice(place, place + rows)  # this process's clips in the batch
                with utils.autocast(device, config.bf16):
                    if config.cache_latents:
                        encoded, label = latents[chosen[mine]].float(), labels[chosen[mine]]
                        encoded, label = encoded.to(device, non_blocking=True), label.to(device, non_blocking=True)
                    else:
                        frames, label = (x.to(device, non_blocking=True) for x in next(batches))
                        encoded = encode_batch(vae, to_clip(frames), cond_frames, config.refine)
                    mean, deviation, *given = (latent_scale * encoded).unbind(1)  # each [B, N, d]
                    theta0 = mean + deviation * posterior_noise[mine]  # a draw from the posterior, of unit deviation
                    # Classifier-free guidance needs the model without a condition; prediction, with frames of unknown class.
                    given = given[0] * (drop[mine] >= config.drop_condition)[:, None, None] if given else None
                    no_class = drop[mine] < config.drop_condition * (2 if cond_frames else 1)
                    label = torch.where(no_class, len(classes), label)
                    loss = diffusion_loss(
                        model, theta0, label, given, t[mine], noise[mine], alpha, sigma, config.min_snr_gamma, scheduled
                    )
                (loss / config.accumulate).backward()
                log.add(loss=loss / 2 if scheduled else loss)

            parts["step"](loss, lr)
            utils.update_ema(ema, model, min(config.ema, (1 + step) / (10 + step)))  # forgets the random start quickly
            done = step + 1
            if log.step(step):
                parts["step"].check(step, train_set, stream)
            if done % config.save_every == 0 and done < config.steps and rank == 0:
                save(done)
                preview(done)
            if interrupt.stop():
                log.print(f"interrupted after {done} steps")
                break
        if rank == 0:
            save(done, final=True)
    if rank == 0:
        preview(done)
        log.print(f"wrote {config.out} after {done} steps, {time.time() - log.start:.0f} s; sheets are in {config.run_dir}")
        log.print(f"peak memory {utils.peak_memory(device):.2f} GiB")
    log.close()


if __name__ == "__main__":
    utils.run(main)
