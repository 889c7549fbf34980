"""Who paints which pixel: XINC's contribution maps of a network's last convolution.

XINC (Padmanabhan et al., CVPR 2024) treats each kernel of the head layer, one per input channel and colour, as a neuron. Its
map is what it alone adds to each pixel; all maps of a colour, and the bias, are that colour before the activation. "How to
Design and Train Your Implicit Neural Representation for Video Compression" (§4.5, §10) takes it to the whole NeRV family.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import plot

DEAD = 0.01  # of the mean kernel's total contribution: less is near-dead. The papers name no threshold


def contributions(x, kernel, bias=None, edges="constant", stride=1):
    """What each kernel adds to each pixel: x [B, in, h, w], kernel [out, in, k, k] -> [B, neurons, colours, H, W].

    edges: "constant" where the convolution pads with zeros, "replicate" where it repeats the edge. stride: of a pixel shuffle
    after it; a neuron is then one input channel and one place in a stride × stride window, zero at all other places, and there
    are stride² as many of them and of pixels. With a bias, each neuron gets an equal share of it, as in XINC's code: the sum
    over neurons is the layer's output. Without, maps are what the kernels themselves do.
    """
    outs, ins, k, _ = kernel.shape
    x = F.pad(x, (k // 2,) * 4, mode=edges)
    maps = F.conv2d(x, kernel.transpose(0, 1).reshape(ins * outs, 1, k, k), groups=ins).unflatten(1, (ins, outs))
    if bias is not None:
        maps = maps + bias[:, None, None] / ins
    if stride == 1:
        return maps
    places = stride**2
    alone = torch.eye(places).to(maps)[:, None, :, None, None]  # of the places in a window, one after the other
    maps = maps.unflatten(2, (-1, places))[:, :, None] * alone  # [B, in, place, colours, place, h, w]
    return F.pixel_shuffle(maps.flatten(3, 4), stride).flatten(1, 2)


def explain(pairs, path, title, edges="constant", stride=1):
    """Measure the head layer over pairs of neighbouring frames, and draw it; returns the figures as a dictionary.

    pairs: a list of two (frame uint8 [H, W, 3], x [1, in, h, w], kernel [out, in, k, k]) each. path: of the PNG. Figures:
    neurons; near_dead, the share of them below DEAD of the mean; half, the least share of neurons that makes half of all
    contributions; motion, the correlation over pixels between how much contributions change and how much the frame does.
    """
    totals, changes, moved, shown = 0, [], [], None
    for pair in pairs:
        sums = []
        for frame, x, kernel in pair:
            size = np.abs(contributions(x, kernel, None, edges, stride)[0].float().cpu().numpy())  # [neurons, colours, H, W]
            size = size[..., : frame.shape[0], : frame.shape[1]]
            totals = totals + size.sum((2, 3))
            sums.append(size.sum((0, 1)))
        change = np.abs(sums[1] - sums[0])
        motion = np.abs(pair[1][0].astype(np.float32) - pair[0][0]).mean(-1)
        changes.append(change.ravel())
        moved.append(motion.ravel())
        if shown is None or motion.mean() > shown[3].mean():  # the pair in which most moves
            shown = (pair[0], sums[0], change, motion)
    ordered = np.sort(totals.ravel())[::-1]
    half = np.searchsorted(np.cumsum(ordered), ordered.sum() / 2) + 1
    changes, moved = np.concatenate(changes), np.concatenate(moved)
    figures = {
        "neurons": totals.size,
        "near_dead": float((totals < DEAD * totals.mean()).mean()),
        "half": float(half / totals.size),
        "motion": float(np.corrcoef(changes, moved)[0, 1]) if changes.std() * moved.std() > 0 else math.nan,
    }
    draw(path, title, shown, totals, edges, stride)
    return figures


def draw(path, title, shown, totals, edges, stride):
    """A picture of one frame: what it shows, who works where, what changes; below, neurons from the busiest to the idlest."""
    (frame, x, kernel), total, change, motion = shown
    maps = contributions(x, kernel, None, edges, stride)[0].float().cpu().numpy()[..., : frame.shape[0], : frame.shape[1]]
    order = np.argsort(totals.ravel())[::-1]
    ranks = np.unique(np.geomspace(1, len(order), 8).round().astype(int)) - 1
    height = 3.2 * frame.shape[0] / frame.shape[1] + 0.45
    fig, axes = plot.figure(4 + len(ranks), 4, height=min(6, height))
    fig.suptitle(title, color=plot.INK, size=11)
    rows = [
        ("the frame", frame, {}),
        ("all kernels together: where they add much", total, {"cmap": "magma"}),
        ("where that changes up to the next frame", change, {"cmap": "magma"}),
        ("where the picture changes", motion, {"cmap": "magma"}),
    ]
    for rank in ranks:
        neuron, colour = divmod(int(order[rank]), totals.shape[1])
        one = maps[neuron, colour]
        share = totals[neuron, colour] / totals.sum()
        name = ("red", "green", "blue")[colour] if totals.shape[1] == 3 else f"output {colour}"
        limit = max(np.abs(one).max(), 1e-12)
        rows.append((f"{name} kernel, rank {rank + 1} of {len(order)}: {100 * share:.2g} %", one,
                     {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}))  # fmt: skip
    for ax, (name, picture, kw) in zip(axes, rows):
        ax.imshow(picture, interpolation="nearest", **kw)
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        ax.set_title(name, size=8, color=plot.INK)
    fig.supxlabel(
        "lower rows: what single kernels add, red makes brighter, blue darker, each in a scale of its own",
        color=plot.INK,
        size=9,
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)
