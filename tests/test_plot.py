"""Plots are PNGs with something in every panel, nothing cut, and readable on any page."""

import csv
import math
import os
import statistics
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import fvd
from bench import speed
from common import plot, utils
from studies import ablate
from studies import fvd as study


def rgb(colour):
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def pixels(path):
    """uint8 [H, W, 3] of a PNG that is opaque all over."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        rgba = np.asarray(image.convert("RGBA"))
    assert (rgba[..., 3] == 255).all()
    return rgba[..., :3]


def cells(path, count, columns):
    """The parts of a plot that its panels are in, after a check that nothing runs over its edges."""
    image = pixels(path)
    for edge in (image[0], image[-1], image[:, 0], image[:, -1]):
        assert (edge == rgb(plot.PAPER)).all()
    rows = math.ceil(count / columns)
    height, width = image.shape[0] // rows, image.shape[1] // columns
    return [image[i // columns * height :, i % columns * width :][:height, :width] for i in range(count)]


def ink(part, colour):
    """How many pixels of a part have a colour, edges of lines aside."""
    return (abs(part.astype(int) - rgb(colour)).max(-1) < 24).sum()


def test_curves_of_all_kinds(tmp_path):
    steps = range(1, 201)
    nan, inf = float("nan"), float("inf")
    panels = [
        ("step", "falling far", [(50 * i, math.exp(-i / 20)) for i in steps]),
        ("step", "with gaps", [(i, nan if i % 7 == 0 else inf if i % 11 == 0 else -i) for i in steps]),
        ("step", "one", [(2_000_000, 0.7)]),
        ("step", "constant", [(i, 3.0) for i in steps]),
        ("step", "zero", [(i, 0.0) for i in steps]),
        ("step", "lost", [(1, nan), (2, inf), (3, -inf)]),
        ("step", "none", []),
    ]
    plot.curves(tmp_path / "losses.png", panels)
    parts = cells(tmp_path / "losses.png", len(panels), 3)
    assert all(ink(part, plot.BLUE) > 20 for part in parts[:2] + parts[3:5]) and ink(parts[2], plot.BLUE) > 5
    assert all(ink(part, plot.RED) > 20 and not ink(part, plot.BLUE) for part in parts[5:])  # which say so
    plot.curves(tmp_path / "one.png", panels[2:3])
    assert pixels(tmp_path / "one.png").shape[1] < pixels(tmp_path / "losses.png").shape[1] / 2


def test_what_falls_far_is_on_a_logarithmic_axis(tmp_path):
    # An exponential is a straight line there: in the middle of its way it is in the middle of its height.
    plot.curves(tmp_path / "a.png", [("step", "loss", [(i, math.exp(-i / 20)) for i in range(200)])])
    y, x = np.nonzero(abs(pixels(tmp_path / "a.png").astype(int) - rgb(plot.BLUE)).max(-1) < 24)
    middle = y[abs(x - (x.min() + x.max()) / 2) < 2].mean()
    assert abs(middle - (y.min() + y.max()) / 2) < 0.05 * (y.max() - y.min())


def test_a_run_goes_on_with_its_plot(tmp_path):
    for start in (0, 10):
        log = utils.RunLog(tmp_path, start + 10, 5, start)
        for step in range(start, start + 10):
            log.add(loss=torch.tensor(1.0 + step))
            log.step(step)
        log.close()
        (part,) = cells(tmp_path / "losses.png", 1, 1)
        assert ink(part, plot.BLUE) > 20
    with open(tmp_path / "losses.csv") as f:
        assert [row["step"] for row in csv.DictReader(f)] == ["5", "10", "15", "20"]


@pytest.mark.parametrize("colour", [plot.INK, plot.BLUE, plot.RED, plot.GREEN])
def test_colours_have_contrast(colour):
    def luminance(colour):  # of WCAG 2
        r, g, b = (c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb(colour))
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    assert (luminance(plot.PAPER) + 0.05) / (luminance(colour) + 0.05) >= 4.5


def test_matplotlib_is_late_and_says_nothing(tmp_path):
    (tmp_path / "file").touch()  # where its settings and its list of fonts cannot be written
    code = "import sys; from common import plot; assert 'matplotlib' not in sys.modules; plot.curves('a.png', [('x', 'y', [])])"
    env = os.environ | {"PYTHONPATH": utils.python_path(ROOT), "MPLCONFIGDIR": str(tmp_path / "file")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and (tmp_path / "a.png").is_file()


def test_ablations(tmp_path):
    long = f"2c-size: {ablate.TABLES['2c-size'][0]}"
    panels = {
        ("3b: training of stage 2", "class agreement, % ↑"): [("scheduled sampling", [100.0]), ("both", [100.0])],
        (long, "PSNR, dB ↑"): [("16 x 16, width 46", [20.0, 21.0, 22.5]), ("8 x 8", [25.0, 24.0, 26.0])],
        ("2f", "distance to reconstructions ↓"): [("a", [0.1, 0.4]), ("b", [0.3, 0.2]), ("c", [0.2]), ("d", [0.3])],
    }
    ablate.draw(tmp_path / "ablate.png", panels)
    for part in cells(tmp_path / "ablate.png", 3, 2):
        assert ink(part, plot.RED) > 40 and ink(part, plot.BLUE) > 5 and ink(part, plot.INK) > 100


def test_growth(tmp_path):
    panels = {
        what: {k: (1000 * k**0.2, 512, [1e-3 * k, 1.1e-3 * k, 0.9e-3 * k]) for k in values}
        for what, values in {"pixels of a frame": (1024, 4096, 65536), "frames": (16, 32), "width": (16, 32, 64)}.items()
    }
    speed.draw(tmp_path / "growth.png", panels)
    for part in cells(tmp_path / "growth.png", 3, 2):
        assert min(ink(part, colour) for colour in (plot.BLUE, plot.RED, plot.GREEN, plot.INK)) > 40


class Detector:
    """Features of a clip: means of colours and of changes, which all corruptions but few move."""

    meta = {"features": "random I3D", "seed": 0, "size": 8}

    def __call__(self, clips):
        x = clips.astype(np.float64).reshape(*clips.shape[:2], -1) / 255
        return np.concatenate([x[:, :, ::97].std(2), abs(np.diff(x, axis=1)).mean(2)], 1)


@pytest.mark.parametrize("topic, panels, columns", [("bias", 1, 1), ("sensitivity", 5, 3)])
def test_studies_of_the_distance(tmp_path, monkeypatch, capsys, topic, panels, columns):
    monkeypatch.setattr(study, "load_detector", lambda config: Detector())
    monkeypatch.setattr(fvd, "label", lambda meta: "FVD on random I3D features")
    study.TOPICS[topic](study.Config(clips=48, resolution=16, frames=16, out_dir=str(tmp_path / "new")))
    assert f"wrote {tmp_path}/new/{topic}.png" in capsys.readouterr().out
    for part in cells(tmp_path / "new" / f"{topic}.png", panels, columns):
        assert ink(part, plot.BLUE) > 40 and ink(part, plot.INK) > 100


def test_the_committed_ablations_are_drawn_from_the_committed_runs(tmp_path, monkeypatch, capsys):
    drawn = {}
    monkeypatch.setattr(ablate, "draw", lambda path, panels: drawn.update(panels))
    (tmp_path / "runs.csv").write_text((ROOT / "docs" / "ablations.csv").read_text())
    monkeypatch.setattr(sys, "argv", ["ablate.py", "--report", "--out-dir", str(tmp_path)])
    ablate.main()
    capsys.readouterr()
    assert len(drawn) == 16
    rows = dict(drawn["2a: modulation", "PSNR, dB ↑"])
    assert list(rows) == ["repeat", "fmm", "channel"] and f"{statistics.mean(rows['channel']):.2f}" == "22.41"
    assert ("3a: denoiser", "distance to reconstructions ↓") in drawn
