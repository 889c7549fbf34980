"""Stage 1, the NeRV-VAE: a ViT hypernetwork encodes a video into weight tokens, which decode themselves (§3.1).

video [B, T, 3, H, W] --ViT, N query tokens--> [B, N, width] --batch norm, FC--> mean, logvar [B, N, d]
tokens = mean + exp(logvar / 2) * ε,  KL toward N(0, 1)
tokens, frame positions --generative NeRV (nerv.py)--> frames

python vae.py                                                   the built-in shapes, minutes on a CPU
python vae.py --dataset ucf                                     UCF-101 in data/UCF-101, preset S
python vae.py --dataset folder --data-dir PATH --preset nano --resolution 64
"""

import copy
import dataclasses
import itertools
import math
import time
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import data
import losses
import nerv
from common import checkpoints, memory, utils
from common.optim import make_optimizer
from common.principal import Principal
from common.utils import UserError, option
from common.video import tile, to_clip, to_frames, write_sheet

# ------------------------------------------------------------------------------------------------------------------ model


@dataclass
class EncoderConfig:
    """Sizes of the ViT. The defaults are the paper's (§A.1); patch is (time, height, width) in frames and pixels."""

    width: int = 896
    depth: int = 18
    heads: int = 14
    patch: tuple[int, int, int] = (1, 8, 8)
    mixing: int = 0  # heads with which tokens read the patches by weights that are learned and fixed; 0 is the paper's


# The paper's ViT whatever the decoder. Larger and longer clips have larger patches, so that there are 4,096 of them always.
ENCODERS = {
    name: EncoderConfig(patch=(c.num_frames // 16, c.resolution // 16, c.resolution // 16)) for name, c in nerv.CONFIGS.items()
}
ENCODERS["nano"] = EncoderConfig(width=128, depth=3, heads=4, patch=(4, 8, 8), mixing=8)


class Attention(nn.Module):
    """Multi-head self-attention: [B, L, width] -> [B, L, width].

    qk_gain > 0 normalizes queries and keys (Dehghani et al. 2023) and starts both at that scale. It is what ends the plateau
    at which a fresh encoder's queries see only the average patch: attention starts out sharp, so that queries differ in
    where they look from the first step on.
    """

    def __init__(self, width, heads, qk_gain=0.0):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.q_norm = nn.LayerNorm(width // heads, bias=False) if qk_gain else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads, bias=False) if qk_gain else nn.Identity()
        for parameter in [*self.q_norm.parameters(), *self.k_norm.parameters()]:
            nn.init.constant_(parameter, qk_gain)

    def forward(self, x, last=0):
        """last: look from the last so many tokens only, at all of them; 0 is from all, as x[:, -0:] is x."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # each [B, L, heads, width / heads]
        q, k = self.q_norm(q[:, -last:]), self.k_norm(k)
        x = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # [B, heads, L, …]
        return self.out(x.transpose(1, 2).flatten(2))


class EncoderBlock(nn.Module):
    """A pre-norm transformer block (Dosovitskiy et al. 2021)."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, qk_gain=2.0)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, last=0):
        x = x[:, -last:] + self.attention(self.norm1(x), last)
        return x + self.mlp(self.norm2(x))


class BatchNorm(nn.Module):
    """Batch norm of [B, features] whose statistics are over the clips of all processes, on CPUs as on GPUs.

    With a batch of 16 they are noise of a quarter of a deviation on every token, which the decoder cannot tell from the video.
    Where `renorm` is set, what goes out is normalized by the running statistics, in training as in use, and the gradient
    alone is that of batch norm (batch renormalization, Ioffe 2017), without which the encoder learns far more slowly.
    """

    def __init__(self, features, momentum=0.1, eps=1e-5):
        super().__init__()
        self.momentum, self.eps, self.renorm = momentum, eps, False
        self.weight, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        if self.training:
            x = x.float()
            mean = utils.average_over_ranks(x.mean(0))
            var = utils.average_over_ranks((x - mean).square().mean(0))
            with torch.no_grad():
                for running, now in ((self.running_mean, mean), (self.running_var, var)):
                    running.lerp_(torch.where(now.isfinite(), now, running), self.momentum)  # the step may be one to skip
            if self.renorm:
                with torch.no_grad():
                    scale = torch.rsqrt(self.running_var + self.eps)
                    ratio, shift = torch.sqrt(var + self.eps) * scale, (mean - self.running_mean) * scale  # the paper's r, d
                return ((x - mean) * torch.rsqrt(var + self.eps) * ratio + shift) * self.weight + self.bias
        return (x - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias


class ViT(nn.Module):
    """Patches and N learned queries go through a transformer, only the queries' outputs are kept (Fig. 2).

    Not the paper's: with `mixing` heads, each query also gets a sum of all patches whose weights are learned and the same for
    all videos. Attention is slow to find out which query is to look where, and a matrix finds it sooner (docs/sharp.md).
    """

    def __init__(self, config, nerv_config):
        super().__init__()
        self.patch, self.num_tokens = config.patch, nerv_config.num_tokens
        self.recompute = False  # True: keep the input of each block alone, and compute the rest again in the backward pass
        pt, ph, pw = config.patch
        size = nerv_config.resolution
        for name, length, step in (("num_frames", nerv_config.num_frames, pt), ("resolution", size, ph)):
            if length % step:
                raise ValueError(f"{name} {length} does not divide into patches of {step}: use a multiple of {step}")
        grid = (nerv_config.num_frames // pt, size // ph, size // pw)
        self.embed = nn.Linear(3 * pt * ph * pw, config.width)
        # Positions start at the scale of the patch embeddings; small ones are drowned by colours for hundreds of steps.
        # Queries start small: they steer the attention all the same (it sees them normalized), and do not drown what it finds.
        self.position = nn.Parameter(grid_position(grid, config.width))
        self.query = nn.Parameter(torch.randn(nerv_config.num_tokens, config.width) * 0.02)
        self.blocks = nn.ModuleList(EncoderBlock(config.width, config.heads) for _ in range(config.depth))
        self.mix = None
        if config.mixing < 0 or config.mixing and config.width % config.mixing:
            raise ValueError(f"mixing {config.mixing}: heads must divide the encoder's width of {config.width}")
        if config.mixing:
            rows, columns = nerv_config.num_tokens * config.mixing, math.prod(grid)
            self.mix = nn.Parameter(torch.randn(rows, columns) / math.sqrt(columns))
        # "Batch normalized along the token embedding dimension" (§3.1), each token by itself: at the start most of the variance
        # is between tokens, and statistics pooled over them would leave little of it to what differs between videos.
        self.norm = BatchNorm(nerv_config.num_tokens * config.width)

    def forward(self, video):
        """video [B, T, 3, H, W] in [-1, 1] -> what the queries have found in it, batch normalized: [B, N, width]."""
        pt, ph, pw = self.patch
        x = video.unflatten(4, (-1, pw)).unflatten(3, (-1, ph)).unflatten(1, (-1, pt))  # [B, t, pt, 3, h, ph, w, pw]
        x = x.permute(0, 1, 4, 6, 2, 3, 5, 7).flatten(4).flatten(1, 3)  # [B, t * h * w, pt * 3 * ph * pw]
        x = self.embed(x) + self.position
        x = torch.cat([x, self.query.expand(len(x), -1, -1)], 1)
        for block in self.blocks[:-1]:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute and self.training else block(x)
        queries = self.blocks[-1](x, last=self.num_tokens)  # what the patches would become, nothing reads
        if self.mix is not None:
            mix = self.mix.to(x.dtype).unflatten(0, (self.num_tokens, -1))  # [N, heads, patches]
            patches = x[:, : -self.num_tokens].unflatten(2, (mix.shape[1], -1))  # [B, patches, heads, width / heads]
            queries = queries + torch.einsum("nhp,bphc->bnhc", mix, patches).flatten(2)
        return self.norm(queries.flatten(1)).unflatten(1, (self.num_tokens, -1))

    def matrices(self):
        """The weights of the transformer and of the patches: what Muon is for."""
        mix = [] if self.mix is None else [self.mix]
        return [self.embed.weight, *mix, *(p for p in self.blocks.parameters() if p.ndim == 2)]


class Encoder(ViT):
    """The hypernetwork: what the queries have found in a video becomes the posterior of its tokens."""

    def __init__(self, config, nerv_config):
        super().__init__(config, nerv_config)
        self.to_latent = nn.Linear(config.width, 2 * nerv_config.token_dim)
        # Start with little noise on the tokens, so that the decoder learns to listen to them before the KL makes them dear.
        nn.init.zeros_(self.to_latent.weight.data[nerv_config.token_dim :])
        if nerv_config.pictures:  # which have said it all at the start
            nn.init.zeros_(self.to_latent.weight), nn.init.zeros_(self.to_latent.bias)
        nn.init.constant_(self.to_latent.bias.data[nerv_config.token_dim :], -12.0)

    def forward(self, video):
        """video [B, T, 3, H, W] in [-1, 1] -> mean, logvar, each [B, N, d]."""
        return self.to_latent(super().forward(video)).float().chunk(2, -1)


def grid_position(grid, width):
    """Fixed-frequency position embeddings to start from: [t * h * w, width], a third of the width for each axis."""
    dim = width // 6 * 2
    axes = [nerv.sinusoid(torch.arange(n, dtype=torch.float32), dim, n) for n in grid]  # each [n, dim]
    t, h, w = axes[0][:, None, None], axes[1][None, :, None], axes[2][None, None, :]
    code = torch.cat([axis.expand(*grid, dim) for axis in (t, h, w)], -1)
    return F.pad(code, (0, width - 3 * dim)).flatten(0, 2)


class VAE(nn.Module):
    """Encoder and generative NeRV (§3.1); decoder is the class of the latter, which the ablations replace."""

    BEYOND = 0.05  # what the transformer adds to tokens that pictures read counts so much: many of them are small

    def __init__(self, nerv_config, encoder_config, decoder=nerv.NeRV):
        super().__init__()
        self.nerv_config, self.encoder_config = nerv_config, encoder_config
        self.encoder = Encoder(encoder_config, nerv_config)
        self.nerv = decoder(nerv_config)
        self.principal = None  # stage 2 may put one in: then tokens are components, going in and coming out

    def encode(self, video, steps=0, shown=None):
        """video [B, T, 3, H, W] in [-1, 1] -> mean, logvar of the tokens' posterior, each [B, N, d].

        The mean is refined in so many steps (refine, below) to decode to the first `shown` frames, or all, better.
        """
        mean, logvar = self.encoder(video)
        if self.nerv.pictures is not None:  # most of it is read off by the pictures; the transformer says what they miss
            mean = self.nerv.read(video).float() + self.BEYOND * mean
        if steps:
            mean = self.refine_weights(mean, video[:, :shown], steps)
        if self.principal is None:
            return mean, logvar
        return self.principal(mean), 2 * self.principal.spread(torch.exp(0.5 * logvar)).log()

    def decode(self, tokens, t):
        """tokens [B, N, d], frame positions t [T] -> frames [B, T, 3, H, W], [-1, 1] (NeRV.forward)."""
        return self.nerv(self.weight_tokens(tokens), t)

    def weight_tokens(self, tokens):
        """What the decoder's heads take: the tokens, or those that components stand for, [B, M, k] -> [B, N, d]."""
        return tokens if self.principal is None else self.principal.tokens(tokens)

    @property
    def token_shape(self):
        """N and d of tokens, going in and coming out."""
        c = self.nerv_config
        return (c.num_tokens, c.token_dim) if self.principal is None else self.principal.shape

    def refine(self, tokens, video, steps):
        """Tokens, or components, that decode to a video [B, T', 3, H, W] better than those given (refine, below)."""
        refined = self.refine_weights(self.weight_tokens(tokens), video, steps)
        return refined if self.principal is None else self.principal(refined)

    def refine_weights(self, tokens, video, steps):
        lr = 0.01 if self.nerv.pictures is None else 0.0002  # most tokens that pictures read are small
        return refine(self.nerv, tokens, video, steps, lr)


def refine(decode, tokens, video, steps, lr=0.01, few=4, price=None):
    """Tokens [B, …] that decode to a video [B, T', 3, H, W] better than those given: `steps` of Adam on them alone.

    decode(tokens, t) -> frames [B, len(t), 3, H, W]. An encoder guesses tokens in one pass; the gradient of the squared error
    then says what it missed (Kim et al. 2018, "Semi-amortized VAEs"). Each clip is by itself. The video is the first T' frames
    of the clip; each step looks at a random few; lr is of the first step and falls to a tenth. price(tokens) -> [B] is added to
    the error of each clip. 0 steps give the tokens back.
    """
    tokens, generator = tokens.detach().float(), torch.Generator().manual_seed(0)
    moment, square = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for step in range(steps):
        t = torch.randperm(video.shape[1], generator=generator)[:few].sort().values.to(video.device)
        with torch.enable_grad():
            tokens.requires_grad_()
            error = (decode(tokens, t).float() - video[:, t]).square().mean((1, 2, 3, 4))
            (gradient,) = torch.autograd.grad((error + price(tokens) if price else error).sum(), tokens)
        moment, square = moment.lerp(gradient, 0.1), square.lerp(gradient.square(), 0.01)
        change = moment / (1 - 0.9 ** (step + 1)) / ((square / (1 - 0.99 ** (step + 1))).sqrt() + 1e-12)
        tokens = tokens.detach() - lr * (1 - 0.9 * step / steps) * change
    return tokens


def load_vae(ckpt, decoder=nerv.NeRV):
    """The VAE of a stage-1 checkpoint (also carried inside stage-2 checkpoints under "vae"), in evaluation mode."""
    with checkpoints.fitting(ckpt, decoder=decoder):
        vae = VAE(nerv.NeRVConfig(**ckpt["nerv_config"]), EncoderConfig(**ckpt["encoder_config"]), decoder)
        if (directions := ckpt["ema"].get("principal.directions")) is not None:
            vae.principal = Principal(directions.shape[:2], vae.token_shape)
        vae.load_state_dict(ckpt["ema"])
    return vae.eval().requires_grad_(False)


def clips_of(ckpt, **own):
    """The settings of the data that a stage-1 checkpoint is of, for all that comes after it; `own`: others, unless empty.

    Clips are whole. Random squares (--crop-scale) teach the encoder what the few videos do not show; a generator would learn to
    make them (augmentations "leak", Karras et al. 2020). Mirrored videos look like videos, and --flip stays.
    """
    return Config(**ckpt["config"] | {name: value for name, value in own.items() if value} | {"crop_scale": 1.0})


def some_frames(train_set, seed, workers=-1, count=4096):
    """So many frames of training clips, two of each at random times, in [-1, 1]: [count, 3, H, W]."""
    generator, stream = torch.Generator().manual_seed(seed), data.Stream(len(train_set), 4, seed)
    clips = (to_clip(video) for video, _ in itertools.islice(data.endless(train_set, stream, workers), count // 8))
    return torch.cat([clip[:, torch.randperm(clip.shape[1], generator=generator)[:2]].flatten(0, 1) for clip in clips])


def psnr(clips, reconstructions):
    """Mean over clips of the PSNR of each in dB; both [B, T, 3, H, W] in [-1, 1], a range of 2."""
    mse = (clips - reconstructions).square().mean((1, 2, 3, 4))
    return (10 * torch.log10(4 / mse.clamp_min(1e-10))).mean().item()


def fine_power(frames):
    """Power at spatial frequencies above a quarter cycle per pixel, which blur takes away: mean of each frame,
    [..., 3, H, W] -> [...]."""
    power = torch.fft.fft2(frames, norm="ortho").abs().square()
    frequency = torch.fft.fftfreq(frames.shape[-1], device=frames.device)
    return power[..., torch.hypot(frequency[:, None], frequency[None, :]) > 0.25].mean((-2, -1))


# --------------------------------------------------------------------------------------------------------------- training


SIZES = ("resolution", "num_frames", "num_tokens", "token_dim", "width", "pos_size")  # of the decoder, as options
DECODER = (*SIZES, "padding", "antialias", "pictures")


@dataclass
class Config:
    dataset: str = option(
        "data", "shapes", "built-in shapes, any folder of videos, or one as it is distributed", choices=data.DATASETS
    )
    data_dir: str = option("data", "", "where it is; classes of a folder are its sub-folders")
    split: int = option("data", 0, "official split of UCF-101; 0 is all videos", choices=[0, 1, 2, 3])
    stride: int = option("data", 1, "frames of the video per frame of the clip")
    fps: float = option("data", 0.0, "frames per second that videos are read at; 0 is their own")
    flip: bool = option("data", False, "mirror half of the training clips, left to right")
    crop_scale: float = option("data", 1.0, "train on random squares of the frames, their side this share of it or more")
    cache: str = option("data", "auto", "decoded frames on disk; auto: of small data sets", choices=["auto", "on", "off"])
    cache_dir: str = option("data", "data/cache", "directory of these caches")
    workers: int = option("data", -1, "threads that decode where there is no cache; -1 is all cores")
    preset: str = option("model", "", "sizes to start from; nano for drawn data, S for videos", choices=list(nerv.CONFIGS))
    resolution: int = option("model", 128, "height and width in pixels: 32, 64, 128, 256")
    num_frames: int = option("model", 16, "T, frames of a clip")
    num_tokens: int = option("model", 128, "N, weight tokens of a video")
    token_dim: int = option("model", 128, "d, width of a token")
    width: int = option("model", 128, "D, channels of the decoder; its last block has 2D (nano: D)")
    pos_size: int = option("model", 8, "h = w of the position code (Table 2c)")
    padding: str = option("model", "zeros", "beyond the edge of a map; nano repeats it", choices=nerv.PADDINGS)
    antialias: bool = option("model", False, "a filter after each upsampling; on for the built-in shapes")
    pictures: int = option("model", 0, "pictures that all videos share, for videos of one scene; 0 is the paper's")
    mixing: int = option("model", 0, "heads of the encoder with which tokens read patches by fixed weights; 0 is the paper's")
    steps: int = option("training", 2_000_000, "optimizer steps")
    batch_size: int = option("training", 32, "clips per step, of all processes together")
    accumulate: int = option("training", 1, "parts of the batch that go through one after another, to save memory")
    decode_frames: int = option("training", 16, "frames of each clip that are decoded in a step, drawn at random")
    optimizer: str = option(
        "training", "adamw", "muon: for the encoder's matrices and the pictures, AdamW for the rest", choices=["adamw", "muon"]
    )
    lr: float = option("training", 1e-4, "peak learning rate, reached after the warm-up, then cosine decay")
    warmup: int = option("training", 10_000, "steps of linear warm-up")
    weight_decay: float = option("training", 0.01, "of the optimizer")
    renorm: float = option("training", 1.0, "share of the steps after which batch norm is by its running statistics")
    grad_clip: float = option("training", 1.0, "largest norm of the gradient")
    ema: float = option("training", 0.9995, "decay of the averaged weights, which are the ones to use")
    seed: int = option("training", 0, "of weights, data order and noise")
    kl_weight: float = option("losses", 1e-5, "weight of the KL divergence, summed over tokens and widths")
    lpips: str = option("losses", "vgg", "backbone of the perceptual loss", choices=["vgg", "alex", "none"])
    lpips_weight: float = option("losses", 1.0, "weight of the perceptual loss")
    gan_weight: float = option("losses", 1.0, "weight of the adversarial loss; 0 trains no discriminator")
    gan_start: int = option("losses", 20_000, "steps before the discriminator joins; frames are consecutive from then on")
    gan_warmup: int = option("losses", 1000, "steps in which the discriminator learns and the decoder does not hear it yet")
    gan_every: int = option("losses", 5, "steps between updates of the discriminator")
    gan_lr: float = option("losses", 0.2, "learning rate of the discriminator, as a share of --lr")
    gan_width: int = option("losses", 64, "channels of the discriminator's first block; twice that after each")
    r1_weight: float = option("losses", 1.0, "weight of R1, the discriminator's squared gradient on real clips")
    r1_every: int = option("losses", 16, "updates of the discriminator between those with R1, which then counts so much more")
    device: str = option("machine", "auto", "cpu, cuda, cuda:1, …; auto: CUDA where there is one")
    bf16: str = option("machine", "auto", "bfloat16 autocast; auto: with CUDA", choices=["auto", "on", "off"])
    recompute: str = option(
        "machine",
        "auto",
        "activation checkpointing of the encoder; auto: where a GPU needs it",
        choices=["auto", "on", "off"],
    )
    compile: str = option("machine", "auto", "torch.compile; auto: with CUDA", choices=["auto", "on", "off"])
    out: str = option("output", "vae.pt", "the checkpoint")
    resume: bool = option("output", False, "go on from the checkpoint --out where it exists, exactly as if never stopped")
    run_dir: str = option("output", "runs/vae", "losses.csv, losses.png and preview sheets go here")
    log_every: int = option("output", 50, "steps between rows of losses.csv")
    save_every: int = option("output", 500, "steps between checkpoints and previews")


def preset_defaults(args):
    """The defaults that --preset and --dataset imply."""
    name = args.preset or ("nano" if args.dataset in data.DRAWN else "S")
    defaults = {k: getattr(nerv.CONFIGS[name], k) for k in DECODER} | {"mixing": ENCODERS[name].mixing}
    defaults |= {"preset": name} | data.DEFAULTS.get(args.dataset, {})
    if name == "nano":  # small enough for two CPU cores, and nothing to download
        defaults.update(steps=2000, batch_size=16, decode_frames=2, lr=1.5e-3, warmup=50, kl_weight=1e-6, ema=0.99)
        defaults.update(optimizer="muon", renorm=0.3, antialias=args.dataset in data.SHAPES)  # see docs/sharp.md
        defaults.update(lpips="none", lpips_weight=0.05, gan_weight=0.0, gan_start=1000, gan_warmup=100, gan_every=1)
        defaults.update(gan_lr=1.0, gan_width=8, r1_weight=0.1, r1_every=8)
    return defaults


def main(argv=None, decoder=nerv.NeRV):
    config = utils.parse_options(Config, __doc__, preset_defaults, argv)
    utils.check_positive(config, "steps", "batch_size", "accumulate", "decode_frames", "stride", *SIZES)
    utils.check_positive(config, "log_every", "save_every", "gan_every", "r1_every", "gan_width", "grad_clip")
    if not 0.25 <= config.crop_scale <= 1:
        raise UserError(f"--crop-scale {config.crop_scale}: it is a share of the frame's side, 0.25 to 1")
    device, rank, world = utils.start_processes(config.device)
    rows = utils.rows_per_process(config.batch_size, config.accumulate, world)  # clips that this process takes at a time
    if rows * world < 2:
        raise UserError("one clip at a time leaves batch norm nothing to compare with: use a larger --batch-size")
    utils.make_parent(config.out)
    torch.manual_seed(config.seed)
    try:
        nerv_config = dataclasses.replace(nerv.CONFIGS[config.preset], **{k: getattr(config, k) for k in DECODER})
        encoder_config = dataclasses.replace(ENCODERS[config.preset], mixing=config.mixing)
        vae = VAE(nerv_config, encoder_config, decoder).to(device)
    except ValueError as error:
        raise UserError(str(error)) from None
    train_set = data.open_dataset(config, "train")
    test_set = data.open_dataset(config, "test", train_set.classes)
    held_out, _ = data.fixed_clips(test_set, 64)

    def judges(pretrained=True):
        """The discriminator and LPIPS, or None for what is not asked for."""
        discriminator = losses.Discriminator(losses.DiscriminatorConfig(config.gan_width)) if config.gan_weight else None
        return discriminator, losses.LPIPS(config.lpips, pretrained) if config.lpips != "none" else None

    if config.gan_weight and config.resolution < (least := 2 ** losses.DiscriminatorConfig().blocks):
        raise UserError(f"--gan-weight {config.gan_weight}: the discriminator takes --resolution {least} or more")
    discriminator, perceptual = (network and network.to(device) for network in judges())
    if discriminator:
        discriminator.to(memory_format=torch.channels_last_3d)  # twice as fast on a CPU
    vae.encoder.recompute, advice = config.recompute == "on", ""
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device).total_memory
        vae.encoder.recompute, advice = memory.choose_stage1(
            config, lambda: (VAE(nerv_config, vae.encoder_config, decoder), *judges(pretrained=False)), rows, world, card
        )
    ema = copy.deepcopy(vae).eval().requires_grad_(False)

    matrices = vae.encoder.matrices() + vae.nerv.matrices() if config.optimizer == "muon" else []
    optimizer = make_optimizer(vae, matrices, config.weight_decay)
    # All that goes on from a checkpoint, beside ema.
    parts = {"model": vae, "step": utils.FiniteStep(vae, optimizer, config.grad_clip)}
    if discriminator:
        disc_optimizer = make_optimizer(discriminator, [], config.weight_decay)
        parts["discriminator"] = discriminator
        parts["disc_step"] = utils.FiniteStep(discriminator, disc_optimizer, config.grad_clip)
    start = 0
    if ckpt := checkpoints.resume(config, "vae", decoder=decoder):
        ema.load_state_dict(ckpt["ema"])
        for name, part in parts.items():
            part.load_state_dict(ckpt["training"][name])
        start = ckpt["step"]
    elif config.pictures:
        pictures = vae.nerv.pictures
        if rank == 0:
            pictures.fit(some_frames(train_set, config.seed, config.workers).to(device), config.num_frames)
        utils.from_first_rank(pictures.shared), utils.from_first_rank(pictures.mean)
        ema.load_state_dict(vae.state_dict())
    stream = data.Stream(len(train_set), config.batch_size, config.seed, start, config.accumulate, rank, world)
    batches = data.endless(train_set, stream, config.workers, device)
    log = utils.RunLog(config.run_dir, config.steps, config.log_every, start, rank)
    log.print(
        f"{len(train_set)} clips of {len(train_set.classes)} classes; encoder "
        f"{sum(p.numel() for p in vae.encoder.parameters()) / 1e6:.2f} M parameters, kernels of one video "
        f"{vae.nerv.num_kernel_weights() / 1e6:.2f} M, tokens {config.num_tokens} x {config.token_dim}"
        + (f"; going on after step {start}" if start else "")
    )
    if advice:
        log.print(advice)
    if utils.wants_compile(device, config.compile):
        # Not the discriminator: R1 takes a second derivative, and where its maps end as 1 x 1 x 1, torch.compile expects
        # gradients of kernels in another order than cuDNN gives them in (an error on an H200).
        for network in filter(None, (vae.encoder, vae.nerv, perceptual)):
            network.compile()

    saver = checkpoints.Saver(config.out)

    def save(step, final=False):
        training = {name: part.state_dict() for name, part in parts.items()}
        saver(
            final, stage="vae", step=step, config=dataclasses.asdict(config), classes=list(train_set.classes),
            nerv_config=dataclasses.asdict(nerv_config), encoder_config=dataclasses.asdict(vae.encoder_config),
            decoder=decoder.__name__, ema=ema.state_dict(), training=training,
        )  # fmt: skip
        log.write()

    def preview(step):
        """A sheet of held-out clips, each real one above its reconstruction; returns their PSNR."""
        with utils.autocast(device, config.bf16):
            reconstructions = reconstruct(ema, held_out, device).float()
        few = torch.linspace(0, len(held_out) - 1, min(6, len(held_out))).round().long()  # they come class by class
        pairs = [clip for pair in zip(held_out[few], reconstructions[few]) for clip in pair]
        write_sheet(f"{config.run_dir}/step{step:07d}.png", pairs, ["real", "reconstructed"] * len(few))
        log.video(step, "real_and_reconstructed", to_frames(tile(pairs)))
        return psnr(held_out, reconstructions)

    num_decoded = min(config.decode_frames, config.num_frames)
    done = start  # finished steps
    with utils.Interrupt() as interrupt:
        for step in range(start, config.steps):
            lr = utils.learning_rate(step, config.steps, config.lr, config.warmup)
            vae.encoder.norm.renorm = step >= config.renorm * config.steps
            # The random numbers of the whole batch, of which this process uses its rows.
            random = utils.step_generator(device, config.seed, step)
            noise = torch.randn(config.batch_size, config.num_tokens, config.token_dim, generator=random, device=device)
            adversarial = discriminator is not None and step >= config.gan_start
            # Frames are independent given the weights, so a step may decode any subset of them. The discriminator judges
            # motion, and is shown neighbours.
            if adversarial:
                first = torch.randint(config.num_frames - num_decoded + 1, (1,), generator=random, device=device)
                t = first + torch.arange(num_decoded, device=device)
            else:
                t = torch.randperm(config.num_frames, generator=random, device=device)[:num_decoded].sort().values
            update = adversarial and (step - config.gan_start) % config.gan_every == 0  # of the discriminator
            lazy = (step - config.gan_start) // config.gan_every % config.r1_every == 0
            r1_weight = config.r1_weight * config.r1_every if lazy else 0.0

            for turn in range(config.accumulate):
                place = (turn * world + rank) * rows  # of this process's clips in the batch
                video = to_clip(next(batches)[0].to(device, non_blocking=True))  # uint8 [B, T, H, W, 3] -> [B, T, 3, H, W]
                with utils.autocast(device, config.bf16):
                    mean, logvar = vae.encode(video)
                    tokens = mean + torch.exp(0.5 * logvar) * noise[place : place + rows]
                    frames, real = vae.decode(tokens, t), video[:, t]
                    # Eq. 1. The KL is summed over a video's N × d numbers.
                    error = frames.float() - real
                    l2 = error.square().mean()
                    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2)).mean()
                    loss, terms = l2 + config.kl_weight * kl, {"l2": l2, "kl": kl}
                    if perceptual:
                        terms["lpips"] = perceptual(losses.at_least_64(frames), losses.at_least_64(real))
                        loss = loss + config.lpips_weight * terms["lpips"]
                    if adversarial and step >= config.gan_start + config.gan_warmup:
                        discriminator.requires_grad_(False)
                        terms["gan"] = losses.generator_loss(discriminator, frames)
                        loss = loss + config.gan_weight * terms["gan"]
                (loss / config.accumulate).backward()
                log.add(loss=loss, **terms)

                if update:
                    discriminator.requires_grad_(True)
                    with utils.autocast(device, config.bf16):
                        disc_loss, margin = losses.discriminator_loss(discriminator, real, frames, r1_weight)
                    (disc_loss / config.accumulate).backward()
                    log.add(disc_loss=disc_loss, disc_margin=margin)

            parts["step"](loss, lr)
            utils.update_ema(ema, vae, min(config.ema, (1 + step) / (10 + step)))  # forgets the random start quickly
            if update:
                parts["disc_step"](disc_loss, lr * config.gan_lr)
            done = step + 1
            if log.step(step):
                for part in parts.values():
                    if isinstance(part, utils.FiniteStep):
                        part.check(step, train_set, stream)
            if done % config.save_every == 0 and done < config.steps and rank == 0:
                save(done)
                preview(done)
            if interrupt.stop():
                log.print(f"interrupted after {done} steps")
                break
        if rank == 0:
            save(done, final=True)
    if rank == 0:
        log.print(f"held-out PSNR {preview(done):.2f} dB after {done} steps, {time.time() - log.start:.0f} s")
        log.print(f"wrote {config.out}; losses and sheets are in {config.run_dir}")
        log.print(f"peak memory {utils.peak_memory(device):.2f} GiB")
    log.close()


@torch.no_grad()
def reconstruct(vae, clips, device, t=None, batch_size=16, refine=0):
    """Clips [B, T, 3, H, W] through the posterior's mean, refined in so many steps, and back, at frame positions t (those of
    the clip by default)."""
    t, out = torch.arange(clips.shape[1]) if t is None else t, []
    for batch in clips.to(device).split(batch_size):
        out.append(vae.decode(vae.encode(batch, refine)[0], t.to(device)).cpu())
    return torch.cat(out)


@torch.no_grad()
def decode(vae, tokens, t, batch_size=16):
    """Tokens [B, N, d] of any number of videos -> their frames at positions t [T], on the CPU: [B, T, 3, H, W]."""
    return torch.cat([vae.decode(part, t.to(part.device)).cpu() for part in tokens.split(batch_size)])


if __name__ == "__main__":
    utils.run(main)
