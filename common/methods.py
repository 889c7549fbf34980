"""The methods of the NeRV family: rows of a table that name their components, and the network that a row makes.

    t [B] --encoding--> code --stem--> [B, C0, h, w] --blocks, each ×stride, with skips--> [B, Cn, H, W] --head--> frames

METHODS is Figure 2 of "How to Design and Train Your Implicit Neural Representation for Video Compression" (below: HTD) as data;
a method of your own is another row. Numbers are those of the published configurations, as ratios to C0, the channels of the
stem's map: so all widths follow from C0, and C0 follows from the number of parameters that is asked for (`plan`).
"""

import dataclasses
import functools
import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn

from common import components as parts
from common.components import Plan


@dataclass
class Method:
    """A row: which components, and how parameters are spread over the blocks (HTD §3.1.2, "Other").

    The first block has expansion × C0 channels, each next one the last's by reduction, none less than least × C0.
    """

    encoding: type
    stem: type
    block: type
    skip: type = None
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


HNERV_STEM = functools.partial(parts.ConvStem, kernel=1, act=True)
GRID_STEM = functools.partial(parts.ConvStem, kernel=3, act=False)
ENERV_SKIP = functools.partial(parts.TimeSkip, norm="instance")
RNERV_SKIP = functools.partial(parts.TimeSkip, norm="layer")
BRIGHT_SKIP = functools.partial(parts.TimeSkip, norm="layer", bright=True)
METHODS = {
    # NeRV-S of its repository: C0 = 26, expansion 1, no block with fewer than 96 channels.
    "nerv": Method(parts.Sinusoid, parts.MLPStem, parts.ShuffleBlock, least=96 / 26),
    # E-NeRV's Bunny configuration: C0 = 196, expansion 3, least 96.
    "enerv": Method(
        parts.Sinusoid, parts.TransformerStem, parts.ENeRVBlock, ENERV_SKIP,
        expansion=3, least=96 / 196,
    ),
    # HNeRV's repository, Bunny at 1.5 M: kernels 1, 3, 5, 5, …, reduction 1.2 from the first block on.
    "hnerv": Method(
        parts.Content, HNERV_STEM, parts.ShuffleBlock,
        expansion=1 / 1.2, reduction=(1.2, 1.2), kernels=(1, 5), head=3, grid=2, lr=1e-3,
    ),
    # … and its NeRV baseline, the "NeRV [5]" of HTD: C0 about 54, reduction 2 from the first block on, least 12.
    "plain": Method(
        parts.Sinusoid, parts.LinearStem, parts.ShuffleBlock,
        expansion=1 / 2, least=12 / 54, head=3, levels=4, lr=1e-3,
    ),
    # FFNeRV's repository, C0 = 48 and least 24, with the expansion that HTD takes at 1.5 M and 3 M (§4.1: 4, not 8).
    "ffnerv": Method(
        parts.TemporalGrid, parts.NoStem, parts.GroupedBlock, flow=True,
        expansion=4, least=0.5, multiple=8,
    ),
    # HiNeRV's Bunny configurations: reduction 2 after the first block, at most four levels.
    "hinerv": Method(
        parts.HierarchicalGrid, GRID_STEM, parts.HiNeRVBlock, parts.LocalGridSkip,
        grid=18, levels=4, lr=2e-3,
    ),
    # DNeRV's repository: HNeRV's decoder, and the difference.
    "diffnerv": Method(
        parts.ContentAndDifference, HNERV_STEM, parts.ShuffleBlock, parts.DifferenceSkip,
        expansion=1 / 1.2, reduction=(1.2, 1.2), kernels=(1, 5), head=3, grid=2,
    ),
    # HTD §4.3: FFNeRV's blocks and grid, no stem, no flow; E-NeRV's skips with layer norm; reduction 1.2 at 1.5 M parameters
    # and 1.4 at 3 M; expansion 4. It does not say what is least, nor the learning rate: here nothing, and HNeRV's.
    "rnerv": Method(
        parts.TemporalGrid, parts.NoStem, parts.GroupedBlock, RNERV_SKIP,
        expansion=4, reduction=(1.2, 1.4), multiple=8, lr=1e-3,
    ),
    # A row of our own: RNeRV whose skips begin bright, and learn sooner.
    "rnerv+": Method(
        parts.TemporalGrid, parts.NoStem, parts.GroupedBlock, BRIGHT_SKIP,
        expansion=4, reduction=(1.2, 1.4), multiple=8, lr=1e-3,
    ),
}  # fmt: skip
# Two of them with one thing changed, for claims of HTD: what flow costs, and where parameters are best.
METHODS["ffnerv-flowless"] = dataclasses.replace(METHODS["ffnerv"], flow=False)
METHODS["rnerv-steep"] = dataclasses.replace(METHODS["rnerv"], reduction=(2.0, 2.0))


class Network(nn.Module):
    """One video: t [B], real-valued, 0 … T-1 -> frames [B, 3, H, W] in [-1, 1]."""

    def __init__(self, method, plan):
        super().__init__()
        self.plan = plan
        self.encoding = method.encoding(plan)
        self.stem = method.stem(getattr(self.encoding, "features", 0), plan)
        numbers = range(len(plan.strides))
        self.blocks = nn.ModuleList(method.block(i, plan, method.kernels) for i in numbers)
        self.skips = nn.ModuleList(method.skip(i, plan) for i in numbers) if method.skip else [None] * len(numbers)
        self.time = parts.TimeSkip.shared(plan) if isinstance(self.skips[0], parts.TimeSkip) else None
        self.head = nn.Conv2d(plan.channels[-1], 3, method.head, padding=method.head // 2)
        self.flow = parts.Flow(plan) if method.flow else None

    def maps(self, t, clips=None):
        """The map after each block."""
        code, difference = self.encoding(t, clips), None
        if isinstance(code, tuple):
            code, difference = code
        x, maps = self.stem(code), []
        for block, skip in zip(self.blocks, self.skips):

            def joined(x, place, skip=skip):
                return skip(x, t, self.time, difference) if skip is not None and skip.place == place else x

            x = block.up(joined(x, "before"))
            x = joined(block.finish(joined(x, "inside")), "after")
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
        if self.flow is None:
            return [own]
        frame, warped = self.flow(maps, own, neighbours)
        return [frame, own, warped]

    def forward(self, t):
        neighbours = None
        if self.flow is not None:
            around = t[:, None] + torch.tensor(parts.Flow.NEIGHBOURS, device=t.device)  # [B, 4]
            seen = around[(around >= 0) & (around <= self.plan.frames - 1)].unique()
            # Beyond the video's ends is black, as in FFNeRV's code.
            neighbours = -torch.ones(len(t), around.shape[1], 3, *self.plan.padded, device=t.device)
            for place in seen:
                neighbours[around == place] = torch.tanh(self.head(self.maps(place[None])[-1]))
        frame = self.views(t, neighbours=neighbours)[0]
        return frame[..., : self.plan.height, : self.plan.width]

    def stored(self):
        """{name: tensor} of what decoding needs and a file holds: all but the encoders of frames."""
        return {name: x for name, x in self.state_dict(keep_vars=True).items() if "encoder" not in name}


def count(method, plan):
    """Parameters of a network as its file holds them, embeddings included; nothing is allocated."""
    with torch.device("meta"):
        return sum(x.numel() for x in Network(method, plan).stored().values())


def strides(height, width, rows, levels):
    """Of the blocks, largest first: a product that leaves about `rows` of the shorter side, and pads as little as it can."""
    best = None
    for power, three, five in itertools.product(range(13), (0, 1), (0, 1)):
        total = 2**power * 3**three * 5**five
        short, padded = min(height, width) / total, math.prod(math.ceil(n / total) * total for n in (height, width))
        cost = 4 * math.log(padded / (height * width)) + abs(math.log(math.ceil(short) / rows)) + 0.05 * three
        if total > 1 and (best is None or cost < best[0]):
            best = (cost, [5] * five + [3] * three + [2] * power)
    found = best[1]
    while len(found) > levels and found.count(2) > 1:
        found = sorted([*(s for s in found if s != 2), *[2] * (found.count(2) - 2), 4], reverse=True)
    return found


def plan(method, size, frames, height, width):
    """The Plan with about `size` parameters: C0 first, then single layers by a step each until it is within half a percent.

    Where no step comes nearer (very small networks) it stays. ValueError where even the narrowest network is much larger.
    """
    steps = strides(height, width, method.grid, method.levels)
    reduction = method.reduction[size > 2.12e6]

    def channels(c0):
        wanted = [c0, method.expansion * c0]
        for _ in steps[1:]:
            wanted.append(max(wanted[-1] / reduction, method.least * c0))
        units = [2 if method.multiple > 1 else 1, *(method.multiple for _ in steps)]
        return [max(1, round(c / unit)) * unit for c, unit in zip(wanted, units)], units

    def made(channels):
        return Plan(frames, height, width, steps, channels)

    low, high = 1.0, 8192.0
    if (least := count(method, made(channels(low)[0]))) > 1.1 * size:
        raise ValueError(f"{least:,} parameters are the least for this method and video")
    for _ in range(12):  # to a third of a percent of C0
        middle = math.sqrt(low * high)
        low, high = (middle, high) if count(method, made(channels(middle)[0])) < size else (low, middle)
    base, units = channels(low)
    off = abs(count(method, made(base)) / size - 1)
    together = 1  # layers that move at once
    while off > (0.005 if together == 1 else 0.01) and together < 3:
        moves = [m for m in itertools.product((-1, 0, 1), repeat=len(base)) if 0 < sum(map(abs, m)) <= together]
        moved = [[c + sign * unit for c, sign, unit in zip(base, move, units)] for move in moves]
        best, nearest = min((abs(count(method, made(m)) / size - 1), m) for m in moved if min(m) > 0)
        if best < off:
            off, base, together = best, nearest, 1
        else:
            together += 1
    return made(base)
