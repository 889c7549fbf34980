"""What `codec.py compare` has measured, drawn in three ways: `python -m studies.codec curves | dial | frames`.

curves     the points of several comparisons of the same videos (--points) together: of models of other --rate, one curve
dial       PSNR against the seconds that encoding a video takes, from one comparison with many numbers of --refine
frames     ours beside x264 at as many bytes, or at the fewest that it takes, as a sheet of videos of --data-dir
"""

import bisect
import csv
import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import codec
import data
from common import plot, rd, rivals, utils, video
from common.tables import table
from common.utils import UserError, option
from common.videofile import VideoFile, decode_frames


@dataclass
class Config:
    points: list = option("curves and dial", ["out/rd/points.csv"], "points.csv of one or more comparisons", nargs="+")
    fits: list = option(
        "dial", [], "report.csv of fit.py runs, one for each of the same videos: a full fit, as one more point", nargs="+"
    )
    below: float = option("curves and dial", 0.0, "bits per pixel of x264 up to which BD-rates count; 0: where curves overlap")
    ckpt: str = option("frames", "codec.pt", "checkpoint of `codec.py train`")
    data_dir: str = option("frames", "", "folder of videos, of which those held out are shown")
    size: int = option("frames", 64, "height and width that they are scaled to")
    videos: int = option("frames", 3, "so many of them, evenly chosen")
    bits: int = option("frames", 6, "of a code")
    refine: int = option("frames", 100, "gradient steps on the codes of each video")
    codecs: list = option("frames", ["x264"], "beside which codecs", nargs="+", choices=list(rivals.RIVALS))
    out_dir: str = option("output", "out/study", "pictures and points.csv go here")


def read_points(paths):
    """Rows of points.csv files, one after the other, with numbers where there are numbers; the same point counts once."""
    rows, seen = [], set()
    for path in paths:
        try:
            with open(path, newline="") as file:
                found = list(csv.DictReader(file))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        for row in found:
            if tuple(row.values()) not in seen:
                seen.add(tuple(row.values()))
                whole = {name: int(row[name]) for name in ("videos", "frames", "bytes")}
                reals = ("bpp", "bpp with model", "psnr", "ms-ssim", "lpips", "seconds")
                rows.append(row | whole | {name: float(row[name]) for name in reals})
    if len({(row["videos"], row["frames"]) for row in rows}) > 1:
        raise UserError(f"{' '.join(paths)} are not of the same videos")
    return rows


def curves(config):
    """One table and one plot of all points; our curves go through the best points of all models."""
    rows = sorted(read_points(config.points), key=lambda row: row["codec"].startswith("ours"))
    rd.write_csv(f"{config.out_dir}/points.csv", rows)
    rd.report(config.out_dir, rows, config.below)


def fitted(paths):
    """(method, seconds a video, PSNR in dB of all frames together, bytes a video) of fit.py's reports, one a video."""
    rows = []
    for path in paths:
        try:
            with open(path, newline="") as file:
                rows.append(next(csv.DictReader(file)))
        except (OSError, StopIteration):
            raise UserError(f"cannot read {path}: it is to be a report.csv of fit.py") from None
    error = np.mean([255**2 * 10 ** (-float(row["of all frames"]) / 10) for row in rows])
    seconds, size = (float(np.mean([float(row[name]) for row in rows])) for name in ("seconds", "bytes"))
    return rows[0]["method"], seconds, rd.psnr(error), size


def dial(config):
    """Each setting of ours is a line, its points are numbers of steps; each other codec is one too, and so is a full fit."""
    lines = {}
    for row in read_points(config.points):
        name = f"ours, {row['setting']}" if row["codec"].startswith("ours") else row["codec"]
        lines.setdefault(name, []).append(
            (row["seconds"] / row["videos"], row["psnr"], row["bytes"] / row["videos"], row["codec"])
        )
    if config.fits:
        method, *point = fitted(config.fits)
        lines[f"fit.py, {method}"] = [(*point, "a network of its own")]
    plot.families(
        f"{config.out_dir}/dial.png",
        [("seconds of encoding a video", "PSNR in dB", {name: [p[:2] for p in points] for name, points in lines.items()})],
    )
    shown = [[name, kind, f"{s:.2f}", f"{d:.2f}", f"{b:.0f}"] for name, points in lines.items() for s, d, b, kind in points]
    table(["line", "point", "seconds a video", "PSNR in dB", "bytes a video"], shown)


def rival_of(name, frames, fps, budget, path):
    """(frames, bytes) of another codec at the best constant quality within a budget of bytes, or at its worst beyond it."""
    made = functools.cache(lambda crf: rivals.encode(name, frames, fps, crf, f"{path}{crf}"))
    # Sizes fall with CRF. The range is without the worst, which is the answer where no other is.
    crf = bisect.bisect_left(range(rivals.RIVALS[name].worst), True, key=lambda crf: made(crf)[0] <= budget)
    size, _, file = made(crf)
    return rivals.decode(name, file, frames.shape), size


@torch.no_grad()
def frames(config):
    """A row of each video as it is, by ours, and by each other codec; titles say how many bytes and how good."""
    _, model, ckpt = codec.open_codec(codec.Decode(config.ckpt))
    paths = [path for path, _ in data.find_folder(Path(config.data_dir), "test", 0)[1]]
    if not config.data_dir or not paths:
        raise UserError("name a folder of videos with --data-dir")
    places = np.linspace(0, len(paths) - 1, config.videos).round().astype(int)
    rows, titles = [], []

    def show(title, clip, real, size=None):
        error = np.square(clip.astype(np.float32) - real).mean()
        rows.append(video.to_clip(np.array(clip)))
        titles.append(title if size is None else f"{title}, {size} B, {rd.psnr(error):.1f} dB")

    with tempfile.TemporaryDirectory() as directory:
        for path in (paths[i] for i in places):
            real, fps = codec.read_video(path, config.size)
            file, price = f"{directory}/a.nerv", ckpt["config"]["rate"]
            size = codec.write_video(file, model, real, fps, [config.bits], 1.0, config.refine, price, 16, quiet=True)
            ours = np.concatenate(list(decode_frames(VideoFile(file).fit(model, config.ckpt), model, 0, len(real))))
            show("real", real, real)
            show("ours", ours, real, size)
            for name in config.codecs:
                made, taken = rival_of(name, real, fps, size, f"{directory}/{name}")
                show(name, made, real, taken)
    video.write_sheet(f"{config.out_dir}/frames.png", rows, titles, columns=6)
    print(f"wrote {config.out_dir}/frames.png")


TOPICS = {"curves": curves, "dial": dial, "frames": frames}


def main():
    topic, config = utils.parse_topic(Config, __doc__, TOPICS)
    Path(config.out_dir).mkdir(parents=True, exist_ok=True)
    topic(config)


if __name__ == "__main__":
    utils.run(main)
