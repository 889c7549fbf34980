"""XINC: contribution maps of a network's last convolution, which show what each kernel adds to each pixel.

XINC (Padmanabhan et al., CVPR 2024) treats each kernel of the head layer, one per input channel and colour, as a neuron. Its
map is what it alone adds to each pixel; the maps of a colour and the bias sum to that colour before the activation. "How to
Design and Train Your Implicit Neural Representation for Video Compression" (§4.5, §10) applies it to the whole NeRV family.
"""

import math

import numpy as np
import torch.nn.functional as F

DEAD = 0.01  # of the mean kernel's total contribution: less is near-dead. The papers state no threshold


def contributions(x, kernel, edges="constant"):
    """What each kernel adds to each pixel: x [B, in, H, W], kernel [out, in, k, k] -> [B, in, out, H, W].

    edges: "constant" if the convolution pads with zeros, "replicate" if it repeats the edge. The sum over neurons is the
    layer's output without its bias, of which XINC's code gives each neuron an equal share.
    """
    outs, ins, k, _ = kernel.shape
    x = F.pad(x, (k // 2,) * 4, mode=edges)
    return F.conv2d(x, kernel.transpose(0, 1).reshape(ins * outs, 1, k, k), groups=ins).unflatten(1, (ins, outs))


def explain(pairs, path, title, edges="constant"):
    """Measure the head layer over pairs of neighbouring frames, and draw it; return the figures as a dictionary.

    pairs: a list of pairs of (frame uint8 [H, W, 3], x [1, in, h, w], kernel [3, in, k, k]). path: of the PNG. Figures:
    neurons; near_dead, the share of them below DEAD of the mean; half, the smallest share of neurons that makes half of all
    contributions; motion, the correlation over pixels between the change of contributions and that of the frame.
    """
    totals, changes, moved, shown = 0, [], [], None
    for pair in pairs:
        maps = [contributions(x, kernel, edges)[0].float().cpu().numpy() for _, x, kernel in pair]
        maps = [m[..., : pair[0][0].shape[0], : pair[0][0].shape[1]] for m in maps]  # [neurons, colours, H, W]
        totals = totals + sum(np.abs(m).sum((2, 3)) for m in maps)
        now, then = (np.abs(m).sum((0, 1)) for m in maps)
        motion = np.abs(pair[1][0].astype(np.float32) - pair[0][0]).mean(-1)
        changes.append(np.abs(then - now).ravel())
        moved.append(motion.ravel())
        if shown is None or motion.mean() > shown[-1].mean():  # the pair with the most motion
            shown = pair[0][0], maps[0], now, np.abs(then - now), motion
    ordered = np.sort(totals.ravel())[::-1]
    half = np.searchsorted(np.cumsum(ordered), ordered.sum() / 2) + 1
    draw(path, title, shown, totals)
    return {
        "neurons": totals.size,
        "near_dead": float((totals < DEAD * totals.mean()).mean()),
        "half": float(half / totals.size),
        "motion": correlation(np.concatenate(changes), np.concatenate(moved)),
    }


def correlation(x, y):
    """Correlation of two arrays [n], or NaN if one is constant."""
    return float(np.corrcoef(x, y)[0, 1]) if x.std() * y.std() > 0 else math.nan


def draw(path, title, shown, totals):
    """Draw the frame, contributions and their change; below, neurons from the largest contribution to the smallest."""
    from matplotlib.figure import Figure  # here, as it takes a second; pyplot would keep figures in memory

    frame, maps, total, change, motion = shown
    pictures = [
        ("the frame", frame, {}),
        ("sum of the absolute contributions of all kernels", total, {"cmap": "magma"}),
        ("change of this sum to the next frame", change, {"cmap": "magma"}),
        ("change of the frame", motion, {"cmap": "magma"}),
    ]
    order = np.argsort(totals.ravel())[::-1]
    for rank in np.unique(np.geomspace(1, len(order), 8).round().astype(int)) - 1:
        neuron, colour = divmod(int(order[rank]), totals.shape[1])
        name = f"{('red', 'green', 'blue')[colour]} kernel, rank {rank + 1} of {len(order)}: "
        limit = max(np.abs(maps[neuron, colour]).max(), 1e-12)
        look = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
        pictures.append((f"{name}{100 * totals[neuron, colour] / totals.sum():.2g} %", maps[neuron, colour], look))
    rows, (H, W) = math.ceil(len(pictures) / 4), frame.shape[:2]
    fig = Figure((12.8, rows * min(6, 3.2 * H / W + 0.4)), dpi=110, layout="constrained")
    fig.suptitle(title, size=11)
    fig.supxlabel("lower rows: contributions of single kernels; red brightens, blue darkens; each on its own scale", size=9)
    axes = fig.subplots(rows, 4, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, (name, picture, look) in zip(axes.flat, pictures):
        ax.imshow(picture, interpolation="nearest", **look)
        ax.set_title(name, size=8)
    fig.savefig(path)
