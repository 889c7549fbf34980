"""Components of the NeRV family: position encodings, stems, blocks, skips, flow.

"How to Design and Train Your Implicit Neural Representation for Video Compression" (below: HTD) divides the family so
(§3.1.2, Fig. 2); methods.py combines the parts. Constants of the published configurations are constants here; their widths
scale with C0, the channels of the stem's map. t [B] are times in frames, real-valued, 0 … T-1.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Plan:
    """The sizes of one network for one video."""

    frames: int  # T
    height: int  # in pixels, before padding
    width: int
    strides: list  # of the blocks; the output is a multiple of their product, cropped to the frame
    channels: list  # C0 of the stem's map, then of each block's

    @property
    def grid(self):
        """(h, w) of the stem's map."""
        total = math.prod(self.strides)
        return math.ceil(self.height / total), math.ceil(self.width / total)

    @property
    def padded(self):
        """(height, width) of the network's output."""
        return tuple(n * math.prod(self.strides) for n in self.grid)


def rows(table, place):
    """Rows of a table [n, ...] at real-valued positions [B] -> [B, ...]: linearly interpolated, clamped at the ends."""
    place = place.clamp(0, len(table) - 1)
    left = place.floor().long()
    part = (place - left).to(table).view(-1, *(1 for _ in table.shape[1:]))
    return torch.lerp(table[left], table[(left + 1).clamp(max=len(table) - 1)], part)


def grid(tables, t, frames, shift=0.0, dim=1):
    """Tables [n, …] over a video of `frames` frames, each read at times t [B], concatenated along `dim`: [B, …]."""
    return torch.cat([rows(table, (t + shift) / frames * len(table) - shift) for table in tables], dim)


def small(x):
    return nn.init.uniform_(x, -1e-3, 1e-3)


def conv(ins, outs, kernel, **kw):
    return nn.Conv2d(ins, outs, kernel, padding=kernel // 2, **kw)


def mlp(*sizes):
    """Linear layers, each followed by a GELU."""
    return nn.Sequential(*(layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.GELU())))


class ChannelNorm(nn.LayerNorm):
    """Layer norm of maps [B, C, h, w] over channels, separately for each pixel."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


# -------------------------------------------------------------------------------------------------------------- encodings
# A module returns the code that the stem takes, and Diff-NeRV's difference or None.


def sinusoid(t, length):
    """NeRV's: sin and cos of 1.25^i π t / length for i = 0 … 79 (Chen et al. 2021, Eq. 2): t [B] -> [B, 160]."""
    # The highest frequency is 5e7: in float32 the angle would be noise, which differs between machines.
    angle = t.double()[:, None] / length * math.pi * 1.25 ** torch.arange(80, dtype=torch.float64, device=t.device)
    return torch.cat([angle.sin(), angle.cos()], -1).float()


class TemporalGrid(nn.Module):
    """Learned maps over time at two rates, linearly interpolated (FFNeRV, Lee et al. 2023, §3.2): t [B] -> [B, C0, h, w].

    One map per frame and one per two frames, with half of the channels each; at most 600 and 300, as published.
    """

    shift, begin = 0.0, staticmethod(nn.init.xavier_uniform_)

    def __init__(self, plan):
        super().__init__()
        self.frames, self.features = plan.frames, sum(c for _, c in self.sizes(plan))
        self.tables = nn.ParameterList(self.begin(torch.empty(n, c, *plan.grid)) for n, c in self.sizes(plan))

    def sizes(self, plan):
        half = plan.channels[0] // 2
        return (max(1, min(300, plan.frames // 2)), plan.channels[0] - half), (min(600, plan.frames), half)

    def forward(self, t, clips=None):
        return grid(self.tables, t, self.frames, self.shift), None


class HierarchicalGrid(TemporalGrid):
    """HiNeRV's base grid (Kwan et al. 2023, §3.1): t [B] -> [B, 12, h, w]. Its configuration for Bunny at 1.6 M has 40 maps of
    4 channels and 20 of 8 for 132 frames, here 0.3 and 0.15 per frame."""

    shift, begin = 0.5, staticmethod(small)

    def sizes(self, plan):
        return [(max(1, round(share * plan.frames)), c) for share, c in ((0.3, 4), (0.15, 8))]


class ConvNeXt(nn.Module):
    """Depthwise convolution, norm, and two linear maps with a GELU between (Liu et al. 2022); residual if sizes agree.

    With `affine`, as in encoders of frames: biases, norms with scale and shift, and a residual branch scaled by 1e-6.
    """

    def __init__(self, ins, outs, hidden, kernel, affine):
        super().__init__()
        self.mix, self.norm = conv(ins, ins, kernel, groups=ins, bias=affine), ChannelNorm(ins, 1e-6, affine)
        self.wide, self.narrow = conv(ins, hidden, 1, bias=affine), conv(hidden, outs, 1, bias=affine)
        self.scale = nn.Parameter(torch.full((outs, 1, 1), 1e-6)) if affine else 1

    def forward(self, x):
        y = self.scale * self.narrow(F.gelu(self.wide(self.norm(self.mix(x)))))
        return x + y if x.shape == y.shape else y


def frame_encoder(ins, outs, strides, narrow):
    """Frames to small maps, a strided convolution and a ConvNeXt per level (HNeRV §3.1): [B, ins, H, W] -> [B, outs, h, w].
    HNeRV normalizes before each convolution but the first, DNeRV (`narrow`) after each; it ends in a 1 × 1 from 64 channels."""
    layers = []
    for i, stride in enumerate(strides):
        a, b = 64 if i else ins, 64 if narrow or i < len(strides) - 1 else outs
        down = nn.Conv2d(a, b, stride, stride)
        layers += [down, ChannelNorm(b, 1e-6)] if narrow or i == 0 else [ChannelNorm(a, 1e-6), down]
        layers.append(ConvNeXt(b, b, 4 * b, 7, True))
    return nn.Sequential(*layers, *([nn.Conv2d(64, outs, 1)] if narrow else []))


class Content(nn.Module):
    """HNeRV's content-adaptive embedding (Chen et al. 2023, §3.1): an encoder maps the frame to its code [16, h, w].

    The codes are stored, the encoder is not. Between frames (t real) codes are interpolated linearly.
    """

    features, narrow, stored = 16, False, ("codes",)

    def __init__(self, plan):
        super().__init__()
        self.encoder = frame_encoder(3, 16, plan.strides, self.narrow)
        self.register_buffer("codes", torch.zeros(plan.frames, 16, *plan.grid))

    def encode(self, clips):
        """Frames with their two neighbours, [B, 3, 3, H, W] in [0, 1] -> what is `stored` of the middle ones."""
        return [self.encoder(clips[:, 1])]

    def forward(self, t, clips=None):
        codes = self.encode(clips) if clips is not None else [rows(getattr(self, name), t) for name in self.stored]
        return (*codes, None)[:2]


class ContentAndDifference(Content):
    """Diff-NeRV's two embeddings (Zhao et al. 2023, "DNeRV", §3.1): content as in HNeRV, and differences to both neighbours.

    The second has two channels on a larger map: the frame downscaled by 24, or the nearest that the strides allow.
    """

    narrow, stored = True, ("codes", "differences")

    def __init__(self, plan):
        super().__init__(plan)
        level = self.level(plan)
        self.difference_encoder = frame_encoder(6, 2, plan.strides[level:], True)
        size = (n * math.prod(plan.strides[:level]) for n in plan.grid)
        self.register_buffer("differences", torch.zeros(plan.frames, 2, *size))

    @staticmethod
    def level(plan):
        """Index of the block whose input has the size of the difference: 2 for strides 5, 4, 4, 3, 2."""
        return min(range(len(plan.strides)), key=lambda i: abs(math.log(math.prod(plan.strides[i:]) / 24)))

    def encode(self, clips):
        before, now, after = clips.unbind(1)
        return [self.encoder(now), self.difference_encoder(torch.stack([now - before, after - now], 2).flatten(1, 2))]


# ------------------------------------------------------------------------------------------------------------------ stems


def mlp_stem(features, plan, hidden=True):
    """NeRV's: a hidden layer, then the whole map (§3.1; 512 hidden for C0 = 26), or the map at once (HNeRV's plain NeRV)."""
    shape = (plan.channels[0], *plan.grid)
    wide = [max(8, round(512 / 26 * plan.channels[0]))] if hidden else []
    return nn.Sequential(mlp(features, *wide, math.prod(shape)), nn.Unflatten(1, shape))


def conv_stem(features, plan, kernel, act=nn.Identity):
    """One convolution: 3 × 3 on HiNeRV's grid; 1 × 1 on DNeRV's and HNeRV's codes, there with GELU. -> [B, C0, h, w]."""
    return nn.Sequential(conv(features, plan.channels[0], kernel), act())


class Transformer(nn.Module):
    """Attention and an MLP, without norms, as in E-NeRV: [B, L, width] -> the same."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, inner = heads, heads * (width // 4)  # heads of 64 for a width of 256
        self.qkv, self.out = nn.Linear(width, 3 * inner, bias=False), nn.Linear(inner, width)
        self.mlp = nn.Sequential(mlp(width, width // 2), nn.Linear(width // 2, width))

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)  # each [B, heads, L, inner / heads]
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class TransformerStem(nn.Module):
    """E-NeRV's (Li et al. 2022, §3.2; 256 wide for C0 = 196): a transformer's map of (y, x), times a vector of t, through
    another. [B, 160] -> [B, C0, h, w]."""

    def __init__(self, features, plan):
        super().__init__()
        self.grid, width = plan.grid, max(8, round(256 / 196 * plan.channels[0]))
        self.time, self.place = mlp(features, 2 * width, width), mlp(2 * features, width)
        self.first, self.second = Transformer(width, 1), Transformer(width, 8)
        self.out = mlp(width, plan.channels[0])

    def forward(self, code):
        axes = torch.meshgrid(*(torch.arange(n, device=code.device) for n in self.grid), indexing="ij")
        position = torch.cat([sinusoid(axis.flatten(), n) for axis, n in zip(axes, self.grid)], -1)  # [h * w, 320]
        place = self.first(self.place(position)[None])  # [1, h * w, width]
        x = self.out(self.second(place * self.time(code)[:, None]))  # [B, h * w, C0]
        return x.transpose(1, 2).unflatten(2, self.grid)


# ----------------------------------------------------------------------------------------------------------------- blocks
# Block i of a plan: [B, C, h, w] -> [B, C', stride * h, stride * w]; HiNeRV's follows its upsampling, which is in the skip.


def nerv_block(i, plan, kernels=(3, 3)):
    """NeRV's block (§3.1): convolution to stride² times the channels, pixel shuffle, GELU. Kernels grow by two per block."""
    stride, (ins, outs) = plan.strides[i], plan.channels[i : i + 2]
    return nn.Sequential(conv(ins, outs * stride**2, min(kernels[0] + 2 * i, kernels[1])), nn.PixelShuffle(stride), nn.GELU())


def enerv_block(i, plan, kernels):
    """E-NeRV's first block is two convolutions, with a quarter of the channels between if it widens (§3.3), others NeRV's."""
    stride, (ins, outs) = plan.strides[i], plan.channels[i : i + 2]
    if i > 0:
        return nerv_block(i, plan, kernels)
    if ins > outs:
        return nn.Sequential(conv(ins, outs, 3), conv(outs, outs * stride**2, 3), nn.PixelShuffle(stride), nn.GELU())
    middle = max(1, ins // 4)
    return nn.Sequential(conv(ins, middle * stride**2, 3), nn.PixelShuffle(stride), conv(middle, outs, 3), nn.GELU())


def grouped_block(i, plan, kernels):
    """FFNeRV's compact block (§3.4): a convolution in 8 groups, then a 1 × 1 across them; for strides of 5, NeRV's block."""
    stride, ins = plan.strides[i], plan.channels[i]
    if stride == 5:
        return nerv_block(i, plan, kernels)
    outs = plan.channels[i + 1] * stride**2
    layers = conv(ins, outs, 3, groups=math.gcd(8, ins, outs)), conv(outs, outs, 1)
    return nn.Sequential(*layers, nn.PixelShuffle(stride), nn.GELU())


def convnext_block(i, plan, kernels):
    """HiNeRV's (§3.2): three ConvNeXt blocks without biases, expanding channels by 4; one at the last level, without
    expansion. Frames are decoded whole: the paper's overlapping patches give the same result."""
    ins, outs = plan.channels[i : i + 2]
    depth, wide = (1, 1) if i == len(plan.strides) - 1 else (3, 4)
    return nn.Sequential(*(ConvNeXt(outs if k else ins, outs, wide * outs, 3, False) for k in range(depth)))


# ------------------------------------------------------------------------------------------------------------------ skips
# Applied before block i: x [B, C, h, w], t [B] in frames, and `given`, the code of time [B, …] or Diff-NeRV's difference.


def time_features(plan):
    """Width of the code of time that TimeSkips share: 128, or less below C0 = 8."""
    return min(128, 16 * plan.channels[0])


class TimeSkip(nn.Module):
    """E-NeRV's (§3.4): the input is normalized, then scaled and shifted per channel by a linear map of t's code.

    The norm is instance norm in the code of E-NeRV and of HTD, whose text says layer norm (§3.1.2, §4.3). Scales start near 0,
    as there, so that networks learn slowly at first, or with `bright` at GELU(1) = 0.84.
    """

    def __init__(self, i, plan, bright=False):
        super().__init__()
        self.to_scale = nn.Linear(time_features(plan), 2 * plan.channels[i])
        if bright:
            nn.init.ones_(self.to_scale.bias.data[: plan.channels[i]])

    def forward(self, x, t, given):
        scale, shift = F.gelu(self.to_scale(given))[:, :, None, None].chunk(2, 1)
        # Groups of one channel are instance norm; nn.InstanceNorm2d rejects maps of one pixel, which become 0 here.
        return torch.group_norm(x, x.shape[1], eps=1e-5) * scale + shift


class LocalGridSkip(nn.Module):
    """HiNeRV's layer norm, bilinear upsampling, and an added learned grid in time (§3.1, "hierarchical encoding"): a
    vector for each of the stride² positions in a cell.

    Block i has rows of 8 / 2^i channels per frame, of twice as many per two frames, and of four times as many per four.
    """

    def __init__(self, i, plan):
        super().__init__()
        self.stride, self.frames, base = plan.strides[i], plan.frames, max(1, 8 >> i)
        sizes = [(max(1, plan.frames >> k), base << k) for k in range(3)]
        self.tables = nn.ParameterList(small(torch.empty(n, self.stride**2, c)) for n, c in sizes)
        self.norm, self.to_map = ChannelNorm(plan.channels[i], 1e-6, False), nn.Linear(7 * base, plan.channels[i])

    def forward(self, x, t, given):
        h, w = x.shape[-2:]
        cell = self.to_map(grid(self.tables, t, self.frames, 0.5, -1))  # [B, s * s, C]
        cell = cell.transpose(1, 2).unflatten(2, (self.stride, self.stride))
        return F.interpolate(self.norm(x), scale_factor=self.stride, mode="bilinear") + cell.repeat(1, 1, h, w)


class DifferenceSkip(nn.Module):
    """Diff-NeRV's collaborative content unit (DNeRV §3.2): a gate between content and difference, as in a GRU."""

    def __init__(self, i, plan):
        super().__init__()
        self.here = i == ContentAndDifference.level(plan) + 1
        if self.here:
            channels = plan.channels[i]
            self.block = nn.Sequential(nn.Conv2d(2, plan.channels[i - 1], 1), nerv_block(i - 1, plan))
            self.gates = conv(2 * channels, 2 * channels, 3)

    def forward(self, x, t, given):
        if not self.here:
            return x
        new, gate = self.gates(torch.cat([x, self.block(given)], 1)).chunk(2, 1)
        return torch.lerp(x, torch.tanh(new), torch.sigmoid(gate))


# ------------------------------------------------------------------------------------------------------------------- flow


class Flow(nn.Module):
    """FFNeRV's flow-guided aggregation (§3.3): a weighted sum of neighbouring frames, warped to this one, and its own frame.

    Flows and weights of neighbours come from the map before the last two blocks, those of own and warped from the last map.
    """

    NEIGHBOURS = (-2, -1, 1, 2)

    def __init__(self, plan):
        super().__init__()
        self.level = max(0, len(plan.strides) - 3)
        self.to_flow = nn.Conv2d(plan.channels[self.level + 1], 3 * len(self.NEIGHBOURS), 1)
        self.to_weight = nn.Conv2d(plan.channels[-1], 2, 1)

    def forward(self, maps, own, neighbours):
        """The maps after each block, own frame [B, 3, H, W], neighbours [B, 4, 3, H, W] -> (frame, warped alone)."""
        B, n, _, H, W = neighbours.shape
        flow, weight = self.to_flow(maps[self.level]).split((2 * n, n), 1)
        scale = W // flow.shape[-1]
        flow = scale * F.interpolate(flow, scale_factor=scale, mode="bilinear") if scale > 1 else flow
        moved = warp(neighbours.flatten(0, 1), flow.unflatten(1, (n, 2)).flatten(0, 1)).unflatten(0, (B, n))
        weight = F.interpolate(weight, scale_factor=scale, mode="nearest").softmax(1)
        warped = (moved * weight[:, :, None]).sum(1)
        return torch.lerp(own, warped, self.to_weight(maps[-1]).softmax(1)[:, 1:]), warped


def warp(frames, flow):
    """Sample frames [B, C, H, W] where each pixel points, flow [B, 2, H, W] in pixels (x, y); edges repeat."""
    H, W = flow.shape[-2:]
    x = torch.arange(W, device=flow.device) + flow[:, 0]
    y = torch.arange(H, device=flow.device)[:, None] + flow[:, 1]
    place = torch.stack([2 * x / max(1, W - 1) - 1, 2 * y / max(1, H - 1) - 1], -1)
    return F.grid_sample(frames, place, padding_mode="border", align_corners=True)
