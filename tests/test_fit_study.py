"""studies.fit: a seed is done once, and a claim is judged by margin and spread."""

import csv
import math
import re
import subprocess

import numpy as np
import pytest

from common import video
from common.utils import UserError
from studies import fit as study
from tests.test_fit import moving_frames


def test_verdicts():
    margin, spread, said = study.verdict([30.0, 31.0], {"a": [28.0, 29.5], "b": [29.0, 29.9]})  # b is the best other
    assert (margin, spread, said) == (pytest.approx(1.05), pytest.approx(0.1), "yes")
    assert study.verdict([30.0, 31.0], {"a": [30.5, 30.0]})[2] == "not separated"  # -0.5 and +1
    assert study.verdict([29.0, 29.1], {"a": [30.0, 30.0], "b": [10.0, 99.0]})[2] == "not separated"
    assert study.verdict([29.0, 29.1], {"a": [30.0, 30.0]})[2] == "no"
    margin, spread, said = study.verdict([40.0], {"a": [10.0]})
    assert (margin, spread, said) == (30, math.inf, "not separated")


def test_points_of_a_curve_are_those_that_there_were():
    curve = [(0.5, 10.0), (1.01, 12.0), (2.0, 15.0)]
    assert [study.at(curve, seconds) for seconds in (0.6, 1.0, 1.5, 2.0)] == [10, 12, 12, 15]
    assert math.isnan(study.at(curve, 0.4))


def test_a_study_of_two_methods_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    video.write_frames(tmp_path / "a.mkv", [np.array(moving_frames(5, 32, 48))], 10)
    options = f"--video {tmp_path}/a.mkv --methods rnerv ffnerv ffnerv-flowless --size 30k --minutes 0.01 --seeds 2 "
    options += "--rd rnerv --crf 30 --av1-crf 50"
    monkeypatch.setattr("sys.argv", ["fit", *options.split(), "--out-dir", str(tmp_path / "out")])
    study.main()
    said = capsys.readouterr().out
    assert "flow costs more than it gives" in said and "RNeRV is best early" in said and "x264" in said
    assert "later layers" not in said and "HiNeRV" not in said  # of methods that are not there
    assert (tmp_path / "out" / "curves.png").is_file() and (tmp_path / "out" / "rd" / "curves.png").is_file()
    with open(tmp_path / "out" / "rd" / "points.csv", newline="") as file:
        points = {(row["codec"], row["setting"]): row for row in csv.DictReader(file)}
    with open(tmp_path / "out" / "seed0" / "report.csv", newline="") as file:
        report = next(csv.DictReader(file))  # of 6 bits
    assert points["rnerv", "6 bits"]["bytes"] == report["bytes"]
    assert float(points["rnerv", "6 bits"]["psnr"]) == pytest.approx(float(report["of all frames"]), abs=0.006)
    sizes = [int(points["rnerv", f"{bits} bits"]["bytes"]) for bits in range(4, 9)]
    assert sizes == sorted(sizes) and int(points["x264", "crf 30"]["bytes"]) > 0
    for seed in range(2):
        with open(tmp_path / "out" / f"seed{seed}" / "report.csv", newline="") as file:
            assert [row["method"] for row in csv.DictReader(file)] == ["rnerv", "ffnerv", "ffnerv-flowless"]
    monkeypatch.setattr(subprocess, "run", None)  # nothing is to be trained again
    monkeypatch.setattr(study, "rate_and_distortion", lambda config, v: None)
    monkeypatch.setattr(study, "rival_of", lambda name, frames, fps, budget, path: (frames, budget))
    study.main()
    report = tmp_path / "out" / "seed1" / "report.csv"
    whole = report.read_text()
    report.write_text(re.sub(r",0\.\d,", ",0.1,", whole))  # as Ctrl-C leaves it
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: subprocess.CompletedProcess(args, 0))
    with pytest.raises(UserError, match="seed 1 was interrupted"):
        study.main()
    report.write_text(whole)
    monkeypatch.setattr("sys.argv", ["fit", *options.replace("rnerv ", "nerv ", 1).split(), "--out-dir", str(tmp_path / "out")])
    with pytest.raises(UserError, match="--rd rnerv: it is none of"):
        study.main()
    options = options.replace("rnerv ", "nerv ")
    monkeypatch.setattr("sys.argv", ["fit", *options.split(), "--out-dir", str(tmp_path / "out")])
    with pytest.raises(UserError, match="other methods, without nerv"):
        study.main()
