"""studies.codec: points of several comparisons as one curve."""

import pytest

from common.utils import UserError
from siblings import rd
from siblings.results import add_row
from studies import codec as study


def points(path, codec, values, videos=2):
    """points.csv with (setting, bytes, psnr, seconds) of a codec."""
    for setting, size, quality, seconds in values:
        row = {"codec": codec, "setting": setting, "videos": videos, "frames": 48, "bytes": size, "bpp": size / 1000}
        row |= {"bpp with model": 1, "psnr": quality, "ms-ssim": "nan", "seconds": seconds, "file": "raw"}
        add_row(path, rd.COLUMNS, row)
    return str(path)


def test_points_of_two_models_are_one_curve(tmp_path, capsys):
    x264 = [("crf 20", 100, 30.0, 1.0), ("crf 40", 50, 25.0, 1.0)]
    first = points(tmp_path / "a.csv", "x264", x264)
    second = points(tmp_path / "b.csv", "ours, refine 0", [("a", 40, 26.0, 3.0)])
    third = points(tmp_path / "c.csv", "ours, refine 0", [("a", 80, 31.0, 5.0)])
    config = study.Config(points=[second, first, third, first], out_dir=str(tmp_path))
    assert len(study.read_points(config.points)) == 4
    study.curves(config)
    share = rd.bd_rate([(0.1, 30), (0.05, 25)], [(0.04, 26), (0.08, 31)])[0]
    assert f"{100 * share:+.1f} %" in capsys.readouterr().out and (tmp_path / "curves.png").is_file()
    with pytest.raises(UserError, match="cannot read"):
        study.read_points([str(tmp_path / "none.csv")])
    with pytest.raises(UserError, match="same videos"):
        study.read_points([first, points(tmp_path / "d.csv", "x265", x264, videos=3)])
