"""The NeRV family on one video in equal time over several seeds: the reports of siblings.fit, combined.

python -m studies.fit --video bunny.mp4 --resize 160x320 --frames 0:132          ten minutes per method, three seeds
python -m studies.fit --video bunny.mp4 --methods rnerv rnerv-mlp …               single components changed: methods.COMPONENTS
python -m studies.fit parity --peers DIR                                         our methods against the published code

Each seed is one run of siblings.fit, which is resumed if interrupted and not repeated.
"""

import csv
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import utils
from common.utils import UserError, option
from siblings.methods import ALL, METHODS
from siblings.results import table
from studies import fit_parity

TIMES = {"1/8": 1 / 8, "1/4": 1 / 4, "1/2": 1 / 2}  # fractions of the training at which the table has PSNR


@dataclass
class Config:
    video: str = option("what", "", "the video to fit")
    resize: str = option("what", "", "fit it at this height and width, as in 160x320, cropped to that shape")
    frames: str = option("what", "", "range of its frames, end excluded, as in 0:132; default: all")
    methods: list = option("what", list(METHODS), "rows of siblings/methods.py", nargs="+", choices=list(ALL), metavar="NAME")
    size: str = option("what", "1.5M", "parameters of each")
    minutes: float = option("training", 10.0, "per method and seed")
    seeds: int = option("training", 3, "runs of each method")
    out_dir: str = option("output", "out/fit", "directory of one folder per seed, with files, report.csv and curves.png")


def run(config, seed):
    """Fit all methods with one seed, or read a finished run -> ({method: report}, {method: [(seconds, PSNR), …]})."""
    directory = Path(config.out_dir).resolve() / f"seed{seed}"

    def rows_of(name):
        path = directory / f"{name}.csv"
        return list(csv.DictReader(path.read_text().splitlines())) if path.is_file() else []

    def reports():
        rows = rows_of("report")
        done = all(float(row["seconds"]) > 0.98 * 60 * config.minutes for row in rows)  # Ctrl-C writes a report, too
        return {row["method"]: row for row in rows if done}

    if not reports():
        options = {name: getattr(config, name) for name in ("size", "minutes", "resize", "frames")} | {"seed": seed}
        options |= {"method": ",".join(config.methods), "bits": 6, "run-dir": directory, "out": directory / "video.nerv"}
        command = [sys.executable, "-m", "siblings.fit", str(Path(config.video).resolve()), "--resume"]
        command += [f"--{name}={value}" for name, value in options.items()]
        subprocess.run(command, cwd=Path(__file__).parent.parent)
    if not (found := reports()):
        raise UserError(f"seed {seed} was interrupted: start again to resume")
    if missing := [name for name in config.methods if name not in found]:
        raise UserError(f"{directory} has other methods, without {missing[0]}: use another --out-dir")
    curves = {name: [] for name in found}
    for row in rows_of("curves"):
        curves[row["method"]].append((float(row["seconds"]), float(row["PSNR"])))
    return found, curves


def at(curve, seconds):
    """The last PSNR of a curve [(seconds, PSNR), …] by that time plus 2 %, as a point comes up to a step late; or NaN."""
    return ([np.nan] + [quality for when, quality in curve if when <= 1.02 * seconds])[-1]


def main():
    if sys.argv[1:2] == ["parity"]:
        return fit_parity.compare(utils.parse_options(fit_parity.Config, fit_parity.__doc__, argv=sys.argv[2:]))
    config = utils.parse_options(Config, __doc__)
    if not config.video:
        raise UserError("give a video with --video")
    utils.check_positive(config, "seeds", "minutes")
    seeds, rows = [run(config, seed) for seed in range(config.seeds)], []
    for name in config.methods:
        seconds = {when: share * 60 * config.minutes for when, share in TIMES.items()}
        found = {when: [at(curves[name], limit) for _, curves in seeds] for when, limit in seconds.items()}
        found["end"] = [float(reports[name]["PSNR, dB"]) for reports, _ in seeds]
        size, steps = (np.mean([int(reports[name][what]) for reports, _ in seeds]) for what in ("bytes", "steps"))
        shown = [f"{np.mean(x):.2f} ({min(x):.2f} to {max(x):.2f})" for x in found.values()]
        rows.append([name, seeds[0][0][name]["parameters"], f"{size:,.0f}", f"{steps:,.0f}", *shown])
    print(f"PSNR in dB, mean of {config.seeds} seeds (least to most); at the end, of the files\n")
    table(["method", "parameters", "bytes", "steps", *TIMES, "end"], rows)


if __name__ == "__main__":
    utils.run(main)
