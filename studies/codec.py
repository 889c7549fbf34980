"""What `siblings.codec compare` has measured, drawn in three ways: `python -m studies.codec curves | dial | frames`.

curves     the points of several comparisons of the same videos (--points) together: of models of other --rate, one curve
dial       PSNR against the seconds that encoding a video takes, from one comparison with many numbers of --refine
frames     ours beside x264 at as many bytes, or at the fewest that it takes, as a sheet of videos of --data-dir
"""

import contextlib
import csv
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import plot, utils, video
from common.tables import table
from common.utils import UserError, option
from siblings import codec, rd, rivals
from siblings.frames import read_video


@dataclass
class Config:
    points: list = option("curves and dial", ["out/rd/points.csv"], "points.csv of one or more comparisons", nargs="+")
    fits: list = option("dial", [], "report.csv of siblings.fit, one for each of the same videos: one more point", nargs="+")
    ckpt: str = option("frames", "codec.pt", "checkpoint of `siblings.codec train`")
    data_dir: str = option("frames", "", "folder of videos to show")
    size: int = option("frames", 64, "height and width that they are scaled to")
    videos: int = option("frames", 3, "so many of them, evenly chosen")
    refine: int = option("frames", 100, "gradient steps on the codes of each video")
    codecs: list = option("frames", ["x264"], "beside which codecs", nargs="+", choices=list(rivals.RIVALS))
    out_dir: str = option("output", "out/study", "pictures and points.csv go here")


def read_rows(path):
    """The rows of a CSV file, {column: number where it is one, else string}. UserError where there is no such file."""

    def value(text):
        with contextlib.suppress(ValueError):
            return float(text)
        return text

    if not Path(path).is_file():
        raise UserError(f"cannot read {path}: there is no such file")
    return [{name: value(text) for name, text in row.items()} for row in csv.DictReader(Path(path).read_text().splitlines())]


def read_points(paths):
    """Rows of points.csv files, one after the other; the same point counts once. UserError for those of other videos."""
    rows = [row for path in paths for row in read_rows(path)]
    if len({(row["videos"], row["frames"]) for row in rows}) > 1:
        raise UserError(f"{' '.join(paths)} are not of the same videos")
    return list({(row["codec"], row["setting"], row["bytes"]): row for row in rows}.values())


def curves(config):
    """One table and one plot of all points; our curves go through the best points of all models."""
    rd.report(config.out_dir, sorted(read_points(config.points), key=lambda row: row["codec"].startswith("ours")))


def fitted(paths):
    """(method, seconds a video, PSNR in dB of all frames together, bytes a video) of fit's reports, one a video."""
    rows = [read_rows(path)[0] for path in paths]
    error = np.mean([255**2 * 10 ** (-row["of all frames"] / 10) for row in rows])
    return rows[0]["method"], np.mean([row["seconds"] for row in rows]), rd.psnr(error), np.mean([row["bytes"] for row in rows])


def dial(config):
    """Each setting of ours is a line, its points are numbers of steps; each other codec is one too, and so is a full fit."""
    lines = {}
    for row in read_points(config.points):
        name = f"ours, {row['setting']}" if row["codec"].startswith("ours") else row["codec"]
        point = row["seconds"] / row["videos"], row["psnr"], row["bytes"] / row["videos"], row["codec"]
        lines.setdefault(name, []).append(point)
    if config.fits:
        method, *point = fitted(config.fits)
        lines[f"fit, {method}"] = [(*point, "a network of its own")]
    panel = {name: [point[:2] for point in points] for name, points in lines.items()}
    plot.families(f"{config.out_dir}/dial.png", [("seconds of encoding a video", "PSNR in dB", panel)])
    shown = [[name, kind, f"{s:.2f}", f"{d:.2f}", f"{b:.0f}"] for name, points in lines.items() for s, d, b, kind in points]
    table(["line", "point", "seconds a video", "PSNR in dB", "bytes a video"], shown)


def frames(config):
    """A row of each video as it is, by ours, and by each other codec; titles say how many bytes and how good."""
    model, ckpt = codec.open_codec(config.ckpt)
    paths = video.list_videos(config.data_dir)[0] if config.data_dir else []
    if not paths:
        raise UserError("name a folder of videos with --data-dir")
    rows, titles = [], []
    for k in np.linspace(0, len(paths) - 1, config.videos).round().astype(int):
        real, fps = read_video(paths[k], config.size)
        with tempfile.TemporaryDirectory() as directory:
            settings = codec.BITS, 1.0, config.refine
            size, _, _, ours = codec.write_video(real, fps, f"{directory}/a.nerv", model, ckpt, *settings)
        made = {"ours": (ours, size)} | {name: rivals.within(name, real, fps, size) for name in config.codecs}
        rows += [video.to_clip(real), *(video.to_clip(clip.copy()) for clip, _ in made.values())]
        dB = {name: rd.psnr(np.square(clip.astype(np.float32) - real).mean()) for name, (clip, _) in made.items()}
        titles += ["real", *(f"{name}, {size} B, {dB[name]:.1f} dB" for name, (_, size) in made.items())]
    video.write_sheet(f"{config.out_dir}/frames.png", rows, titles, columns=6)
    print(f"wrote {config.out_dir}/frames.png")


def main():
    topic, config = utils.parse_topic(Config, __doc__, {"curves": curves, "dial": dial, "frames": frames})
    Path(config.out_dir).mkdir(parents=True, exist_ok=True)
    topic(config)


if __name__ == "__main__":
    utils.run(main)
