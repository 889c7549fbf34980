"""Stage 1, the NeRV-VAE: a ViT hypernetwork encodes a video into weight tokens, from which a NeRV decodes it (§3.1).

video [B, T, 3, H, W] --ViT, N query tokens--> [B, N, width] --batch norm, FC--> mean, logvar [B, N, d]
tokens = mean + exp(logvar / 2) * ε,  KL toward N(0, 1)
tokens, frame positions --generative NeRV (nerv.py)--> frames

python vae.py                                                   the built-in shapes with nano's extras, minutes on a CPU
python vae.py --dataset ucf                                     UCF-101 in data/UCF-101, preset S
"""

import copy
import dataclasses
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import extras
import losses
import nerv
from common import checkpoints, utils
from common.utils import UserError, option
from common.video import to_clip, write_sheet
from extras.muon import make_optimizer

# ------------------------------------------------------------------------------------------------------------------ model


@dataclass
class EncoderConfig:
    """Sizes of the ViT. The defaults are the paper's (§A.1); patch is (time, height, width) in frames and pixels."""

    width: int = 896
    depth: int = 18
    heads: int = 14
    patch: tuple[int, int, int] = (1, 8, 8)
    recompute: bool = False  # activation checkpointing: keep the input of each block, and compute the rest again backwards


def encoder_sizes(preset, c):
    """The paper's ViT, whatever the decoder c; larger and longer clips have larger patches, so that there are 4,096 of them."""
    if preset == "nano":
        return EncoderConfig(width=128, depth=3, heads=4, patch=(4, 8, 8))
    return EncoderConfig(patch=(max(1, c.num_frames // 16), c.resolution // 16, c.resolution // 16))


class Attention(nn.Module):
    """Multi-head self-attention: [B, L, width] -> [B, L, width].

    qk_gain > 0 normalizes queries and keys (Dehghani et al. 2023; not in the paper), so that attention starts out peaked, not
    uniform. The blocks of stage 2 do without.
    """

    def __init__(self, width, heads, qk_gain=0.0):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm = self.k_norm = nn.Identity()
        if qk_gain:
            self.q_norm, self.k_norm = (nn.LayerNorm(width // heads, bias=False) for _ in range(2))
            nn.init.constant_(self.q_norm.weight, qk_gain), nn.init.constant_(self.k_norm.weight, qk_gain)

    def forward(self, x, last=0):
        """Only the last `last` positions have an output, and attend to all; 0 means all positions, as x[:, -0:] is x."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # each [B, L, heads, width / heads]
        q, k = self.q_norm(q[:, -last:]), self.k_norm(k)
        x = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # [B, heads, L, …]
        return self.out(x.transpose(1, 2).flatten(2))


class EncoderBlock(nn.Module):
    """A pre-norm transformer block (Dosovitskiy et al. 2021)."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(width), Attention(width, heads, qk_gain=2.0), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, last=0):
        x = x[:, -last:] + self.attention(self.norm1(x), last)
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches and N learned queries go through a transformer, and only the queries' outputs are kept (Fig. 2)."""

    def __init__(self, config, nerv_config):
        super().__init__()
        self.patch, self.num_tokens, self.recompute = config.patch, nerv_config.num_tokens, config.recompute
        (pt, ph, pw), size = config.patch, nerv_config.resolution
        if nerv_config.num_frames % pt or size % ph:
            raise ValueError(f"num_frames must be a multiple of {pt}, and resolution of {ph}")
        grid = (nerv_config.num_frames // pt, size // ph, size // pw)
        self.embed = nn.Linear(3 * pt * ph * pw, config.width)
        self.position = nn.Parameter(grid_position(grid, config.width))
        self.query = nn.Parameter(torch.randn(nerv_config.num_tokens, config.width) * 0.02)
        self.blocks = nn.ModuleList(EncoderBlock(config.width, config.heads) for _ in range(config.depth))
        # "Batch normalized along the token embedding dimension" (§3.1): each of the N × width numbers by itself, since at the
        # start they vary more between tokens than between videos.
        self.norm = utils.BatchNorm(nerv_config.num_tokens * config.width)

    def forward(self, video):
        """video [B, T, 3, H, W] in [-1, 1] -> the queries' outputs, batch normalized: [B, N, width]."""
        pt, ph, pw = self.patch
        x = video.unflatten(4, (-1, pw)).unflatten(3, (-1, ph)).unflatten(1, (-1, pt))  # [B, t, pt, 3, h, ph, w, pw]
        x = x.permute(0, 1, 4, 6, 2, 3, 5, 7).flatten(4).flatten(1, 3)  # [B, t * h * w, pt * 3 * ph * pw]
        x = self.embed(x) + self.position
        x = torch.cat([x, self.query.expand(len(x), -1, -1)], 1)
        for block in self.blocks[:-1]:
            if self.recompute and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        x = self.blocks[-1](x, last=self.num_tokens)  # what the patches would become is not used
        return self.norm(x.flatten(1)).unflatten(1, (self.num_tokens, -1))


class Encoder(ViT):
    """The hypernetwork: the queries' outputs become the posterior of the tokens."""

    def __init__(self, config, nerv_config):
        super().__init__(config, nerv_config)
        self.to_latent = nn.Linear(config.width, 2 * nerv_config.token_dim)
        # Not in the paper: the posterior starts narrow, with std exp(-6), so that noise does not hide the tokens.
        nn.init.zeros_(self.to_latent.weight.data[nerv_config.token_dim :])
        nn.init.constant_(self.to_latent.bias.data[nerv_config.token_dim :], -12.0)

    def forward(self, video):
        """video [B, T, 3, H, W] in [-1, 1] -> mean, logvar, each [B, N, d]."""
        return self.to_latent(super().forward(video)).float().chunk(2, -1)


def grid_position(grid, width):
    """The initial value of the learned position embedding: [t * h * w, width], a third of the width for each axis."""
    dim = width // 6 * 2
    t, h, w = (nerv.sinusoid(torch.arange(n, dtype=torch.float32), dim, n) for n in grid)  # each [n, dim]
    code = torch.cat([axis.expand(*grid, dim) for axis in (t[:, None, None], h[:, None], w)], -1)
    return F.pad(code, (0, width - 3 * dim)).flatten(0, 2)


class VAE(nn.Module):
    """Encoder and generative NeRV (§3.1); decoder is the class of the latter, nerv.NeRV or a variant of it."""

    def __init__(self, nerv_config, encoder_config, decoder=nerv.NeRV):
        super().__init__()
        self.nerv_config, self.encoder_config = nerv_config, encoder_config
        self.encoder, self.nerv = Encoder(encoder_config, nerv_config), decoder(nerv_config)

    def encode(self, video):
        """video [B, T, 3, H, W] in [-1, 1] -> mean, logvar of the tokens' posterior, each [B, N, d]."""
        return self.encoder(video)

    def decode(self, tokens, t):
        """tokens [B, N, d], frame positions t [T] -> frames [B, T, 3, H, W], [-1, 1] (NeRV.forward).

        All videos decode in one call if their maps fit a GPU's 32-bit indices, or a CPU's cache (one by one, nano is three
        times as fast there).
        """
        c, limit = self.nerv_config, (2**31 - 1 if t.is_cuda else 2**19)  # elements
        size = len(t) * c.last_factor * c.width * c.resolution**2  # elements of a video's largest map
        return torch.cat([self.nerv(part, t) for part in tokens.split(max(1, limit // size))])


def load_vae(ckpt, decoder=nerv.NeRV):
    """The VAE of a stage-1 checkpoint (also carried inside stage-2 checkpoints under "vae"), in evaluation mode."""
    with checkpoints.fitting(ckpt["decoder"], decoder.__name__):
        configs = nerv.NeRVConfig(**ckpt["nerv_config"]), EncoderConfig(**ckpt["encoder_config"])
        vae = extras.build_vae(VAE, *configs, decoder, ckpt["config"]["extras"])
        vae.load_state_dict(ckpt["ema"])
    return vae.eval().requires_grad_(False)


def data_settings(ckpt, **own):
    """The settings of a stage-1 checkpoint, for data.open_dataset, in which the non-empty ones of `own` replace others."""
    return Config(**(ckpt["config"] | {name: value for name, value in own.items() if value}))


def psnr(clips, reconstructions):
    """Mean over clips of the PSNR of each in dB; both [B, T, 3, H, W] in [-1, 1], a range of 2."""
    mse = (clips - reconstructions).square().mean((1, 2, 3, 4))
    return (10 * torch.log10(4 / mse.clamp_min(1e-10))).mean().item()


@torch.no_grad()
def decode_all(vae, tokens, t, batch_size=16):
    """Tokens [B, N, d] of any number of videos -> their frames at positions t [T], on the CPU: [B, T, 3, H, W]."""
    return torch.cat([vae.decode(part, t.to(part.device)).float().cpu() for part in tokens.split(batch_size)])


@torch.no_grad()
def reconstruct(vae, clips, device, t=None, batch_size=16):
    """Clips [B, T, 3, H, W] through the posterior's mean and back, at frame positions t (those of the clip by default)."""
    t = torch.arange(clips.shape[1]) if t is None else t
    return torch.cat([decode_all(vae, vae.encode(batch.to(device))[0], t) for batch in clips.split(batch_size)])


# --------------------------------------------------------------------------------------------------------------- training


@dataclass
class Config:
    dataset: str = option("data", "shapes", "built-in, a folder of videos, or public ones", choices=data.DATASETS)
    data_dir: str = option("data", "", "its directory, if not the default; sub-folders of a folder are classes")
    stride: int = option("data", 1, "frames of the video per frame of the clip")
    flip: bool = option("data", False, "mirror half of the training clips, left to right")
    preset: str = option("model", "", "sizes to start from; nano for synthetic data, S for videos", choices=list(nerv.CONFIGS))
    resolution: int = option("model", 128, "height and width in pixels: 8 times a power of two")
    num_frames: int = option("model", 16, "T, frames of a clip")
    num_tokens: int = option("model", 128, "N, weight tokens of a video")
    token_dim: int = option("model", 128, "d, width of a token")
    width: int = option("model", 128, "D, channels of the decoder; its last block has 2D (nano: D)")
    extras: list = option("model", [], "not in the paper: see extras/; without a name, all are off", nargs="*", metavar="NAME")
    steps: int = option("training", 2_000_000, "optimizer steps")
    batch_size: int = option("training", 32, "clips per step, of all processes together")
    accumulate: int = option("training", 1, "parts of the batch, to save memory; batch norm sees one at a time")
    decode_frames: int = option(
        "training", 16, "frames of each clip that are decoded in a step, at random; neighbours for the GAN"
    )
    lr: float = option("training", 1e-4, "peak learning rate, reached after the warm-up, then cosine decay")
    warmup: int = option("training", 10_000, "steps of linear warm-up")
    seed: int = option("training", 0, "seed for weights, data order and noise")
    kl_weight: float = option("losses", 1e-5, "of the KL, summed over a video's N × d numbers (L2: mean over pixels)")
    lpips: str = option("losses", "vgg", "backbone of the perceptual loss", choices=["vgg", "alex", "none"])
    lpips_weight: float = option("losses", 1.0, "weight of the perceptual loss")
    gan_weight: float = option("losses", 1.0, "weight of the adversarial loss; 0 trains no discriminator")
    bf16: str = option("machine", "auto", "bfloat16 autocast; auto: with CUDA", choices=["auto", "on", "off"])
    compile: str = option("machine", "auto", "torch.compile; auto: with CUDA", choices=["auto", "on", "off"])
    recompute: bool = option("machine", False, "activation checkpointing of the encoder, to save memory")
    out: str = option("output", "vae.pt", "the checkpoint; losses and contact sheets go to runs/NAME beside it")
    resume: bool = option("output", False, "continue from the checkpoint --out, if it exists")
    save_every: int = option("output", 500, "steps between checkpoints and contact sheets")


SIZES = ("resolution", "num_frames", "num_tokens", "token_dim", "width")  # fields of NeRVConfig that are options too
# The discriminator learns every 5 steps at a fifth of the learning rate (§A.1); when it joins, and R1, are not in the paper.
GAN_EVERY, GAN_LR, R1_WEIGHT, R1_EVERY = 5, 0.2, 1.0, 16


def preset_defaults(args):
    """The defaults that --preset and --dataset imply."""
    name = args.preset or ("nano" if args.dataset in data.DRAWN else "S")
    defaults = {k: getattr(nerv.CONFIGS[name], k) for k in SIZES} | {"preset": name} | data.DEFAULTS.get(args.dataset, {})
    if name == "nano":  # small enough for two CPU cores, and nothing to download
        steps = 2000 if args.dataset in data.DRAWN else 1000
        small = dict(steps=steps, batch_size=16, decode_frames=2, lr=1.5e-3, warmup=50, kl_weight=1e-6, lpips="none")
        more = ["mixing=8", "renorm=0.3", "muon", "edges"] + ["filter"] * (args.dataset in data.SHAPES)
        defaults |= small | dict(lpips_weight=0.05, gan_weight=0.0, extras=more)
    return defaults


def networks(config, decoder, device):
    """The VAE of the settings, the discriminator and LPIPS, or None for what is not asked for."""
    try:
        nerv_config = dataclasses.replace(nerv.CONFIGS[config.preset], **{k: getattr(config, k) for k in SIZES})
        vit_config = dataclasses.replace(encoder_sizes(config.preset, nerv_config), recompute=config.recompute)
        vae = extras.build_vae(VAE, nerv_config, vit_config, decoder, config.extras, config.steps * config.accumulate)
    except ValueError as error:
        raise UserError(str(error)) from None
    discriminator = losses.Discriminator(8 if config.preset == "nano" else 64).to(device) if config.gan_weight else None
    if discriminator and config.resolution < discriminator.smallest:
        raise UserError(f"--gan-weight takes --resolution {discriminator.smallest} or more")
    return vae.to(device), discriminator, losses.LPIPS(config.lpips).to(device) if config.lpips != "none" else None


def main(argv=None, decoder=nerv.NeRV):
    config = utils.parse_options(Config, __doc__, preset_defaults, argv)
    device, rank, world, rows = utils.start_training(config, "accumulate", "decode_frames", "stride", *SIZES)
    vae, discriminator, perceptual = networks(config, decoder, device)
    train_set = data.open_dataset(config, "train")
    held_out, _ = data.fixed_clips(data.open_dataset(config, "test", train_set.classes), 64)
    ema = copy.deepcopy(vae).eval().requires_grad_(False)
    T, count = config.num_frames, min(config.decode_frames, config.num_frames)
    optimizer_step = utils.FiniteStep(vae, make_optimizer(vae, muon="muon" in config.extras))
    trained = {"model": vae, "optimizer_step": optimizer_step}  # what a checkpoint resumes
    if discriminator:
        disc_step = utils.FiniteStep(discriminator, make_optimizer(discriminator))
        trained |= {"discriminator": discriminator, "discriminator_step": disc_step}
    start, gan_start = 0, min(20_000, config.steps // 2)
    if ckpt := checkpoints.resume(config, "vae", decoder=decoder.__name__):
        start, gan_start = checkpoints.restore(ckpt, trained, ema), ckpt["gan_start"]  # even if --steps has changed
    else:
        extras.start(vae, ema, data.endless(train_set, data.Stream(len(train_set), 4, config.seed)), config.seed)
    stream = data.Stream(len(train_set), config.batch_size, config.seed, start, config.accumulate, rank, world)
    batches = data.endless(train_set, stream, device)
    log = utils.RunLog(config.out, config.steps, start, rank)
    encoder_size, kernels = utils.millions(vae.encoder), vae.nerv.num_kernel_weights() / 1e6
    log.print(f"{len(train_set)} clips, encoder {encoder_size:.2f} M, kernels of a video {kernels:.2f} M, from step {start} on")
    if utils.wants_compile(device, config.compile):
        for network in filter(None, (vae.encoder, vae.nerv, perceptual)):  # R1 takes second derivatives of the discriminator
            network.compile()

    def save(step):
        checkpoints.save(
            config.out, stage="vae", step=step, config=config, classes=list(train_set.classes), nerv_config=vae.nerv_config,
            encoder_config=vae.encoder_config, decoder=decoder.__name__, gan_start=gan_start, ema=ema, training=trained,
        )  # fmt: skip
        with utils.autocast(device, config.bf16):
            reconstructions = reconstruct(ema, held_out, device)
        shown = data.spread(held_out, 6)
        pairs = torch.stack([held_out[shown], reconstructions[shown]], 1).flatten(0, 1)
        write_sheet(log.directory / f"step{step:07d}.png", pairs, ["real", "reconstructed"] * (len(pairs) // 2))
        log.write()
        log.print(f"step {step}: held-out PSNR {psnr(held_out, reconstructions):.2f} dB")

    for step in utils.training_steps(start, config, save):
        lr = utils.learning_rate(step, config.steps, config.lr, config.warmup)
        # The random numbers of the whole batch, of which this process uses its rows.
        random = utils.step_generator(device, config.seed, step)
        noise = torch.randn(config.batch_size, config.num_tokens, config.token_dim, generator=random, device=device)
        # Frames are independent given the weights: a random few give an unbiased loss. The discriminator needs neighbours.
        adversarial = discriminator is not None and step >= gan_start
        t = torch.randperm(T, generator=random, device=device)[:count].sort().values
        if adversarial:
            t = torch.randint(T - count + 1, (1,), generator=random, device=device) + torch.arange(count, device=device)
        update = adversarial and (step - gan_start) % GAN_EVERY == 0  # of the discriminator
        with_r1 = (step - gan_start) % (GAN_EVERY * R1_EVERY) == 0  # in every R1_EVERY-th update, at that many times its weight

        for turn in range(config.accumulate):
            place = (turn * world + rank) * rows  # of this process's clips in the batch
            video = to_clip(next(batches)[0].to(device, non_blocking=True))  # uint8 [B, T, H, W, 3] -> [B, T, 3, H, W]
            with utils.autocast(device, config.bf16):
                mean, logvar = vae.encode(video)
                tokens = mean + torch.exp(0.5 * logvar) * noise[place : place + rows]
                frames, real = vae.decode(tokens, t), video[:, t]
                # Eq. 1. The KL is summed over a video's N × d numbers.
                l2 = (frames.float() - real).square().mean()
                kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2)).mean()
                loss, terms = l2 + config.kl_weight * kl, {"l2": l2, "kl": kl}
                if perceptual:
                    terms["lpips"] = perceptual(frames, real)
                    loss = loss + config.lpips_weight * terms["lpips"]
                if adversarial:
                    terms["gan"] = losses.generator_loss(discriminator, frames)
                    loss = loss + config.gan_weight * terms["gan"]
            (loss / config.accumulate).backward()
            log.add(loss=loss, **terms)
            if update:
                with utils.autocast(device, config.bf16):
                    disc_loss, margin = losses.discriminator_loss(discriminator, real, frames, R1_WEIGHT * R1_EVERY * with_r1)
                (disc_loss / config.accumulate).backward()
                log.add(disc_loss=disc_loss, disc_margin=margin)

        log.add(skipped=optimizer_step(loss, lr))  # of the loss, only whether it is finite matters
        utils.update_ema(ema, vae, 0.99 if config.preset == "nano" else 0.9995, step)
        if update:
            disc_step(disc_loss, lr * GAN_LR)
        log.step(step)
    log.close()


if __name__ == "__main__":
    utils.run(main)
