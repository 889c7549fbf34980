"""FVD, the Fréchet video distance, between two folders of videos. (evaluate.py computes it for a checkpoint.)

python fvd.py real/ generated/ --save-stats real.npz    downloads I3D's weights once; saves the features of real/ …
python fvd.py real.npz other/                           … and reuses them
python fvd.py real/ generated/ --features random        needs no weights, but is less informative and not called FVD

FVD (Unterthiner et al. 2018, arXiv:1812.01717) is the Fréchet distance |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½) of Gaussians
fitted to features of clips of 16 frames: the 400 logits, averaged over time, of I3D (Carreira & Zisserman 2017,
arXiv:1705.07750) trained on Kinetics-400. Implementations agree on that; --protocol sets the rest (see docs/evaluation.md):

                 stylegan-v                    videogpt                        tensorflow
    frame        to 224 × 224; if wide, its    shorter side to 224, then the   to 224 × 224, whatever
                 central square                central 224 × 224               its shape
    bilinear     half-pixel centres            half-pixel centres              TensorFlow 1's: pixel i at i · size / 224
    covariance   / N                           / (N − 1)                       / (N − 1)
    real clip    random 16 frames of a video   random                          the first 16
    generated    the first 16                  the first 16                    the first 16

None of them antialiases. FVD is biased upward, by about a constant over the number of videos: compare equal numbers only.
"""

import functools
import itertools
import json
import math
import os
import random
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import utils, video, weights
from common.utils import UserError, option

SIZE = 224  # I3D's height and width
BATCH = 8  # clips per forward pass
# A column of the table above: covariances are divided by N - ddof; starts are of real and of generated clips.
Protocol = namedtuple("Protocol", "frame half_pixel ddof starts")
PROTOCOLS = {
    "stylegan-v": Protocol("square", True, 0, ("random", "first")),
    "videogpt": Protocol("shorter", True, 1, ("random", "first")),
    "tensorflow": Protocol("whole", False, 1, ("first", "first")),
}


def pad_same(x, kernel, stride):
    """TensorFlow's "same": zero padding of x [..., T, H, W] for ⌈size / stride⌉ windows; if odd, one more at the end."""
    padding = []
    for size, k, s in zip(x.shape[:1:-1], kernel[::-1], stride[::-1]):
        total = max((math.ceil(size / s) - 1) * s + k - size, 0)
        padding += [total // 2, total - total // 2]
    return F.pad(x, padding)


class Unit3D(nn.Module):
    """Convolution, batch norm, ReLU: [B, in, T, H, W] -> [B, out, ⌈T / stride⌉, ⌈H / stride⌉, ⌈W / stride⌉]."""

    def __init__(self, in_channels, out_channels, kernel=1, stride=1):
        super().__init__()
        self.conv3d = nn.Conv3d(in_channels, out_channels, kernel, stride, "same" if stride == 1 else 0, bias=False)
        self.bn = nn.BatchNorm3d(out_channels, eps=1e-3)

    def forward(self, x):
        x = x if self.conv3d.padding == "same" else pad_same(x, self.conv3d.kernel_size, self.conv3d.stride)
        return F.relu(self.bn(self.conv3d(x)), inplace=True)


def max_pool(x, kernel, stride):
    """Max pooling of x >= 0 [B, C, T, H, W], "same", one dimension after another, which is faster than F.max_pool3d."""
    x = pad_same(x, kernel, stride)
    for dim in (4, 3, 2):
        x = functools.reduce(torch.maximum, x.unfold(dim, kernel[dim - 2], stride[dim - 2]).unbind(-1))
    return x


class Mixed(nn.Module):
    """An Inception module: four parallel branches, [B, in, T, H, W] -> [B, n0 + n1 + n2 + n3, T, H, W]."""

    def __init__(self, in_channels, n0, n1a, n1, n2a, n2, n3):
        super().__init__()
        self.b0 = Unit3D(in_channels, n0)
        self.b1a, self.b1b = Unit3D(in_channels, n1a), Unit3D(n1a, n1, 3)
        self.b2a, self.b2b = Unit3D(in_channels, n2a), Unit3D(n2a, n2, 3)
        self.b3b = Unit3D(in_channels, n3)

    def forward(self, x):
        pooled = max_pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], 1)


class I3D(nn.Module):
    """The Inflated Inception network: clips [B, 3, T, 224, 224] in [-1, 1], T >= 9, -> logits [B, 400], averaged over time.

    Names and shapes follow github.com/piergiaj/pytorch-i3d. It also takes smaller frames, with a smaller last pool.
    """

    LAYERS = {  # Mixed: channels in, of branch 0, of 1 and 2 before and after their 3 × 3 × 3 convolutions, of 3
        "Conv3d_1a_7x7": (Unit3D, 3, 64, 7, 2),
        "MaxPool3d_2a_3x3": (max_pool, (1, 3, 3), (1, 2, 2)),
        "Conv3d_2b_1x1": (Unit3D, 64, 64),
        "Conv3d_2c_3x3": (Unit3D, 64, 192, 3),
        "MaxPool3d_3a_3x3": (max_pool, (1, 3, 3), (1, 2, 2)),
        "Mixed_3b": (Mixed, 192, 64, 96, 128, 16, 32, 32),
        "Mixed_3c": (Mixed, 256, 128, 128, 192, 32, 96, 64),
        "MaxPool3d_4a_3x3": (max_pool, (3, 3, 3), (2, 2, 2)),
        "Mixed_4b": (Mixed, 480, 192, 96, 208, 16, 48, 64),
        "Mixed_4c": (Mixed, 512, 160, 112, 224, 24, 64, 64),
        "Mixed_4d": (Mixed, 512, 128, 128, 256, 24, 64, 64),
        "Mixed_4e": (Mixed, 512, 112, 144, 288, 32, 64, 64),
        "Mixed_4f": (Mixed, 528, 256, 160, 320, 32, 128, 128),
        "MaxPool3d_5a_2x2": (max_pool, (2, 2, 2), (2, 2, 2)),
        "Mixed_5b": (Mixed, 832, 256, 160, 320, 32, 128, 128),
        "Mixed_5c": (Mixed, 832, 384, 192, 384, 48, 128, 128),
    }

    def __init__(self):
        super().__init__()
        for name, (layer, *sizes) in self.LAYERS.items():
            if layer is not max_pool:
                self.add_module(name, layer(*sizes))
        self.logits = nn.ModuleDict({"conv3d": nn.Conv3d(1024, 400, 1)})

    def forward(self, x):
        for name, (layer, *sizes) in self.LAYERS.items():
            x = max_pool(x, *sizes) if layer is max_pool else self.get_submodule(name)(x)
        x = F.avg_pool3d(x, (2, min(7, x.shape[3]), min(7, x.shape[4])), stride=1)  # [B, 1024, T / 8 - 1, 1, 1]
        return self.logits["conv3d"](x).mean((2, 3, 4))

    @classmethod
    def random(cls, seed=0):
        """A network with random weights, determined by the seed; activations keep their scale from layer to layer."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = cls()
            for conv in (module for module in network.modules() if isinstance(module, nn.Conv3d)):
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu" if conv.bias is None else "linear")
        return network


class Detector:
    """Features of clips by a protocol: uint8 frames [B, T, H, W, 3] of any size -> float32 array [B, 400]."""

    def __init__(self, network, name, protocol="stylegan-v", device="cpu", size=SIZE):
        self.network, self.device, self.protocol, self.size = network.eval().to(device), device, PROTOCOLS[protocol], size
        self.meta = {"features": name, "protocol": protocol, "size": size}

    @torch.inference_mode()
    def __call__(self, clips):
        features = []
        for batch in torch.as_tensor(clips).split(BATCH):
            batch = batch.to(self.device).repeat(1, math.ceil(9 / batch.shape[1]), 1, 1, 1)  # I3D needs 9 frames
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # TF32 has a mantissa of ten bits
                features.append(self.network(preprocess(batch, self.protocol, self.size)).float().cpu())
        return torch.cat(features).numpy()


def load_detector(features="i3d", protocol="stylegan-v", seed=0, device="cpu"):
    if features == "random":
        return Detector(I3D.random(seed), f"random I3D, seed {seed}", protocol, device)
    network = I3D()
    network.load_state_dict(weights.weights("i3d"), strict=False)  # batch norms have no scale: it stays 1
    return Detector(network, weights.title("i3d"), protocol, device)


def label(meta):
    """The name of a distance between such features: FVD only with the published weights."""
    return "FVD" if meta["features"] == weights.title("i3d") else "FVD on random I3D features"


def preprocess(frames, protocol, size=SIZE):
    """uint8 frames [B, T, H, W, 3] -> float [B, 3, T, size, size] in [-1, 1], by one of PROTOCOLS."""
    x, target, short = frames.flatten(0, 1).movedim(-1, 1).float(), (size, size), min(frames.shape[2:4])  # [B * T, 3, H, W]
    if protocol.frame == "square":
        x = central(x, short)
    elif protocol.frame == "shorter":
        target = tuple(math.ceil(side * size / short) for side in x.shape[2:])
    if target != x.shape[2:] and protocol.half_pixel:
        x = F.interpolate(x, target, mode="bilinear")
    elif target != x.shape[2:]:  # one more pixel on both: align_corners then samples at i · size / target
        x = F.pad(x, (0, 1, 0, 1), mode="replicate")
        x = F.interpolate(x, [side + 1 for side in target], mode="bilinear", align_corners=True)[..., :-1, :-1]
    return (central(x, size) / 127.5 - 1).unflatten(0, frames.shape[:2]).transpose(1, 2)


def central(x, size):
    """[..., H, W] -> the central square, [..., size, size]."""
    top, left = ((side - size) // 2 for side in x.shape[-2:])
    return x[..., top : top + size, left : left + size]


def frechet_distance_of(x, y, ddof=0):
    """The Fréchet distance of Gaussians fitted to features x [n, d] and y [m, d]; covariances are divided by n - ddof.

    With Σ = BᵀB, tr (Σ₁Σ₂)^½ is the sum of the singular values of B₁B₂ᵀ, which is accurate even if there are fewer videos
    than dimensions, so that the covariances are singular.
    """
    means, roots = [], []
    for features in (x, y):
        means.append(np.mean(features, 0, np.float64))
        centred = (features - means[-1]) / math.sqrt(len(features) - ddof)
        roots.append(np.linalg.qr(centred, mode="r") if len(centred) > centred.shape[1] else centred)  # the smaller B
    traces = sum(np.square(root).sum() for root in roots) - 2 * np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    return max(0.0, float(np.square(means[0] - means[1]).sum() + traces))  # rounding may give -1e-13 for equal ones


def bootstrap(x, y, ddof=0, resamples=100, seed=0, paired=False):
    """Features x [n, d] and y [m, d] -> (low, high), the 95 % bootstrap interval of their distance over videos.

    paired draws rows of x and y together, for reconstructions of the same clips. A resample has fewer distinct videos, so its
    distance is larger, and a percentile interval may not contain the distance itself; draws are therefore shifted so that
    their mean is the distance. If the distance is mostly bias, the interval is too wide.
    """
    rng, value, draws = np.random.default_rng(seed % 2**64), frechet_distance_of(x, y, ddof), []
    for _ in range(resamples):
        i = rng.integers(len(x), size=len(x))
        j = i if paired else rng.integers(len(y), size=len(y))
        draws.append(frechet_distance_of(x[i], y[j], ddof))
    low, high = np.quantile(draws, [0.025, 0.975]) - np.mean(draws)
    return max(0.0, float(value + low)), float(value + high)


@dataclass
class Config:
    protocol: str = option("features", "stylegan-v", "reference implementation to follow", choices=list(PROTOCOLS))
    features: str = option("features", "i3d", "trained I3D, or one with random weights", choices=["i3d", "random"])
    frames: int = option("clips", 16, "frames per clip")
    stride: int = option("clips", 1, "frames of the video per frame of the clip")
    videos: int = option("clips", 2048, "videos per folder, a random sample if there are more")
    seed: int = option("clips", 0, "seed for sampling videos and clips, bootstrap and random weights")
    bootstrap: int = option("result", 100, "resamples for the interval; 0: no interval")
    save_stats: str = option("result", "", "file for the features of the first folder, to give in its place later")
    get_weights: bool = option("machine", False, "only download all weights of common/weights.py")
    device: str = option("machine", "auto", "cpu, cuda, cuda:1, …; auto: CUDA if available")


def read_clip(path, config, start):
    """A clip of a video, from its "first" frame or a "random" one: uint8 [frames, H, W, 3]. Raises BadVideo."""
    span, begin = (config.frames - 1) * config.stride + 1, 0
    if start == "random":  # seeded by name, so that an unreadable video does not change the others' clips
        rng = random.Random(f"{config.seed} ".encode() + os.fsencode(Path(path).name))
        begin = rng.randint(0, max(0, video.count_frames(path) - span))
    frames = video.read_frames(path, None, begin, span)
    if len(frames) < span:
        raise video.BadVideo(path, f"it has {len(frames)} frames, but a clip needs {span} (--frames, --stride)")
    return frames[:: config.stride]


def measure(place, paths, detector, config, start):
    """(features [n, 400] of one clip per video, of up to --videos videos in random order, [why a video was skipped, …])."""
    random.Random(config.seed).shuffle(paths)
    features, skipped, left, total = [], [], iter(paths), min(config.videos, len(paths))
    with ThreadPoolExecutor() as pool, utils.bar(desc=video.printable(place), total=total, unit="video") as bar:
        while batch := list(itertools.islice(left, min(BATCH, config.videos - len(features)))):
            for clip in [pool.submit(read_clip, path, config, start) for path in batch]:
                try:
                    features.append(detector(clip.result()[None])[0])
                    bar.update()
                except video.BadVideo as error:  # another one takes its place
                    skipped.append(f"    skipped {error}")
    if len(features) < 2:
        raise UserError(f"{place} gives {len(features)} clips, and a distance needs two; {''.join(skipped[:1]).strip()}")
    return np.stack(features), skipped


def find(place):
    """The videos under a directory. UserError if there are none."""
    if paths := video.list_videos(place)[0]:
        return paths
    raise UserError(f"{place} is not a folder of videos ({' '.join(video.VIDEO_SUFFIXES)}, frames) or a file of --save-stats")


def load_stats(path, meta):
    """Load the features of --save-stats without executing anything in the file. UserError unless they match `meta`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found, features = json.loads(str(file["meta"])), file["features"]
        if found != meta:
            raise ValueError(f"it holds {found}, but {meta} is needed")
    except Exception as error:  # a foreign file may raise anything, depending on its first bytes
        raise UserError(f"{path} cannot be used: {' '.join(str(error).split())}") from None
    return features


def main():
    places = list(itertools.takewhile(lambda argument: not argument.startswith("-"), sys.argv[1:]))
    config = utils.parse_options(Config, __doc__, argv=sys.argv[1 + len(places) :])
    utils.check_positive(config, "frames", "stride", "videos")
    if config.get_weights:
        return print(*(f"{len(weights.weights(name))} arrays of {weights.title(name)}" for name in weights.FILES), sep="\n")
    if len(places) != 2:
        raise UserError("give two folders of videos first, or a file of --save-stats for one: python fvd.py real/ generated/")
    if config.save_stats:
        utils.make_parent(config.save_stats)
    detector = load_detector(config.features, config.protocol, config.seed, utils.pick_device(config.device))
    meta, ddof = detector.meta | {"frames": config.frames, "stride": config.stride}, detector.protocol.ddof
    sets = [load_stats(place, meta) if Path(place).is_file() else find(place) for place in places]  # before hours of work
    lines = ["{features}, protocol {protocol}, clips of {frames} frames, stride {stride}".format(**meta)]
    for i, (role, start, place) in enumerate(zip(("real", "generated"), detector.protocol.starts, places)):
        stored = Path(place).is_file()
        sets[i], skipped = (sets[i], []) if stored else measure(place, sets[i], detector, config, start)
        lines += [f"{role:32} {len(sets[i])} videos, {len(skipped)} skipped: {place}", *skipped]
    if config.save_stats:
        with utils.whole(config.save_stats) as part, open(part, "wb") as file:
            np.savez(file, features=sets[0], meta=json.dumps(meta))
    lines.append(f"{label(meta):32} {frechet_distance_of(*sets, ddof):.4g}")
    if config.bootstrap > 0:
        ends = bootstrap(*sets, ddof, config.bootstrap, config.seed)
        lines[-1] += "   95 % of {} resamples: {:.4g} to {:.4g}".format(config.bootstrap, *ends)
    print("\n".join(lines))


if __name__ == "__main__":
    utils.run(main)
