"""One network for one video: counts by formula, components by plain loops, fits that fit, files that come back, XINC's sums."""

import copy
import dataclasses
import functools
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import codec
import dit
import fit
import nerv
import vae
from common import checkpoints, container, entropy, methods, utils, video, xinc
from common import components as parts
from common.components import Plan
from common.methods import METHODS, Network

CURVES = fit.plot.families
TINY = "--steps 6 --size 20k --batch-size 2 --lr 5e-3"


def moving_frames(count=4, height=32, width=32):
    """Soft stripes on the move, another way in each colour; uint8 [count, height, width, 3]."""
    x, y, t = np.arange(width), np.arange(height)[:, None], np.arange(count)[:, None, None]
    wave = 127 + 100 * np.sin((x + 5 * t) / 9) * np.cos(y / 8)
    return np.stack([wave, wave[:, ::-1], 255 - wave], -1).astype(np.uint8)


@pytest.fixture
def call(call, monkeypatch):
    """call("a.mkv --steps 3") runs fit.py in this process, in an empty directory but for a.mkv, 5 frames of 21 x 35."""
    monkeypatch.setattr(fit.plot, "families", lambda path, panels: None)  # matplotlib takes longer than all else
    video.write_frames("a.mkv", [moving_frames(5, 21, 35)], 10)

    return functools.partial(call, "fit.py")


def frames_of(path):
    return np.stack(list(fit.FittedVideo(path)(range(5))))


# ----------------------------------------------------------------------------------------------------------- by the formula


def conv(ins, outs, kernel, groups=1, bias=True):
    return ins // groups * outs * kernel**2 + bias * outs


def shuffles(plan, kernels):
    layers = zip(plan.channels, plan.channels[1:], plan.strides, kernels)
    return sum(conv(a, b * s * s, k) for a, b, s, k in layers)


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
    head = conv(last, 3, 3 if name in ("hnerv", "plain", "diffnerv") else 1)
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


def test_rnerv_is_that_of_the_paper():
    m = METHODS["rnerv"]
    assert (m.encoding, m.stem, m.block) == (parts.TemporalGrid, parts.NoStem, parts.GroupedBlock)
    assert m.skip.func is parts.TimeSkip and m.skip.keywords == {"norm": "layer"} and not m.flow and m.expansion == 4
    for size, reduction in ((1.5e6, 1.2), (3e6, 1.4)):
        c0, *rest = methods.plan(m, size, 132, 640, 1280).channels
        assert abs(rest[0] - 4 * c0) <= 8
        for a, b in zip(rest, rest[1:]):
            assert abs(b - a / reduction) <= 16  # multiples of eight, and a step to come within 1 %


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


def plain_conv(x, weight, bias, groups=1):
    """[B, in, h, w] by [out, in / groups, k, k], zeros around, tap by tap."""
    outs, ins, k, _ = weight.shape
    y, padded = torch.zeros(len(x), outs, *x.shape[2:], dtype=x.dtype), F.pad(x, (k // 2,) * 4)
    for o in range(outs):
        first = o // (outs // groups) * ins
        for i in range(ins):
            for a in range(k):
                for b in range(k):
                    y[:, o] += weight[o, i, a, b] * padded[:, first + i, a : a + x.shape[2], b : b + x.shape[3]]
    return y if bias is None else y + bias[:, None, None]


def plain_shuffle(x, s):
    """[B, C * s * s, h, w] -> [B, C, h * s, w * s], pixel by pixel."""
    B, C, h, w = x.shape
    y = torch.zeros(B, C // s**2, h * s, w * s, dtype=x.dtype)
    for i in range(h * s):
        for j in range(w * s):
            y[:, :, i, j] = x[:, (i % s) * s + j % s :: s * s, i // s, j // s]
    return y


@pytest.fixture
def small():
    torch.manual_seed(0)
    return Plan(frames=6, height=24, width=48, strides=[2, 4], channels=[8, 16, 4])


def test_sinusoid(small):
    code = parts.Sinusoid(small)(torch.tensor([0.0, 2.5, 5.0]))
    for row, t in zip(code, (0, 2.5, 5)):
        angles = [1.25**i * math.pi * t / 6 for i in range(80)]
        close(row.double(), torch.tensor([f(a) for f in (math.sin, math.cos) for a in angles]).double(), 1e-6)


def test_grids(small):
    t = torch.tensor([0.0, 2.25, 5.0])
    grid = parts.TemporalGrid(small)
    half, whole = (table.detach() for table in grid.tables)
    assert half.shape == (3, 4, 3, 6) and whole.shape == (6, 4, 3, 6)
    close(grid(t)[0], torch.cat([half[0], whole[0]]), 1e-6)
    close(grid(t)[1], torch.cat([half[1] * 0.875 + half[2] * 0.125, whole[2] * 0.75 + whole[3] * 0.25]), 1e-6)
    close(grid(t)[2], torch.cat([half[2], whole[5]]), 1e-6)
    grid = parts.HierarchicalGrid(small)
    two, one = (table.detach() for table in grid.tables)
    assert len(two) == 2 and len(one) == 1
    close(grid(t)[0], torch.cat([two[0], one[0]]), 1e-6)  # half a row before the first
    place = 2.75 / 6 * 2 - 0.5
    close(grid(t)[1], torch.cat([two[0] * (1 - place) + two[1] * place, one[0]]), 1e-6)


def test_shuffle_blocks(small):
    x = torch.randn(2, 8, 3, 6).double()
    block = parts.ShuffleBlock(0, small, (1, 5)).double()
    assert block.conv.kernel_size == (1, 1) and parts.ShuffleBlock(1, small, (1, 5)).conv.kernel_size == (3, 3)
    close(block.up(x), plain_shuffle(plain_conv(x, block.conv.weight, block.conv.bias), 2))
    block = parts.GroupedBlock(0, small, (3, 3)).double()
    y = plain_conv(plain_conv(x, block.conv.weight, block.conv.bias, 8), block.across.weight, block.across.bias)
    close(block.up(x), plain_shuffle(y, 2))
    assert parts.GroupedBlock(0, dataclasses.replace(small, strides=[5]), (3, 3)).across is None
    block = parts.ENeRVBlock(0, small, (3, 3)).double()
    y = plain_shuffle(plain_conv(x, block.conv.weight, block.conv.bias), 2)
    assert y.shape[1] == 2  # a quarter
    close(block.up(x), plain_conv(y, block.same.weight, block.same.bias))
    narrowing = dataclasses.replace(small, channels=[8, 3])
    block = parts.ENeRVBlock(0, narrowing, (3, 3)).double()
    y = plain_conv(x, block.same.weight, block.same.bias)
    close(block.up(x), plain_shuffle(plain_conv(y, block.conv.weight, block.conv.bias), 2))


def plain_norm(x):
    """Each pixel over its channels."""
    mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, correction=0)
    return (x - mean) / (var + 1e-6).sqrt()


def test_hinerv_block(small):
    block, x = parts.HiNeRVBlock(0, small, (3, 3)).double(), torch.randn(2, 8, 3, 6).double()
    up = block.up(x)
    assert up.shape == (2, 8, 6, 12)
    close(up[:, :, 0, 0], x[:, :, 0, 0])
    close(up[:, :, 1, 0], 0.75 * x[:, :, 0, 0] + 0.25 * x[:, :, 1, 0])
    y = up
    for i, layer in enumerate(block.layers):
        z = plain_norm(plain_conv(y, layer.mix.weight, None, 8 if i == 0 else 16))
        z = plain_conv(F.gelu(plain_conv(z, layer.wide.weight, None)), layer.narrow.weight, None)
        y = z if i == 0 else y + z  # the first one changes the number of channels
    assert len(block.layers) == 3
    close(block.finish(up), y)


def test_transformer():
    torch.manual_seed(0)
    layer, x = parts.Transformer(8, 2).double(), torch.randn(1, 5, 8).double()
    q, k, v = (layer.qkv.weight[n * 4 : n * 4 + 4] @ x[0].T for n in range(3))  # two heads of 2, each [4, 5]
    seen = []
    for head in range(2):
        a, b, c = (z[2 * head : 2 * head + 2] for z in (q, k, v))
        weight = torch.softmax(a.T @ b / math.sqrt(2), -1)
        seen.append(weight @ c.T)
    y = x[0] + torch.cat(seen, -1) @ layer.out.weight.T + layer.out.bias
    up, _, down = layer.mlp
    y = y + F.gelu(y @ up.weight.T + up.bias) @ down.weight.T + down.bias
    close(layer(x)[0], y)


def test_skips(small):
    x, t = torch.randn(2, 8, 3, 6).double(), torch.tensor([1.0, 4.0])
    shared = parts.TimeSkip.shared(small).double()
    shared[0].forward = lambda t: parts.Sinusoid.forward(shared[0], t).double()
    for norm in ("layer", "instance"):
        skip = parts.TimeSkip(0, small, norm).double()
        scale, shift = F.gelu(skip.to_scale(shared(t)))[:, :, None, None].chunk(2, 1)
        mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True, correction=0)
        normal = plain_norm(x) if norm == "layer" else (x - mean) / (var + 1e-5).sqrt()
        close(skip(x, t, shared, None), normal * scale + shift)
    skip = parts.LocalGridSkip(0, small)
    assert [tuple(table.shape) for table in skip.tables] == [(6, 4, 8), (3, 4, 16), (1, 4, 32)]
    y = torch.zeros(2, 8, 6, 12)
    code = torch.cat([parts.rows(table, (t + 0.5) / 6 * len(table) - 0.5) for table in skip.tables], -1)  # [2, 4, 56]
    for i in range(6):
        for j in range(12):
            y[:, :, i, j] = skip.to_map(code[:, i % 2 * 2 + j % 2])
    close(skip(torch.zeros(2, 8, 6, 12), t, None, None), y, 1e-6)
    skip = parts.DifferenceSkip(0, small).double()
    assert skip.here and not parts.DifferenceSkip(1, small).here
    x, difference = torch.randn(2, 16, 6, 12).double(), torch.randn(2, 2, 3, 6).double()
    d = plain_conv(difference, skip.embed.weight, skip.embed.bias)
    d = F.gelu(plain_shuffle(plain_conv(d, skip.block.conv.weight, skip.block.conv.bias), 2))
    p, s = plain_conv(torch.cat([x, d], 1), skip.gates.weight, skip.gates.bias).chunk(2, 1)
    s = torch.sigmoid(s)
    close(skip(x, t, None, difference), s * torch.tanh(p) + (1 - s) * x)


def test_warp_and_flow(small):
    frames = torch.randn(1, 2, 5, 7).double()
    flow = torch.randn(1, 2, 5, 7).double() * 2
    moved = parts.warp(frames, flow)
    for i in range(5):
        for j in range(7):
            x = min(max(j + flow[0, 0, i, j].item(), 0), 6)
            y = min(max(i + flow[0, 1, i, j].item(), 0), 4)
            a, b = min(int(y), 3), min(int(x), 5)
            u, v = y - a, x - b
            f = frames[0]
            value = (1 - u) * ((1 - v) * f[:, a, b] + v * f[:, a, b + 1]) + u * (
                (1 - v) * f[:, a + 1, b] + v * f[:, a + 1, b + 1]
            )
            close(moved[0, :, i, j], value, 1e-6)
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


class Frames:
    """A fit.Video of frames in memory."""

    clips = fit.Video.clips
    rate = 10.0

    def __init__(self, frames):
        self.frames, (_, self.height, self.width, _) = frames, frames.shape
        self.known = np.ones((self.height, self.width), bool)

    def __len__(self):
        return len(self.frames)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_overfits(name, tmp_path):
    frames = moving_frames()
    size, steps = {"plain": ("100k", 60), "hinerv": ("60k", 130), "ffnerv": ("60k", 90), "ffnerv-flowless": ("60k", 90)}.get(
        name, ("60k", 50)
    )
    one = fit.Fit(name, Frames(frames), fit.Config(size=size, steps=steps, batch_size=4, lr=1e-2), torch.device("cpu"))
    assert fit.frame_psnr(np.repeat(frames.mean(0, keepdims=True), 4, 0), frames).mean() < 21
    while one.progress < 1:
        one.step()
    row = one.write(tmp_path / "a.nerv")
    assert float(row["PSNR, dB"]) > 30
    assert row["bytes"] == (tmp_path / "a.nerv").stat().st_size and row["parameters"] == methods.count(one.method, one.plan)


@pytest.mark.parametrize("shape", [(1, 7, 5), (2, 1, 1), (3, 2, 90)])
def test_videos_of_odd_shapes(shape, tmp_path):
    for name in METHODS:
        one = fit.Fit(name, Frames(moving_frames(*shape)), fit.Config(size="20k", steps=2), torch.device("cpu"))
        one.step()
        one.write(tmp_path / "a.nerv")
        frames = list(fit.FittedVideo(tmp_path / "a.nerv")(range(shape[0])))
        assert [frame.shape for frame in frames] == [(*shape[1:], 3)] * shape[0] and math.isfinite(one.recent)


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


def test_the_same_command_makes_the_same_file_and_resuming_it_too(call, monkeypatch, tmp_path):
    for name in ("ffnerv", "diffnerv"):
        once = f"a.mkv --method {name} {TINY}"
        assert call(f"{once} --out one.nerv --run-dir one") == 0
        assert call(f"{once} --out two.nerv --run-dir two") == 0
        assert (tmp_path / "one.nerv").read_bytes() == (tmp_path / "two.nerv").read_bytes()
        with monkeypatch.context() as patch:  # Ctrl-C after three steps
            asked = iter([False, False, True])
            patch.setattr(utils.Interrupt, "stop", lambda self, asked=asked: next(asked))
            assert call(f"{once} --out half.nerv --run-dir half") == 0
        assert (tmp_path / "half.nerv").read_bytes() != (tmp_path / "one.nerv").read_bytes()
        assert len(frames_of("half.nerv")) == 5  # a file that can be used
        assert call(f"{once} --out half.nerv --run-dir half --resume") == 0
        assert (tmp_path / "half.nerv").read_bytes() == (tmp_path / "one.nerv").read_bytes()
        for run in ("one", "two", "half"):
            (tmp_path / run / "state.pt").unlink()
    assert call(f"{once} --out one.nerv --run-dir one --seed 1") == 0
    assert (tmp_path / "half.nerv").read_bytes() != (tmp_path / "one.nerv").read_bytes()
    assert call(f"{once} --out one.nerv --run-dir one --resume") == 2  # another seed


def test_what_is_masked_is_not_looked_at(call, tmp_path, capsys):
    frames = moving_frames(5, 21, 35)
    mask = np.zeros((21, 35), np.uint8)
    mask[4:12, 10:20] = 255
    Image.fromarray(mask).save("mask.png")
    spoilt = frames.copy()
    spoilt[:, mask > 0] = np.random.default_rng(0).integers(0, 256, (5, 80, 3))
    video.write_frames("b.mkv", [spoilt], 10)
    for name in ("rnerv", "diffnerv"):
        for source in "ab":
            assert call(f"{source}.mkv --method {name} {TINY} --mask mask.png --out {source}.nerv") == 0
        assert (tmp_path / "a.nerv").read_bytes() == (tmp_path / "b.nerv").read_bytes()
    assert "| hidden" in capsys.readouterr().out


def test_a_video_of_any_length_stays_on_the_disk(call):
    v = fit.Video("a.mkv", fit.Config(frames="1:4", resize="16x32"))
    assert v.frames.shape == (3, 16, 32, 3) and isinstance(v.frames, np.memmap)
    assert isinstance(fit.Video("a.mkv", fit.Config()).frames.base, np.memmap)
    # 21 x 35 cut to 17.5 x 35 and made smaller: the middle is still the middle
    whole = moving_frames(5, 21, 35)[1:4].astype(float)
    assert np.abs(v.frames[:, 7:9, 15:17].mean((1, 2)) - whole[:, 9:12, 16:19].mean((1, 2))).max() < 12


# ------------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_numbers_of_a_tensor(bits):
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(bits))
    numbers, step = fit.quantize(x, bits)
    assert numbers.min() >= -(2 ** (bits - 1)) and numbers.max() < 2 ** (bits - 1)
    error = (torch.from_numpy(numbers) * step - x.flatten()).square().mean().sqrt()
    whole = x.abs().max() / (2 ** (bits - 1) - 1)
    assert error <= (whole / 2) and (bits > 4 or step < whole)  # at 4 bits, cutting off the ends pays
    numbers = np.random.default_rng(0).logistic(0, 3, 4000).round().clip(-8, 7).astype(np.int16)
    k = entropy.best_scale(numbers, 4)
    lengths = [len(entropy.pack(numbers[:, None], entropy.coding_order([j / 4], [4], [True]))) for j in (k - 3, k, k + 3)]
    assert lengths[1] < min(lengths[0], lengths[2])


def test_zeros_can_be_stored():
    numbers, step = fit.quantize(torch.zeros(7), 8)
    assert not numbers.any() and math.isfinite(step)


@pytest.mark.parametrize("name", METHODS)
def test_files_come_back_the_same_on_any_number_of_threads(name, tmp_path):
    path = tmp_path / "a.nerv"
    fit.Fit(name, Frames(moving_frames(5, 21, 35)), fit.Config(size="30k", bits=5), torch.device("cpu")).write(path)
    file = fit.FittedVideo(path)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(np.stack(list(file([0, 1.5, 4]))))
    finally:
        torch.set_num_threads(before)
    assert found[0].shape == (3, 21, 35, 3)
    assert np.array_equal(found[0], found[1])
    alone = np.stack([next(iter(fit.FittedVideo(path)([t]))) for t in (4, 1.5, 0)])[::-1]
    assert np.array_equal(alone, found[0])  # in any company


def test_decoding(call, capsys):
    assert call(f"a.mkv {TINY} --frames 0:5") == 0
    whole = frames_of("a.nerv")
    assert "PSNR" in capsys.readouterr().out
    assert call("--decode a.nerv --out b.mkv") == 0
    assert video.probe("b.mkv").fps == 10 and np.array_equal(video.read_frames("b.mkv", None), whole)
    assert call("--decode a.nerv --out c.mkv --frames 2:4") == 0
    assert np.array_equal(video.read_frames("c.mkv", None), whole[2:4])
    assert call("--decode a.nerv --out d.mkv --fps 20") == 0
    twice = video.read_frames("d.mkv", None)
    assert video.probe("d.mkv").fps == 20 and len(twice) == 10
    assert np.array_equal(twice[::2], whole) and np.array_equal(twice[9], whole[4])  # nothing is known after the last one
    assert call("--decode a.nerv --out e.mkv --fps 5") == 0
    assert np.array_equal(video.read_frames("e.mkv", None), whole[::2])


def test_a_report_and_curves_of_several(call, tmp_path, monkeypatch):
    monkeypatch.setattr(fit.plot, "families", CURVES)
    assert call(f"a.mkv --method plain,rnerv {TINY} --run-dir run --out out/x.nerv") == 0
    assert (tmp_path / "out/x.plain.nerv").is_file() and (tmp_path / "out/x.rnerv.nerv").is_file()
    report, csv = (tmp_path / "run/report.csv").read_text(), (tmp_path / "run/curves.csv").read_text().splitlines()
    size = (tmp_path / "out/x.rnerv.nerv").stat().st_size
    assert f",{size},{8 * size / (5 * 21 * 35):.4f}," in report
    assert {line.split(",")[0] for line in csv[1:]} == {"plain", "rnerv"} and (tmp_path / "run/curves.png").is_file()


@pytest.mark.parametrize(
    "options, reason",
    [
        ("", "name one video"),
        ("a.mkv --decode a.nerv", "name one video"),
        ("nothing.mp4", "No such file"),
        ("a.mkv --method nerf", "nerf"),
        ("a.mkv --method nerv,nerv", "once"),
        ("a.mkv --size many", "--size many"),
        ("a.mkv --size 1k --method enerv", "least"),
        ("a.mkv --bits 9", "4 to 8"),
        ("a.mkv --minutes 0", "positive"),
        ("a.mkv --frames 3:9", "0 to 4"),
        ("a.mkv --resize big", "160x320"),
        ("a.mkv --mask nothing.png", "nothing.png"),
        ("a.mkv --mask small.png", "2 x 2"),
        ("--decode a.mkv --out b.mkv", "not a file of this program"),
        ("--decode nothing.nerv --out b.mkv", "No such file"),
        ("--decode other.nerv --out b.mkv", "header"),
        ("--explain a.mkv", "not a file of this program"),
    ],
)
def test_bad_input_is_one_line(options, reason, call, capsys):
    Image.new("L", (2, 2)).save("small.png")
    container.write("other.nerv", {"kind": "codec"}, [])
    assert call(options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and reason in error


def test_damaged_files_are_one_line(call, capsys, tmp_path):
    assert call(f"a.mkv {TINY}") == 0
    good, rng = (tmp_path / "a.nerv").read_bytes(), np.random.default_rng(0)
    cut = [good[:n] for n in (0, 5, 60, len(good) // 2, len(good) - 1)] + [good + b"x"]
    for place in rng.integers(0, len(good), 12):
        flipped = bytearray(good)
        flipped[place] ^= 1 << rng.integers(8)
        cut.append(bytes(flipped))
    reader = container.Reader(tmp_path / "a.nerv")
    for change in ({"channels": [2**16] * 4}, {"frames": 10**9}, {"strides": [8] * 12}, {"method": "x"}, {"bits": True}):
        container.write("b.nerv", reader.header | change, [reader[i] for i in range(len(reader))])
        cut.append((tmp_path / "b.nerv").read_bytes())
    capsys.readouterr()
    for data in cut:
        (tmp_path / "b.nerv").write_bytes(data)
        assert call("--decode b.nerv --out b.mkv") == 2
        error = capsys.readouterr().err
        assert error.startswith("error: b.nerv: ") and error.count("\n") == 1
    assert not (tmp_path / "b.mkv").exists()


# -------------------------------------------------------------------------------------------------------------------- XINC


def test_contributions_sum_to_the_output():
    torch.manual_seed(0)
    x, kernel, bias = torch.randn(2, 5, 6, 7).double(), torch.randn(3, 5, 3, 3).double(), torch.randn(3).double()
    maps = xinc.contributions(x, kernel, bias)
    assert maps.shape == (2, 5, 3, 6, 7)
    close(maps.sum(1), F.conv2d(x, kernel, bias, padding=1), 1e-12)
    close(xinc.contributions(x, kernel)[:, 2, 1], plain_conv(x[:, 2:3], kernel[1:2, 2:3], None)[:, 0], 1e-12)
    maps = xinc.contributions(x, kernel, bias, edges="replicate")
    close(maps.sum(1), F.conv2d(F.pad(x, (1,) * 4, mode="replicate"), kernel, bias), 1e-12)
    whole = torch.randint(-9, 9, (1, 5, 6, 7)).double(), torch.randint(-9, 9, (3, 5, 3, 3)).double()
    assert torch.equal(xinc.contributions(*whole).sum(1), F.conv2d(*whole, padding=1))  # nothing to round: to the bit


def test_contributions_through_a_pixel_shuffle():
    torch.manual_seed(0)
    x, kernel, bias = torch.randn(1, 4, 3, 5).double(), torch.randn(12, 4, 3, 3).double(), torch.randn(12).double()
    maps = xinc.contributions(x, kernel, bias, stride=2)
    assert maps.shape == (1, 16, 3, 6, 10)
    close(maps.sum(1), F.pixel_shuffle(F.conv2d(x, kernel, bias, padding=1), 2), 1e-12)
    one = maps[0, 2 * 4 + 3]  # of channel 2, the lower right of each window
    assert not one[:, ::2].any() and not one[:, :, ::2].any() and one[:, 1::2, 1::2].all()


@pytest.mark.parametrize("name", METHODS)
def test_head_layers_of_all_methods(name):
    torch.manual_seed(0)
    network = Network(METHODS[name], Plan(3, 16, 16, [2, 2, 2], [8, 8, 8, 8])).double().eval()
    with torch.no_grad():
        time = torch.tensor([1.0]).double()
        sinusoid = parts.Sinusoid.forward
        try:  # codes of time are made in float32
            parts.Sinusoid.forward = lambda self, t, clips=None: sinusoid(self, t).double()
            x = network.maps(time)[-1]
        finally:
            parts.Sinusoid.forward = sinusoid
        close(xinc.contributions(x, network.head.weight, network.head.bias).sum(1), network.head(x), 1e-12)


def test_figures_of_contributions(tmp_path):
    """Two input channels: one is idle, one is bright where the square is; it moves."""
    kernel = torch.zeros(3, 2, 1, 1)
    kernel[:, 1] = 1

    def frame(place):
        picture = np.zeros((12, 24, 3), np.uint8)
        picture[4:8, place : place + 4] = 200
        x = torch.zeros(1, 2, 12, 24)
        x[:, 0], x[0, 1] = 1, torch.from_numpy(picture[..., 0] / 100.0)
        return picture, x, kernel

    figures = xinc.explain([(frame(3), frame(9))], tmp_path / "a.png", "a square")
    assert figures["neurons"] == 6 and figures["near_dead"] == 0.5 and figures["half"] == pytest.approx(2 / 6)
    assert figures["motion"] > 0.99 and (tmp_path / "a.png").stat().st_size > 10_000
    assert math.isnan(xinc.explain([(frame(3), frame(3))], tmp_path / "a.png", "a still")["motion"])


def test_explaining_files_and_generated_videos(call, capsys, monkeypatch):
    assert call(f"a.mkv {TINY}") == 0
    assert call("--explain a.nerv") == 0 and "near-dead" in capsys.readouterr().out
    assert video.image_size("a.xinc.png")[0] > 500
    # dit.pt, of random weights
    torch.manual_seed(0)
    small = dataclasses.replace(nerv.CONFIGS["nano"], num_frames=4)
    encoder = vae.EncoderConfig(width=24, depth=1, heads=2, patch=(2, 16, 16))
    stage1, config = vae.VAE(small, encoder), dit.DiTConfig(32, 16, 2, 0, 24, 1, 2)
    content = {"nerv_config": dataclasses.asdict(small), "encoder_config": dataclasses.asdict(encoder), "decoder": "NeRV"}
    stage2 = {"dit_config": dataclasses.asdict(config), "denoiser": "DiT", "latent_scale": 1.0, "classes": ["a", "b"]}
    stage2 |= {"vae": content | {"ema": stage1.state_dict()}, "ema": dit.DiT(config).state_dict()}
    checkpoints.save("dit.pt", stage="dit", **stage2)
    sums = []
    explain = xinc.explain

    def checked(pairs, path, title, edges, stride):
        pairs = list(pairs)
        for frame, x, kernel in pairs[0]:
            out = torch.tanh(xinc.contributions(x, kernel, None, edges, stride).sum(1))
            sums.append(np.abs(video.to_frames(out)[0].astype(int) - frame).max())
        return explain(pairs, path, title, edges, stride)

    with monkeypatch.context() as patch:
        patch.setattr(xinc, "explain", checked)
        assert call("--explain dit.pt --out g.png") == 0
    assert "96 kernels" in capsys.readouterr().out and max(sums) <= 1  # the biases are zero here
    # a file of codec.py
    c = codec.CodecConfig(16, num_frames=4, width=4, tokens=(3, 8), token_dims=(8, 6))
    vit = vae.EncoderConfig(width=24, depth=1, heads=2, patch=(2, 8, 8))
    model, name = codec.Codec(c, vit), "codec.pt"
    state = {"codec_config": dataclasses.asdict(c), "encoder_config": dataclasses.asdict(vit), "config": {"rate": 0.0}}
    checkpoints.save(name, stage="codec", ema=copy.deepcopy(model.state_dict()), **state)
    monkeypatch.setattr(sys, "argv", ["codec.py", "encode", "a.mkv", "c.nerv"])
    codec.main()
    assert call("--explain c.nerv") == 0 and "192 kernels" in capsys.readouterr().out  # 4 channels × 16 places × 3 colours
    assert video.image_size("c.xinc.png")[0] > 500
