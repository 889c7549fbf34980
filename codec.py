"""A video as a file of weights: NeRV-Enc and NeRV-Dec (Chen et al. 2024, "FastNeRV" below), any size of it (HyperNeRV).

clip [B, T, 3, R, R] --ViT, weight tokens--> codes [B, P]: every token of every layer, one after the other     (Hypernetwork)
codes --quantize, entropy code--> bytes of one chunk of a file (common/container.py)                         (common/entropy.py)
codes, frame positions --shared kernels times codes, convolutions--> frames                (NeRVDec, common/modulation.py)

python codec.py train --dataset folder --data-dir clips/train         the hypernetwork and the shared kernels; writes codec.pt
python codec.py encode in.mp4 out.nerv --bits 6 --keep 0.5 --refine 20
python codec.py decode out.nerv out.mp4 --frames 100:140              only these frames, from the chunks they are in
python codec.py info out.nerv
python codec.py compare in.mp4 clips/                                 rate and distortion against x264, x265 and SVT-AV1

`python codec.py encode --help` shows the options of encode. docs/codec.md has the format of the file.
"""

import copy
import dataclasses
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
import losses
import nerv
import vae
from common import checkpoints, container, degrade, progress, rd, rivals, utils, video
from common.modulation import ALLOCATIONS, CodecConfig, Layer, fallbacks
from common.optim import make_optimizer
from common.utils import UserError, option
from common.video import cut, join, printable, to_clip
from common.videofile import VideoFile, coding_order, decode_frames, model_name, packed

# ------------------------------------------------------------------------------------------------------------------- model

ENCODERS = {
    "fastnerv": vae.EncoderConfig(width=720, depth=6, heads=12, patch=(1, 64, 64)),
    "nano": vae.EncoderConfig(width=128, depth=3, heads=4, patch=(4, 8, 8)),
}
RANGE = 4.0  # codes lie within ±RANGE


class Hypernetwork(vae.ViT):
    """NeRV-Enc: patches and one learned query for each weight token go through a ViT; each layer has its linear map (Fig. 4).

    The ViT is that of stage 1 with its batch norm, without which a small one is slow to learn.
    """

    def __init__(self, vit_config, config):
        super().__init__(vit_config, config)
        self.counts = config.tokens
        self.heads = nn.ModuleList(nn.Linear(vit_config.width, dim) for dim in config.token_dims if dim)
        for head in self.heads:  # start near the shared kernels, on which all videos agree
            nn.init.normal_(head.weight, std=1 / math.sqrt(vit_config.width))
            nn.init.zeros_(head.bias)

    def forward(self, clips):
        """clips [B, T, 3, R, R] in [-1, 1] -> codes [B, P], each within ±RANGE."""
        parts = super().forward(clips).split([n for n in self.counts if n], 1)  # each [B, tokens of a layer, width]
        codes = torch.cat([head(part).flatten(1) for head, part in zip(self.heads, parts)], 1)
        return RANGE * torch.tanh(codes.float() / RANGE)


class NeRVDec(nn.Module):
    """Codes in, frames out; and all that turns codes into bytes and back: what a receiver needs to have.

    mean and log_scale [P] are of a logistic distribution for each code, which training fits: the entropy coder's model.
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        last = [False] * (len(c.strides) - 1) + [True]
        layers = zip(c.shapes, c.strides, c.tokens, c.token_dims, last)
        self.layers = nn.ModuleList(Layer(*layer) for layer in layers)
        if c.pictures:
            self.pictures = nerv.Pictures(c.pictures, c.resolution, c.codes[-1] // c.pictures, gain=4.0)
        self.mean = nn.Parameter(torch.zeros(c.num_codes))
        self.log_scale = nn.Parameter(torch.full((c.num_codes,), math.log(0.3)))

    def forward(self, codes, t):
        """codes [B, P], positions t [T'] real-valued, 0 … T-1 in the clip -> frames [B, T', 3, R, R] about [-1, 1]."""
        B, c = len(codes), self.config
        if codes.device.type == "cpu" and B > 1 and not torch.is_grad_enabled():
            return torch.cat([self(part, t) for part in codes.split(1)])  # to the bit the same in any company
        parts = codes.split(c.codes, 1)
        x = nerv.sinusoid(t.float(), c.pos_dim, c.num_frames).to(codes.dtype)[:, :, None, None].repeat(1, B, 1, 1)
        for i, (layer, part) in enumerate(zip(self.layers, parts)):
            x = layer(nerv.GELU_GAIN * F.gelu(x) if i else x, part)
        frames = 2 * x.unflatten(1, (B, 3)).transpose(0, 1)  # the paper's output bias of 0.5 on [0, 1] is 0 on [-1, 1]
        return frames + self.pictures(parts[-1], t, c.num_frames) if c.pictures else frames

    def num_weights(self):
        """Kernels and biases, of which one video's network has as many (Table 2, "INR size")."""
        return sum(layer.shared.numel() + layer.bias.numel() for layer in self.layers)

    def sources(self, keep):
        """Where each code is read from when each layer keeps its first tokens, the share `keep` of them: [P] indices.

        Kept codes are read from themselves.
        """
        kept = tuple(math.ceil(keep * n - 1e-9) for n in self.config.tokens)
        return fallbacks(self.config.tokens, self.config.token_dims, kept).to(self.mean.device)

    def steps(self, bits):
        """The quantizer's step for each code, [P]: 2^bits levels in ±RANGE; bits is a list of one number, or one per layer."""
        return (2 * RANGE / 2 ** self.config.per_code(bits).float()).to(self.mean.device)

    def quantize(self, codes, bits):
        """codes [B, P] -> whole numbers [B, P], as floats."""
        steps = self.steps(bits)
        half = RANGE / steps
        return torch.minimum(torch.maximum(((codes - self.mean) / steps).round(), -half), half - 1)

    def dequantize(self, numbers, bits):
        return self.mean + numbers * self.steps(bits)

    def bits(self, codes, steps):
        """What each code costs in bits, about, with a gradient: codes [B, P], steps [P] -> [B, P]."""
        scale, far = self.log_scale.exp(), (codes - self.mean).abs()
        mass = torch.sigmoid((steps / 2 - far) / scale) - torch.sigmoid((-steps / 2 - far) / scale)
        return -torch.log2(mass.clamp_min(1e-9))


class Codec(nn.Module):
    def __init__(self, config, vit_config):
        super().__init__()
        self.config, self.vit_config = config, vit_config
        self.encoder, self.decoder = Hypernetwork(vit_config, config), NeRVDec(config)


def load_codec(ckpt):
    """The Codec of a checkpoint, in evaluation mode."""
    with checkpoints.fitting(ckpt):
        codec = Codec(CodecConfig(**ckpt["codec_config"]), vae.EncoderConfig(**ckpt["encoder_config"]))
        codec.load_state_dict(ckpt["ema"])
    return codec.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------- a file


def encode_clips(codec, clips, bits, keep, refine=0, rate=0.0):
    """Clips [B, T, 3, R, R] in [-1, 1] -> whole numbers [B, P], their codes after `refine` steps against the clips.

    Quantization is in the loop of these steps, straight through; rate is what a bit per pixel is worth in squared error.
    """
    decoder, steps = codec.decoder, codec.decoder.steps(bits)
    sources, pixels = decoder.sources(keep), codec.config.num_frames * codec.config.resolution**2
    kept = sources == torch.arange(len(sources), device=sources.device)

    def decode(codes, t):
        rounded = decoder.dequantize(decoder.quantize(codes, bits), bits)
        return decoder((codes + (rounded - codes).detach())[:, sources], t)

    def price(codes):
        return rate / pixels * (decoder.bits(codes, steps) * kept).sum(1)

    codes = vae.refine(decode, codec.encoder(clips), clips, refine, lr=0.05, price=price if rate else None)
    return decoder.quantize(codes, bits)


@dataclass
class Encode:
    ckpt: str = option("input", "codec.pt", "checkpoint of `codec.py train`")
    bits: list = option("size", [6], "of a code, 4 to 8: one number, or one for each layer", nargs="+", type=int)
    keep: float = option("size", 1.0, "share of the weight tokens that is written")
    refine: int = option("effort", 0, "gradient steps on the codes against the video")
    rate: float = option("effort", -1.0, "what a bit per pixel is worth in squared error, to --refine; -1: as in training")
    batch_size: int = option("machine", 16, "clips encoded at once")
    device: str = option("machine", "auto", "cpu, cuda, cuda:1, …; auto: CUDA where there is one")


def check_sizes(bits, keep, refine, config, ckpt):
    """UserError for bits (a list, one number or one per layer), keep and refine that cannot be, of a codec or this model."""
    if len(bits) not in (1, len(config.tokens)) or not all(4 <= b <= 8 for b in bits):
        layers = len(config.tokens)
        raise UserError(f"--bits {' '.join(map(str, bits))}: one number from 4 to 8, or {layers} of them, one per layer")
    if not 0 < keep <= 1:
        raise UserError(f"--keep {keep}: it is a share of the tokens, above 0 and up to 1")
    if refine < 0:
        raise UserError(f"--refine {refine}: it must not be negative")
    if refine and (damage := ckpt["config"].get("degrade", "none")) != "none":
        raise UserError(f"--refine {refine} would fit the degraded video, and the model is to restore it (--degrade {damage})")


@torch.no_grad()
def write_video(target, codec, frames, fps, bits, keep, refine, price, batch_size, quiet=False):
    """Encode frames, uint8 [F, H, W, 3], as the file `target`, which is so many bytes; the settings are those of Encode."""
    c, (count, height, width, _) = codec.config, frames.shape
    order, device = coding_order(codec.decoder, bits, keep), codec.decoder.mean.device
    tiles, chunks = len(cut(frames[:1], c.num_frames, c.resolution)), []
    starts = range(0, count, c.num_frames)
    several = max(1, batch_size // tiles)  # chunks at a time
    for first in progress.bar(range(0, len(starts), several), "encoding", unit="batch", disable=quiet):
        group = starts[first : first + several]
        clips = torch.cat([cut(frames[s : s + c.num_frames], c.num_frames, c.resolution) for s in group])
        parts = clips.split(batch_size)
        numbers = torch.cat([encode_clips(codec, part.to(device), bits, keep, refine, price) for part in parts])
        chunks += [packed(own, order) for own in numbers.cpu().numpy().reshape(len(group), tiles, -1)]
    size, name = [width, height], model_name(codec)
    header = {"kind": "codec", "model": name, "size": size, "frames": count, "rate": round(fps, 4), "bits": bits, "keep": keep}
    return container.write(target, header, chunks)


def read_video(path, size=None):
    """(all frames of a video at its own size or cut to a square, uint8 [F, H, W, 3], frames a second). UserError."""
    frames, fps = video.read_frames(path, size) if size else video.whole_video(path), video.probe(path).fps or 25.0
    if frames[0, :, :, 0].size > VideoFile.LARGEST:
        about = f"has frames of {frames.shape[2]} x {frames.shape[1]}, more than {VideoFile.LARGEST} pixels"
        raise UserError(f"{printable(path)} {about}")
    return frames, fps


def encode(source, target, config):
    """Encode the video file `source` as the file `target`."""
    _, codec, ckpt = open_codec(config)
    check_sizes(config.bits, config.keep, config.refine, codec.config, ckpt)
    utils.check_positive(config, "batch_size")
    utils.make_parent(target)
    frames, fps = read_video(source)
    begin, price = time.time(), ckpt["config"]["rate"] if config.rate < 0 else config.rate
    size = write_video(target, codec, frames, fps, config.bits, config.keep, config.refine, price, config.batch_size)
    seconds, error, T = time.time() - begin, 0.0, codec.config.num_frames
    for k, made in enumerate(decode_frames(VideoFile(target).fit(codec, config.ckpt), codec, 0, len(frames))):
        error += np.square(made - frames[k * T : (k + 1) * T].astype(np.float32)).sum(dtype=np.float64)
    count, height, width, _ = frames.shape
    print(
        f"wrote {target}: {count} frames of {width} x {height} in {size} bytes, {8 * size / (count * height * width):.4f} bits "
        f"per pixel, PSNR {rd.psnr(error / frames.size):.2f} dB, {seconds:.1f} s"
    )


@dataclass
class Decode:
    ckpt: str = option("input", "codec.pt", "checkpoint of `codec.py train` that encoded the file")
    frames: str = option("what", "", "first and last of the video's frames, the last one left out, 100:140; default: all")
    time_scale: float = option("what", 1.0, "decoded frames per frame of the video, which stays as long as it is")
    salvage: bool = option("what", False, "decode what is undamaged; the last good frame stands in for the rest, or grey")
    device: str = option("machine", "auto", "cpu, cuda, cuda:1, …; auto: CUDA where there is one")


def decode(source, target, config):
    """Decode the file `source` into the video `target`."""
    utils.check_positive(config, "time_scale")
    file = VideoFile(source)
    _, codec, _ = open_codec(config)
    file.fit(codec, config.ckpt)
    first, last = video.frame_range(config.frames, file.frames)
    if file.reader.tail > 0 and not config.salvage:
        raise container.BadFile(source, f"{file.reader.tail} bytes follow its end: --salvage leaves them out")
    parts = decode_frames(file, codec, first, last, config.time_scale, config.salvage)
    count = video.write_frames(target, parts, file.rate * config.time_scale)
    print(f"wrote {target}: {count} frames of {file.width} x {file.height}")


@dataclass
class Info:
    pass


def info(source, config):
    """Print what a file says of itself, and which of its chunks are damaged."""
    VideoFile(source).print()


def open_codec(config):
    """(device, Codec on it, checkpoint) of settings with ckpt and device."""
    ckpt = checkpoints.load(config.ckpt, "codec", "python codec.py train")
    device = utils.pick_device(config.device)
    return device, load_codec(ckpt).to(device), ckpt


@dataclass
class Compare:
    ckpt: str = option("input", "codec.pt", "checkpoint of `codec.py train`")
    size: int = option("input", 0, "cut videos to squares and scale them to so many pixels; 0: as they are")
    videos: int = option("input", 0, "so many of the videos, evenly chosen; 0: all")
    bits: list = option("ours", [6], "of a code; each of this list with each of the next two is a point", nargs="+", type=int)
    keep: list = option("ours", [1.0, 0.5, 0.25], "shares of the weight tokens", nargs="+", type=float)
    refine: list = option("ours", [0, 10, 100], "gradient steps, a curve for each number", nargs="+", type=int)
    rate: float = option("ours", -1.0, "what a bit per pixel is worth in squared error, to --refine; -1: as in training")
    codecs: list = option("others", list(rivals.RIVALS), "which codecs", nargs="*", choices=list(rivals.RIVALS))
    crf: list = option("others", [20, 26, 32, 38, 44, 51], "points of x264 and x265, 0 to 51", nargs="+", type=int)
    av1_crf: list = option("others", [20, 30, 40, 50, 57, 63], "points of SVT-AV1, 0 to 63", nargs="+", type=int)
    tune: str = option("others", "psnr", "what the others look at: psnr, or people", choices=["psnr", "people"])
    lpips: bool = option("measures", True, "LPIPS with AlexNet, where its weights can be had")
    below: float = option("measures", 0.0, "bits per pixel of x264 up to which BD-rates count; 0: where curves overlap")
    batch_size: int = option("machine", 16, "clips encoded at once")
    device: str = option("machine", "auto", "cpu, cuda, cuda:1, …; auto: CUDA where there is one")
    out_dir: str = option("output", "out/rd", "points.csv and curves.png go here")


def perceptual():
    """lpips(x, y) -> mean LPIPS of frames [T, 3, H, W] in [-1, 1], NaN below 32 pixels; None, and a line, without weights."""
    try:
        network = losses.LPIPS("alex")
    except UserError as error:
        print(f"LPIPS is left out: {error}", file=sys.stderr)
        return None

    def lpips(x, y):
        return network(losses.at_least_64(x[None]), losses.at_least_64(y[None])).item() if min(x.shape[2:]) >= 32 else math.nan

    return lpips


def compare(*sources, config):
    """Rate and distortion of ours and of other codecs, over video files and the held-out videos of directories."""
    _, codec, ckpt = open_codec(config)
    utils.check_positive(config, "batch_size")
    if min(config.size, config.videos) < 0:
        raise UserError("--size and --videos must not be negative")
    price = ckpt["config"]["rate"] if config.rate < 0 else config.rate

    def ours(frames, fps, path, bits, keep, refine):
        begin = time.time()
        size = write_video(path, codec, frames, fps, bits, keep, refine, price, config.batch_size, quiet=True)
        seconds, file = time.time() - begin, VideoFile(path).fit(codec, config.ckpt)
        return size, "nerv", seconds, np.concatenate(list(decode_frames(file, codec, 0, len(frames))))

    points = rivals.points(config.codecs, config.crf, config.av1_crf, config.tune == "psnr")
    model = 4 * sum(x.numel() for x in codec.decoder.state_dict().values())  # bytes, of float32
    for refine, bits, keep in itertools.product(config.refine, config.bits, config.keep):
        check_sizes([bits], keep, refine, codec.config, ckpt)
        name, run = f"ours, refine {refine}", functools.partial(ours, bits=[bits], keep=keep, refine=refine)
        points.append(rd.Point(name, f"{bits} bits, keep {keep:g}", run, model))
    folders = {s: data.find_folder(Path(s), "test", 0)[1] for s in sources if Path(s).is_dir()}
    paths = [path for s in sources for path, _ in folders.get(s, [(s, "")])]
    if not paths:
        raise UserError(f"{' '.join(map(printable, sources))}: there are no videos in it")
    videos = [read_video(paths[i], config.size) for i in data.spread_over(paths, config.videos or len(paths))]
    rd.compare(points, videos, config.out_dir, perceptual() if config.lpips else None, config.below)


class Loader:
    """Random clips of the .nerv files under a directory, as batches without end: [B, T, 3, H, W] in [-1, 1], on the device.

    Many videos decode in one call (§3.2, "NeRV-Dec"). Every chunk comes once in a pass, each pass in an order that follows from
    the seed; `start` is the batch to begin with. What has been read stays in memory as the whole numbers it is made of, a byte
    each. The files are of one model and one size of frame. UserError for those that are not, or where there are none.
    """

    def __init__(self, directory, ckpt="codec.pt", batch_size=16, seed=0, start=0, device="auto", bf16="auto"):
        self.device, self.codec, _ = open_codec(Decode(ckpt, device=device))
        self.batch_size, self.seed, self.start, self.bf16 = batch_size, seed, start, bf16
        paths = sorted(Path(directory).rglob("*.nerv"))
        if not paths:
            raise UserError(f"{directory} holds no .nerv files: make some with `python codec.py encode`")
        self.files = [VideoFile(path).fit(self.codec, ckpt) for path in paths]
        self.height, self.width = self.files[0].height, self.files[0].width
        for file in self.files:
            if (file.height, file.width) != (self.height, self.width):
                raise UserError(f"{printable(file.path)} has frames of another size than {printable(paths[0])}")
        self.clips = []  # whole ones; of a video with none, the one that was filled up
        for file in self.files:
            whole = max(1, file.frames // self.codec.config.num_frames)
            self.clips += [(file, chunk) for chunk in range(whole)]
        self.kept = {}

    def __len__(self):
        """Clips in a pass."""
        return len(self.clips)

    def codes(self, i):
        file, chunk = self.clips[i % len(self)]
        if i % len(self) not in self.kept:
            numbers = file.numbers(chunk)
            if numbers is None:
                raise container.BadFile(file.path, f"chunk {chunk} is damaged")
            self.kept[i % len(self)] = numbers
        return file.codes(self.kept[i % len(self)])

    @torch.no_grad()
    def batch(self, indices):
        codes, c = torch.cat([self.codes(i) for i in indices]), self.codec.config
        t, size = torch.arange(c.num_frames, device=self.device), c.resolution
        tiles = torch.empty(len(codes), c.num_frames, 3, size, size, device=self.device)
        together = len(codes) if self.device.type == "cuda" else 1  # each goes to its place while it is in the cache
        for part, place in zip(codes.split(together), tiles.split(together)):
            with utils.autocast(self.device, self.bf16):
                place.copy_(self.codec.decoder(part, t))
        return join(tiles.clamp_(-1, 1).unflatten(0, (len(indices), -1)), self.height, self.width)

    def __iter__(self):
        for indices in data.Stream(len(self), self.batch_size, self.seed, self.start):
            yield self.batch(indices)


# ---------------------------------------------------------------------------------------------------------------- training


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
    degrade: str = option("data", "none", "what the encoder sees of a clip that is to come out whole", choices=degrade.KINDS)
    cache: str = option("data", "auto", "frames on disk: auto for small data sets", choices=["auto", "on", "off"])
    cache_dir: str = option("data", "data/cache", "directory of the caches")
    workers: int = option("data", -1, "threads that read clips ahead; -1: as many as there are cores")
    preset: str = option("model", "", "default: fastnerv, the paper's, or nano for the shapes", choices=list(ENCODERS))
    resolution: int = option("model", 256, "height and width of a tile in pixels, a power of two")
    num_frames: int = option("model", 8, "frames of a clip, T")
    width: int = option("model", 16, "channels of the decoder; larger ones take no byte more (HyperNeRV, Table 3)")
    pictures: int = option("model", 0, "learned ones that all videos share, for a codec of one scene; with --tokens")
    allocation: str = option(
        "model", "adaptive", "which layers have tokens (Table 4)", choices=["adaptive", "uniform", "specific"]
    )
    tokens: list = option("model", [], "weight tokens of each layer, instead of --allocation", nargs="+", type=int)
    token_dims: list = option("model", [], "numbers of a token of each layer", nargs="+", type=int)
    batch_size: int = option("training", 32, "clips per step, of all processes together")
    steps: int = option("training", 1_000_000, "length of the training; the learning rate decays to zero over it")
    optimizer: str = option("training", "adamw", "muon: for the matrices of the encoder", choices=["adamw", "muon"])
    lr: float = option("training", 1e-4, "peak learning rate")
    warmup: int = option("training", 1000, "steps of linear warm-up")
    weight_decay: float = option("training", 0.01, "of the optimizer")
    renorm: float = option("training", 0.3, "share of the steps after which batch norm is by its running statistics")
    grad_clip: float = option("training", 1.0, "largest norm of the gradient")
    ema: float = option("training", 0.9995, "decay of the averaged weights, which are the ones to use")
    seed: int = option("training", 0, "of weights, data order and noise")
    mask: float = option("size", 0.5, "share of the clips of which a random share of the tokens is left out")
    bits: int = option("size", 6, "of a code, 4 to 8, whose rounding the decoder learns to bear")
    rate: float = option("size", 0.0, "what a bit per pixel is worth in squared error; 0 is the paper's loss")
    device: str = option("machine", "auto", "cpu, cuda, cuda:1, …; auto: CUDA where there is one")
    bf16: str = option("machine", "auto", "bfloat16 autocast; auto: with CUDA", choices=["auto", "on", "off"])
    compile: str = option("machine", "auto", "torch.compile; auto: with CUDA", choices=["auto", "on", "off"])
    out: str = option("output", "codec.pt", "the checkpoint")
    resume: bool = option("output", False, "go on from the checkpoint --out where it exists, exactly as if never stopped")
    run_dir: str = option("output", "runs/codec", "losses.csv, losses.png and preview sheets go here")
    log_every: int = option("output", 50, "steps between rows of losses.csv")
    save_every: int = option("output", 500, "steps between checkpoints and previews")


def preset_defaults(args):
    """The defaults that --preset, --dataset and --allocation imply."""
    name = args.preset or ("nano" if args.dataset in data.DRAWN else "fastnerv")
    tokens, dims = ALLOCATIONS[name][args.allocation]
    defaults = data.DEFAULTS.get(args.dataset, {}) | {"preset": name, "tokens": list(tokens), "token_dims": list(dims)}
    if name == "nano":  # small enough for two CPU cores
        defaults |= {"resolution": 64, "width": 32, "steps": 2000, "batch_size": 16, "lr": 1.5e-3, "warmup": 50, "ema": 0.99}
        defaults |= {"optimizer": "muon"}
    return defaults


@torch.no_grad()
def reconstruct(codec, clips, device, bits, keep=1.0, batch_size=16):
    """Clips [B, T, 3, R, R] through the codec and back, and the bytes of all of them, without headers."""
    decoder, out, size = codec.decoder, [], 0
    order, sources = coding_order(decoder, bits, keep), decoder.sources(keep)
    for batch in clips.to(device).split(batch_size):
        numbers = encode_clips(codec, batch, bits, keep)
        size += sum(len(packed(row, order)) for row in numbers.cpu().numpy()[:, None])
        out.append(decoder(decoder.dequantize(numbers, bits)[:, sources], torch.arange(clips.shape[1], device=device)).cpu())
    return torch.cat(out), size


def train(config):
    utils.check_positive(config, "steps", "batch_size", "stride", "num_frames", "width")
    utils.check_positive(config, "log_every", "save_every", "grad_clip")
    for name, low, high in (("crop_scale", 0.25, 1), ("mask", 0, 1), ("bits", 4, 8)):
        if not low <= getattr(config, name) <= high:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: it is from {low} to {high}")
    device, rank, world = utils.start_processes(config.device)
    rows = utils.rows_per_process(config.batch_size, 1, world)  # clips that this process takes
    if rows * world < 2:
        raise UserError("one clip at a time leaves batch norm nothing to compare with: use a larger --batch-size")
    utils.make_parent(config.out)
    torch.manual_seed(config.seed)
    try:
        codec_config = CodecConfig(
            **{f.name: getattr(config, f.name) for f in dataclasses.fields(CodecConfig) if hasattr(config, f.name)}
        )
        codec = Codec(codec_config, ENCODERS[config.preset]).to(device)
    except ValueError as error:
        raise UserError(str(error)) from None
    train_set = data.open_dataset(config, "train")
    test_set = data.open_dataset(config, "test", train_set.classes)
    held_out, _ = data.fixed_clips(test_set, 64)
    grid = degrade.draw(len(held_out), torch.Generator().manual_seed(0))
    seen = degrade.degrade(held_out, config.degrade, grid)  # what the encoder sees of them
    ema = copy.deepcopy(codec).eval().requires_grad_(False)
    optimizer = make_optimizer(codec, codec.encoder.matrices() if config.optimizer == "muon" else [], config.weight_decay)
    parts = {"model": codec, "step": utils.FiniteStep(codec, optimizer, config.grad_clip)}
    start = 0
    if ckpt := checkpoints.resume(config, "codec"):
        ema.load_state_dict(ckpt["ema"])
        for name, part in parts.items():
            part.load_state_dict(ckpt["training"][name])
        start = ckpt["step"]
    stream = data.Stream(len(train_set), config.batch_size, config.seed, start, 1, rank, world)
    batches = data.endless(train_set, stream, config.workers, device)
    log = utils.RunLog(config.run_dir, config.steps, config.log_every, start, rank)
    log.print(
        f"{len(train_set)} clips; encoder {sum(p.numel() for p in codec.encoder.parameters()) / 1e6:.2f} M parameters, decoder "
        f"{codec.decoder.num_weights() / 1e3:.1f} k, codes of a clip {codec_config.num_codes / 1e3:.1f} k"
        + (f"; going on after step {start}" if start else "")
    )
    if utils.wants_compile(device, config.compile):
        codec.encoder.compile()
        codec.decoder.compile()

    saver = checkpoints.Saver(config.out)

    def save(step, final=False):
        training = {name: part.state_dict() for name, part in parts.items()}
        saver(
            final, stage="codec", step=step, config=dataclasses.asdict(config), classes=list(train_set.classes),
            codec_config=dataclasses.asdict(codec_config), encoder_config=dataclasses.asdict(codec.vit_config),
            ema=ema.state_dict(), training=training,
        )  # fmt: skip
        log.write()

    def preview(step):
        """A sheet of held-out clips, whole and of half the tokens; returns PSNR and bits per pixel, of both, as text."""
        whole, half = (reconstruct(ema, seen, device, [config.bits], keep) for keep in (1.0, 0.5))
        few = torch.linspace(0, len(held_out) - 1, min(6, len(held_out))).round().long()
        shown = {"real": held_out, "all tokens": whole[0], "half of them": half[0]}
        if config.degrade != "none":
            shown = {"real": held_out, config.degrade: seen, "all tokens": whole[0]}
        clips = [clip for row in zip(*(clips[few] for clips in shown.values())) for clip in row]
        video.write_sheet(f"{config.run_dir}/step{step:07d}.png", clips, list(shown) * len(few))
        pixels = held_out.numel() / 3
        return ", ".join(f"{vae.psnr(held_out, clips):.2f} dB at {8 * n / pixels:.4f} bpp" for clips, n in (whole, half))

    t, own = (torch.arange(n, device=device) for n in (config.num_frames, codec_config.num_codes))
    quantum, pixels = codec.decoder.steps([config.bits]), config.num_frames * config.resolution**2
    done = start  # finished steps
    with utils.Interrupt() as interrupt:
        for step in range(start, config.steps):
            lr = utils.learning_rate(step, config.steps, config.lr, config.warmup)
            codec.encoder.norm.renorm = step >= config.renorm * config.steps
            # The random numbers of the whole batch, of which this process uses its rows.
            random, place = utils.step_generator(device, config.seed, step), slice(rank * rows, (rank + 1) * rows)
            noise = torch.rand(config.batch_size, len(own), generator=random, device=device)[place] - 0.5
            draws = torch.rand(2, config.batch_size, generator=random, device=device)[:, place].tolist()
            keeps = [share if masked < config.mask else 1.0 for masked, share in zip(*draws)]
            sources = torch.stack([codec.decoder.sources(max(keep, 1e-6)) for keep in keeps])  # [B, P]

            clips = to_clip(next(batches)[0].to(device, non_blocking=True))  # uint8 [B, T, H, W, 3] -> [B, T, 3, H, W]
            damaged = degrade.degrade(clips, config.degrade, degrade.draw(config.batch_size, random)[place])
            with utils.autocast(device, config.bf16):
                codes = codec.encoder(damaged)
                codes = codes + noise * quantum  # rounding, as far as a gradient goes
                frames = codec.decoder(codes.gather(1, sources), t)
                l2 = (frames.float() - clips).square().mean()  # Eq. 1
                # The distribution is fitted in any case; the codes themselves hear of it where bits have a price.
                cost = codec.decoder.bits(codes if config.rate else codes.detach(), quantum)
                bpp = (cost * (sources == own)).sum(1).mean() / pixels
                loss = l2 + (config.rate or 1e-3) * bpp
            loss.backward()
            log.add(loss=loss, l2=l2, bpp=bpp)
            parts["step"](loss, lr)
            utils.update_ema(ema, codec, min(config.ema, (1 + step) / (10 + step)))  # forgets the random start quickly
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
        log.print(f"held-out clips after {done} steps, all and half of the tokens: {preview(done)}")
        if config.degrade != "none":
            restored = reconstruct(ema, seen, device, [config.bits])[0]
            degrade.report(held_out, config.degrade, grid, seen, restored)
        log.print(f"{time.time() - log.start:.0f} s; wrote {config.out}; losses and sheets are in {config.run_dir}")
    log.close()


# Each command: its function, its settings, its presets, and the files it takes, "…" for more of the last one.
COMMANDS = {
    "train": (train, Config, preset_defaults, ()),
    "encode": (encode, Encode, None, ("VIDEO", "FILE.nerv")),
    "decode": (decode, Decode, None, ("FILE.nerv", "VIDEO")),
    "info": (info, Info, None, ("FILE.nerv",)),
    "compare": (compare, Compare, None, ("VIDEO", "…")),
}


def main():
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        utils.parse_options(Config, __doc__, preset_defaults)  # those of train
    if name not in COMMANDS:
        raise UserError(f"name a command first: {', '.join(COMMANDS)}")
    function, settings, presets, wanted = COMMANDS[name]
    files = list(itertools.takewhile(lambda argument: not argument.startswith("-"), sys.argv[2:]))
    config = utils.parse_options(settings, __doc__, presets, sys.argv[2 + len(files) :])
    if len(files) != len(wanted) and not (files and "…" in wanted):
        raise UserError(f"usage: python codec.py {' '.join([name, *wanted])}, then options")
    function(*files, config=config)


if __name__ == "__main__":
    utils.run(main)
