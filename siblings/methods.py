"""The methods of the NeRV family: rows of a table that name their components, and the network built from a row.

    t [B] --encoding--> code --stem--> [B, C0, h, w] --skip, then block, × stride each--> [B, Cn, H, W] --head--> frames

METHODS is Figure 2 of "How to Design and Train Your Implicit Neural Representation for Video Compression" (below: HTD) as data;
add a row for a method of your own. Numbers are those of the published configurations, as ratios to C0, the channels of the
stem's map: all widths follow from C0, and C0 follows from the requested number of parameters (`plan`).
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
    """A row: which components, and how parameters are distributed over the blocks (HTD §3.1.2, "Other").

    The first block has expansion × C0 channels; each next one divides them by reduction, down to least × C0. A pair holds the
    values up to 2.1 M parameters and above: the boundary is half-way between HTD's 1.5 M and 3 M.
    """

    encoding: type  # None: the sinusoid of time
    stem: object  # None: the code is the map
    block: object
    skip: object = None
    flow: bool = False
    expansion: float = 1.0
    reduction: object = 2.0
    least: object = 0.0
    kernels: tuple = (3, 3)  # of the blocks: the first one's, then two more per block up to the second number
    head: int = 1  # kernel of the last convolution
    sigmoid: bool = False  # output sigmoid on [0, 1], else tanh on [-1, 1]: the same function, of twice the argument
    grid: float = 8.5  # rows of the stem's map, about: 9 of 1080 or 720, 8 of 640
    levels: int = 5  # maximum number of blocks; beyond it, strides of two merge into fours
    multiple: int = 1  # divisor of the channels, from the first block on
    zero_biases: bool = False  # initialization
    lr: float = 5e-4  # the published peak learning rate


HNERV = {"expansion": 1 / 1.2, "reduction": 1.2, "kernels": (1, 5), "head": 3, "grid": 2}
CODES = partial(parts.conv_stem, kernel=1)
METHODS = {
    # NeRV-S of its repository: C0 = 26, expansion 1, no block with fewer than 96 channels.
    "nerv": Method(None, parts.mlp_stem, parts.nerv_block, least=96 / 26),
    # E-NeRV's Bunny configuration: C0 = 196, expansion 3, least 96.
    "enerv": Method(None, parts.TransformerStem, parts.enerv_block, parts.TimeSkip,
                    expansion=3, least=96 / 196, sigmoid=True),
    # HNeRV's repository, Bunny at 1.5 M: kernels 1, 3, 5, 5, …, reduction 1.2 from the first block on.
    "hnerv": Method(parts.Content, partial(CODES, act=nn.GELU), parts.nerv_block, **HNERV, lr=1e-3),
    # … and its NeRV baseline, the "NeRV [5]" of HTD: C0 about 54, least 12.
    "plain": Method(None, partial(parts.mlp_stem, hidden=False), parts.nerv_block,
                    expansion=1 / 2, least=12 / 54, head=3, levels=4, lr=1e-3),
    # FFNeRV's repository, C0 = 48 and least 24, with HTD's expansion at 1.5 M and 3 M (§4.1: 4, not 8).
    "ffnerv": Method(parts.TemporalGrid, None, parts.grouped_block, flow=True, expansion=4, least=0.5, multiple=8),
    # HiNeRV's Bunny configurations: reduction 2 after the first block, at most four levels.
    "hinerv": Method(parts.HierarchicalGrid, partial(parts.conv_stem, kernel=3), parts.convnext_block, parts.LocalGridSkip,
                     grid=18, levels=4, sigmoid=True, zero_biases=True, lr=2e-3),
    # DNeRV: HNeRV's decoder, with the difference.
    "diffnerv": Method(parts.ContentAndDifference, CODES, parts.nerv_block, parts.DifferenceSkip, **HNERV),
    # RNeRV as HTD releases it (configs/overrides): E-NeRV with FFNeRV's grid and no stem; C0 = 12 and least 20 at 1.5 M
    # parameters, 24 and 12 at 3 M. Its command leaves the learning rate at 1e-4; here it is HNeRV's.
    "rnerv": Method(parts.TemporalGrid, None, parts.enerv_block, parts.TimeSkip,
                    expansion=3, least=(20 / 12, 12 / 24), head=3, sigmoid=True, lr=1e-3),
    # … and as its §4.3 has it: FFNeRV's blocks, reduction 1.2 at 1.5 M and 1.4 at 3 M, expansion 4. It does not state `least`.
    "rnerv-text": Method(parts.TemporalGrid, None, parts.grouped_block, parts.TimeSkip,
                         expansion=4, reduction=(1.2, 1.4), multiple=8, head=3, sigmoid=True, lr=1e-3),
}  # fmt: skip
# Ours: skips that start bright and learn faster. For claims of HTD: the cost of flow, and where parameters help most.
METHODS["rnerv+"] = replace(METHODS["rnerv"], skip=partial(parts.TimeSkip, bright=True))
METHODS["ffnerv-flowless"] = replace(METHODS["ffnerv"], flow=False)
METHODS["rnerv-steep"] = replace(METHODS["rnerv-text"], reduction=2.0)
# One column at a time changed from rnerv (HTD §4.2, Figs. 5 to 7); HiNeRV's blocks rely on the upsampling of its skips.
COMPONENTS = {
    "rnerv-mlp": {"encoding": None, "stem": parts.mlp_stem},
    "rnerv-transformer": {"encoding": None, "stem": parts.TransformerStem},
    "rnerv-hierarchical": {"encoding": parts.HierarchicalGrid, "stem": partial(parts.conv_stem, kernel=3)},
    "rnerv-content": {"encoding": parts.Content, "stem": partial(CODES, act=nn.GELU)},
    "rnerv-nerv-block": {"block": parts.nerv_block},
    "rnerv-grouped-block": {"block": parts.grouped_block, "multiple": 8},
    "rnerv-hinerv-block": {"block": parts.convnext_block, "skip": parts.LocalGridSkip},
    "rnerv-skipless": {"skip": None},
    "rnerv-flow": {"flow": True},
    "rnerv-kernels": {"kernels": (1, 5)},
    "rnerv-flat": {"reduction": 1.2},
}
ALL = METHODS | {name: replace(METHODS["rnerv"], **changed) for name, changed in COMPONENTS.items()}


class Network(nn.Module):
    """Network of one video: t [B], real-valued, 0 … T-1 -> frames [B, 3, H, W] in [-1, 1]."""

    def __init__(self, method, plan):
        super().__init__()
        self.plan, self.sigmoid, numbers = plan, method.sigmoid, range(len(plan.strides))
        self.encoding = method.encoding(plan) if method.encoding else None
        self.stem = method.stem(getattr(self.encoding, "features", 160), plan) if method.stem else nn.Identity()
        self.blocks = nn.ModuleList(method.block(i, plan, method.kernels) for i in numbers)
        self.skips = nn.ModuleList(method.skip(i, plan) for i in numbers) if method.skip else None
        width = parts.time_features(plan)
        self.time = parts.mlp(160, width, width) if self.skips and isinstance(self.skips[0], parts.TimeSkip) else None
        self.head = parts.conv(plan.channels[-1], 3, method.head)
        self.flow = parts.Flow(plan) if method.flow else None
        if method.zero_biases:
            [nn.init.zeros_(x) for name, x in self.named_parameters() if name.endswith("bias")]

    def maps(self, t, clips=None):
        """The map after each block."""
        time = parts.sinusoid(t, self.plan.frames)
        code, given = self.encoding(t, clips) if self.encoding else (time, None)
        given = self.time(time) if self.time else given
        x, maps = self.stem(code), []
        for i, block in enumerate(self.blocks):
            x = block(self.skips[i](x, t, given) if self.skips else x)
            maps.append(x)
        return maps

    def frame(self, x):
        """The last map -> the network's own frame [B, 3, H, W], before aggregation."""
        return torch.tanh(self.head(x) / 2 if self.sigmoid else self.head(x))

    def views(self, t, clips=None, neighbours=None):
        """All outputs for a loss: the frame first, before cropping; with flow, then own and warped ones.

        clips: for encoders, as in Content.encode. neighbours: [B, 4, 3, H, W], the frames that flow warps.
        """
        own = self.frame((maps := self.maps(t, clips))[-1])
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
                neighbours[around == place] = self.frame(self.maps(place[None])[-1])
        return self.views(t, neighbours=neighbours)[0][..., : self.plan.height, : self.plan.width]

    def stored(self):
        """{name: tensor} of all that decoding needs and a file holds: everything but the encoders of frames."""
        return {name: x for name, x in self.state_dict(keep_vars=True).items() if "encoder" not in name}


def count(method, plan, codes=False):
    """Parameters of a network, without allocating it, nor counting the codes of frames, as in HTD's Table 5: for 600 frames of
    1080 rows, DNeRV's codes exceed its network of 1.5 M."""
    with torch.device("meta"):
        stored = Network(method, plan).stored().values()
    return sum(x.numel() for x in stored if codes or isinstance(x, nn.Parameter))


def strides(height, width, rows, levels):
    """Strides of the blocks, largest first, whose product leaves about `rows` of the shorter side, with little padding."""
    if (height, rows) == (1080, 2):
        return [5, 3, 2, 2, 2]  # HNeRV's and HTD's, with codes of 9 × 16: a product that leaves two rows pads a fifth of them
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
    """The Plan with about `size` parameters: C0 first, then single layers change until it is within 0.5 %, or pairs until it is
    within 1 %. It stops early if no change brings it nearer (very small networks). ValueError if the narrowest network is much
    larger."""
    steps = strides(height, width, method.grid, method.levels)
    reduction, least = (x[size > 2.12e6] if isinstance(x, tuple) else x for x in (method.reduction, method.least))
    units = [2 if method.multiple > 1 else 1, *(method.multiple for _ in steps)]

    def off(channels):
        """Signed relative deviation from the size."""
        return count(method, Plan(frames, height, width, steps, channels)) / size - 1

    def channels(c0):
        wanted = [c0, method.expansion * c0]
        for _ in steps[1:]:
            wanted.append(max(wanted[-1] / reduction, least * c0))
        return [max(1, round(c / unit)) * unit for c, unit in zip(wanted, units)]

    low, high = 1.0, 8192.0
    if (beyond := off(channels(low))) > 0.1:
        raise ValueError(f"{round(size * (1 + beyond)):,} parameters are the minimum for this method and video")
    for _ in range(12):  # to a third of a percent of C0
        middle = math.sqrt(low * high)
        low, high = (middle, high) if off(channels(middle)) < 0 else (low, middle)
    base, together = channels(low), 1  # layers that change at once
    while abs(off(base)) > 0.005 * together and together < 3:
        moves = [m for m in itertools.product((-1, 0, 1), repeat=len(base)) if 0 < sum(map(abs, m)) <= together]
        moved = [[c + sign * unit for c, sign, unit in zip(base, move, units)] for move in moves]
        nearest = min((m for m in moved if min(m) > 0), key=lambda m: abs(off(m)))
        base, together = (nearest, 1) if abs(off(nearest)) < abs(off(base)) else (base, together + 1)
    return Plan(frames, height, width, steps, base)
