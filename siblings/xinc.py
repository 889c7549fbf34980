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
    draw_neurons(path, title, shown, totals)
    return {
        "neurons": totals.size,
        "near_dead": float((totals < DEAD * totals.mean()).mean()),
        "half": float(half / totals.size),
        "motion": correlation(np.concatenate(changes), np.concatenate(moved)),
    }


def correlation(x, y):
    """Correlation of two arrays [n], or NaN if one is constant."""
    return float(np.corrcoef(x, y)[0, 1]) if x.std() * y.std() > 0 else math.nan


def painted(x, kernel, stride=1):
    """Sum of the absolute contributions of all kernels: x [B, in, h, w], kernel [out, in, k, k] -> [B, H, W].

    A pixel shuffle of `stride` after the layer, as in HyperNeRV, puts each kernel's map on every stride-th pixel (HTD §10.1).
    """
    return F.pixel_shuffle(contributions(x, kernel).abs().sum(1), stride).sum(1)


# Frames around a cut, each (chunk before or after it, index in the chunk); the second pair and the last are HTD's, Fig. 41.
PAIRS = {
    "across the cut": ((0, -1), (1, 0)),
    "next frame of a chunk": ((0, -2), (0, -1)),
    "first and last of a chunk": ((0, 0), (0, -1)),
    "first frames of two chunks": ((0, 0), (1, 0)),
}


def explain_cuts(chunks, path, title):
    """How contributions change between the end of a chunk and the start of the next, with its own weights; drawn to `path`.

    chunks: a list of (number of frames, 2 or more; look(number) -> (frame uint8 [H, W, 3], `painted` [H, W])). Returns {name of
    PAIRS: figures}, over all cuts: changed, the share of all contributions that changes; motion, its correlation over pixels
    with the change of the frame; still, its mean over pixels that change by less than one level of 255, over that of all.
    """
    found = {name: [] for name in PAIRS}
    for cut in zip(chunks, chunks[1:]):
        for name, ends in PAIRS.items():
            (one, before), (other, after) = (cut[k][1](number % cut[k][0]) for k, number in ends)
            moved = np.abs(other.astype(np.float32) - one).mean(-1)
            found[name].append((one, other, np.abs(after - before), moved, before.mean()))
    figures, most = {}, np.argmax([moved.mean() for *_, moved, _ in found["first frames of two chunks"]])
    for name, rows in found.items():
        changes, moved = (np.concatenate([row[k].ravel() for row in rows]) for k in (2, 3))
        still = changes[moved < 1].mean() / changes.mean() if (moved < 1).any() and changes.any() else math.nan
        changed = float(changes.mean() / np.mean([row[4] for row in rows]))
        figures[name] = {"changed": changed, "motion": correlation(changes, moved), "still": float(still)}
    shown, looks = {name: rows[most] for name, rows in found.items()}, [("", {}), ("the other frame", {})]
    for k, what in ((2, "contributions"), (3, "the picture")):  # one scale for all rows
        limit = max(np.percentile(row[k], 99.5) for row in shown.values())
        looks.append((f"change of {what}", {"cmap": "magma", "vmax": limit}))
    pictures = [(text or name, x, look) for name, row in shown.items() for x, (text, look) in zip(row, looks)]
    draw(path, title, pictures, width=2.2)
    return figures


def draw_neurons(path, title, shown, totals):
    """The frame, contributions and their change; below, neurons from the largest contribution to the smallest."""
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
    below = "lower rows: contributions of single kernels; red brightens, blue darkens; each on its own scale"
    draw(path, title, pictures, width=3.2, below=below)


def draw(path, title, pictures, width, below=""):
    """Draw pictures [(name, array [H, W] or [H, W, 3], options of imshow)], four per row, as a PNG."""
    from matplotlib.figure import Figure  # here, as it takes a second; pyplot would keep figures in memory

    H, W = pictures[0][1].shape[:2]
    rows = math.ceil(len(pictures) / 4)
    fig = Figure((4 * width, rows * min(6, width * H / W + 0.4)), dpi=110, layout="constrained")
    fig.suptitle(title, size=11)
    fig.supxlabel(below, size=9)
    axes = fig.subplots(rows, 4, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, (name, picture, look) in zip(axes.flat, pictures):
        ax.imshow(picture, interpolation="nearest", **look)
        ax.set_title(name, size=8)
    fig.savefig(path)
