"""The methods of the NeRV family: rows of a table that name their components, and the network that a row makes.

    t [B] --encoding--> code --stem--> [B, C0, h, w] --skip, then block, × stride each--> [B, Cn, H, W] --head--> frames

METHODS is Figure 2 of "How to Design and Train Your Implicit Neural Representation for Video Compression" (below: HTD) as data;
a method of your own is another row. Numbers are those of the published configurations, as ratios to C0, the channels of the
stem's map: so all widths follow from C0, and C0 follows from the number of parameters that is asked for (`plan`).
"""

import itertools
import math
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn as nn

from siblings import components as parts
from siblings.components import Plan


@dataclass
class Method:
    """A row: which components, and how parameters are spread over the blocks (HTD §3.1.2, "Other").

    The first block has expansion × C0 channels, each next one the last's by reduction, none less than least × C0.
    """

    encoding: type
    stem: object  # None: the code is the map
    block: object
    skip: object = None
    flow: bool = False
    expansion: float = 1.0
    reduction: tuple = (2.0, 2.0)  # up to 2.1 M parameters, and above: half-way between HTD's 1.5 M and 3 M
    least: float = 0.0
    kernels: tuple = (3, 3)  # of the blocks: the first one's, then two more each time up to the second number
    head: int = 1  # kernel of the last convolution
    grid: float = 8.5  # rows of the stem's map, about: 9 of 1080 or 720, 8 of 640
    levels: int = 5  # most blocks; beyond, strides of two join to fours
    multiple: int = 1  # of which channels are multiples, from the first block on
    lr: float = 5e-4  # the published peak learning rate


HNERV_STEM = partial(parts.conv_stem, kernel=1, act=nn.GELU)
INSTANCE, LAYER = (partial(parts.TimeSkip, norm=norm) for norm in ("instance", "layer"))
METHODS = {
    # NeRV-S of its repository: C0 = 26, expansion 1, no block with fewer than 96 channels.
    "nerv": Method(parts.Sinusoid, parts.mlp_stem, parts.nerv_block, least=96 / 26),
    # E-NeRV's Bunny configuration: C0 = 196, expansion 3, least 96.
    "enerv": Method(
        parts.Sinusoid, parts.TransformerStem, parts.enerv_block, INSTANCE,
        expansion=3, least=96 / 196,
    ),
    # HNeRV's repository, Bunny at 1.5 M: kernels 1, 3, 5, 5, …, reduction 1.2 from the first block on.
    "hnerv": Method(
        parts.Content, HNERV_STEM, parts.nerv_block,
        expansion=1 / 1.2, reduction=(1.2, 1.2), kernels=(1, 5), head=3, grid=2, lr=1e-3,
    ),
    # … and its NeRV baseline, the "NeRV [5]" of HTD: C0 about 54, reduction 2 from the first block on, least 12.
    "plain": Method(
        parts.Sinusoid, partial(parts.mlp_stem, hidden=False), parts.nerv_block,
        expansion=1 / 2, least=12 / 54, head=3, levels=4, lr=1e-3,
    ),
    # FFNeRV's repository, C0 = 48 and least 24, with the expansion that HTD takes at 1.5 M and 3 M (§4.1: 4, not 8).
    "ffnerv": Method(
        parts.TemporalGrid, None, parts.grouped_block, flow=True,
        expansion=4, least=0.5, multiple=8,
    ),
    # HiNeRV's Bunny configurations: reduction 2 after the first block, at most four levels.
    "hinerv": Method(
        parts.HierarchicalGrid, partial(parts.conv_stem, kernel=3), parts.convnext_block, parts.LocalGridSkip,
        grid=18, levels=4, lr=2e-3,
    ),
    # DNeRV's repository: HNeRV's decoder, and the difference.
    "diffnerv": Method(
        parts.ContentAndDifference, HNERV_STEM, parts.nerv_block, parts.DifferenceSkip,
        expansion=1 / 1.2, reduction=(1.2, 1.2), kernels=(1, 5), head=3, grid=2,
    ),
    # HTD §4.3: FFNeRV's blocks and grid, no stem, no flow; E-NeRV's skips with layer norm; reduction 1.2 at 1.5 M parameters
    # and 1.4 at 3 M; expansion 4. It does not say what is least, nor the learning rate: here nothing, and HNeRV's.
    "rnerv": Method(
        parts.TemporalGrid, None, parts.grouped_block, LAYER,
        expansion=4, reduction=(1.2, 1.4), multiple=8, lr=1e-3,
    ),
}  # fmt: skip
# A row of our own: RNeRV whose skips begin bright, and learn sooner.
METHODS["rnerv+"] = replace(METHODS["rnerv"], skip=partial(LAYER, bright=True))
# Two with one thing changed, for claims of HTD: what flow costs, and where parameters are best.
METHODS["ffnerv-flowless"] = replace(METHODS["ffnerv"], flow=False)
METHODS["rnerv-steep"] = replace(METHODS["rnerv"], reduction=(2.0, 2.0))


class Network(nn.Module):
    """One video: t [B], real-valued, 0 … T-1 -> frames [B, 3, H, W] in [-1, 1]."""

    def __init__(self, method, plan):
        super().__init__()
        self.plan, numbers = plan, range(len(plan.strides))
        self.encoding = method.encoding(plan)
        self.stem = method.stem(self.encoding.features, plan) if method.stem else nn.Identity()
        self.blocks = nn.ModuleList(method.block(i, plan, method.kernels) for i in numbers)
        self.skips = nn.ModuleList(method.skip(i, plan) for i in numbers) if method.skip else None
        self.time = parts.time_code(plan) if self.skips and isinstance(self.skips[0], parts.TimeSkip) else None
        self.head = parts.conv(plan.channels[-1], 3, method.head)
        self.flow = parts.Flow(plan) if method.flow else None

    def maps(self, t, clips=None):
        """The map after each block."""
        code, given = self.encoding(t, clips)
        if self.time:
            given = self.time(parts.sinusoid(t, self.plan.frames))
        x, maps = self.stem(code), []
        for i, block in enumerate(self.blocks):
            x = block(self.skips[i](x, t, given) if self.skips else x)
            maps.append(x)
        return maps

    def views(self, t, clips=None, neighbours=None):
        """All that a loss looks at: the frame first, before it is cut to size; with flow, then own and warped ones.

        clips: where an encoder sees the video, [B, 3, 3, H, W] of the frame before, itself and the one after, padded.
        neighbours: [B, 4, 3, H, W], the frames that flow moves.
        """
        maps = self.maps(t, clips)
        # Some of the papers have a sigmoid on [0, 1]: the same function, of twice the argument.
        own = torch.tanh(self.head(maps[-1]))
        if not self.flow:
            return [own]
        frame, warped = self.flow(maps, own, neighbours)
        return [frame, own, warped]

    def forward(self, t):
        neighbours = None
        if self.flow:
            around = t[:, None] + torch.tensor(parts.Flow.NEIGHBOURS, device=t.device)  # [B, 4]
            # Beyond the video's ends is black, as in FFNeRV's code.
            neighbours = -torch.ones(*around.shape, 3, *self.plan.padded, device=t.device)
            for place in around[(around >= 0) & (around <= self.plan.frames - 1)].unique():
                neighbours[around == place] = torch.tanh(self.head(self.maps(place[None])[-1]))
        return self.views(t, neighbours=neighbours)[0][..., : self.plan.height, : self.plan.width]

    def stored(self):
        """{name: tensor} of what decoding needs and a file holds: all but the encoders of frames."""
        return {name: x for name, x in self.state_dict(keep_vars=True).items() if "encoder" not in name}


def count(method, plan):
    """Parameters of a network as its file holds them, embeddings included; nothing is allocated."""
    with torch.device("meta"):
        return sum(x.numel() for x in Network(method, plan).stored().values())


def strides(height, width, rows, levels):
    """Of the blocks, largest first: a product that leaves about `rows` of the shorter side, and pads as little as it can."""
    best = (math.inf, [])
    for twos, threes, fives in itertools.product(range(13), (0, 1), (0, 1)):
        total = 2**twos * 3**threes * 5**fives
        short, padded = min(height, width) / total, math.prod(math.ceil(n / total) * total for n in (height, width))
        cost = 4 * math.log(padded / (height * width)) + abs(math.log(math.ceil(short) / rows)) + 0.05 * threes
        if total > 1:
            best = min(best, (cost, [5] * fives + [3] * threes + [2] * twos))
    found = best[1]
    while len(found) > levels and found.count(2) > 1:
        found = sorted([*found[:-2], 4], reverse=True)
    return found


def plan(method, size, frames, height, width):
    """The Plan with about `size` parameters: C0 first, then single layers by a step each until it is within half a percent.

    Where no step comes nearer (very small networks) it stays. ValueError where even the narrowest network is much larger.
    """
    steps = strides(height, width, method.grid, method.levels)
    reduction = method.reduction[size > 2.12e6]
    units = [2 if method.multiple > 1 else 1, *(method.multiple for _ in steps)]

    def made(channels):
        return Plan(frames, height, width, steps, channels)

    def off(channels):
        """How far from the size, as a share of it and with its sign."""
        return count(method, made(channels)) / size - 1

    def channels(c0):
        wanted = [c0, method.expansion * c0]
        for _ in steps[1:]:
            wanted.append(max(wanted[-1] / reduction, method.least * c0))
        return [max(1, round(c / unit)) * unit for c, unit in zip(wanted, units)]

    low, high = 1.0, 8192.0
    if (least := off(channels(low))) > 0.1:
        raise ValueError(f"{round(size * (1 + least)):,} parameters are the least for this method and video")
    for _ in range(12):  # to a third of a percent of C0
        middle = math.sqrt(low * high)
        low, high = (middle, high) if off(channels(middle)) < 0 else (low, middle)
    base, together = channels(low), 1  # layers that move at once
    while abs(off(base)) > (0.005 if together == 1 else 0.01) and together < 3:
        moves = [m for m in itertools.product((-1, 0, 1), repeat=len(base)) if 0 < sum(map(abs, m)) <= together]
        moved = [[c + sign * unit for c, sign, unit in zip(base, move, units)] for move in moves]
        nearest = min((m for m in moved if min(m) > 0), key=lambda m: abs(off(m)))
        base, together = (nearest, 1) if abs(off(nearest)) < abs(off(base)) else (base, together + 1)
    return made(base)
