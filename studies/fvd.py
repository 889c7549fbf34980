"""What fvd.py costs and what it can tell: `python -m studies.fvd speed | bias | sensitivity`, a table each, PNGs in --out-dir.

speed        features of clips, against I3D written without any care for speed; both give the same features
bias         FVD between two halves of one set of clips falls as 1 / n, and what fvd_infinity makes of it
sensitivity  does the distance grow with blur, noise, swapped, frozen and shuffled frames? Rank correlations

Clips are the built-in shapes, or those of any videos (--data-dir). --features random measures on an untrained I3D.
"""

import hashlib
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import fvd
from common import plot, progress, utils
from common.tables import table
from common.utils import option


@dataclass
class Config:
    data_dir: str = option("clips", "", "folder of videos; default: the built-in shapes")
    resolution: int = option("clips", 64, "height and width of the clips")
    frames: int = option("clips", 16, "frames of a clip")
    clips: int = option("clips", 64, "how many: bias takes two halves of them, speed and sensitivity all")
    size: int = option("features", 224, "height and width that I3D sees; smaller is faster, and another network")
    features: str = option("features", "i3d", "trained network, or one of random weights", choices=["i3d", "random"])
    i3d: str = option("features", "", "file with the weights; default: those that fvd.py --get-weights fetches")
    protocol: str = option("features", "stylegan-v", "see fvd.py", choices=list(fvd.PROTOCOLS))
    seed: int = option("features", 0, "of random weights, and of all that is drawn")
    batch_size: int = option("machine", 4, "clips in the network at once")
    repeats: int = option("machine", 3, "of speed: measurements in turns; of bias: pairs of halves for each n")
    out_dir: str = option("output", "out/fvd", "features, which are not computed twice, and plots")


def load_clips(config):
    """uint8 frames [--clips, T, H, W, 3]."""
    kind = "folder" if config.data_dir else "shapes"
    dataset = data.open_dataset(data.Config(kind, config.data_dir, 0, config.resolution, config.frames, cache="off"), "train")
    return np.stack([dataset[i][0] for i in progress.bar(range(config.clips), "clips")])


def load_detector(config):
    detector = fvd.load_detector(config.features, config.protocol, config.i3d, seed=config.seed)
    detector.size = detector.meta["size"] = config.size
    return detector


def features_of(detector, clips, config, name):
    """Features [N, 400] of clips, from --out-dir where an earlier run has left those of this detector and these pixels."""
    parts = (name, *detector.meta.values(), hashlib.sha256(clips).hexdigest()[:12])
    path = Path(config.out_dir) / ("-".join(map(str, parts)).replace(" ", "_") + ".npy")
    if path.is_file():
        return np.load(path)
    starts = progress.bar(range(0, len(clips), config.batch_size), name, unit="batch")
    features = np.concatenate([detector(clips[i : i + config.batch_size]) for i in starts])
    utils.make_parent(path)
    np.save(path, features)
    return features


def heading(config, detector):
    size = "" if config.size == fvd.SIZE else f", I3D at {config.size} x {config.size} and not at {fvd.SIZE}"
    shape = f"{config.frames} frames of {config.resolution} x {config.resolution}, {config.data_dir or 'built-in shapes'}"
    print(f"{config.clips} clips, {shape}; {detector.meta['features']}, protocol {config.protocol}{size}")


# ------------------------------------------------------------------------------------------------------------------ speed


def plain_i3d(weights, x):
    """I3D from a state dict, layer by layer as in its paper: x [B, 3, T, H, W] in [-1, 1] -> logits [B, 400]."""

    def same(x, kernel, stride):
        padding = []
        for size, k, s in zip(x.shape[2:], kernel, stride):
            total = max(k - (size % s or s), 0)
            padding = [total // 2, total - total // 2, *padding]
        return F.pad(x, padding)

    def unit(x, name, stride=(1, 1, 1)):
        kernel = weights[f"{name}.conv3d.weight"]
        x = F.conv3d(same(x, kernel.shape[2:], stride), kernel, stride=stride)
        mean, var, weight, bias = (weights[f"{name}.bn.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, mean, var, weight, bias, eps=0.001))

    def pool(x, kernel, stride):
        return F.max_pool3d(same(x, kernel, stride), kernel, stride)

    def mixed(x, name):
        b1, b2 = (unit(unit(x, f"{name}.b{i}a"), f"{name}.b{i}b") for i in (1, 2))
        return torch.cat([unit(x, f"{name}.b0"), b1, b2, unit(pool(x, (3, 3, 3), (1, 1, 1)), f"{name}.b3b")], 1)

    x = pool(unit(x, "Conv3d_1a_7x7", (2, 2, 2)), (1, 3, 3), (1, 2, 2))
    x = unit(unit(x, "Conv3d_2b_1x1"), "Conv3d_2c_3x3")
    stages = {"3bc": ((1, 3, 3), (1, 2, 2)), "4bcdef": ((3, 3, 3), (2, 2, 2)), "5bc": ((2, 2, 2), (2, 2, 2))}
    for (number, *letters), (kernel, stride) in stages.items():
        x = pool(x, kernel, stride)
        for letter in letters:
            x = mixed(x, f"Mixed_{number}{letter}")
    x = F.avg_pool3d(x, (2, min(7, x.shape[3]), min(7, x.shape[4])), 1)
    return F.conv3d(x, weights["logits.conv3d.weight"], weights["logits.conv3d.bias"]).flatten(2).mean(2)


def speed(config):
    """The same preprocessed clips through both, in turns."""
    network = fvd.I3D.random(config.seed).eval()
    weights, fused = network.state_dict(), network.fused()
    clips = torch.rand(config.batch_size, 3, config.frames, config.size, config.size) * 2 - 1
    batches = max(1, config.clips // config.batch_size)
    runs = {"plain I3D": lambda: plain_i3d(weights, clips), "fvd.I3D": lambda: fused(clips)}
    seconds = {name: [] for name in runs}
    with torch.inference_mode():
        first, second = (run() for run in runs.values())
        for _ in range(config.repeats):
            for name, run in runs.items():
                start = time.perf_counter()
                for _ in progress.bar(range(batches), name, leave=False):
                    run()
                seconds[name].append(time.perf_counter() - start)
    count, rows = batches * config.batch_size, []
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds["plain I3D"])]
        spread, median = f"{min(ratios):.2f} to {max(ratios):.2f}", statistics.median(values)
        rows.append([name, f"{median:.1f} s", f"{count / median:.2f}", f"{statistics.median(ratios):.2f}", spread])
    print(f"{count} clips of {config.frames} x {config.size} x {config.size}, {torch.get_num_threads()} threads")
    table(["", "median", "clips / s", "time / plain", "range"], rows)
    print(f"largest difference of a logit: {(first - second).abs().max() / first.abs().max():.1e} of the largest logit")


# ------------------------------------------------------------------------------------------------------------------- bias


def bias(config):
    """Two disjoint random halves of n clips each, for n from --clips / 16 to --clips / 2."""
    detector = load_detector(config)
    features = features_of(detector, load_clips(config), config, "real")
    ddof, name = fvd.PROTOCOLS[config.protocol].ddof, fvd.label(detector.meta)
    rng, rows, points = np.random.default_rng(config.seed), [], []
    for n in np.unique((config.clips / np.array([16, 11, 8, 6, 4, 3, 2])).astype(int)):
        values = []
        for _ in range(max(2, config.repeats)):
            order = rng.permutation(len(features))
            values.append(fvd.frechet_distance_of(features[order[:n]], features[order[n : 2 * n]], ddof))
        points.append((n, np.mean(values), np.std(values, ddof=1)))
        rows.append([n, f"{np.mean(values):.4g}", f"{np.std(values, ddof=1):.2g}", f"{n * np.mean(values):.4g}"])
    heading(config, detector)
    table(["n", name, "standard deviation", "n × that"], rows)
    n, means, deviations = np.array(points).T
    slope, intercept = np.polyfit(1 / n, means, 1)
    residual = means - (intercept + slope / n)
    print(f"line: {intercept:.4g} + {slope:.4g} / n, R² {1 - residual.var() / means.var():.5f}; theory: 0 at n = ∞")
    half = len(features) // 2
    value, *_ = fvd.fvd_infinity(features[order[:half]], features[order[half:]], ddof, seed=config.seed)
    print(f"extrapolated from the {half} clips of each half: {value:.4g}")
    path = Path(config.out_dir) / "bias.png"
    fig, (ax,) = plot.figure(1, width=5, height=3)
    ends = np.array([0, 1 / n[0]])
    ax.errorbar(1 / n, means, deviations, fmt="o", color=plot.BLUE, markersize=4, capsize=3, label="mean and deviation")
    ax.plot(ends, intercept + slope * ends, "--", color=plot.INK, linewidth=0.8, label="line through the means")
    ax.plot(0, 0, "*", color=plot.RED, clip_on=False, label="theory, at n = ∞")
    ax.set_xticks([0, *(1 / n)], ["∞", *(f"{k:.0f}" for k in n)])
    ax.set(xlabel="n, clips of each half, placed at 1 / n", ylabel=name)
    ax.legend(fontsize=8, labelcolor=plot.INK, frameon=False)
    utils.make_parent(path)
    fig.savefig(path)
    print(f"wrote {path}")


# ------------------------------------------------------------------------------------------------------------ sensitivity


def blur(clip, sigma, rng):
    """Gaussian, of sigma in pixels."""
    radius = max(1, round(3 * sigma))
    window = torch.exp(-(torch.arange(-radius, radius + 1.0) ** 2) / (2 * sigma**2))
    window = (window / window.sum()).expand(3, 1, 1, -1)
    x = torch.as_tensor(clip).movedim(-1, 1).float()
    for kernel, sides in ((window, (radius, radius, 0, 0)), (window.mT, (0, 0, radius, radius))):
        x = F.conv2d(F.pad(x, sides, "replicate"), kernel, groups=3)
    return x.movedim(1, -1).round().byte().numpy()


def noise(clip, deviation, rng):
    """Gaussian, of a standard deviation in steps of 255."""
    return (clip + deviation * rng.standard_normal(clip.shape)).round().clip(0, 255).astype(np.uint8)


def swap(clip, count, rng):
    """So many swaps of two random frames, one after the other."""
    order = np.arange(len(clip))
    for _ in range(count):
        i, j = rng.choice(len(clip), 2, replace=False)
        order[[i, j]] = order[[j, i]]
    return clip[order]


def freeze(clip, count, rng):
    """The last frames stand still."""
    return clip[np.minimum(np.arange(len(clip)), len(clip) - 1 - count)]


def shuffle(clip, width, rng):
    """Frames in a random order within windows of so many."""
    parts = [rng.permutation(np.arange(i, min(i + width, len(clip)))) for i in range(0, len(clip), width)]
    return clip[np.concatenate(parts)]


LEVELS = {blur: (0.5, 1, 2, 4, 8), noise: (2, 5, 12, 30, 75), swap: (1, 2, 3, 5, 8), freeze: (1, 3, 6, 10, 15)}
LEVELS[shuffle] = (2, 4, 8, 16)
NAMES = {
    blur: "Gaussian blur, σ in pixels",
    noise: "Gaussian noise, of 255",
    swap: "swaps of two frames",
    freeze: "last frames frozen",
    shuffle: "frames shuffled within windows of",
}


def sensitivity(config):
    """The distance of clips from themselves, corrupted; the floor is that of two halves of them, uncorrupted."""
    detector, clips, rows, curves = load_detector(config), load_clips(config), [], {}
    ddof, name = fvd.PROTOCOLS[config.protocol].ddof, fvd.label(detector.meta)
    real = features_of(detector, clips, config, "real")
    floor = fvd.frechet_distance_of(real[::2], real[1::2], ddof)
    for corrupt, levels in LEVELS.items():
        values = []
        for level in levels:
            rng = np.random.default_rng(config.seed)
            corrupted = np.stack([corrupt(clip, level, rng) for clip in clips])
            features = features_of(detector, corrupted, config, f"{corrupt.__name__}-{level}")
            values.append(fvd.frechet_distance_of(real, features, ddof))
        correlation = np.corrcoef(np.arange(len(levels)), np.argsort(np.argsort(values)))[0, 1]  # Spearman's
        curves[corrupt] = points = list(zip(levels, values))
        shown = ", ".join(f"{level}: {value:.3g}" for level, value in points)
        rows.append([NAMES[corrupt], shown, f"{correlation:.2f}", min((a for a, b in points if b > floor), default="none")])
    heading(config, detector)
    table(["corruption", f"level: {name}", "rank correlation", "first level above the floor"], rows)
    print(f"floor, two halves of {len(real) // 2} clips: {floor:.3g}")
    fig, axes = plot.figure(len(curves))
    every = [value for points in curves.values() for _, value in points]
    for ax, (corrupt, points) in zip(axes, curves.items()):
        ax.plot(*zip(*points), "o-", color=plot.BLUE, linewidth=1.2, markersize=4)
        ax.axhline(floor, color=plot.INK, linewidth=0.8, linestyle="--")
        plot.logarithmic(ax.xaxis, LEVELS[corrupt])
        ax.set(yscale="log", ylim=(min(every) / 1.5, max(every) * 1.5))
        plot.logarithmic(ax.yaxis)
        ax.set_xlabel(NAMES[corrupt])
    fig.supylabel(f"{name}; dashed: two halves, uncorrupted", size=9, color=plot.INK)
    path = Path(config.out_dir) / "sensitivity.png"
    utils.make_parent(path)
    fig.savefig(path)
    print(f"wrote {path}")


TOPICS = {"speed": speed, "bias": bias, "sensitivity": sensitivity}


def main():
    topic, config = utils.parse_topic(Config, __doc__, TOPICS)
    utils.check_positive(config, "clips", "frames", "size", "batch_size", "repeats")
    topic(config)


if __name__ == "__main__":
    utils.run(main)
