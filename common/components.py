"""The NeRV family in parts: position encodings, stems, blocks, skips, flow.

A network of the family takes the number of a frame and returns that frame. "How to Design and Train Your Implicit Neural
Representation for Video Compression" (below: HTD) takes its members apart so (§3.1.2, Fig. 2). common/methods.py puts them
together again. What is fixed in a published configuration is fixed here; what is a width there goes with C0, the channels of
the stem's map. t [B] are times in frames, real-valued, 0 … T-1.
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
    strides: list  # of the blocks; what comes out is a multiple of their product, and cut to the frame
    channels: list  # C0 of the stem's map, then of each block's

    @property
    def grid(self):
        """(h, w) of the stem's map."""
        total = math.prod(self.strides)
        return math.ceil(self.height / total), math.ceil(self.width / total)

    @property
    def padded(self):
        """(height, width) of what the network makes."""
        return tuple(n * math.prod(self.strides) for n in self.grid)


def rows(table, place):
    """Rows of a table [n, ...] at real places [B] -> [B, ...]: linear between two of them, the first and last repeated."""
    place = place.clamp(0, len(table) - 1)
    left = place.floor().long()
    part = (place - left).to(table).view(-1, *(1 for _ in table.shape[1:]))
    return torch.lerp(table[left], table[(left + 1).clamp(max=len(table) - 1)], part)


# -------------------------------------------------------------------------------------------------------------- encodings


class Sinusoid(nn.Module):
    """sin and cos of 1.25^i π t / T for i = 0 … 79 (NeRV, Chen et al. 2021, Eq. 2): t [B] in frames -> [B, 160]."""

    features = 160

    def __init__(self, plan):
        super().__init__()
        self.frames = plan.frames

    def forward(self, t, clips=None):
        # The highest frequency is 5e7: in float32 the angle would be noise, and not the same noise on every machine.
        powers = 1.25 ** torch.arange(80, dtype=torch.float64, device=t.device)
        angle = t.double()[:, None] / self.frames * math.pi * powers
        return torch.cat([angle.sin(), angle.cos()], -1).float()


class TemporalGrid(nn.Module):
    """Learned maps along time, at two rates, linear in between (FFNeRV, Lee et al. 2023, §3.2): t [B] -> [B, C0, h, w].

    One map per frame and one per two frames, with half of the channels each; no more than the 600 and 300 of the published
    configuration, so that a long video does not spend all of its parameters here.
    """

    def __init__(self, plan):
        super().__init__()
        half = plan.channels[0] // 2
        counts = (max(1, min(300, plan.frames // 2)), min(600, plan.frames))
        parts = zip(counts, (plan.channels[0] - half, half))
        self.tables = nn.ParameterList(nn.init.xavier_uniform_(torch.empty(n, c, *plan.grid)) for n, c in parts)
        self.frames, self.features = plan.frames, plan.channels[0]

    def forward(self, t, clips=None):
        return torch.cat([rows(table, t / self.frames * len(table)) for table in self.tables], 1)


class HierarchicalGrid(nn.Module):
    """HiNeRV's base grid (Kwan et al. 2023, §3.1, "base encoding"): t [B] -> [B, 12, h, w].

    As its configuration for Bunny: 40 maps of 4 channels and 20 of 8 for 132 frames, here 0.3 and 0.15 per frame.
    """

    features = 12

    def __init__(self, plan):
        super().__init__()
        counts = (max(1, round(0.3 * plan.frames)), max(1, round(0.15 * plan.frames)))
        self.tables = nn.ParameterList(
            nn.init.uniform_(torch.empty(n, c, *plan.grid), -1e-3, 1e-3) for n, c in zip(counts, (4, 8))
        )
        self.frames = plan.frames

    def forward(self, t, clips=None):
        return torch.cat([rows(table, (t + 0.5) / self.frames * len(table) - 0.5) for table in self.tables], 1)


class ChannelNorm(nn.Module):
    """Layer norm of maps [B, C, h, w] over their channels, each pixel by itself."""

    def __init__(self, channels=0):
        super().__init__()
        self.weight, self.bias = (
            (nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))) if channels else (None, None)
        )

    def forward(self, x):
        return F.layer_norm(x.movedim(1, -1), x.shape[1:2], self.weight, self.bias, 1e-6).movedim(-1, 1)


def instance_norm(x):
    """Each channel of maps [B, C, h, w] over its pixels; F.instance_norm refuses a single one, here it becomes 0."""
    var, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(var + 1e-5)


class ConvNeXt(nn.Module):
    """Depthwise convolution, layer norm, and two linear maps with a GELU between (Liu et al. 2022); added where sizes agree."""

    def __init__(self, ins, outs, hidden, kernel, affine):
        super().__init__()
        self.mix = nn.Conv2d(ins, ins, kernel, padding=kernel // 2, groups=ins, bias=affine)
        self.norm = ChannelNorm(ins if affine else 0)
        self.wide, self.narrow = nn.Conv2d(ins, hidden, 1, bias=affine), nn.Conv2d(hidden, outs, 1, bias=affine)

    def forward(self, x):
        y = self.narrow(F.gelu(self.wide(self.norm(self.mix(x)))))
        return x + y if x.shape == y.shape else y


class FrameEncoder(nn.Sequential):
    """Frames to small maps, a strided convolution and a ConvNeXt per level (HNeRV §3.1): [B, ins, H, W] -> [B, outs, h, w]."""

    def __init__(self, ins, outs, strides, narrow):
        dims = [ins, *(64 for _ in strides[:-1]), 64 if narrow else outs]
        levels = [
            nn.Sequential(nn.Conv2d(a, b, s, s), ChannelNorm(b), ConvNeXt(b, b, 4 * b, 7, True))
            for a, b, s in zip(dims, dims[1:], strides)
        ]
        super().__init__(*levels, *([nn.Conv2d(64, outs, 1)] if narrow else []))


class Content(nn.Module):
    """HNeRV's content-adaptive embedding (Chen et al. 2023, §3.1): an encoder sees the frame and makes its code [16, h, w].

    The codes are stored, the encoder is not. Between frames (t real) codes are linear.
    """

    features = 16

    def __init__(self, plan):
        super().__init__()
        self.encoder = FrameEncoder(3, 16, plan.strides, narrow=False)
        self.register_buffer("codes", torch.zeros(plan.frames, 16, *plan.grid))

    def encode(self, clips):
        """Frames with the one before and the one after [B, 3, 3, H, W] -> the codes of the middle ones, as a tuple."""
        return (self.encoder(clips[:, 1]),)

    @property
    def stored(self):
        return (self.codes,)

    def forward(self, t, clips=None):
        codes = self.encode(clips) if clips is not None else tuple(rows(table, t) for table in self.stored)
        return codes[0] if len(codes) == 1 else codes


class ContentAndDifference(Content):
    """Diff-NeRV's two embeddings (Zhao et al. 2023, "DNeRV", §3.1): content as HNeRV's, and differences to both neighbours.

    The second is two channels of a larger map: the frame by 24 in the paper, here by what of the strides comes nearest.
    """

    def __init__(self, plan):
        super().__init__(plan)
        level = self.level(plan)
        self.difference_encoder = FrameEncoder(6, 2, plan.strides[level:], narrow=True)
        size = (n * math.prod(plan.strides[:level]) for n in plan.grid)
        self.register_buffer("differences", torch.zeros(plan.frames, 2, *size))

    @staticmethod
    def level(plan):
        """The number of the block whose input has the size of the difference: 2 of strides 5, 4, 4, 3, 2."""
        return min(range(len(plan.strides)), key=lambda i: abs(math.log(math.prod(plan.strides[i:]) / 24)))

    def encode(self, clips):
        before, now, after = clips.unbind(1)
        return self.encoder(now), self.difference_encoder(torch.cat([now - before, after - now], 1))

    @property
    def stored(self):
        return self.codes, self.differences


# ------------------------------------------------------------------------------------------------------------------ stems


class MLPStem(nn.Module):
    """NeRV's: a hidden layer, then the whole map at once (§3.1; 512 hidden for C0 = 26): [B, 160] -> [B, C0, h, w]."""

    def __init__(self, features, plan):
        super().__init__()
        self.shape, hidden = (plan.channels[0], *plan.grid), max(8, round(512 / 26 * plan.channels[0]))
        self.hidden, self.out = nn.Linear(features, hidden), nn.Linear(hidden, math.prod(self.shape))

    def forward(self, code):
        return F.gelu(self.out(F.gelu(self.hidden(code)))).unflatten(1, self.shape)


class LinearStem(nn.Module):
    """One linear layer, the plain NeRV of the HNeRV paper: [B, 160] -> [B, C0, h, w]."""

    def __init__(self, features, plan):
        super().__init__()
        self.shape = (plan.channels[0], *plan.grid)
        self.out = nn.Linear(features, math.prod(self.shape))

    def forward(self, code):
        return F.gelu(self.out(code)).unflatten(1, self.shape)


class Transformer(nn.Module):
    """Attention and an MLP, without norms, as E-NeRV has it: [B, L, width] -> the same."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, inner = heads, heads * max(1, width // 4)  # heads of 64 for a width of 256
        self.qkv, self.out = nn.Linear(width, 3 * inner, bias=False), nn.Linear(inner, width)
        self.mlp = nn.Sequential(nn.Linear(width, max(1, width // 2)), nn.GELU(), nn.Linear(max(1, width // 2), width))

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)  # each [B, heads, L, inner / heads]
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class TransformerStem(nn.Module):
    """E-NeRV's (Li et al. 2022, §3.2): a map of (y, x) through a transformer, times a vector of t, through another.

    Its width is 256 for C0 = 196, and 512 hidden in the MLP of t. [B, 160] -> [B, C0, h, w].
    """

    def __init__(self, features, plan):
        super().__init__()
        self.grid, c0 = plan.grid, plan.channels[0]
        width = max(8, round(256 / 196 * c0))
        self.time = nn.Sequential(nn.Linear(features, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.GELU())
        self.place = nn.Sequential(nn.Linear(2 * features, width), nn.GELU())
        self.first, self.second = Transformer(width, 1), Transformer(width, 8)
        self.out = nn.Sequential(nn.Linear(width, c0), nn.GELU())

    def forward(self, code):
        h, w = self.grid
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        position = [
            Sinusoid(Plan(n, 0, 0, [], []))(axis.flatten().to(code.device)) for axis, n in ((y, h), (x, w))
        ]  # each [h * w, 160]
        place = self.first(self.place(torch.cat(position, -1))[None])  # [1, h * w, width]
        x = self.out(self.second(place * self.time(code)[:, None]))  # [B, h * w, C0]
        return x.transpose(1, 2).unflatten(2, self.grid)


class ConvStem(nn.Module):
    """One convolution: 3 × 3 on HiNeRV's grid; 1 × 1 and a GELU on HNeRV's codes. [B, features, h, w] -> [B, C0, h, w]."""

    def __init__(self, features, plan, kernel, act):
        super().__init__()
        self.conv, self.act = nn.Conv2d(features, plan.channels[0], kernel, padding=kernel // 2), act

    def forward(self, code):
        return F.gelu(self.conv(code)) if self.act else self.conv(code)


class NoStem(nn.Module):
    """FFNeRV's: the grid is the map."""

    def __init__(self, features, plan):
        super().__init__()

    def forward(self, code):
        return code


# ----------------------------------------------------------------------------------------------------------------- blocks
# A block has two halves, between which HiNeRV's skip comes in: up(x), to the new size and channels, and finish(x).


class ShuffleBlock(nn.Module):
    """NeRV's block (§3.1): convolution to stride² times the channels, pixel shuffle, GELU."""

    def __init__(self, i, plan, kernels):
        super().__init__()
        self.stride, (ins, outs) = plan.strides[i], plan.channels[i : i + 2]
        kernel = min(kernels[0] + 2 * i, kernels[1])
        self.conv = nn.Conv2d(ins, outs * self.stride**2, kernel, padding=kernel // 2)

    def up(self, x):
        return F.pixel_shuffle(self.conv(x), self.stride)

    def finish(self, x):
        return F.gelu(x)


class ENeRVBlock(ShuffleBlock):
    """E-NeRV's first block is two convolutions, through a quarter of the channels where it widens (§3.3); others are NeRV's."""

    def __init__(self, i, plan, kernels):
        super().__init__(i, plan, kernels)
        ins, outs = plan.channels[i : i + 2]
        if i == 0:
            middle = max(1, ins // 4) if ins <= outs else outs
            up, same = ((ins, middle), (middle, outs)) if ins <= outs else ((outs, outs), (ins, outs))
            self.conv = nn.Conv2d(up[0], up[1] * self.stride**2, 3, padding=1)
            self.same = nn.Conv2d(*same, 3, padding=1)
            self.widens = ins <= outs
        else:
            self.same = None

    def up(self, x):
        if self.same is None:
            return super().up(x)
        return self.same(super().up(x)) if self.widens else super().up(self.same(x))


class GroupedBlock(ShuffleBlock):
    """FFNeRV's compact block (§3.4): a convolution in 8 groups, then a 1 × 1 across them; strides of 5 have NeRV's block."""

    def __init__(self, i, plan, kernels):
        super().__init__(i, plan, kernels)
        self.across = None
        if self.stride < 5:
            ins, outs = plan.channels[i], plan.channels[i + 1] * self.stride**2
            self.conv = nn.Conv2d(ins, outs, 3, padding=1, groups=math.gcd(8, ins, outs))
            self.across = nn.Conv2d(outs, outs, 1)

    def up(self, x):
        x = self.conv(x)
        return F.pixel_shuffle(x if self.across is None else self.across(x), self.stride)


class HiNeRVBlock(nn.Module):
    """HiNeRV's block (§3.2): bilinear upsampling, then three ConvNeXt blocks without biases, of 4 times the channels; the last
    level has one, of the channels as they are. Frames are decoded whole: the paper's patches overlap to give the same."""

    def __init__(self, i, plan, kernels):
        super().__init__()
        self.stride, (ins, outs) = plan.strides[i], plan.channels[i : i + 2]
        depth, wide = (1, 1) if i == len(plan.strides) - 1 else (3, 4)
        sizes = [ins, *(outs for _ in range(depth))]
        self.layers = nn.Sequential(*(ConvNeXt(a, b, wide * b, 3, False) for a, b in zip(sizes, sizes[1:])))

    def up(self, x):
        return F.interpolate(x, scale_factor=self.stride, mode="bilinear")

    def finish(self, x):
        return self.layers(x)


# ------------------------------------------------------------------------------------------------------------------ skips
# `place` says where in a block a skip comes in. x [B, C, h, w], t [B] in frames, difference of ContentAndDifference or None.


class TimeSkip(nn.Module):
    """E-NeRV's (§3.4): what comes in is normalized, then scaled and shifted, channel by channel, by a linear map of t's code.

    The published code has instance norm; HTD (§3.1.2, §4.3) says layer norm, of which E-NeRV's own text leaves the axes open.
    The row says which. The code of t is shared: an MLP of 128, and in networks with few channels of four times C0. Scales begin
    near 0, as in E-NeRV's code, so that networks learn little at first, or with `bright` at GELU(1) = 0.84.
    """

    place = "before"

    def __init__(self, i, plan, norm, bright=False):
        super().__init__()
        self.to_scale = nn.Linear(self.features(plan), 2 * plan.channels[i])
        if bright:
            nn.init.ones_(self.to_scale.bias.data[: plan.channels[i]])
        self.norm = {"layer": ChannelNorm(), "instance": instance_norm}[norm]

    @staticmethod
    def features(plan):
        return min(128, 4 * plan.channels[0])

    @staticmethod
    def shared(plan):
        features = TimeSkip.features(plan)
        layers = nn.Linear(160, features), nn.GELU(), nn.Linear(features, features), nn.GELU()
        return nn.Sequential(Sinusoid(plan), *layers)

    def forward(self, x, t, shared, difference):
        scale, shift = F.gelu(self.to_scale(shared(t)))[:, :, None, None].chunk(2, 1)
        return self.norm(x) * scale + shift


class LocalGridSkip(nn.Module):
    """HiNeRV's (§3.1, "hierarchical encoding"): a learned grid in time, one vector for each of the stride² places in a cell.

    As published: one row per frame of 8 channels, halved from level to level, one per two of twice as many, one per four of
    four times as many; a linear map to the channels of the map, to which it is added after upsampling.
    """

    place = "inside"

    def __init__(self, i, plan):
        super().__init__()
        self.stride, self.frames = plan.strides[i], plan.frames
        base = max(1, 8 >> i)
        sizes = [(max(1, plan.frames >> k), base << k) for k in range(3)]
        self.tables = nn.ParameterList(nn.init.uniform_(torch.empty(n, self.stride**2, c), -1e-3, 1e-3) for n, c in sizes)
        self.to_map = nn.Linear(7 * base, plan.channels[i])

    def forward(self, x, t, shared, difference):
        code = [rows(table, (t + 0.5) / self.frames * len(table) - 0.5) for table in self.tables]
        cell = self.to_map(torch.cat(code, -1)).transpose(1, 2).unflatten(2, (self.stride, self.stride))  # [B, C, s, s]
        return x + cell.repeat(1, 1, x.shape[2] // self.stride, x.shape[3] // self.stride)


class DifferenceSkip(nn.Module):
    """Diff-NeRV's collaborative content unit (DNeRV §3.2): a gate between content and difference, as in a GRU.

    What a 1 × 1 convolution and a block make of the difference comes beside what the network's block at this size makes.
    """

    place = "after"

    def __init__(self, i, plan):
        super().__init__()
        self.here = i == ContentAndDifference.level(plan)
        if self.here:
            channels, ins = plan.channels[i + 1], plan.channels[i]
            self.embed, self.block = nn.Conv2d(2, ins, 1), ShuffleBlock(i, plan, (3, 3))
            self.block.conv = nn.Conv2d(ins, channels * plan.strides[i] ** 2, 3, padding=1)
            self.gates = nn.Conv2d(2 * channels, 2 * channels, 1)

    def forward(self, x, t, shared, difference):
        if not self.here:
            return x
        difference = self.block.finish(self.block.up(self.embed(difference)))
        new, gate = self.gates(torch.cat([x, difference], 1)).chunk(2, 1)
        return torch.lerp(x, torch.tanh(new), torch.sigmoid(gate))


# ------------------------------------------------------------------------------------------------------------------- flow


class Flow(nn.Module):
    """FFNeRV's flow-guided aggregation (§3.3): neighbouring frames, warped to this one, and the network's own, by weights.

    Flows and the weights of the four neighbours come from the map at which two blocks are left to go, the weights of own and
    warped from the last one.
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
    """Frames [B, C, H, W] seen from where each pixel points, flow [B, 2, H, W] in pixels (x, y); edges repeat."""
    H, W = flow.shape[-2:]
    x = torch.arange(W, device=flow.device) + flow[:, 0]
    y = torch.arange(H, device=flow.device)[:, None] + flow[:, 1]
    place = torch.stack([2 * x / max(1, W - 1) - 1, 2 * y / max(1, H - 1) - 1], -1)
    return F.grid_sample(frames, place, padding_mode="border", align_corners=True)
