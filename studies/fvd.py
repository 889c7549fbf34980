"""What a Fréchet video distance can tell: `python -m studies.fvd bias | sensitivity`, a table each, a plot in --out-dir.

bias         FVD between two halves of one set of clips falls as 1 / n, and what extrapolating to infinity makes of it
sensitivity  does the distance grow with blur, noise, swapped, frozen and shuffled frames? Rank correlations

Clips are the built-in shapes, or those of any videos (--data-dir). --features random measures on an untrained I3D.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr

import data
import fvd
from common import plot, utils
from common.tables import table
from common.utils import option


@dataclass
class Config:
    data_dir: str = option("clips", "", "folder of videos; default: the built-in shapes")
    resolution: int = option("clips", 64, "height and width of the clips")
    frames: int = option("clips", 16, "frames of a clip")
    clips: int = option("clips", 64, "how many: bias takes two halves of them, sensitivity all")
    features: str = option("features", "i3d", "trained network, or one of random weights", choices=["i3d", "random"])
    protocol: str = option("features", "stylegan-v", "see fvd.py", choices=list(fvd.PROTOCOLS))
    seed: int = option("features", 0, "of random weights, and of all that is drawn")
    repeats: int = option("what", 3, "of bias: pairs of halves for each n")
    out_dir: str = option("output", "out/fvd", "where the plots go")


def load(config):
    """(uint8 frames [--clips, T, H, W, 3], detector, its features of them, ddof, name of the distance), after a line."""
    kind, size, c = "folder" if config.data_dir else "shapes", config.resolution, config
    dataset = data.open_dataset(data.Config(kind, c.data_dir, size, c.frames), "train")
    clips = np.stack([dataset[i][0] for i in range(c.clips)])
    detector = fvd.load_detector(c.features, c.protocol, seed=c.seed, device=utils.pick_device())
    shape = f"{c.frames} frames of {size} x {size}, {c.data_dir or 'built-in shapes'}"
    print(f"{c.clips} clips, {shape}; {detector.meta['features']}, protocol {c.protocol}")
    return clips, detector, detector(clips), fvd.PROTOCOLS[c.protocol].ddof, fvd.label(detector.meta)


def extrapolated(x, y, ddof, rng, points=10, repeats=5):
    """Features x [n, d] and y [m, d] -> their distance at infinitely many videos, FVD∞ (Chong & Forsyth 2020).

    The bias is about proportional to 1 / n: a line is fitted to distances of random subsets of half to all videos, evenly
    spaced in 1 / n. It bends with fewer videos than directions in which the features vary much.
    """
    most, means = min(len(x), len(y)), []
    sizes = np.unique((1 / np.linspace(1 / most, 2 / most, points)).round().astype(int))
    for n in sizes:
        subsets = [(x[rng.permutation(len(x))[:n]], y[rng.permutation(len(y))[:n]]) for _ in range(repeats)]
        means.append(np.mean([fvd.frechet_distance_of(a, b, ddof) for a, b in subsets]))
    return np.polyfit(1 / sizes, means, 1)[1]


def bias(config):
    """Two disjoint random halves of n clips each, for n from --clips / 16 to --clips / 2."""
    _, _, features, ddof, name = load(config)
    rng, rows, points = np.random.default_rng(config.seed), [], []
    for n in np.unique((config.clips / np.array([16, 11, 8, 6, 4, 3, 2])).astype(int).clip(2)):
        orders = [rng.permutation(len(features)) for _ in range(max(2, config.repeats))]
        values = [fvd.frechet_distance_of(features[order[:n]], features[order[n : 2 * n]], ddof) for order in orders]
        points.append((n, np.mean(values), np.std(values, ddof=1)))
        rows.append([n, f"{np.mean(values):.4g}", f"{np.std(values, ddof=1):.2g}", f"{n * np.mean(values):.4g}"])
    table(["n", name, "standard deviation", "n × that"], rows)
    n, means, deviations = np.array(points).T
    slope, intercept = np.polyfit(1 / n, means, 1)
    residual = means - (intercept + slope / n)
    print(f"line: {intercept:.4g} + {slope:.4g} / n, R² {1 - residual.var() / means.var():.5f}; theory: 0 at n = ∞")
    halves = features[orders[-1][: len(features) // 2]], features[orders[-1][len(features) // 2 :]]
    print(f"extrapolated from the {len(halves[0])} clips of each half: {extrapolated(*halves, ddof, rng):.4g}")
    fig, (ax,) = plot.figure(1, width=5, height=3)
    ends = np.array([0, 1 / n[0]])
    ax.errorbar(1 / n, means, deviations, fmt="o", color=plot.BLUE, markersize=4, capsize=3, label="mean and deviation")
    ax.plot(ends, intercept + slope * ends, "--", color=plot.INK, linewidth=0.8, label="line through the means")
    ax.plot(0, 0, "*", color=plot.RED, clip_on=False, label="theory, at n = ∞")
    ax.set_xticks([0, *(1 / n)], ["∞", *(f"{k:.0f}" for k in n)])
    ax.set(xlabel="n, clips of each half, placed at 1 / n", ylabel=name)
    ax.legend(fontsize=8, labelcolor=plot.INK, frameon=False)
    return fig


def blur(clip, sigma, rng):
    """Gaussian, of sigma in pixels."""
    return gaussian_filter(clip.astype(np.float32), (0, sigma, sigma, 0), mode="nearest", truncate=3).round().astype(np.uint8)


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


LEVELS = {
    blur: ("Gaussian blur, σ in pixels", (0.5, 1, 2, 4, 8)),
    noise: ("Gaussian noise, of 255", (2, 5, 12, 30, 75)),
    swap: ("swaps of two frames", (1, 2, 3, 5, 8)),
    freeze: ("last frames frozen", (1, 3, 6, 10, 15)),
    shuffle: ("frames shuffled within windows of", (2, 4, 8, 16)),
}


def sensitivity(config):
    """The distance of clips from themselves, corrupted; the floor is that of two halves of them, uncorrupted."""
    (clips, detector, real, ddof, name), rows, curves = load(config), [], {}
    floor = fvd.frechet_distance_of(real[::2], real[1::2], ddof)
    for corrupt, (title, levels) in LEVELS.items():
        points = curves[title] = []
        for level in utils.bar(levels, title):
            rng = np.random.default_rng(config.seed)
            corrupted = np.stack([corrupt(clip, level, rng) for clip in clips])
            points.append((level, fvd.frechet_distance_of(real, detector(corrupted), ddof)))
        correlation = spearmanr(*zip(*points)).statistic
        shown = ", ".join(f"{level}: {value:.3g}" for level, value in points)
        rows.append([title, shown, f"{correlation:.2f}", min((a for a, b in points if b > floor), default="none")])
    table(["corruption", f"level: {name}", "rank correlation", "first level above the floor"], rows)
    print(f"floor, two halves of {len(real) // 2} clips: {floor:.3g}")
    fig, axes = plot.figure(len(curves))
    every = [value for points in curves.values() for _, value in points]
    for ax, (title, points) in zip(axes, curves.items()):
        ax.plot(*zip(*points), "o-", color=plot.BLUE, linewidth=1.2, markersize=4)
        ax.axhline(floor, color=plot.INK, linewidth=0.8, linestyle="--")
        plot.logarithmic(ax.xaxis, [level for level, _ in points])
        ax.set(yscale="log", ylim=(min(every) / 1.5, max(every) * 1.5), xlabel=title)
        plot.logarithmic(ax.yaxis)
    fig.supylabel(f"{name}; dashed: two halves, uncorrupted", size=9, color=plot.INK)
    return fig


def main():
    topic, config = utils.parse_topic(Config, __doc__, {"bias": bias, "sensitivity": sensitivity})
    utils.check_positive(config, "clips", "frames", "repeats")
    path = Path(config.out_dir) / f"{topic.__name__}.png"
    utils.make_parent(path)
    topic(config).savefig(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    utils.run(main)
