"""Who paints which pixel: XINC's contribution maps of a network's last convolution.

XINC (Padmanabhan et al., CVPR 2024) treats each kernel of the head layer, one per input channel and colour, as a neuron. Its
map is what it alone adds to each pixel; all maps of a colour, and the bias, are that colour before the activation. "How to
Design and Train Your Implicit Neural Representation for Video Compression" (§4.5, §10) takes it to the whole NeRV family.
"""

import math

import numpy as np
import torch.nn.functional as F

from common import plot

DEAD = 0.01  # of the mean kernel's total contribution: less is near-dead. The papers name no threshold


def contributions(x, kernel, bias=None, edges="constant"):
    """What each kernel adds to each pixel: x [B, in, H, W], kernel [out, in, k, k] -> [B, in, out, H, W].

    edges: "constant" where the convolution pads with zeros, "replicate" where it repeats the edge. With a bias, each neuron
    gets an equal share of it, as in XINC's code: the sum over neurons is the layer's output. Without, maps are what the kernels
    themselves do.
    """
    outs, ins, k, _ = kernel.shape
    x = F.pad(x, (k // 2,) * 4, mode=edges)
    maps = F.conv2d(x, kernel.transpose(0, 1).reshape(ins * outs, 1, k, k), groups=ins).unflatten(1, (ins, outs))
    return maps if bias is None else maps + bias[:, None, None] / ins


def explain(pairs, path, title, edges="constant"):
    """Measure the head layer over pairs of neighbouring frames, and draw it; returns the figures as a dictionary.

    pairs: a list of two (frame uint8 [H, W, 3], x [1, in, h, w], kernel [3, in, k, k]) each. path: of the PNG. Figures:
    neurons; near_dead, the share of them below DEAD of the mean; half, the least share of neurons that makes half of all
    contributions; motion, the correlation over pixels between how much contributions change and how much the frame does.
    """
    totals, changes, moved, shown = 0, [], [], None
    for pair in pairs:
        maps = [contributions(x, kernel, None, edges)[0].float().cpu().numpy() for _, x, kernel in pair]
        maps = [m[..., : pair[0][0].shape[0], : pair[0][0].shape[1]] for m in maps]  # [neurons, colours, H, W]
        totals = totals + sum(np.abs(m).sum((2, 3)) for m in maps)
        now, then = (np.abs(m).sum((0, 1)) for m in maps)
        motion = np.abs(pair[1][0].astype(np.float32) - pair[0][0]).mean(-1)
        changes.append(np.abs(then - now).ravel())
        moved.append(motion.ravel())
        if shown is None or motion.mean() > shown[-1].mean():  # the pair in which most moves
            shown = pair[0][0], maps[0], now, np.abs(then - now), motion
    ordered = np.sort(totals.ravel())[::-1]
    half = np.searchsorted(np.cumsum(ordered), ordered.sum() / 2) + 1
    changes, moved = np.concatenate(changes), np.concatenate(moved)
    draw(path, title, shown, totals)
    return {
        "neurons": totals.size,
        "near_dead": float((totals < DEAD * totals.mean()).mean()),
        "half": float(half / totals.size),
        "motion": float(np.corrcoef(changes, moved)[0, 1]) if changes.std() * moved.std() > 0 else math.nan,
    }


def draw(path, title, shown, totals):
    """A picture of one frame: what it shows, who works where, what changes; below, neurons from the busiest to the idlest."""
    frame, maps, total, change, motion = shown
    rows = [
        ("the frame", frame, {}),
        ("all kernels together: where they add much", total, {"cmap": "magma"}),
        ("where that changes up to the next frame", change, {"cmap": "magma"}),
        ("where the picture changes", motion, {"cmap": "magma"}),
    ]
    order = np.argsort(totals.ravel())[::-1]
    for rank in np.unique(np.geomspace(1, len(order), 8).round().astype(int)) - 1:
        neuron, colour = divmod(int(order[rank]), totals.shape[1])
        name = f"{('red', 'green', 'blue')[colour]} kernel, rank {rank + 1} of {len(order)}: "
        limit = max(np.abs(maps[neuron, colour]).max(), 1e-12)
        look = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
        rows.append((f"{name}{100 * totals[neuron, colour] / totals.sum():.2g} %", maps[neuron, colour], look))
    fig, axes = plot.figure(len(rows), 4, height=min(6, 3.2 * frame.shape[0] / frame.shape[1] + 0.45))
    fig.suptitle(title, color=plot.INK, size=11)
    for ax, (name, picture, look) in zip(axes, rows):
        ax.imshow(picture, interpolation="nearest", **look)
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        ax.set_title(name, size=8, color=plot.INK)
    below = "lower rows: what single kernels add, red makes brighter, blue darker, each in a scale of its own"
    fig.supxlabel(below, color=plot.INK, size=9)
    fig.savefig(path)
