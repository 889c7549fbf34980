"""studies.fit: a seed is done once, and a table has all methods."""

import math
import re
import subprocess

import pytest

from common.utils import UserError
from common.video import write_frames
from studies import fit as study
from tests.test_fit import moving_frames


def test_points_of_a_curve_are_those_that_there_were():
    curve = [(0.5, 10.0), (1.01, 12.0), (2.0, 15.0)]
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
    assert [line.split("|")[1].strip() for line in said.splitlines()[-3:]] == ["rnerv", "ffnerv", "ffnerv-flowless"]
    monkeypatch.setattr(subprocess, "run", None)  # nothing is to be trained again
    run()
    with pytest.raises(UserError, match="other methods, without nerv"):
        run(options.replace(" rnerv ", " nerv "))
    report = out / "seed0" / "report.csv"
    report.write_text(re.sub(r",[\d.]+,(?=[^,]*$)", ",0.1,", report.read_text(), flags=re.M))  # as Ctrl-C leaves it
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: subprocess.CompletedProcess(args, 0))
    with pytest.raises(UserError, match="seed 0 was interrupted"):
        run()
