"""Rate and distortion: a point of a codec's curve over a set of videos, the distance of two curves, and all of them as a plot.

PSNR is that of the squared error of all frames of all videos together, in RGB. MS-SSIM and LPIPS are means over frames.
"""

import csv
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytorch_msssim
import torch

from common import plot, progress
from common.tables import table
from common.utils import UserError, make_parent
from common.video import printable, to_clip

BATCH = 16  # frames that are looked at together
COLUMNS = [
    "codec",
    "setting",
    "videos",
    "frames",
    "bytes",
    "bpp",
    "bpp with model",
    "psnr",
    "ms-ssim",
    "lpips",
    "seconds",
    "file",
]


def psnr(error):
    """dB of a mean squared error of 8-bit frames; of none at all, 98 dB."""
    return 10 * math.log10(255**2 / max(error, 1e-5))


def window(height, width):
    """The side of MS-SSIM's window: 11 pixels, or the largest of which five scales fit a small frame; 0 where none does.

    pytorch-msssim wants a frame's shorter side to be more than 16 times the window's less one: 3 at 64 pixels, 7 at 128. So
    values are to be compared at one size of frames only.
    """
    return max((side for side in (3, 5, 7, 9, 11) if min(height, width) > 16 * (side - 1)), default=0)


def ms_ssim(x, y):
    """MS-SSIM of each frame (Wang et al. 2003): x, y float [T, 3, H, W] in [-1, 1] -> [T], NaN where frames are too small."""
    side = window(*x.shape[-2:])
    if not side:
        return torch.full(x.shape[:1], math.nan)
    return pytorch_msssim.ms_ssim(x + 1, y + 1, data_range=2, size_average=False, win_size=side)


class Point(NamedTuple):
    """One setting of one codec: run(frames, fps, path) -> (bytes, kind of file, seconds of encoding, the frames decoded).

    model: bytes that a receiver needs beside the files.
    """

    codec: str
    setting: str
    run: Callable
    model: int = 0


@torch.no_grad()
def measure(point, videos, directory, lpips=None):
    """A Point over videos [(uint8 frames [T, H, W, 3], fps)] -> {column: value} of COLUMNS; files go into the directory."""
    sums, kinds = dict.fromkeys(("frames", "values", "bytes", "seconds", "error", "ms-ssim", "lpips"), 0), set()
    for frames, fps in videos:
        size, kind, seconds, decoded = point.run(frames, fps, f"{directory}/video")
        found = dict.fromkeys(sums, 0) | {"frames": len(frames), "values": frames.size, "bytes": size, "seconds": seconds}
        for k in range(0, len(frames), BATCH):
            real, made = (np.array(x[k : k + BATCH]) for x in (frames, decoded))  # a copy, which may be of a file
            found["error"] += np.square(real - made.astype(np.float32)).sum(dtype=np.float64)
            x, y = to_clip(real), to_clip(made)
            found["ms-ssim"] += ms_ssim(x, y).sum().item()
            found["lpips"] += len(x) * lpips(x, y) if lpips else math.nan
        sums = {name: value + found[name] for name, value in sums.items()}
        kinds.add(kind)
    pixels = sums["values"] / 3
    return {
        "codec": point.codec,
        "setting": point.setting,
        "videos": len(videos),
        "frames": sums["frames"],
        "bytes": sums["bytes"],
        "bpp": 8 * sums["bytes"] / pixels,
        "bpp with model": 8 * (sums["bytes"] + point.model) / pixels,
        "psnr": psnr(sums["error"] / sums["values"]),
        "ms-ssim": sums["ms-ssim"] / sums["frames"],
        "lpips": sums["lpips"] / sums["frames"],
        "seconds": sums["seconds"],
        "file": "+".join(sorted(kinds)),
    }


def compare(points, videos, directory, lpips=None, below=0.0):
    """Measure Points over videos: points.csv and curves.png in the directory, tables on standard output."""
    path, rows = Path(directory) / "points.csv", []
    make_parent(path)
    with tempfile.TemporaryDirectory() as files:
        for point in progress.bar(points, "measuring", unit="point"):
            rows.append(measure(point, videos, files, lpips))
            write_csv(path, rows)
    report(directory, rows, below)


def front(points):
    """[(rate, quality)] without those that another one beats or equals in both, by rate: what a codec's curve goes through."""
    best, kept = -math.inf, []
    for rate, quality in sorted(points, key=lambda point: (point[0], -point[1])):
        if quality > best:
            best = quality
            kept.append((rate, quality))
    return kept


def bd_rate(reference, points, below=math.inf):
    """How much rate a curve [(rate, quality), …] takes beyond a reference at equal quality, over the qualities that both have.

    -0.2 is a fifth less (Bjontegaard 2001): the mean distance of log rates as functions of quality, here by PCHIP, which does
    not swing between points as one cubic through all of them does. Only what the reference has at a rate up to `below` counts.
    Returns (the share, lowest and highest quality); NaN where the curves do not overlap.
    """
    from scipy.interpolate import PchipInterpolator  # half a second, which other commands need not wait for

    curves = [front(curve) for curve in (reference, points)]
    if min(len(curve) for curve in curves) < 2:
        return math.nan, math.nan, math.nan
    rates, qualities = zip(*(np.array(curve).T for curve in curves))
    low, high = max(q[0] for q in qualities), min(q[-1] for q in qualities)
    if below < rates[0][-1]:
        most = PchipInterpolator(np.log(rates[0]), qualities[0])(math.log(below)) if below > rates[0][0] else -math.inf
        high = min(high, float(most))
    if low >= high:
        return math.nan, math.nan, math.nan
    areas = [PchipInterpolator(q, np.log(r)).integrate(low, high) for r, q in zip(rates, qualities)]
    return math.expm1(float(areas[1] - areas[0]) / (high - low)), low, high


def shown(value):
    """A value of a table, as people write it."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}"
    return str(value)


def write_csv(path, rows):
    try:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise UserError(f"cannot write {printable(path)}: {error.strerror}") from None


def report(directory, rows, below=0.0):
    """Print the rows as a table, and what each codec's curve takes beyond x264's; draw curves.png into the directory."""
    table(COLUMNS, [[shown(row[name]) for name in COLUMNS] for row in rows])
    codecs = list(dict.fromkeys(row["codec"] for row in rows))
    curves = {codec: [(row["bpp"], row["psnr"]) for row in rows if row["codec"] == codec] for codec in codecs}
    limit, lines = below or math.inf, []
    for reference in (codec for codec in codecs if codec.startswith("x264")):
        for codec in (codec for codec in codecs if codec != reference):
            share, low, high = bd_rate(curves[reference], curves[codec], limit)
            found = ["", "none"] if math.isnan(share) else [f"{100 * share:+.1f} %", f"{low:.2f} to {high:.2f}"]
            lines.append([codec, reference, *found])
    if lines:
        print()
        table(["codec", "against", "BD-rate, PSNR", "over dB"], lines)
    names = {"psnr": "PSNR in dB", "ms-ssim": "MS-SSIM", "lpips": "LPIPS"}
    panels = []
    for name in (name for name in names if not all(math.isnan(row[name]) for row in rows)):
        lines = {c: sorted((row["bpp"], row[name]) for row in rows if row["codec"] == c) for c in codecs}
        panels.append(("bits per pixel", names[name], lines))
    plot.families(Path(directory) / "curves.png", panels)
