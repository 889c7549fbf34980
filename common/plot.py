"""Plots as PNGs, dark on light. matplotlib is imported at the first plot; without pyplot, which keeps figures in memory."""

import logging
import math

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it logs building its font cache
PAPER, INK, FAINT = "#f6f8fa", "#24292f", "#d0d7de"
BLUE, RED, GREEN = "#0969da", "#b62324", "#1a7f37"  # contrast with PAPER: at least 4.5


def figure(count, columns=3, width=3.2, height=2.2):
    """A figure of `count` panels of width × height inches, in up to `columns` columns -> (figure, list of axes)."""
    from matplotlib.figure import Figure

    columns, rows = min(columns, count), math.ceil(count / min(columns, count))
    fig = Figure((columns * width, rows * height), dpi=110, facecolor=PAPER, layout="constrained")
    axes = list(fig.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[count:]:
        ax.remove()
    for ax in axes[:count]:
        ax.set(facecolor=PAPER, axisbelow=True)
        ax.grid(color=FAINT, linewidth=0.6)
        ax.tick_params(which="both", colors=INK, labelsize=8, length=2)
        ax.spines[["top", "right"]].set_visible(False)
        for text in (ax.xaxis.label, ax.yaxis.label, ax.title):
            text.set(color=INK, size=9)  # set_title has its own default size
    return fig, axes[:count]


def curves(path, panels):
    """Line plots [(x label, y label, [(x, y), …])] as a PNG; y is logarithmic if it spans a factor of more than 20."""
    fig, axes = figure(len(panels))
    for ax, (x_name, y_name, points) in zip(axes, panels):
        points = [(x, y) for x, y in points if math.isfinite(y)]
        ax.set(xlabel=x_name, ylabel=y_name)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1e3:g}k" if x >= 1e3 else f"{x:g}")
        ax.plot(*zip(*points), color=BLUE, linewidth=1.2, marker="o" if len(points) < 30 else "", markersize=3)
        if points and 0 < 20 * min(y for _, y in points) < max(y for _, y in points):
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter("")
    fig.savefig(path, format="png")
