"""The NeRV family on one video in equal time, seed after seed, and what HTD claims of it: fit.py's report of many runs.

python -m studies.fit --video bunny.mp4 --resize 160x320 --frames 0:132          ten minutes a method, three seeds
python -m studies.fit --video bunny.mp4 --resize 160x320 --minutes 3 --seeds 1 --methods ffnerv rnerv --rd rnerv

A seed is one run of fit.py with all methods in turns, step by step. It is resumed where it stopped, and a seed that is done is
not done again. "HTD" is the paper that fit.py is after.
"""

import csv
import functools
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import fit
from common import checkpoints, plot, rd, rivals, utils
from common.methods import METHODS
from common.tables import table
from common.utils import UserError, option
from studies.codec import rival_of

TIMES = {"1/8": 1 / 8, "1/4": 1 / 4, "1/2": 1 / 2, "end": 1.0}  # of the training, at which PSNR is in the table
# What HTD says -> (method, those it is better than, when); "all" is every other method of the paper. Its times are those of 20
# epochs of NeRV (short), 300 of NeRV (medium) and 300 of HiNeRV (long); minutes of a CPU are a part of the first.
CLAIMS = {
    "RNeRV is best early": ("rnerv", "all", "1/8"),
    "RNeRV is best in the middle": ("rnerv", "all", "1/2"),
    "HiNeRV is best at the end": ("hinerv", "all", "end"),
    "HiNeRV is behind RNeRV early": ("rnerv", ["hinerv"], "1/8"),
    "flow costs more than it gives": ("ffnerv-flowless", ["ffnerv"], "end"),
    "parameters toward later layers help": ("rnerv", ["rnerv-steep"], "end"),
}
OURS = ("rnerv+", "ffnerv-flowless", "rnerv-steep")  # rows that are not a method of the paper


@dataclass
class Config:
    video: str = option("what", "", "the video to fit")
    resize: str = option("what", "", "fit it at this height and width, 160x320, cut to that shape")
    frames: str = option("what", "", "first and last of its frames, the last one left out; default: all")
    methods: list = option("what", list(METHODS), "rows of common/methods.py", nargs="+", choices=list(METHODS))
    size: str = option("what", "1.5M", "parameters of each")
    bits: int = option("what", 6, "of a stored parameter, 4 to 8")
    minutes: float = option("training", 10.0, "of each method in each seed")
    seeds: int = option("training", 3, "runs of each method")
    rd: list = option(
        "rates", [], "methods to write at 4 to 8 bits, for a plot of rate and distortion", nargs="*", choices=list(METHODS)
    )
    crf: list = option("rates", [14, 22, 30, 38], "points of x264 and x265 in it, 0 to 51", nargs="+", type=int)
    av1_crf: list = option("rates", [16, 28, 40, 52], "points of SVT-AV1 in it, 0 to 63", nargs="+", type=int)
    out_dir: str = option("output", "out/fit", "a directory for each seed, curves.png and the files go here")


def run(config, seed):
    """Fit all methods with one seed, or take what is there -> ({method: report}, {method: [(seconds, PSNR), …]})."""
    directory = Path(config.out_dir) / f"seed{seed}"

    def reports():
        if not (directory / "report.csv").is_file():
            return {}
        with open(directory / "report.csv", newline="") as file:
            found = {row["method"]: row for row in csv.DictReader(file)}
        done = all(float(row["seconds"]) > 0.98 * 60 * config.minutes for row in found.values())  # Ctrl-C has a report too
        return found if done else {}

    if not reports():
        command = [sys.executable, "fit.py", Path(config.video).resolve(), "--method", ",".join(config.methods)]
        command += ["--size", config.size, "--bits", config.bits, "--minutes", config.minutes, "--seed", seed, "--resume"]
        command += ["--run-dir", directory.resolve(), "--out", directory.resolve() / "video.nerv"]
        command += ["--resize", config.resize] if config.resize else []
        command += ["--frames", config.frames] if config.frames else []
        done = subprocess.run(list(map(str, command)), cwd=Path(__file__).parent.parent)
        if done.returncode:
            raise UserError(f"seed {seed}: fit.py ended with {done.returncode}")
    if not (found := reports()):
        raise UserError(f"seed {seed} was interrupted: start again to go on")
    curves = {name: [] for name in found}
    with open(directory / "curves.csv", newline="") as file:
        for row in csv.DictReader(file):
            curves[row["method"]].append((float(row["seconds"]), float(row["PSNR"])))
    if missing := [name for name in config.methods if name not in found]:
        raise UserError(f"{directory} is of other methods, without {missing[0]}: use another --out-dir")
    return found, curves


def at(curve, seconds):
    """The last PSNR of a curve [(seconds, PSNR), …] up to that time, NaN before its first point.

    A point comes a step late, and so 2 % later counts.
    """
    return ([np.nan] + [quality for when, quality in curve if when <= 1.02 * seconds])[-1]


def verdict(ours, others):
    """Is a method better, by PSNR of each seed, ours [S] and {other: [S]}? (margin in dB, spread, "yes | no | not separated").

    The margin is to the best other by its mean over seeds; the spread is the range of that difference over seeds. One seed has
    none, and separates nothing.
    """
    best = max(others.values(), key=np.mean)
    gap = np.subtract(ours, best)
    margin, spread = gap.mean(), np.ptp(gap) if len(gap) > 1 else np.inf
    return margin, spread, "not separated" if abs(margin) <= spread else "yes" if margin > 0 else "no"


def at_bits(one, bits, frames, fps, path):
    """What rd.Point.run is to give, of a fit.Fit that is done."""
    size = one.store(f"{path}.nerv", bits)
    return size, "nerv", one.seconds, np.stack(list(fit.FittedVideo(f"{path}.nerv")(range(len(frames)))))


def rate_and_distortion(config, v):
    """One training is a curve: the first seed's networks at 4 to 8 bits beside other codecs, into out_dir/rd."""
    state = checkpoints.load(Path(config.out_dir) / "seed0" / "state.pt", "fit", "python -m studies.fit")
    points = []
    for name in config.rd:
        one = fit.Fit(name, v, fit.Config(size=config.size), torch.device("cpu"))
        one.load_state_dict(state["fits"][name])
        points += [rd.Point(name, f"{bits} bits", functools.partial(at_bits, one, bits)) for bits in range(4, 9)]
    points += rivals.points(["x264", "x265", "av1"], config.crf, config.av1_crf, for_psnr=True)
    rd.compare(points, [(v.frames, v.rate)], f"{config.out_dir}/rd")


def main():
    config = utils.parse_options(Config, __doc__)
    if wrong := [name for name in config.rd if name not in config.methods]:
        raise UserError(f"--rd {wrong[0]}: it is none of --methods")
    utils.check_positive(config, "seeds", "minutes")
    if not config.video:
        raise UserError("name a video with --video")
    runs = [run(config, seed) for seed in range(config.seeds)]
    whole = 60 * config.minutes
    found = {
        name: {when: [at(curves[name], share * whole) for _, curves in runs] for when, share in TIMES.items()}
        for name in config.methods
    }

    def spread(values):
        return f"{np.mean(values):.2f}" + (f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else "")

    rows = []
    for name in config.methods:
        sizes = [int(reports[name]["bytes"]) for reports, _ in runs]
        steps = np.mean([int(reports[name]["steps"]) for reports, _ in runs])
        found[name]["end"] = [float(reports[name]["PSNR, dB"]) for reports, _ in runs]
        shown = [spread(found[name][when]) for when in TIMES]
        rows.append([name, runs[0][0][name]["parameters"], f"{np.mean(sizes):,.0f}", f"{steps:,.0f}", *shown])
    print(f"PSNR in dB, mean of {config.seeds} seeds (least to most); at the end, of the files\n")
    table(["method", "parameters", "bytes", "steps", *TIMES], rows)

    v = fit.Video(config.video, fit.Config(resize=config.resize, frames=config.frames))
    budget = int(np.mean([int(reports[name]["bytes"]) for reports, _ in runs for name in config.methods]))
    print(f"\nOther codecs, at constant quality, within the mean of these files, {budget:,} bytes\n")
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for name in rivals.available():
            made, size = rival_of(name, np.array(v.frames), v.rate, budget, f"{directory}/a")
            quality = np.mean(fit.frame_psnr(made, v.frames))
            rows.append([name, f"{size:,}", f"{quality:.2f}"])
    table(["codec", "bytes", "PSNR in dB"], rows)

    rows = []
    for claim, (name, others, when) in CLAIMS.items():
        others = [m for m in config.methods if m not in (name, *OURS)] if others == "all" else others
        if name in config.methods and others and set(others) <= set(config.methods):
            margin, wide, said = verdict(found[name][when], {m: found[m][when] for m in others})
            rows.append([claim, when, f"{margin:+.2f}", "one seed" if np.isinf(wide) else f"{wide:.2f}", said])
    print()
    table(["claim", "at", "margin in dB", "spread", "verdict"], rows)
    marks = [whole * share for share in (*fit.MARKS, 1.0)]
    lines = {name: [(s, np.mean([at(curves[name], s) for _, curves in runs])) for s in marks] for name in config.methods}
    lines = {name: [point for point in points if np.isfinite(point[1])] for name, points in lines.items()}
    plot.families(f"{config.out_dir}/curves.png", [("seconds of training", "PSNR after quantization, dB", lines)])
    if config.rd:
        print()
        rate_and_distortion(config, v)


if __name__ == "__main__":
    utils.run(main)
