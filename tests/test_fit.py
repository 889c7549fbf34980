"""One network for one video: frames of the published networks, fits that fit, files that come back, XINC's sums, the study."""

import functools
import math
import re
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run

from common import utils, video
from common.video import write_frames
from siblings import components as parts
from siblings import container, fit, fitted, methods, xinc
from siblings.components import Plan
from siblings.frames import read_video
from siblings.methods import ALL, METHODS, Network
from studies import fit as study

CURVES = fit.families
TINY = "--steps 6 --size 20k --lr 5e-3"
CPU = torch.device("cpu")


def moving_frames(count=4, height=32, width=32):
    """Soft stripes on the move, another way in each colour; uint8 [count, height, width, 3]."""
    x, y, t = np.arange(width), np.arange(height)[:, None], np.arange(count)[:, None, None]
    wave = 127 + 100 * np.sin((x + 5 * t) / 9) * np.cos(y / 8)
    return np.stack([wave, wave[:, ::-1], 255 - wave], -1).astype(np.uint8)


@pytest.fixture
def call(call, monkeypatch):
    """call("a.mkv --steps 3") runs siblings.fit in a directory with a.mkv, 5 frames of 21 x 35."""
    monkeypatch.setattr(fit, "families", lambda path, panels: None)  # matplotlib takes longer than all else
    write_frames("a.mkv", [moving_frames(5, 21, 35)], 10)
    return functools.partial(call, "siblings.fit")


def frames_of(path, places=range(5)):
    return np.stack(list(fitted.decoded(fitted.FittedVideo(path).network, places)))


# Mean, deviation and a number of the frame that `numbered` networks make, written down when the same networks, with copied
# weights, made the frames of the published code to 5e-7 (python -m studies.fit parity); widths at 1.5 M of 640 x 1280.
PINNED = {
    "nerv": ([-0.59294, 0.22601, -0.58200], [18, 18, 68, 68, 68, 68]),
    "enerv": ([-0.30587, 0.47387, -0.70698], [64, 193, 97, 48, 32, 32]),
    "hnerv": ([-0.64713, 0.13253, -0.78620], [69, 58, 48, 40, 33, 28]),
    "plain": ([-0.18922, 0.44505, -0.26908], [54, 27, 13, 12, 12]),
    "ffnerv": ([0.76037, 0.09255, 0.81255], [32, 128, 72, 32, 16, 16]),
    "hinerv": ([-0.19690, 0.24099, -0.36576], [186, 186, 93, 46, 23]),
    "diffnerv": ([-0.61808, 0.17032, -0.69143], [63, 51, 44, 36, 30, 25]),
    "rnerv": ([0.10675, 0.49108, -0.43334], [40, 120, 66, 66, 66, 66]),
    "rnerv-text": ([-0.19276, 0.68327, 0.54315], [26, 104, 88, 72, 64, 56]),
    "ffnerv-flowless": ([0.75514, 0.11311, 0.79500], [32, 128, 72, 32, 16, 16]),
}


@torch.no_grad()
def numbered(name):
    """A small network whose weights are a sine of their number."""
    network = Network(METHODS[name], Plan(6, 32, 48, [5, 2, 2], [8, 24, 16, 8])).eval()
    for k, x in enumerate(network.stored().values()):
        x.copy_((torch.sin(0.7 * torch.arange(x.numel()) + k) / max(1, x[0].numel()) ** 0.5).view(x.shape))
    return network


@pytest.mark.parametrize("name", PINNED)
def test_frames_and_widths_of_the_published_networks(name):
    frame = numbered(name)(torch.tensor([2.25])).detach()
    assert frame.shape == (1, 3, 32, 48)  # of 40 x 60
    assert [frame.mean().item(), frame.std().item(), frame[0, 1, 20, 33].item()] == pytest.approx(PINNED[name][0], abs=2e-4)
    assert methods.plan(METHODS[name], 1.5e6, 132, 640, 1280).channels == PINNED[name][1]
    for size, frames, height, width in ((3e6, 132, 160, 320), (1.5e6, 600, 1080, 1920)):
        found = methods.plan(METHODS[name], size, frames, height, width)
        assert methods.count(METHODS[name], found) == pytest.approx(size, rel=0.01)


def test_strides_of_the_papers_at_1080p():
    """Of NeRV and FFNeRV, HiNeRV, HNeRV; those at 640 x 1280 are in the widths above."""
    found = [methods.strides(1080, 1920, rows, levels) for rows, levels in ((8.5, 5), (18, 4), (2, 5))]
    assert found == [[5, 3, 2, 2, 2], [5, 3, 2, 2], [5, 3, 2, 2, 2]]


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_flow_decodes_what_it_learns_from():
    """In decoding, neighbours are the network's own frames, black beyond the ends."""
    torch.manual_seed(0)
    network = Network(METHODS["ffnerv"], Plan(4, 16, 16, [2, 2], [4, 8, 8])).eval()
    t = torch.arange(4.0)
    with torch.no_grad():
        own = torch.tanh(network.head(network.maps(t)[-1]))
        black = -torch.ones(3, 16, 16)
        around = [[own[i + k] if 0 <= i + k < 4 else black for k in (-2, -1, 1, 2)] for i in range(4)]
        neighbours = torch.stack([torch.stack(row) for row in around])
        close(network(t), network.views(t, neighbours=neighbours)[0], 1e-6)


def test_encoders_see_the_frame_and_its_neighbours():
    torch.manual_seed(0)
    encoding = parts.ContentAndDifference(Plan(4, 32, 32, [2, 2, 2, 2], [4] * 5))
    clips = torch.randn(1, 3, 3, 32, 32)
    content, difference = encoding(torch.tensor([1.0]), clips)
    assert content.shape == (1, 16, 2, 2) and difference.shape == (1, 2, *encoding.differences.shape[2:])
    still = clips[:, 1:2].expand(-1, 3, -1, -1, -1)
    assert torch.equal(encoding(None, still)[0], content) and not torch.equal(encoding(None, still)[1], difference)


class Frames(fit.Video):
    """A fit.Video of frames in memory."""

    def __init__(self, frames):
        self.frames, self.rate, (_, self.height, self.width, _) = frames, 10.0, frames.shape


def quality(frames, real):
    return np.mean([fit.rd.psnr(fit.squared_error(*pair)) for pair in zip(frames, real)])


@pytest.mark.parametrize("name", PINNED)
def test_every_method_overfits(name, tmp_path):
    frames = moving_frames()
    size, steps = "100k" if name == "plain" else "60k", {"hinerv": 250, "hnerv": 70, "diffnerv": 70}.get(name, 120)
    one = fit.Fit(name, Frames(frames), fit.Config(size=size, steps=steps, lr=5e-3), CPU)
    assert quality([frames.mean(0)] * 4, frames) < 21
    while one.progress < 1:
        one.step()
    row = one.write(tmp_path / "a.nerv")
    assert float(row["PSNR, dB"]) == pytest.approx(quality(frames_of(tmp_path / "a.nerv", range(4)), frames), abs=0.006)
    assert float(row["PSNR, dB"]) > 26
    assert row["bytes"] == (tmp_path / "a.nerv").stat().st_size and row["parameters"] == methods.count(
        one.method, one.plan, codes=True
    )


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 90)])
def test_videos_of_odd_shapes(shape, tmp_path):
    for name in ALL:
        one = fit.Fit(name, Frames(moving_frames(*shape)), fit.Config(size="40k", steps=2), CPU)
        one.step()
        one.write(tmp_path / "a.nerv")
        assert frames_of(tmp_path / "a.nerv", range(shape[0])).shape == (*shape, 3) and math.isfinite(one.recent)


def test_turns_are_taken_by_the_clock_and_a_report_has_all(call, tmp_path, monkeypatch):
    seconds, history = {"nerv": 0.7, "rnerv": 1.9, "plain": 0.2}, []

    def step(self):
        self.steps += 1
        self.seconds += seconds[self.name]
        history.append(self.name)

    monkeypatch.setattr(fit.Fit, "step", step), monkeypatch.setattr(fit, "families", CURVES)
    assert call("a.mkv --method nerv,rnerv,plain --minutes 0.5 --size 20k --run-dir run --out out/x.nerv") == 0
    spent = dict.fromkeys(seconds, 0.0)
    for name in history:
        assert spent[name] <= min(spent.values()) + 1e-9  # who has had least comes next
        spent[name] += seconds[name]
    assert all(30 <= s < 30 + seconds[name] + 1e-9 for name, s in spent.items())
    report, csv = (tmp_path / "run/report.csv").read_text(), (tmp_path / "run/curves.csv").read_text().splitlines()
    size = (tmp_path / "out/x.rnerv.nerv").stat().st_size
    assert f",{size},{8 * size / (5 * 21 * 35):.4f}," in report and (tmp_path / "run/curves.png").is_file()
    assert {line.split(",")[0] for line in csv[1:]} == set(seconds)


@pytest.mark.parametrize("name", ["ffnerv", "diffnerv"])
def test_what_was_stopped_and_resumed_makes_the_same_file(name, call, monkeypatch, tmp_path):
    once = f"a.mkv --method {name} {TINY}"
    assert call(f"{once} --out one.nerv --run-dir one") == 0
    one = (tmp_path / "one.nerv").read_bytes()
    with monkeypatch.context() as patch:  # Ctrl-C after three steps
        asked = iter([False, False, False, True])
        patch.setattr(utils.Interrupt, "stop", lambda self: next(asked))
        assert call(f"{once} --out half.nerv --run-dir half") == 0
    assert (tmp_path / "half.nerv").read_bytes() != one and len(frames_of("half.nerv")) == 5  # a file that can be used
    assert call(f"{once} --out half.nerv --run-dir half --resume") == 0
    assert (tmp_path / "half.nerv").read_bytes() == one
    assert call(f"{once} --out half.nerv --run-dir one --resume --seed 1") == 2


def test_decoding(call):
    assert call(f"a.mkv {TINY} --frames 0:5") == 0
    whole = frames_of("a.nerv")
    for options, rate, expected in (
        ("", 10, whole),
        ("--frames 2:4", 10, whole[2:4]),
        ("--fps 5", 5, whole[::2]),
        ("--fps 20", 20, frames_of("a.nerv", [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4])),  # nothing is known after the last
    ):
        out = f"{rate}_{len(expected)}.mkv"
        assert call(f"--decode a.nerv --out {out} {options}") == 0
        frames, fps = read_video(out)
        assert fps == rate and np.array_equal(frames, expected)
    assert call("--decode a.nerv --out b.mkv --frames 3:4 --fps 5") == 2  # no frame of the slower video is there


def test_wrong_use_and_damaged_files_are_one_line(call, capsys, tmp_path):
    def refused(options, reason):
        assert call(options) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and reason in error

    refused("", "give one video")
    refused("a.mkv --method nerf", "--method nerf: choose from")
    refused("a.mkv --size 1k --method enerv", "minimum")
    assert call("a.mkv --size 20k --method plain --steps 60 --lr 1e30") == 2
    assert capsys.readouterr().err.endswith("\nerror: plain: the loss is not finite: use a smaller --lr\n")
    refused("--explain a.mkv", "not a file written by this program")
    refused("a.mkv --out ./a.mkv", "would overwrite")
    fit.Fit("rnerv", Frames(moving_frames()), fit.Config(size="20k"), CPU).store("a.nerv", 8)
    good, reader, path = (tmp_path / "a.nerv").read_bytes(), container.Reader("a.nerv"), tmp_path / "b.nerv"
    bad = [good[:60], good[:-1], good + b"x"]
    for place in np.random.default_rng(0).integers(0, len(good), 6):
        bad.append(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    for content in bad:
        path.write_bytes(content)
        refused("--decode b.nerv --out b.mkv", "b.nerv: ")
    for change in ({"channels": [2**16] * 4}, {"frames": 10**9}, {"strides": [8] * 12}, {"method": "x"}, {"bits": True}):
        container.write(path, reader.header | change, [reader[i] for i in range(len(reader))])
        refused("--decode b.nerv --out b.mkv", "b.nerv: ")


def test_contributions_and_their_figures(tmp_path):
    torch.manual_seed(0)
    x, kernel = torch.randn(2, 5, 6, 7).double(), torch.randn(3, 5, 3, 3).double()
    close(xinc.contributions(x, kernel)[:, 2, 1], F.conv2d(x[:, 2:3], kernel[1:2, 2:3], padding=1)[:, 0], 1e-12)
    maps = xinc.contributions(x, kernel, edges="replicate")
    close(maps.sum(1), F.conv2d(F.pad(x, (1,) * 4, mode="replicate"), kernel), 1e-12)
    kernel = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).expand(3, -1, -1, -1)  # the first of two input channels is idle

    def frame(place):
        """A square, and maps of which the second is bright where it is."""
        picture = np.zeros((12, 24, 3), np.uint8)
        picture[4:8, place : place + 4] = 200
        return picture, torch.stack([torch.ones(12, 24), torch.from_numpy(picture[..., 0] / 100.0).float()])[None], kernel

    figures = xinc.explain([(frame(3), frame(9))], tmp_path / "a.png", "a square")
    assert figures["neurons"] == 6 and figures["near_dead"] == 0.5 and figures["half"] == pytest.approx(2 / 6)
    assert figures["motion"] > 0.99


def test_what_a_layer_with_a_pixel_shuffle_adds():
    torch.manual_seed(0)
    x, kernel = torch.randn(2, 5, 6, 7).double(), torch.randn(12, 5, 3, 3).double()
    total = xinc.painted(x, kernel, stride=2)
    each = [F.conv2d(x[:, i : i + 1], kernel[:, i : i + 1], padding=1).abs() for i in range(5)]
    assert total.shape == (2, 12, 14)
    for row, column in ((0, 0), (5, 8), (11, 13)):  # output 4 * colour + 2 * (row % 2) + column % 2 of each kernel
        here = [m[:, colour * 4 + row % 2 * 2 + column % 2, row // 2, column // 2] for m in each for colour in range(3)]
        close(total[:, row, column], sum(here), 1e-12)


def test_figures_at_cuts(tmp_path):
    """Two chunks of three frames of a square that moves on by a place. The other chunk paints ten times as much."""

    def chunk(first, level):
        def look(number):
            picture = np.zeros((12, 24, 3), np.uint8)
            picture[4:8, first + number : first + number + 4] = 200
            return picture, level * (1 + picture[..., 0] / 100.0)

        return 3, look

    same = xinc.explain_cuts([chunk(2, 1), chunk(5, 1)], tmp_path / "a.png", "a square")
    assert list(same) == list(xinc.PAIRS) and (tmp_path / "a.png").stat().st_size > 10_000
    assert all(figures["motion"] > 0.99 and figures["still"] == 0 for figures in same.values())
    mean = 1 + 2 * 16 / 288
    columns = dict(zip(xinc.PAIRS, (1, 1, 2, 3)))  # as many are new, and as many are gone, each two levels of four rows
    assert {name: pytest.approx(2 * 2 * 4 * n / 288 / mean) for name, n in columns.items()} == {
        name: figures["changed"] for name, figures in same.items()
    }
    other = xinc.explain_cuts([chunk(2, 1), chunk(5, 10)], tmp_path / "a.png", "another network")
    for name in ("across the cut", "first frames of two chunks"):
        assert other[name]["changed"] > 8 and 0.5 < other[name]["still"] < 1.1
    for name in ("next frame of a chunk", "first and last of a chunk"):
        assert other[name] == same[name]


def test_explaining_files_and_generated_videos(call, capsys, monkeypatch, trained):
    seen, explain = [], xinc.explain

    def keep(pairs, *rest):
        seen.extend(pairs)
        return explain(seen, *rest)

    monkeypatch.setattr(xinc, "explain", keep)
    assert call(f"a.mkv {TINY} --method nerv") == 0
    assert call("--explain a.nerv") == 0 and "near-dead" in capsys.readouterr().out
    bias = fitted.FittedVideo("a.nerv").network.head.bias[:, None, None]
    for frame, x, kernel in seen[0]:
        made = video.to_frames(torch.tanh(xinc.contributions(x, kernel).sum(1) + bias))[0, :21, :35]
        assert np.abs(made.astype(int) - frame).max() <= 1
    assert call(f"--explain {trained}/dit.pt --out g.png") == 0 and "kernels" in capsys.readouterr().out


def test_a_study_of_two_methods_goes_on_where_it_stopped(call, tmp_path, monkeypatch, capsys):
    assert [study.at([(0.5, 10.0), (1.01, 12.0), (2.0, 15.0)], seconds) for seconds in (0.6, 1.0, 1.5, 2.0)] == [10, 12, 12, 15]
    options = f"--video {tmp_path}/a.mkv --methods rnerv ffnerv --size 60k --minutes 0.01 --seeds 1 --out-dir {tmp_path}/out"

    def outcome(options=options):
        status, said = run("studies.fit", options), capsys.readouterr()
        return status, said.err + said.out

    status, said = outcome()
    assert status == 0 and [line.split("|")[1].strip() for line in said.splitlines()[-2:]] == ["rnerv", "ffnerv"]
    monkeypatch.setattr(subprocess, "run", lambda *args, **kw: pytest.fail("trained again"))
    assert outcome()[0] == 0
    report = tmp_path / "out/seed0/report.csv"
    report.write_text(re.sub(r",[\d.]+,(?=[^,]*$)", ",0.1,", report.read_text(), flags=re.M))  # as Ctrl-C leaves it
    monkeypatch.setattr(subprocess, "run", lambda *args, **kw: None)
    status, said = outcome()
    assert status == 2 and "seed 0 was interrupted" in said
