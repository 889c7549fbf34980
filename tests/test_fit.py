"""One network for one video: counts by formula, components by plain loops, fits that fit, files that come back, XINC's sums."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dit
import nerv
import vae
from common import checkpoints, utils, video
from siblings import components as parts
from siblings import container, fit, fitted, methods, xinc
from siblings.components import Plan
from siblings.frames import read_video, write_frames
from siblings.methods import METHODS, Network

CURVES = fit.plot.families
TINY = "--steps 6 --size 20k --lr 5e-3"
CPU = torch.device("cpu")


def moving_frames(count=4, height=32, width=32):
    """Soft stripes on the move, another way in each colour; uint8 [count, height, width, 3]."""
    x, y, t = np.arange(width), np.arange(height)[:, None], np.arange(count)[:, None, None]
    wave = 127 + 100 * np.sin((x + 5 * t) / 9) * np.cos(y / 8)
    return np.stack([wave, wave[:, ::-1], 255 - wave], -1).astype(np.uint8)


@pytest.fixture
def call(monkeypatch, tmp_path):
    """call("a.mkv --steps 3") runs siblings.fit in this process, in a directory with a.mkv, 5 frames of 21 x 35."""
    monkeypatch.setattr(fit.plot, "families", lambda path, panels: None)  # matplotlib takes longer than all else
    monkeypatch.chdir(tmp_path)
    write_frames("a.mkv", [moving_frames(5, 21, 35)], 10)

    def call(options):
        monkeypatch.setattr("sys.argv", ["fit", *options.split()])
        try:
            utils.run(fit.main)
        except SystemExit as stop:
            return stop.code
        return 0

    return call


def frames_of(path, places=range(5)):
    return np.stack(list(fitted.decoded(fitted.FittedVideo(path).network, places)))


# ----------------------------------------------------------------------------------------------------------- by the formula


def conv(ins, outs, kernel, groups=1, bias=True):
    return ins // groups * outs * kernel**2 + bias * outs


def shuffles(plan, kernels):
    return sum(conv(a, b * s * s, k) for a, b, s, k in zip(plan.channels, plan.channels[1:], plan.strides, kernels))


def grouped(plan):
    found = 0
    for a, b, s in zip(plan.channels, plan.channels[1:], plan.strides):
        outs = b * s * s
        found += conv(a, outs, 3) if s == 5 else conv(a, outs, 3, math.gcd(8, a, outs)) + conv(outs, outs, 1)
    return found


def time_skips(plan):
    shared = min(128, 4 * plan.channels[0])
    return 161 * shared + (shared + 1) * shared + sum((shared + 1) * 2 * c for c in plan.channels[:-1])


def transformer(width, heads):
    inner, hidden = heads * (width // 4), width // 2
    return 3 * width * inner + (inner + 1) * width + (width + 1) * hidden + (hidden + 1) * width


def formula(name, p):
    """Parameters of a method with the plan p: every layer's weights and biases, every grid and embedding."""
    (h, w), c0, last, T = p.grid, p.channels[0], p.channels[-1], p.frames
    head = conv(last, 3, METHODS[name].head)
    grid = h * w * (c0 // 2) * (T // 2 + T)
    if name == "nerv":
        hidden = round(512 / 26 * c0)
        return 161 * hidden + (hidden + 1) * c0 * h * w + shuffles(p, [3] * 9) + head
    if name == "plain":
        return 161 * c0 * h * w + shuffles(p, [3] * 9) + head
    if name == "enerv":
        d, rest = round(256 / 196 * c0), dataclasses.replace(p, strides=p.strides[1:], channels=p.channels[1:])
        stem = 161 * 2 * d + (2 * d + 1) * d + 321 * d + transformer(d, 1) + transformer(d, 8) + (d + 1) * c0
        first = conv(c0, c0 // 4 * p.strides[0] ** 2, 3) + conv(c0 // 4, p.channels[1], 3)
        return stem + first + shuffles(rest, [3] * 9) + time_skips(p) + head
    if name == "hnerv":
        return T * 16 * h * w + conv(16, c0, 1) + shuffles(p, [1, 3, 5, 5, 5]) + head
    if name == "diffnerv":  # at 160 x 320 the difference is 10 x 20, after the stride of 5
        a, b, s = p.channels[1], p.channels[2], p.strides[1]
        unit = conv(2, a, 1) + conv(a, b * s * s, 3) + conv(2 * b, 2 * b, 1)
        return T * (16 * h * w + 2 * 10 * 20) + conv(16, c0, 1) + shuffles(p, [1, 3, 5, 5, 5]) + unit + head
    if name == "ffnerv":
        return grid + grouped(p) + conv(p.channels[1], 12, 1) + conv(last, 2, 1) + head
    if name == "ffnerv-flowless":
        return grid + grouped(p) + head
    if name in ("rnerv", "rnerv+", "rnerv-steep"):
        return grid + grouped(p) + time_skips(p) + head
    assert name == "hinerv"
    total = h * w * (4 * round(0.3 * T) + 8 * round(0.15 * T)) + conv(12, c0, 3) + head
    for i, (a, b, s) in enumerate(zip(p.channels, p.channels[1:], p.strides)):
        width = 8 >> i
        total += s * s * (T * width + T // 2 * 2 * width + T // 4 * 4 * width) + (7 * width + 1) * a
        depth, wide = (1, 1) if i == len(p.strides) - 1 else (3, 4)
        for ins in (a, b, b)[:depth]:
            total += conv(ins, ins, 3, ins, False) + conv(ins, wide * b, 1, bias=False) + conv(wide * b, b, 1, bias=False)
    return total


@pytest.mark.parametrize("size", [1.5e6, 3e6])
@pytest.mark.parametrize("name", METHODS)
def test_parameters_by_the_formula_and_within_one_percent(name, size):
    plan = methods.plan(METHODS[name], size, 132, 160, 320)
    assert methods.count(METHODS[name], plan) == formula(name, plan)
    assert abs(formula(name, plan) / size - 1) <= 0.01


@pytest.mark.parametrize(
    "height, width, rows, levels, found",
    [
        (1080, 1920, 8.5, 5, [5, 3, 2, 2, 2]),  # NeRV's, FFNeRV's
        (1080, 1920, 18, 4, [5, 3, 2, 2]),  # HiNeRV's
        (720, 1280, 18, 4, [5, 2, 2, 2]),  # … on Bunny
        (720, 1280, 8.5, 5, [5, 2, 2, 2, 2]),  # NeRV's on Bunny
        (640, 1280, 2, 5, [5, 4, 4, 2, 2]),  # HNeRV's on Bunny
        (640, 1280, 8.5, 4, [5, 4, 2, 2]),  # … and of NeRV beside it, plain
        (960, 1920, 2, 5, [5, 4, 4, 3, 2]),  # HNeRV's on UVG
        (160, 320, 8.5, 5, [5, 2, 2]),
    ],
)
def test_strides_of_the_papers(height, width, rows, levels, found):
    assert methods.strides(height, width, rows, levels) == found


# ------------------------------------------------------------------------------------------------------------ by plain loops


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def plain_shuffle(x, s):
    """[B, C * s * s, h, w] -> [B, C, h * s, w * s], pixel by pixel."""
    B, C, h, w = x.shape
    y = torch.zeros(B, C // s**2, h * s, w * s, dtype=x.dtype)
    for i in range(h * s):
        for j in range(w * s):
            y[:, :, i, j] = x[:, (i % s) * s + j % s :: s * s, i // s, j // s]
    return y


def plain_norm(x, dims=(1,), eps=1e-6):
    """Each pixel over its channels, or over other dimensions."""
    mean, var = x.mean(dims, keepdim=True), x.var(dims, keepdim=True, correction=0)
    return (x - mean) / (var + eps).sqrt()


@pytest.fixture
def small():
    torch.manual_seed(0)
    return Plan(frames=6, height=24, width=48, strides=[2, 4], channels=[8, 16, 4])


def test_codes_of_time(small):
    for row, t in zip(parts.Sinusoid(small)(torch.tensor([0.0, 2.5, 5.0]))[0], (0, 2.5, 5)):
        angles = [1.25**i * math.pi * t / 6 for i in range(80)]
        close(row.double(), torch.tensor([f(a) for f in (math.sin, math.cos) for a in angles]).double(), 1e-6)
    t, grid = torch.tensor([0.0, 2.25, 5.0]), parts.TemporalGrid(small)
    half, whole = (table.detach() for table in grid.tables)
    assert half.shape == (3, 4, 3, 6) and whole.shape == (6, 4, 3, 6)
    found = grid(t)[0]
    close(found[0], torch.cat([half[0], whole[0]]), 1e-6)
    close(found[1], torch.cat([half[1] * 0.875 + half[2] * 0.125, whole[2] * 0.75 + whole[3] * 0.25]), 1e-6)
    close(found[2], torch.cat([half[2], whole[5]]), 1e-6)
    grid = parts.HierarchicalGrid(small)
    two, one = (table.detach() for table in grid.tables)
    assert len(two) == 2 and len(one) == 1
    found, place = grid(t)[0], 2.75 / 6 * 2 - 0.5
    close(found[0], torch.cat([two[0], one[0]]), 1e-6)  # half a row before the first
    close(found[1], torch.cat([two[0] * (1 - place) + two[1] * place, one[0]]), 1e-6)


def test_blocks(small):
    x = torch.randn(2, 8, 3, 6).double()

    def by_hand(block, *layers):
        y = x
        for layer in layers:
            y = plain_shuffle(y, 2) if layer is None else layer(y)
        close(block(x), F.gelu(y))

    block = parts.nerv_block(0, small, (1, 5)).double()
    assert block[0].kernel_size == (1, 1) and parts.nerv_block(1, small, (1, 5))[0].kernel_size == (3, 3)
    by_hand(block, block[0], None)
    block = parts.grouped_block(0, small, (3, 3)).double()
    assert block[0].groups == 8 and block[1].kernel_size == (1, 1)
    by_hand(block, *block[:2], None)
    assert len(parts.grouped_block(0, dataclasses.replace(small, strides=[5]), (3, 3))) == 3  # NeRV's
    block = parts.enerv_block(0, small, (3, 3)).double()
    assert block[0].out_channels == 2 * 4  # a quarter
    by_hand(block, block[0], None, block[2])
    block = parts.enerv_block(0, dataclasses.replace(small, channels=[8, 3]), (3, 3)).double()
    by_hand(block, *block[:2], None)
    block = parts.convnext_block(0, small, (3, 3)).double()
    y = x
    for i, layer in enumerate(block):
        z = layer.narrow(F.gelu(layer.wide(plain_norm(layer.mix(y)))))
        y = z if i == 0 else y + z  # the first one changes the number of channels
    assert len(block) == 3 and len(parts.convnext_block(1, small, (3, 3))) == 1
    close(block(x), y)


def test_transformer():
    torch.manual_seed(0)
    layer, x = parts.Transformer(8, 2).double(), torch.randn(1, 5, 8).double()
    q, k, v = (layer.qkv.weight[n * 4 : n * 4 + 4] @ x[0].T for n in range(3))  # two heads of 2, each [4, 5]
    seen = []
    for head in range(2):
        a, b, c = (z[2 * head : 2 * head + 2] for z in (q, k, v))
        seen.append(torch.softmax(a.T @ b / math.sqrt(2), -1) @ c.T)
    y = x[0] + layer.out(torch.cat(seen, -1))
    close(layer(x)[0], y + layer.mlp(y))


def test_skips(small):
    x, t = torch.randn(2, 8, 3, 6).double(), torch.tensor([1.0, 4.0])
    given = torch.randn(2, parts.time_features(small)).double()
    for norm, dims, eps in (("layer", (1,), 1e-6), ("instance", (2, 3), 1e-5)):
        skip = parts.TimeSkip(0, small, norm).double()
        scale, shift = F.gelu(skip.to_scale(given))[:, :, None, None].chunk(2, 1)
        close(skip(x, t, given), plain_norm(x, dims, eps) * scale + shift)
    skip, x = parts.LocalGridSkip(0, small), x.float()
    assert [tuple(table.shape) for table in skip.tables] == [(6, 4, 8), (3, 4, 16), (1, 4, 32)]
    y = torch.nn.Upsample(scale_factor=2, mode="bilinear")(x)
    code = torch.cat([parts.rows(table, (t + 0.5) / 6 * len(table) - 0.5) for table in skip.tables], -1)  # [2, 4, 56]
    for i in range(6):
        for j in range(12):
            y[:, :, i, j] += skip.to_map(code[:, i % 2 * 2 + j % 2])
    close(skip(x, t, None), y, 1e-6)
    skip = parts.DifferenceSkip(1, small).double()
    assert skip.here and not parts.DifferenceSkip(0, small).here
    x, difference = torch.randn(2, 16, 6, 12).double(), torch.randn(2, 2, 3, 6).double()
    p, s = skip.gates(torch.cat([x, skip.block(difference)], 1)).chunk(2, 1)
    s = torch.sigmoid(s)
    close(skip(x, t, difference), s * torch.tanh(p) + (1 - s) * x)


def test_warp_and_flow(small):
    frames, flow = torch.randn(1, 2, 5, 7).double(), torch.randn(1, 2, 5, 7).double() * 2
    moved, f = parts.warp(frames, flow), frames[0]
    for i in range(5):
        for j in range(7):
            x, y = min(max(j + flow[0, 0, i, j].item(), 0), 6), min(max(i + flow[0, 1, i, j].item(), 0), 4)
            a, b = min(int(y), 3), min(int(x), 5)
            u, v = y - a, x - b
            above, below = ((1 - v) * f[:, k, b] + v * f[:, k, b + 1] for k in (a, a + 1))
            close(moved[0, :, i, j], (1 - u) * above + u * below, 1e-6)
    layer = parts.Flow(small)
    torch.nn.init.zeros_(layer.to_flow.weight)
    torch.nn.init.zeros_(layer.to_flow.bias)
    maps = [torch.randn(1, 16, 6, 12), torch.randn(1, 4, 24, 48)]
    own, neighbours = torch.randn(1, 3, 24, 48), torch.randn(1, 4, 3, 24, 48)
    frame, warped = layer(maps, own, neighbours)
    close(warped, neighbours.mean(1), 1e-5)  # no flow, equal weights
    share = layer.to_weight(maps[1]).softmax(1)
    close(frame, share[:, :1] * own + share[:, 1:] * warped, 1e-5)


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
    encoding.codes.copy_(torch.randn(4, 16, 2, 2))
    close(encoding(torch.tensor([1.5]))[0][0], (encoding.codes[1] + encoding.codes[2]) / 2, 1e-6)


# ----------------------------------------------------------------------------------------------------------------- fitting


class Frames(fit.Video):
    """A fit.Video of frames in memory."""

    def __init__(self, frames):
        self.frames, self.rate, (_, self.height, self.width, _) = frames, 10.0, frames.shape


def quality(frames, real):
    return np.mean([fit.rd.psnr(fit.squared_error(*pair)) for pair in zip(frames, real)])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_overfits(name, tmp_path):
    frames = moving_frames()
    size = "100k" if name == "plain" else "60k"
    one = fit.Fit(name, Frames(frames), fit.Config(size=size, steps=200, lr=5e-3), CPU)
    assert quality([frames.mean(0)] * 4, frames) < 21
    while one.progress < 1:
        one.step()
    row = one.write(tmp_path / "a.nerv")
    assert float(row["PSNR, dB"]) == pytest.approx(quality(frames_of(tmp_path / "a.nerv", range(4)), frames), abs=0.006)
    assert float(row["PSNR, dB"]) > 26
    assert row["bytes"] == (tmp_path / "a.nerv").stat().st_size and row["parameters"] == methods.count(one.method, one.plan)


@pytest.mark.parametrize("shape", [(1, 7, 5), (2, 1, 1), (3, 2, 90)])
def test_videos_of_odd_shapes(shape, tmp_path):
    for name in METHODS:
        one = fit.Fit(name, Frames(moving_frames(*shape)), fit.Config(size="20k", steps=2), CPU)
        one.step()
        one.write(tmp_path / "a.nerv")
        assert frames_of(tmp_path / "a.nerv", range(shape[0])).shape == (*shape, 3) and math.isfinite(one.recent)


def test_turns_are_taken_by_the_clock(call, monkeypatch):
    seconds, history = {"nerv": 0.7, "rnerv": 1.9, "plain": 0.2}, []

    def step(self):
        self.steps += 1
        self.seconds += seconds[self.name]
        history.append(self.name)

    monkeypatch.setattr(fit.Fit, "step", step)
    assert call("a.mkv --method nerv,rnerv,plain --minutes 0.5 --size 20k") == 0
    spent = dict.fromkeys(seconds, 0.0)
    for name in history:
        assert spent[name] <= min(spent.values()) + 1e-9  # who has had least comes next
        spent[name] += seconds[name]
    assert all(30 <= s < 30 + seconds[name] + 1e-9 for name, s in spent.items())


@pytest.mark.parametrize("name", ["ffnerv", "diffnerv"])
def test_the_same_command_makes_the_same_file_and_resuming_it_too(name, call, monkeypatch, tmp_path):
    once = f"a.mkv --method {name} {TINY}"
    assert call(f"{once} --out one.nerv --run-dir one") == 0
    assert call(f"{once} --out two.nerv --run-dir two") == 0
    one = (tmp_path / "one.nerv").read_bytes()
    assert one == (tmp_path / "two.nerv").read_bytes()
    with monkeypatch.context() as patch:  # Ctrl-C after three steps
        asked = iter([False, False, False, True])
        patch.setattr(utils.Interrupt, "stop", lambda self: next(asked))
        assert call(f"{once} --out half.nerv --run-dir half") == 0
    assert (tmp_path / "half.nerv").read_bytes() != one
    assert len(frames_of("half.nerv")) == 5  # a file that can be used
    assert call(f"{once} --out half.nerv --run-dir half --resume") == 0
    assert (tmp_path / "half.nerv").read_bytes() == one
    assert call(f"{once} --out half.nerv --run-dir one --resume --seed 1") == 2
    assert call(f"{once} --out half.nerv --seed 1") == 0
    assert (tmp_path / "half.nerv").read_bytes() != one


def test_a_part_of_a_video_made_smaller():
    whole = moving_frames(5, 21, 35)[1:4]
    made = fit.resized(whole, "16x32")  # 21 x 35 cut to 17.5 x 35: the middle is still the middle
    assert made.shape == (3, 16, 32, 3)
    assert np.abs(made[:, 7:9, 15:17].mean((1, 2)) - whole[:, 9:12, 16:19].mean((1, 2))).max() < 12


# ------------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_numbers_of_a_tensor(bits):
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(bits))
    numbers, step = fitted.quantize(x, bits)
    assert numbers.min() >= -(2 ** (bits - 1)) and numbers.max() < 2 ** (bits - 1)
    error = (torch.from_numpy(numbers) * step - x.flatten()).square().mean().sqrt()
    whole = x.abs().max() / (2 ** (bits - 1) - 1)
    assert error <= (whole / 2) and (bits > 4 or step < whole)  # at 4 bits, cutting off the ends pays
    numbers, step = fitted.quantize(torch.zeros(7), bits)
    assert not numbers.any() and math.isfinite(step)


def test_decoding(call, capsys):
    assert call(f"a.mkv {TINY} --frames 0:5") == 0
    whole = frames_of("a.nerv")
    assert "PSNR" in capsys.readouterr().out
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


def test_a_report_and_curves_of_several(call, tmp_path, monkeypatch):
    monkeypatch.setattr(fit.plot, "families", CURVES)
    assert call(f"a.mkv --method plain,rnerv {TINY} --run-dir run --out out/x.nerv") == 0
    report, csv = (tmp_path / "run/report.csv").read_text(), (tmp_path / "run/curves.csv").read_text().splitlines()
    size = (tmp_path / "out/x.rnerv.nerv").stat().st_size
    assert f",{size},{8 * size / (5 * 21 * 35):.4f}," in report and (tmp_path / "out/x.plain.nerv").is_file()
    assert {line.split(",")[0] for line in csv[1:]} == {"plain", "rnerv"} and (tmp_path / "run/curves.png").is_file()


@pytest.mark.parametrize(
    "options, reason",
    [
        ("", "name one video"),
        ("a.mkv --decode a.nerv", "name one video"),
        ("a.mkv --method nerf", "nerf"),
        ("a.mkv --method nerv,nerv", "once"),
        ("a.mkv --size many", "--size many"),
        ("a.mkv --size 1k --method enerv", "least"),
        ("a.mkv --bits 9", "4 to 8"),
        ("a.mkv --minutes 0", "positive"),
        ("a.mkv --resize big", "160x320"),
        ("--decode a.mkv --out b.mkv", "not a file of this program"),
        ("--decode nothing.nerv --out b.mkv", "No such file"),
        ("--decode other.nerv --out b.mkv", "header"),
        ("--explain a.mkv", "not a file of this program"),
    ],
)
def test_bad_input_is_one_line(options, reason, call, capsys):
    container.write("other.nerv", {"kind": "codec"}, [])
    assert call(options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and reason in error


def test_damaged_files_are_one_line(call, capsys, tmp_path):
    fit.Fit("rnerv", Frames(moving_frames()), fit.Config(size="20k"), CPU).store("a.nerv", 8)
    good, reader = (tmp_path / "a.nerv").read_bytes(), container.Reader("a.nerv")
    bad = [good[:60], good[:-1], good + b"x"]
    for place in np.random.default_rng(0).integers(0, len(good), 12):
        flipped = bytearray(good)
        flipped[place] ^= 1
        bad.append(bytes(flipped))
    for change in ({"channels": [2**16] * 4}, {"frames": 10**9}, {"strides": [8] * 12}, {"method": "x"}, {"bits": True}):
        container.write("b.nerv", reader.header | change, [reader[i] for i in range(len(reader))])
        bad.append((tmp_path / "b.nerv").read_bytes())
    for content in bad:
        (tmp_path / "b.nerv").write_bytes(content)
        assert call("--decode b.nerv --out b.mkv") == 2
        error = capsys.readouterr().err
        assert error.startswith("error: b.nerv: ") and error.count("\n") == 1


# -------------------------------------------------------------------------------------------------------------------- XINC


def test_contributions_sum_to_the_output():
    torch.manual_seed(0)
    x, kernel, bias = torch.randn(2, 5, 6, 7).double(), torch.randn(3, 5, 3, 3).double(), torch.randn(3).double()
    close(xinc.contributions(x, kernel, bias).sum(1), F.conv2d(x, kernel, bias, padding=1), 1e-12)
    close(xinc.contributions(x, kernel)[:, 2, 1], F.conv2d(x[:, 2:3], kernel[1:2, 2:3], padding=1)[:, 0], 1e-12)
    maps = xinc.contributions(x, kernel, bias, edges="replicate")
    close(maps.sum(1), F.conv2d(F.pad(x, (1,) * 4, mode="replicate"), kernel, bias), 1e-12)


def test_figures_of_contributions(tmp_path):
    """Two input channels: one is idle, one is bright where the square is; it moves."""
    kernel = torch.zeros(3, 2, 1, 1)
    kernel[:, 1] = 1

    def frame(place):
        picture = np.zeros((12, 24, 3), np.uint8)
        picture[4:8, place : place + 4] = 200
        x = torch.ones(1, 2, 12, 24)
        x[0, 1] = torch.from_numpy(picture[..., 0] / 100.0)
        return picture, x, kernel

    figures = xinc.explain([(frame(3), frame(9))], tmp_path / "a.png", "a square")
    assert figures["neurons"] == 6 and figures["near_dead"] == 0.5 and figures["half"] == pytest.approx(2 / 6)
    assert figures["motion"] > 0.99 and (tmp_path / "a.png").stat().st_size > 10_000
    assert math.isnan(xinc.explain([(frame(3), frame(3))], tmp_path / "a.png", "a still")["motion"])


def test_explaining_files_and_generated_videos(call, capsys, monkeypatch):
    seen, explain = [], xinc.explain

    def checked(pairs, path, title, edges):
        pairs = list(pairs)
        seen.extend((frame, xinc.contributions(x, kernel, None, edges)[0].sum(0)) for frame, x, kernel in pairs[0])
        return explain(pairs, path, title, edges)

    monkeypatch.setattr(xinc, "explain", checked)
    assert call(f"a.mkv {TINY}") == 0
    assert call("--explain a.nerv") == 0 and "near-dead" in capsys.readouterr().out
    seen.clear()
    torch.manual_seed(0)  # dit.pt, of random weights
    small = dataclasses.replace(nerv.CONFIGS["nano"], num_frames=4)
    encoder = vae.EncoderConfig(width=24, depth=1, heads=2, patch=(2, 16, 16))
    stage1, config = vae.VAE(small, encoder), dit.DiTConfig(32, 16, 2, 0, 24, 1, 2)
    content = {"nerv_config": dataclasses.asdict(small), "encoder_config": dataclasses.asdict(encoder), "decoder": "NeRV"}
    stage2 = {"dit_config": dataclasses.asdict(config), "denoiser": "DiT", "latent_scale": 1.0, "classes": ["a", "b"]}
    stage2 |= {"vae": content | {"ema": stage1.state_dict()}, "ema": dit.DiT(config).state_dict()}
    checkpoints.save("dit.pt", stage="dit", **stage2)
    assert call("--explain dit.pt --out g.png") == 0 and "96 kernels" in capsys.readouterr().out
    for frame, total in seen:  # the biases are zero here
        assert np.abs(video.to_frames(torch.tanh(total)).astype(int) - frame).max() <= 1
