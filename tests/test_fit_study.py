"""studies.fit: a seed is done once, and a claim is judged by margin and spread."""

import math
import re
import subprocess

import pytest

from common.utils import UserError
from common.video import write_frames
from studies import fit as study
from tests.test_fit import moving_frames


def test_verdicts():
    margin, spread, said = study.verdict([30.0, 31.0], {"a": [28.0, 29.5], "b": [29.0, 29.9]})  # b is the best other
    assert (margin, spread, said) == (pytest.approx(1.05), pytest.approx(0.1), "yes")
    assert study.verdict([30.0, 31.0], {"a": [30.5, 30.0]})[2] == "not separated"  # -0.5 and +1
    assert study.verdict([29.0, 29.1], {"a": [30.0, 30.0], "b": [10.0, 99.0]})[2] == "not separated"
    assert study.verdict([29.0, 29.1], {"a": [30.0, 30.0]})[2] == "no"
    assert study.verdict([40.0], {"a": [10.0]}) == (30, math.inf, "not separated")


def test_points_of_a_curve_are_those_that_there_were():
    curve = [(0.5, 10.0, 1), (1.01, 12.0, 2), (2.0, 15.0, 4)]
    assert [study.at(curve, seconds) for seconds in (0.6, 1.0, 1.5, 2.0)] == [10, 12, 12, 15]
    assert math.isnan(study.at(curve, 0.4))


def test_a_study_of_two_methods_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    write_frames(tmp_path / "a.mkv", [moving_frames(5, 32, 48)], 10)
    out = tmp_path / "out"
    options = f"--video {tmp_path}/a.mkv --methods rnerv ffnerv ffnerv-flowless --size 60k --minutes 0.01 --seeds 1"

    def run(changed=options):
        monkeypatch.setattr("sys.argv", ["fit", *changed.split(), "--out-dir", str(out)])
        study.main()

    run()
    said = capsys.readouterr().out
    assert "flow costs more than it gives" in said and "RNeRV is best early" in said
    assert "later layers" not in said and "HiNeRV" not in said  # of methods that are not there
    assert (out / "curves.png").is_file()
    monkeypatch.setattr(subprocess, "run", None)  # nothing is to be trained again
    run()
    with pytest.raises(UserError, match="other methods, without nerv"):
        run(options.replace(" rnerv ", " nerv "))
    report = out / "seed0" / "report.csv"
    report.write_text(re.sub(r",[\d.]+,(?=[^,]*$)", ",0.1,", report.read_text(), flags=re.M))  # as Ctrl-C leaves it
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: subprocess.CompletedProcess(args, 0))
    with pytest.raises(UserError, match="seed 0 was interrupted"):
        run()
