"""The validity of a Fréchet video distance: `python -m studies.fvd bias | sensitivity` prints a table of each.

bias         FVD between two halves of one set of clips falls with n
sensitivity  does the distance grow with blur, noise, swapped, frozen and shuffled frames? Rank correlations

Clips are 16 frames of 64 × 64 of the built-in shapes, or of any videos (--data-dir). --features random uses an untrained
I3D.
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.stats import linregress, spearmanr

import data
import fvd
from common import utils
from common.utils import option
from siblings.results import table


@dataclass
class Config:
    data_dir: str = option("clips", "", "folder of videos; default: the built-in shapes")
    clips: int = option("clips", 64, "number of clips: bias uses two halves of them, sensitivity all")
    features: str = option("features", "i3d", "trained network, or one with random weights", choices=["i3d", "random"])
    repeats: int = option("what", 3, "of bias: pairs of halves per n")


def bias(clips, detector, config):
    """Two disjoint random halves of n clips each, for n from --clips / 16 to --clips / 2."""
    features, rng, rows, means = detector(clips), np.random.default_rng(0), [], []
    sizes = np.unique((config.clips / np.array([16, 11, 8, 6, 4, 3, 2])).astype(int).clip(2))
    for n in sizes:
        orders = [rng.permutation(len(features)) for _ in range(max(2, config.repeats))]
        values = [fvd.frechet_distance_of(features[order[:n]], features[order[n : 2 * n]]) for order in orders]
        means.append(np.mean(values))
        rows.append([n, f"{means[-1]:.4g}", f"{np.std(values, ddof=1):.2g}", f"{n * means[-1]:.4g}"])
    table(["n", fvd.label(detector.meta), "standard deviation", "n × that"], rows)
    line = linregress(1 / sizes, means)
    print(f"line: {line.intercept:.4g} + {line.slope:.4g} / n, R² {line.rvalue**2:.5f}; theory: 0 at n = ∞")


def blur(clip, sigma, rng):
    """Gaussian blur, sigma in pixels."""
    return gaussian_filter(clip.astype(np.float32), (0, sigma, sigma, 0), mode="nearest", truncate=3).round().astype(np.uint8)


def noise(clip, deviation, rng):
    """Gaussian noise, its standard deviation in steps of 255."""
    return (clip + deviation * rng.standard_normal(clip.shape)).round().clip(0, 255).astype(np.uint8)


def swap(clip, count, rng):
    """`count` successive swaps of two random frames."""
    order = np.arange(len(clip))
    for _ in range(count):
        i, j = rng.choice(len(clip), 2, replace=False)
        order[[i, j]] = order[[j, i]]
    return clip[order]


def freeze(clip, count, rng):
    """Freeze the last `count` frames."""
    return clip[np.minimum(np.arange(len(clip)), len(clip) - 1 - count)]


def shuffle(clip, width, rng):
    """Shuffle frames within windows of `width`."""
    parts = [rng.permutation(np.arange(i, min(i + width, len(clip)))) for i in range(0, len(clip), width)]
    return clip[np.concatenate(parts)]


LEVELS = {
    blur: ("Gaussian blur, σ in pixels", (0.5, 1, 2, 4, 8)),
    noise: ("Gaussian noise, of 255", (2, 5, 12, 30, 75)),
    swap: ("swaps of two frames", (1, 2, 3, 5, 8)),
    freeze: ("last frames frozen", (1, 3, 6, 10, 15)),
    shuffle: ("frames shuffled within windows of", (2, 4, 8, 16)),
}


def sensitivity(clips, detector, config):
    """The distance of clips from corrupted copies; the floor is the distance of two uncorrupted halves."""
    real, rows = detector(clips), []
    floor = fvd.frechet_distance_of(real[::2], real[1::2])
    for corrupt, (title, levels) in LEVELS.items():
        values = []
        for level in utils.bar(levels, title):
            rng = np.random.default_rng(0)
            corrupted = np.stack([corrupt(clip, level, rng) for clip in clips])
            values.append(fvd.frechet_distance_of(real, detector(corrupted)))
        shown = ", ".join(f"{level}: {value:.3g}" for level, value in zip(levels, values))
        rows.append([title, shown, f"{spearmanr(levels, values).statistic:.2f}"])
    table(["corruption", f"level: {fvd.label(detector.meta)}", "rank correlation"], rows)
    print(f"floor, two halves of {len(real) // 2} clips: {floor:.3g}")


def main():
    topic, config = utils.parse_options(Config, __doc__, topics={"bias": bias, "sensitivity": sensitivity})
    utils.check_positive(config, "clips", "repeats")
    dataset = data.open_dataset(data.Config("folder" if config.data_dir else "shapes", config.data_dir, 64, 16), "train")
    detector = fvd.load_detector(config.features, device=utils.pick_device())
    print(f"{config.clips} clips of {config.data_dir or 'the built-in shapes'}; {detector.meta['features']}")
    topic(np.stack([dataset[i][0] for i in range(config.clips)]), detector, config)


if __name__ == "__main__":
    utils.run(main)
