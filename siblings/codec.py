"""Video compression by generated weights: NeRV-Enc and NeRV-Dec (Chen et al. 2024, "FastNeRV" below), at any rate (HyperNeRV).

clip [B, T, 3, R, R] --ViT, weight tokens--> codes [B, P]: the tokens of all layers, concatenated              (Hypernetwork)
codes --quantize, entropy code--> bytes of one chunk of a file                                  (videofile.py, entropy.py)
codes, frame positions --shared kernels times codes, convolutions--> frames                                         (NeRVDec)

python -m siblings.codec train --dataset folder --data-dir clips/train      the hypernetwork and the shared kernels: codec.pt
python -m siblings.codec encode in.mp4 out.nerv --bits 6 --keep 0.5 --refine 20         (encode --help shows its options)
python -m siblings.codec decode out.nerv out.mp4 --frames 100:140
python -m siblings.codec compare in.mp4 clips/                    rate and distortion against x264, x265 and SVT-AV1
"""

import copy
import functools
import itertools
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import extras
import nerv
import vae
from common import checkpoints, utils, video
from common.layouts import find_videos
from common.utils import UserError, option
from common.video import to_clip
from extras.basis import SharedBasis
from extras.muon import make_optimizer
from extras.refine import refine
from extras.renorm import BatchRenorm
from siblings import container, rd, rivals
from siblings.degrade import KINDS, degrade
from siblings.frames import check_target, cut, frame_range, read_video
from siblings.videofile import VideoFile, coding_order, decode_frames, model_name, packed

# ------------------------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class CodecConfig:
    """Sizes of the decoder and its tokens. The defaults are FastNeRV's (§4.1; token sizes from HyperNeRV, §7.2)."""

    resolution: int = 256  # R = H = W in pixels of a tile, a power of two
    num_frames: int = 8  # T of a chunk
    width: int = 16  # channels between the layers
    pos_dim: int = 16  # of the time embedding, the only input
    tokens: tuple = ((4, 256), (64, 288), (16, 288), (0, 0))  # per layer: number of weight tokens, size of each
    basis: int = 0  # K frames shared by all videos (SharedBasis; not in the papers); its tokens follow those of the layers
    pixelwise: bool = False  # an MLP of each pixel's position instead, as in TransINR and GINR (FastNeRV, Table 2)

    def __post_init__(self):
        if self.resolution < 4 or self.resolution & (self.resolution - 1):
            raise ValueError(f"resolution {self.resolution} is not a power of two of at least 4")
        most = [math.prod(shape) for shape, _ in self.layers] + [math.inf] * (self.basis > 0)
        fits = len(self.tokens) == len(most) and any(self.codes) and all(bool(n) == bool(d) for n, d in self.tokens)
        fits = fits and all(0 <= n <= m for n, m in zip(self.codes, most))
        if not fits or self.basis and (not self.codes[-1] or self.codes[-1] % self.basis):
            raise ValueError(f"one NxD for each layer, up to {most} numbers; with --basis K the last are a multiple of K")

    @property
    def layers(self):
        """(kernel shape, stride of the pixel shuffle) per layer; strides are 4, and the last is 2 if the resolution needs it.

        The first kernel is 1 × 1, since its input is a single pixel; the others are 3 × 3. A pixelwise MLP is four of 1 × 1.
        """
        if self.pixelwise:
            channels = [3 * self.pos_dim, *[self.width] * 3, 3]
            return [((out, in_, 1, 1), 1) for in_, out in zip(channels, channels[1:])]
        levels = self.resolution.bit_length() - 1
        strides = [4] * (levels // 2) + [2] * (levels % 2)
        channels = [self.pos_dim, *[self.width] * (len(strides) - 1), 3]
        sides = [1, *[3] * (len(strides) - 1)]
        shapes = [(out * s**2, in_, k, k) for in_, out, s, k in zip(channels, channels[1:], strides, sides)]
        return list(zip(shapes, strides))

    @property
    def num_tokens(self):
        return sum(n for n, _ in self.tokens)

    @property
    def codes(self):
        """Number of codes per layer; their sum P is what a file holds per clip, before tokens are dropped."""
        return [n * d for n, d in self.tokens]

    def sources(self, keep):
        """Index [P] of the code that each code is read from, if each layer keeps only its first tokens, a share `keep` of them.

        Kept codes are read from themselves. A dropped token i drops its leading bit until it names one that is
        kept: with half of 2^k tokens, the first half is used twice, as in HyperNeRV (§3.2).
        """
        found, first = [], 0
        for n, dim in self.tokens:
            places = list(range(n))
            for i in range(max(1, math.ceil(keep * n - 1e-9)), n):
                places[i] = places[i - (1 << i.bit_length() - 1)]
            found.append(first + (torch.tensor(places, dtype=torch.long)[:, None] * dim + torch.arange(dim)).flatten())
            first += n * dim
        return torch.cat(found)


ENCODERS = {
    "fastnerv": vae.EncoderConfig(width=720, depth=6, heads=12, patch=(1, 64, 64)),
    "nano": vae.EncoderConfig(width=128, depth=3, heads=4, patch=(4, 8, 8)),
}
RANGE = 4.0  # codes lie within ±RANGE
BITS = 6  # bits per code; training makes the decoder robust to this rounding
EXTRAS = {"muon": None, "renorm": float, "cosine": None, "ema": None}  # as in extras/; learning-rate decay; weight averaging


def pixel_code(t, config):
    """Input of the pixelwise MLP: t [T] -> codes of (t, y, x) [T, 3 * pos_dim, R, R], each of unit second moment.

    Spatial frequencies are geometric, from half a wave per frame to the finest that pixels resolve, as in TransINR.
    """
    size, dim = config.resolution, config.pos_dim
    frequencies = math.pi / size * torch.logspace(0, math.log2(0.9 * size), dim // 2, base=2, device=t.device)
    angle = torch.arange(size, device=t.device)[:, None] * frequencies
    place = math.sqrt(2) * torch.cat([angle.sin(), angle.cos()], 1).T  # [pos_dim, R]
    parts = nerv.sinusoid(t.float(), dim, config.num_frames)[:, :, None, None], place[:, :, None], place[:, None]
    return torch.cat([part.expand(len(t), -1, size, size) for part in parts], 1)


def step_of(bits):
    """The quantizer's step."""
    return 2 * RANGE / 2**bits


class Hypernetwork(vae.ViT):
    """NeRV-Enc: a ViT on patches and one learned query per weight token; each layer has its own linear map (Fig. 4).

    The ViT is that of stage 1 with its batch norm, without which a small one learns slowly.
    """

    def __init__(self, vit_config, config):
        super().__init__(vit_config, config)
        self.counts = [n for n, _ in config.tokens if n]
        self.heads = nn.ModuleList(nn.Linear(vit_config.width, dim) for _, dim in config.tokens if dim)
        for head in self.heads:  # start near the shared kernels, the same for all videos
            nn.init.normal_(head.weight, std=1 / math.sqrt(vit_config.width))
            nn.init.zeros_(head.bias)

    def forward(self, clips):
        """clips [B, T, 3, R, R] in [-1, 1] -> codes [B, P], each within ±RANGE."""
        parts = super().forward(clips).split(self.counts, 1)  # each [B, tokens of the layer, width]
        codes = torch.cat([head(part).flatten(1) for head, part in zip(self.heads, parts)], 1)
        return RANGE * torch.tanh(codes.float() / RANGE)


class Layer(nn.Module):
    """A convolution and a pixel shuffle. All videos share the kernel; each video's tokens scale its entries (§3.2, Fig. 4b)."""

    def __init__(self, shape, stride, tokens, dim, last):
        super().__init__()
        self.stride, self.tokens, self.dim, self.last = stride, tokens, dim, last
        std = (0.1 if last else 1) / math.sqrt(math.prod(shape[1:]))  # frames start grey
        self.shared = nn.Parameter(torch.randn(shape) * std)
        self.bias = nn.Parameter(torch.zeros(shape[0]))
        if tokens:
            self.strength = nn.Parameter(torch.ones(1))  # effect of a code of 1: the grid of codes is fixed

    def kernel(self, codes):
        """codes [B, tokens * dim] -> kernels [B, out, in, k, k].

        The entries are split evenly among the tokens, each repeated to fill its part. Then each output channel is normalized
        (HyperNeRV, §9), except in the last layer, whose amplitude is that of the colours.
        """
        if not self.tokens:
            return self.shared.expand(len(codes), *self.shared.shape)
        span = math.ceil(self.shared.numel() / self.tokens)
        factors = codes.unflatten(1, (self.tokens, self.dim)).repeat(1, 1, math.ceil(span / self.dim))[:, :, :span]
        factors = 1 + self.strength * factors.flatten(1)[:, : self.shared.numel()].view(-1, *self.shared.shape)
        kernel = self.shared * factors
        return kernel if self.last else kernel * torch.rsqrt(kernel.square().sum((2, 3, 4), keepdim=True) + 1e-8)

    def forward(self, x, codes):
        """x [T, B * in, h, w], codes [B, tokens * dim] -> [T, B * out, h * stride, w * stride]."""
        B = len(codes)  # videos are the groups (Fig. 5)
        kernel, bias = self.kernel(codes).flatten(0, 1).to(x.dtype), self.bias.to(x.dtype).repeat(B)
        if B == 1 and not torch.is_grad_enabled():  # channels last: twice as fast on a CPU
            x, kernel = (part.contiguous(memory_format=torch.channels_last) for part in (x, kernel))
        return F.pixel_shuffle(F.conv2d(x, kernel, bias, padding=kernel.shape[-1] // 2, groups=B), self.stride)


class NeRVDec(nn.Module):
    """Codes in, frames out, and the conversion of codes to bytes and back: all that a receiver needs.

    mean and log_scale [P] parametrize a logistic distribution per code, fitted in training: the entropy coder's model.
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        sizes = [(*layer, *tokens) for layer, tokens in zip(c.layers, c.tokens)]
        self.layers = nn.ModuleList(Layer(*size, last=size is sizes[-1]) for size in sizes)
        self.shared = SharedBasis(c.basis, c.resolution, c.codes[-1] // c.basis, gain=4.0) if c.basis else None
        self.mean = nn.Parameter(torch.zeros(sum(c.codes)))
        self.log_scale = nn.Parameter(torch.full((sum(c.codes),), math.log(0.3)))

    def forward(self, codes, t):
        """codes [B, P], positions t [T'] real-valued, 0 … T-1 in the clip -> frames [B, T', 3, R, R] about [-1, 1]."""
        B, c = len(codes), self.config
        if codes.device.type == "cpu" and B > 1 and not torch.is_grad_enabled():
            return torch.cat([self(part, t) for part in codes.split(1)])  # bit-identical for any batch
        parts = codes.split(c.codes, 1)
        x = pixel_code(t, c) if c.pixelwise else nerv.sinusoid(t.float(), c.pos_dim, c.num_frames)[:, :, None, None]
        x = x.to(codes.dtype).repeat(1, B, 1, 1)  # [T', B * in, 1, 1]; pixelwise [T', B * in, R, R]
        for i, (layer, part) in enumerate(zip(self.layers, parts)):
            x = layer(nerv.GELU_GAIN * F.gelu(x) if i else x, part)
        frames = 2 * x.unflatten(1, (B, 3)).transpose(0, 1)  # the paper's output bias of 0.5 on [0, 1] is 0 on [-1, 1]
        return frames if self.shared is None else frames + self.shared(parts[-1], t, c.num_frames)

    def num_weights(self):
        """Kernels and biases, as many as the network of one video has (Table 2, "INR size")."""
        return sum(layer.shared.numel() + layer.bias.numel() for layer in self.layers)

    def quantize(self, codes, bits):
        """codes [B, P] -> integers [B, P], as floats: 2^bits levels in ±RANGE."""
        return ((codes - self.mean) / step_of(bits)).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    def dequantize(self, numbers, bits):
        return self.mean + numbers * step_of(bits)

    def cost(self, codes, bits):
        """Approximate, differentiable cost of each code in bits: codes [B, P] -> [B, P]."""
        half, scale, far = step_of(bits) / 2, self.log_scale.exp(), (codes - self.mean).abs()
        mass = torch.sigmoid((half - far) / scale) - torch.sigmoid((-half - far) / scale)
        return -torch.log2(mass.clamp_min(1e-9))


class Codec(nn.Module):
    def __init__(self, config, vit_config, chosen=(), steps=0):
        """chosen: extras; steps: length of the training, for renorm."""
        super().__init__()
        self.config, self.vit_config, self.chosen = config, vit_config, extras.parse(chosen, EXTRAS)
        self.encoder, self.decoder = Hypernetwork(vit_config, config), NeRVDec(config)
        if "renorm" in self.chosen:
            self.encoder.norm = BatchRenorm(self.encoder.norm, self.chosen["renorm"] * steps)


def open_codec(path, device="auto"):
    """(the Codec of a checkpoint, in evaluation mode on the device; the checkpoint)."""
    ckpt = checkpoints.load(path, "codec", "python -m siblings.codec train")
    with checkpoints.fitting():
        sizes = CodecConfig(**ckpt["codec_config"]), vae.EncoderConfig(**ckpt["encoder_config"])
        codec = Codec(*sizes, ckpt["config"]["extras"])
        codec.load_state_dict(ckpt["ema"])
    return codec.to(utils.pick_device(device)).eval().requires_grad_(False), ckpt


def encode_clips(codec, clips, bits, keep, steps=0, price=0.0):
    """Clips [B, T, 3, R, R] in [-1, 1] -> integers [B, P]: their codes after `steps` of refinement on the clips.

    These steps include quantization, with a straight-through gradient; price: weight of a bit per pixel against squared error.
    """
    decoder, sources = codec.decoder, codec.config.sources(keep).to(clips.device)
    kept = sources == torch.arange(len(sources), device=clips.device)

    def decode(codes, t):
        rounded = decoder.dequantize(decoder.quantize(codes, bits), bits)
        return decoder((codes + (rounded - codes).detach())[:, sources], t)

    def cost(codes):
        return price / clips[0, :, 0].numel() * (decoder.cost(codes, bits) * kept).sum(1)

    codes = refine(decode, codec.encoder(clips), clips, steps, lr=0.05, price=cost if price else None)
    return decoder.quantize(codes, bits)


# ---------------------------------------------------------------------------------------------------------------- training


@dataclass
class Config:
    dataset: str = option("data", "shapes", "built-in shapes, a folder of videos or a public data set", choices=data.DATASETS)
    data_dir: str = option("data", "", "its directory; classes of a folder are its sub-folders")
    stride: int = option("data", 1, "frames of the video per frame of the clip")
    degrade: str = option("data", "none", "degradation of the encoder's input; the target is the original clip", choices=KINDS)
    preset: str = option("model", "", "default: fastnerv (the paper's), or nano for the shapes", choices=list(ENCODERS))
    resolution: int = option("model", 256, "height and width of a tile in pixels, a power of two")
    num_frames: int = option("model", 8, "frames of a clip, T")
    width: int = option("model", 16, "channels of the decoder, which do not change the file size (HyperNeRV, Table 3)")
    tokens: list = option("model", ["4x256", "64x288", "16x288", "0x0"], "per layer, tokens x size of each", nargs="+")
    basis: int = option("model", 0, "frames shared by all videos, for one scene, with --tokens; 0: none, as in the papers")
    pixelwise: bool = option("model", False, "decode by a pixelwise MLP, as FastNeRV's baselines TransINR and GINR")
    batch_size: int = option("training", 32, "clips per step, over all processes")
    steps: int = option("training", 46_875, "optimizer steps; the paper's are 150 epochs of 10,000 videos")
    lr: float = option("training", 1e-4, "learning rate; a tenth of it for the last tenth of the steps")
    extras: list = option("training", [], f"not in the papers: {', '.join(EXTRAS)}", nargs="*", metavar="NAME")
    mask: float = option("training", 0.0, "share of clips that lose a random share of their tokens (HyperNeRV: 0.5)")
    rate: float = option("training", 0.0, "weight of a bit per pixel against squared error; 0: the papers' loss")
    seed: int = option("training", 0, "of weights, data order and noise")
    device: str = option("machine", "auto", "cpu, cuda, cuda:1, …; auto: CUDA if available")
    bf16: str = option("machine", "auto", "bfloat16 autocast; auto: with CUDA", choices=["auto", "on", "off"])
    compile: str = option("machine", "auto", "torch.compile; auto: with CUDA", choices=["auto", "on", "off"])
    out: str = option("output", "codec.pt", "the checkpoint; losses and sheets go to runs/NAME beside it")
    resume: bool = option("output", False, "continue from the checkpoint --out if it exists, exactly as if never stopped")
    save_every: int = option("output", 500, "steps between checkpoints and previews")
    flip = False  # read by data.py


def preset_defaults(args):
    """The defaults implied by --preset and --dataset."""
    name = args.preset or ("nano" if args.dataset in data.DRAWN else "fastnerv")
    defaults = data.DEFAULTS.get(args.dataset, {}) | {"preset": name}
    if name == "nano":  # small enough for two CPU cores
        defaults |= {"resolution": 64, "width": 32, "tokens": ["8x32", "32x32", "8x32"], "mask": 0.5}
        defaults |= {"steps": 2000, "batch_size": 16, "lr": 1.5e-3, "extras": ["muon", "renorm=0.3", "cosine", "ema"]}
    if args.pixelwise:  # as many codes: TransINR spreads them evenly over the layers, GINR has all in the second
        nano = {"width": 64, "tokens": ["14x32", "14x32", "14x32", "6x32"]}
        defaults |= nano if name == "nano" else {"width": 208, "tokens": ["64x128", "64x128", "64x128", "4x156"]}
    return defaults


def new_codec(config):
    """The untrained Codec for a training configuration. UserError if sizes do not fit."""
    try:
        tokens = tuple((int(n), int(dim)) for n, dim in (word.split("x") for word in config.tokens))
        sizes = {name: getattr(config, name) for name in ("resolution", "num_frames", "width", "basis", "pixelwise")}
        return Codec(CodecConfig(**sizes, tokens=tokens), ENCODERS[config.preset], config.extras, config.steps)
    except ValueError as error:
        raise UserError(f"--resolution {config.resolution} --tokens {' '.join(config.tokens)}: {error}") from None


@torch.no_grad()
def preview(codec, real, seen, device, path):
    """Save a sheet of held-out clips with all and with half of the tokens; return PSNR and bits per pixel of both, as text."""
    shown, found, decoder = {"real": real} | ({"degraded": seen} if seen is not real else {}), [], codec.decoder
    for name, keep in (("all tokens", 1.0), ("half of them", 0.5)):
        order, sources, clips, size = coding_order(decoder, BITS, keep), codec.config.sources(keep), [], 0
        for batch in seen.to(device).split(16):
            numbers = encode_clips(codec, batch, BITS, keep)
            size += sum(len(packed(row, order)) for row in numbers.cpu().numpy()[:, None])
            codes = decoder.dequantize(numbers, BITS)[:, sources]
            clips.append(decoder(codes, torch.arange(real.shape[1], device=device)).cpu())
        shown[name] = torch.cat(clips)
        found.append(f"{vae.psnr(real, shown[name]):.2f} dB at {8 * size / (real.numel() / 3):.4f} bpp without header")
    few = data.spread(real, 6)
    video.write_sheet(path, torch.stack([clips[few] for clips in shown.values()], 1).flatten(0, 1), [*shown] * len(few))
    return ", ".join(found) + (f"; degraded {vae.psnr(real, seen):.2f} dB" if seen is not real else "")


def train(config):
    device, rank, world, rows = utils.start_training(config, "stride", "num_frames", "width", device=config.device)
    codec = new_codec(config).to(device)
    train_set = data.open_dataset(config, "train")
    held_out, _ = data.fixed_clips(data.open_dataset(config, "test", train_set.classes), 64)
    grid = torch.rand(len(held_out), 8, 8, generator=torch.Generator().manual_seed(0))
    seen = degrade(held_out, config.degrade, grid)  # what the encoder sees
    ema = copy.deepcopy(codec).eval().requires_grad_(False)
    optimizer_step = utils.FiniteStep(codec, make_optimizer(codec, muon="muon" in codec.chosen))
    trained = {"model": codec, "optimizer_step": optimizer_step}
    ckpt = checkpoints.resume(config, "codec")
    start = checkpoints.restore(ckpt, trained, ema) if ckpt else 0
    stream = data.Stream(len(train_set), config.batch_size, config.seed, start, 1, rank, world)
    batches = data.endless(train_set, stream, device)
    log = utils.RunLog(config.out, config.steps, start, rank)
    sizes = f"encoder {utils.millions(codec.encoder):.2f} M, decoder {codec.decoder.num_weights() / 1e3:.1f} k"
    log.print(f"{len(train_set)} clips, {sizes}, codes per clip {sum(codec.config.codes) / 1e3:.1f} k, from step {start}")
    if utils.wants_compile(device, config.compile):
        codec.encoder.compile()
        codec.decoder.compile()

    def save(step):
        checkpoints.save(
            config.out, stage="codec", step=step, config=config, classes=list(train_set.classes), codec_config=codec.config,
            encoder_config=codec.vit_config, ema=ema, training=trained,
        )  # fmt: skip
        log.write()
        found = preview(ema, held_out, seen, device, log.directory / f"step{step:07d}.png")
        log.print(f"step {step}: held-out clips with all and half of the tokens, {found}")

    t, own = (torch.arange(n, device=device) for n in (config.num_frames, sum(codec.config.codes)))
    for step in utils.training_steps(start, config, save):
        lr = config.lr if step < 0.9 * config.steps else 0.1 * config.lr  # FastNeRV, §4.1
        if "cosine" in codec.chosen:
            lr = utils.learning_rate(step, config.steps, config.lr, warmup=50)
        # Random numbers for the whole batch, of which this process uses its rows.
        random, place = utils.step_generator(device, config.seed, step), slice(rank * rows, (rank + 1) * rows)
        noise = torch.rand(config.batch_size, len(own), generator=random, device=device)[place] - 0.5
        draws = torch.rand(2, config.batch_size, generator=random, device=device)[:, place].tolist()
        keeps = [share if masked < config.mask else 1.0 for masked, share in zip(*draws)]
        sources = torch.stack([codec.config.sources(keep) for keep in keeps]).to(device)  # [B, P]
        grid = torch.rand(config.batch_size, 8, 8, generator=random, device=device)[place]

        clips = to_clip(next(batches)[0].to(device, non_blocking=True))  # uint8 [B, T, H, W, 3] -> [B, T, 3, H, W]
        with utils.autocast(device, config.bf16):
            codes = codec.encoder(degrade(clips, config.degrade, grid))
            codes = codes + noise * step_of(BITS)  # models rounding, with a gradient
            frames = codec.decoder(codes.gather(1, sources), t)
            l2 = (frames.float() - clips).square().mean()  # Eq. 1
            # The distribution is always fitted; the codes only if bits have a price.
            cost = codec.decoder.cost(codes if config.rate else codes.detach(), BITS)
            bpp = (cost * (sources == own)).sum(1).mean() / clips[0, :, 0].numel()
            loss = l2 + (config.rate or 1e-3) * bpp
        loss.backward()
        log.add(loss=loss, l2=l2, bpp=bpp)
        log.add(skipped=optimizer_step(loss, lr))
        utils.update_ema(ema, codec, 0.99 if "ema" in codec.chosen else 0.0, step)  # without "ema", this copies the codec
        log.step(step)
    log.close()


# ---------------------------------------------------------------------------------------------------------- other commands


@dataclass
class Encode:
    ckpt: str = option("input", "codec.pt", "checkpoint of `codec train`")
    bits: int = option("size", BITS, "bits per code, 4 to 8")
    keep: float = option("size", 1.0, "share of the weight tokens to write")
    refine: int = option("effort", 0, "gradient steps that fit the codes to the video")


@dataclass
class Decode:
    ckpt: str = option("input", "codec.pt", "checkpoint of `codec train` that encoded the file")
    frames: str = option("what", "", "range of frames, end excluded, as in 100:140; default: all")
    time_scale: float = option("what", 1.0, "decoded frames per frame of the video; after a chunk's last, extrapolated")


@dataclass
class Compare:
    ckpt: str = option("input", "codec.pt", "checkpoint of `codec train`")
    size: int = option("input", 0, "crop videos to squares and scale them to this size in pixels; 0: do not")
    videos: int = option("input", 0, "number of videos, evenly spaced; 0: all")
    bits: list = option("ours", [BITS], "bits per code; combined with each of the next two options", nargs="+", type=int)
    keep: list = option("ours", [1.0, 0.5, 0.25], "shares of the weight tokens", nargs="+", type=float)
    refine: list = option("ours", [0, 10, 100], "gradient steps, one curve per value", nargs="+", type=int)
    codecs: list = option("others", list(rivals.RIVALS), "codecs to compare with", nargs="*", choices=list(rivals.RIVALS))
    crf: list = option("others", [20, 26, 32, 38, 44, 51, 57, 63], "their CRFs; above 51 only AV1", nargs="+", type=int)
    out_dir: str = option("output", "out/rd", "directory of points.csv and curves.png")


@torch.no_grad()
def write_video(frames, fps, target, codec, ckpt, bits, keep, refine, quiet=True):
    """Encode frames, uint8 [F, H, W, 3], into the file `target`; the settings are those of Encode.

    Returns (bytes, seconds of encoding, the decoded frames), as rd.Point.run.
    """
    c, (count, height, width, _), trained, begin = codec.config, frames.shape, ckpt["config"], time.time()
    if not 4 <= bits <= 8 or not 0 < keep <= 1:
        raise UserError(f"--bits {bits} --keep {keep}: bits are 4 to 8; a share of the tokens is above 0 and up to 1")
    if refine < 0 or refine and trained["degrade"] != "none":
        raise UserError(f"--refine {refine}: 0 or more, but 0 for a restoration model, which would fit the degraded video")
    order, chunks, device = coding_order(codec.decoder, bits, keep), [], codec.decoder.mean.device
    for k in utils.bar(range(0, count, c.num_frames), "encoding", unit="chunk", disable=quiet):
        tiles = cut(frames[k : k + c.num_frames], c.num_frames, c.resolution).to(device)
        numbers = [encode_clips(codec, part, bits, keep, refine, trained["rate"]) for part in tiles.split(16)]
        chunks.append(packed(torch.cat(numbers).cpu().numpy(), order))
    header = {"kind": "codec", "model": model_name(codec), "size": [width, height], "frames": count, "rate": round(fps, 4)}
    size, seconds = container.write(target, header | {"bits": [bits], "keep": keep}, chunks), time.time() - begin
    return size, seconds, np.concatenate(list(decode_frames(VideoFile(target, codec, ""), codec, 0, count)))


def encode(source, target, config):
    """Encode the video file `source` into the file `target`."""
    codec, ckpt = open_codec(config.ckpt)
    check_target(target, source, config.ckpt)
    frames, fps = read_video(source)
    settings = config.bits, config.keep, config.refine
    size, seconds, made = write_video(frames, fps, target, codec, ckpt, *settings, quiet=False)
    error = np.mean([np.square(x - y.astype(np.float32)).mean() for x, y in zip(made, frames)])
    print(
        f"wrote {target}: {len(frames)} frames of {frames.shape[2]} x {frames.shape[1]} in {size} bytes, "
        f"{24 * size / frames.size:.4f} bits per pixel, PSNR {rd.psnr(error):.2f} dB, {seconds:.1f} s"
    )


def decode(source, target, config):
    """Decode the file `source` into the video `target`."""
    utils.check_positive(config, "time_scale")
    check_target(target, source, config.ckpt)
    codec, _ = open_codec(config.ckpt)
    file = VideoFile(source, codec, config.ckpt)
    first, last = frame_range(config.frames, file.frames)
    made = decode_frames(file, codec, first, last, config.time_scale)
    count = video.write_frames(target, made, file.rate * config.time_scale)
    print(f"wrote {target}: {count} frames of {file.width} x {file.height}")


def compare(*sources, config):
    """Rate and distortion of ours and other codecs, over video files and the held-out videos of directories."""
    codec, ckpt = open_codec(config.ckpt)
    points = rivals.points(config.codecs, config.crf)
    model = 4 * sum(x.numel() for x in codec.decoder.state_dict().values())  # bytes, in float32
    for steps, bits, keep in itertools.product(config.refine, config.bits, config.keep):
        run = functools.partial(write_video, codec=codec, ckpt=ckpt, bits=bits, keep=keep, refine=steps)
        points.append(rd.Point(f"ours, refine {steps}", f"{bits} bits, keep {keep:g}", run, model))
    paths = []
    for source in map(Path, sources):
        if source.is_dir():
            _, items, _, notes = find_videos(data.find_root(data.Config("folder", source)), "folder", "test")
            paths += [path for path, _ in items]
            for note in notes:
                data.report(note)
        else:
            paths.append(source)
    videos = [read_video(paths[i], config.size or None) for i in data.spread(paths, config.videos or len(paths))]
    rd.compare(points, videos, config.out_dir)


# Each command: its function, its settings, its presets, and the files it takes; "…" repeats the last one.
COMMANDS = {
    "train": (train, Config, preset_defaults, ()),
    "encode": (encode, Encode, None, ("VIDEO", "FILE.nerv")),
    "decode": (decode, Decode, None, ("FILE.nerv", "VIDEO")),
    "compare": (compare, Compare, None, ("VIDEO", "…")),
}


def main():
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        utils.parse_options(Config, __doc__, preset_defaults)  # those of train
    if name not in COMMANDS:
        raise UserError(f"give a command first: {', '.join(COMMANDS)}")
    function, settings, presets, wanted = COMMANDS[name]
    files = list(itertools.takewhile(lambda argument: not argument.startswith("-"), sys.argv[2:]))
    config = utils.parse_options(settings, __doc__, presets, sys.argv[2 + len(files) :])
    if len(files) != len(wanted) and not (files and "…" in wanted):
        raise UserError(f"usage: python -m siblings.codec {' '.join([name, *wanted])}, then options")
    function(*files, config=config)


if __name__ == "__main__":
    utils.run(main)
