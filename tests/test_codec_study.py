"""studies.codec: points of several comparisons as one, and another codec at a budget of bytes."""

import csv

import numpy as np
import pytest

from common import rd, rivals
from common.utils import UserError
from studies import codec as study


def points(path, codec, values, videos=2):
    """points.csv with (setting, bytes, psnr, seconds) of a codec."""
    rows = [
        dict.fromkeys(rd.COLUMNS, "nan")
        | {"codec": codec, "setting": setting, "videos": videos, "frames": 48, "bytes": size, "bpp": size / 1000}
        | {"psnr": quality, "seconds": seconds, "file": "raw"}
        for setting, size, quality, seconds in values
    ]
    rd.write_csv(path, rows)
    return str(path)


def test_points_of_two_models_are_one_curve(tmp_path, capsys):
    x264 = [("crf 20", 100, 30.0, 1.0), ("crf 40", 50, 25.0, 1.0)]
    first = points(tmp_path / "a.csv", "x264", x264)
    second = points(tmp_path / "b.csv", "ours, refine 0", [("a", 40, 26.0, 3.0)])
    third = points(tmp_path / "c.csv", "ours, refine 0", [("a", 80, 31.0, 5.0)])
    study.curves(study.Config(points=[second, first, third, first], out_dir=str(tmp_path)))
    with open(tmp_path / "points.csv", newline="") as file:
        assert [(row["codec"], row["bytes"]) for row in csv.DictReader(file)] == [
            ("x264", "100"), ("x264", "50"), ("ours, refine 0", "40"), ("ours, refine 0", "80"),
        ]  # fmt: skip
    share = rd.bd_rate([(0.1, 30), (0.05, 25)], [(0.04, 26), (0.08, 31)])[0]
    assert f"{100 * share:+.1f} %" in capsys.readouterr().out
    study.dial(study.Config(points=[first, second], out_dir=str(tmp_path)))
    assert "ours, a" in (said := capsys.readouterr().out) and "1.50" in said  # seconds a video
    for name, quality, size in (("fit a", 30.0, 100), ("fit b", 20.0, 300)):
        row = {"method": "rnerv", "of all frames": quality, "seconds": 60, "bytes": size}
        (tmp_path / f"{name}.csv").write_text(",".join(row) + "\n" + ",".join(map(str, row.values())) + "\n")
    fits = [str(tmp_path / "fit a.csv"), str(tmp_path / "fit b.csv")]
    study.dial(study.Config(points=[second], fits=fits, out_dir=str(tmp_path)))
    said = capsys.readouterr().out
    assert all(word in said for word in ("fit.py, rnerv", "60.00", "22.60", "200"))  # a mean of errors, not of dB
    with pytest.raises(UserError, match="report.csv of fit.py"):
        study.fitted([str(tmp_path / "none.csv")])
    with pytest.raises(UserError, match="same videos"):
        study.curves(study.Config(points=[first, points(tmp_path / "d.csv", "x265", x264, videos=3)], out_dir=str(tmp_path)))


def test_a_rival_keeps_to_the_budget(tmp_path):
    x = np.arange(48)
    wave = 127 + 100 * np.sin((x + 3 * np.arange(6)[:, None, None]) / 5) * np.cos(x[:, None] / 3)
    frames = np.stack([wave, 255 - wave, wave], -1).astype(np.uint8)
    sizes = {crf: rivals.encode("x264", frames, 25.0, crf, tmp_path / "a")[0] for crf in (20, 35, 51)}
    made, size = study.rival_of("x264", frames, 25.0, sizes[35], tmp_path / "a")
    assert sizes[51] <= size <= sizes[35] and made.shape == frames.shape
    assert study.rival_of("x264", frames, 25.0, 1, tmp_path / "a")[1] == sizes[51]  # the fewest that it takes
