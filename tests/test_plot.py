"""Plots are PNGs with something in every panel, nothing cut, and readable on any page."""

import csv
import math

import numpy as np
import torch
from PIL import Image

from common import plot, utils


def rgb(colour):
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def cells(path, count, columns):
    """The parts of an opaque PNG that its panels are in, after a check that nothing runs over its edges."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        rgba = np.asarray(image.convert("RGBA"))
    assert (rgba[..., 3] == 255).all()
    for edge in (rgba[0], rgba[-1], rgba[:, 0], rgba[:, -1]):
        assert (edge[:, :3] == rgb(plot.PAPER)).all()
    height, width = rgba.shape[0] // math.ceil(count / columns), rgba.shape[1] // columns
    return [rgba[i // columns * height :, i % columns * width :, :3][:height, :width] for i in range(count)]


def ink(part, colour):
    """How many pixels of a part have a colour, edges of lines aside."""
    return (abs(part.astype(int) - rgb(colour)).max(-1) < 24).sum()


def test_curves_of_all_kinds(tmp_path):
    steps, nan, inf = range(1, 201), float("nan"), float("inf")
    panels = [
        ("step", "falling far", [(50 * i, math.exp(-i / 20)) for i in steps]),
        ("step", "with gaps", [(i, nan if i % 7 == 0 else inf if i % 11 == 0 else -i) for i in steps]),
        ("step", "one", [(2_000_000, 0.7)]),
        ("step", "zero", [(i, 0.0) for i in steps]),
        ("step", "lost", [(1, nan), (2, inf), (3, -inf)]),
        ("step", "none", []),
    ]
    plot.curves(tmp_path / "losses.png", panels)
    parts = cells(tmp_path / "losses.png", len(panels), 3)
    assert all(ink(part, plot.BLUE) > 5 for part in parts[:4])
    assert not any(ink(part, plot.BLUE) for part in parts[4:])
    # An exponential is a straight line on a logarithmic axis: in the middle of its way it is in the middle of its height.
    y, x = np.nonzero(abs(parts[0].astype(int) - rgb(plot.BLUE)).max(-1) < 24)
    middle = y[abs(x - (x.min() + x.max()) / 2) < 2].mean()
    assert abs(middle - (y.min() + y.max()) / 2) < 0.05 * (y.max() - y.min())


def test_a_run_goes_on_with_its_losses_and_their_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(utils.RunLog, "EVERY", 5)
    for start in (0, 10):
        log = utils.RunLog(tmp_path / "vae.pt", start + 10, start)
        for step in range(start, start + 10):
            log.add(loss=torch.tensor(1.0 + step), **({"late": torch.tensor(2.0)} if step >= 10 else {}))
            assert log.step(step) == (step % 5 == 4)
        log.print("a message")
        log.close(torch.device("cpu"))
    with open(tmp_path / "runs" / "vae" / "losses.csv") as f:
        rows = [(row["step"], row["loss"], row["late"]) for row in csv.DictReader(f)]
    assert rows == [("5", "3", ""), ("10", "8", ""), ("15", "13", "2"), ("20", "18", "2")]
    assert all(ink(part, plot.BLUE) > 20 for part in cells(tmp_path / "runs" / "vae" / "losses.png", 2, 2))
    out, err = capsys.readouterr()
    assert out.count("s: a message\n") == 2 and "20/20" in err and "loss 18" in err


def test_colours_have_contrast():
    def luminance(colour):  # of WCAG 2
        r, g, b = (c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb(colour))
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    for colour in (plot.INK, plot.BLUE, plot.RED, plot.GREEN):
        assert (luminance(plot.PAPER) + 0.05) / (luminance(colour) + 0.05) >= 4.5
