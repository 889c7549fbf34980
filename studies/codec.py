"""What `siblings.codec compare` has measured, shown in two ways: `python -m studies.codec curves | frames`.

curves     the points of several comparisons of the same videos (--points) together: of models of other --rate, one curve
frames     ours beside x264 at as many bytes, or at the fewest that it takes, as a sheet of videos of --data-dir
"""

import csv
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import utils, video
from common.utils import UserError, option
from siblings import codec, rd, rivals
from siblings.frames import read_video


@dataclass
class Config:
    points: list = option("curves", ["out/rd/points.csv"], "points.csv of one or more comparisons", nargs="+")
    ckpt: str = option("frames", "codec.pt", "checkpoint of `siblings.codec train`")
    data_dir: str = option("frames", "", "folder of videos to show")
    size: int = option("frames", 64, "height and width that they are scaled to")
    out_dir: str = option("output", "out/study", "pictures go here")


def read_points(paths):
    """Rows of points.csv files, one after the other; the same point counts once. UserError for those of other videos."""
    rows = []
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"cannot read {path}: there is no such file")
        for row in csv.DictReader(Path(path).read_text().splitlines()):
            rows.append(row | {name: float(row[name]) for name in rd.COLUMNS[2:-1]})
    if len({(row["videos"], row["frames"]) for row in rows}) > 1:
        raise UserError(f"{' '.join(paths)} are not of the same videos")
    return list({(row["codec"], row["setting"], row["bytes"]): row for row in rows}.values())


def curves(config):
    """One table and one plot of all points; our curves go through the best points of all models."""
    rd.report(config.out_dir, sorted(read_points(config.points), key=lambda row: row["codec"].startswith("ours")))


def frames(config):
    """Three videos, as they are, by ours with 100 steps of refinement, and by x264; titles say how many bytes and how good."""
    model, ckpt = codec.open_codec(config.ckpt)
    paths = video.list_videos(config.data_dir)[0] if config.data_dir else []
    if not paths:
        raise UserError("name a folder of videos with --data-dir")
    rows, titles = [], []
    for k in np.linspace(0, len(paths) - 1, 3).round().astype(int):
        real, fps = read_video(paths[k], config.size)
        with tempfile.TemporaryDirectory() as directory:
            size, _, _, ours = codec.write_video(real, fps, f"{directory}/a.nerv", model, ckpt, codec.BITS, 1.0, 100)
        rows.append(video.to_clip(real))
        titles.append("real")
        for name, (clip, taken) in {"ours": (ours, size), "x264": rivals.within("x264", real, fps, size)}.items():
            rows.append(video.to_clip(clip.copy()))
            titles.append(f"{name}, {taken} B, {rd.psnr(np.square(clip.astype(np.float32) - real).mean()):.1f} dB")
    video.write_sheet(f"{config.out_dir}/frames.png", rows, titles, columns=6)
    print(f"wrote {config.out_dir}/frames.png")


def main():
    topic, config = utils.parse_options(Config, __doc__, topics={"curves": curves, "frames": frames})
    Path(config.out_dir).mkdir(parents=True, exist_ok=True)
    topic(config)


if __name__ == "__main__":
    utils.run(main)
