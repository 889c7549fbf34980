"""Rate and distortion: a point of a codec's curve over a set of videos, the BD-rate of two curves, and plots of all curves.

PSNR comes from the mean squared error over all frames of all videos, in RGB. MS-SSIM is a mean over frames.
"""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytorch_msssim
import torch

from common import utils
from common.video import to_clip
from siblings.results import add_row, families, table

BATCH = 16  # frames per batch of MS-SSIM
COLUMNS = ["codec", "setting", "videos", "frames", "bytes", "bpp", "bpp with model", "psnr", "ms-ssim", "seconds"]


def psnr(error):
    """dB of a mean squared error of 8-bit frames; 98 dB for an error of zero."""
    return 10 * math.log10(255**2 / max(error, 1e-5))


def ms_ssim(x, y):
    """MS-SSIM of each frame (Wang et al. 2003): x, y float [T, 3, H, W] in [-1, 1] -> [T], NaN where frames are too small.

    The window of 11 pixels shrinks if five scales do not fit: to 7 at 128 pixels and 3 at 64. Compare values only at one
    frame size.
    """
    side = max((side for side in (3, 5, 7, 9, 11) if min(x.shape[-2:]) > 16 * (side - 1)), default=0)
    if not side:
        return torch.full(x.shape[:1], math.nan)
    return pytorch_msssim.ms_ssim(x + 1, y + 1, data_range=2, size_average=False, win_size=side)


class Point(NamedTuple):
    """One setting of one codec: run(frames, fps, path) -> (bytes, seconds of encoding, the frames decoded).

    model: bytes that a receiver needs besides the files.
    """

    codec: str
    setting: str
    run: Callable
    model: int = 0


def measure(point, videos, directory):
    """Measure a Point over videos [(uint8 frames [T, H, W, 3], fps)] -> {column: value} of COLUMNS; files go to `directory`."""
    row = {"codec": point.codec, "setting": point.setting, "videos": len(videos)} | dict.fromkeys(COLUMNS[3:], 0)
    pixels = error = 0
    for frames, fps in videos:
        size, seconds, decoded = point.run(frames, fps, f"{directory}/video")
        for name, value in {"frames": len(frames), "bytes": size, "seconds": seconds}.items():
            row[name] += value
        pixels += frames.size // 3
        for k in range(0, len(frames), BATCH):
            real, made = (np.array(x[k : k + BATCH]) for x in (frames, decoded))
            error += np.square(real - made.astype(np.float32)).sum(dtype=np.float64)
            row["ms-ssim"] += ms_ssim(to_clip(real), to_clip(made)).sum().item()
    row |= {"psnr": psnr(error / pixels / 3), "ms-ssim": row["ms-ssim"] / row["frames"]}
    return row | {"bpp": 8 * row["bytes"] / pixels, "bpp with model": 8 * (row["bytes"] + point.model) / pixels}


def compare(points, videos, directory):
    """Measure Points over videos: write points.csv and curves.png to the directory, and print tables."""
    for name in ("points.csv", "curves.png"):
        utils.make_parent(f"{directory}/{name}")
    Path(f"{directory}/points.csv").unlink(missing_ok=True)
    rows = []
    with tempfile.TemporaryDirectory() as files:
        for point in utils.bar(points, "measuring", unit="point"):
            rows.append(measure(point, videos, files))
            add_row(f"{directory}/points.csv", COLUMNS, rows[-1])
    report(directory, rows)


def front(points):
    """The Pareto front of [(rate, quality)], sorted by rate: the points of a codec's curve."""
    best, kept = -math.inf, []
    for rate, quality in sorted(points, key=lambda point: (point[0], -point[1])):
        if quality > best:
            best = quality
            kept.append((rate, quality))
    return kept


def bd_rate(reference, points):
    """Extra rate of a curve [(rate, quality), …] over a reference at equal quality, over the qualities that both have.

    -0.2 is a fifth less (Bjontegaard 2001): the mean difference of log rates as functions of quality, here by PCHIP, which does
    not oscillate between points as a single cubic does.
    Returns (relative difference, lowest and highest quality), NaN if the curves do not overlap.
    """
    from scipy.interpolate import PchipInterpolator  # imported here: it takes half a second

    rates, qualities = zip(*(np.array(front(curve) or [(1, -math.inf)]).T for curve in (reference, points)))
    low, high = max(q[0] for q in qualities), min(q[-1] for q in qualities)
    if not low < high:
        return math.nan, math.nan, math.nan
    areas = [PchipInterpolator(q, np.log(r)).integrate(low, high) for r, q in zip(rates, qualities)]
    return math.expm1(float(areas[1] - areas[0]) / (high - low)), low, high


def report(directory, rows):
    """Print the rows as a table, and each codec's BD-rate against x264; write curves.png to the directory."""
    table(COLUMNS, [[f"{x:.4g}" if isinstance(x, float) else x for x in (row[name] for name in COLUMNS)] for row in rows])
    codecs, lines = list(dict.fromkeys(row["codec"] for row in rows)), []
    curves = {codec: [(row["bpp"], row["psnr"]) for row in rows if row["codec"] == codec] for codec in codecs}
    for codec in codecs if "x264" in codecs else ():
        share, low, high = bd_rate(curves["x264"], curves[codec])
        found = ["", "none"] if math.isnan(share) else [f"{100 * share:+.1f} %", f"{low:.2f} to {high:.2f}"]
        lines.append([codec, *found])
    print()
    table(["codec", "BD-rate against x264, PSNR", "over dB"], lines)
    panels = []
    for name in ("psnr", "ms-ssim"):
        if not all(math.isnan(row[name]) for row in rows):
            lines = {c: sorted((row["bpp"], row[name]) for row in rows if row["codec"] == c) for c in codecs}
            panels.append(("bits per pixel", name.upper(), lines))
    families(f"{directory}/curves.png", panels)
