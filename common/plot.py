"""Plots as PNGs, by matplotlib: dark ink on an opaque light card, which is readable on a light page and on a dark one.

matplotlib is imported when the first plot is drawn, so that the start of a script does not wait for it. Only Figure is used,
never pyplot, which keeps figures in memory and looks for a screen.
"""

import logging
import math

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of its font cache, and where it may not write one
PAPER, INK, FAINT = "#f6f8fa", "#24292f", "#d0d7de"
BLUE, RED, GREEN = "#0969da", "#b62324", "#1a7f37"  # the contrast of each with the card is 4.5 or more


def font_file():
    """The path of matplotlib's own font, DejaVu Sans, for text in pictures: Pillow's has no letter with an accent."""
    import matplotlib

    return f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"


def figure(count, columns=3, width=3.2, height=2.2):
    """A figure of `count` panels, of width × height inches each, so many in a row -> (figure, list of axes)."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = math.ceil(count / columns)
    fig = Figure((columns * width, rows * height), dpi=110, facecolor=PAPER, layout="constrained")
    fig.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    axes = list(fig.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[count:]:
        ax.remove()
    for ax in axes[:count]:
        ax.set_facecolor(PAPER)
        ax.grid(color=FAINT, linewidth=0.6)
        ax.set_axisbelow(True)
        ax.tick_params(which="both", colors=INK, labelsize=8, length=2)
        for side, spine in ax.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(INK)
        for text in (ax.xaxis.label, ax.yaxis.label, ax.title):
            text.set(color=INK, size=9)  # set_title takes a size of its own
    return fig, axes[:count]


def logarithmic(axis, ticks=None):
    """A logarithmic x or y axis with numbers as people write them, at the given ticks, or at those that its range asks for."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = getattr(axis.axes, f"get_{axis.axis_name}lim")()
    axis.set_major_locator(FixedLocator(ticks) if ticks else LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def curves(path, panels):
    """Line plots [(name of x, name of y, [(x, y), …])] as a PNG, a panel each.

    y is logarithmic where it spans a factor of 20. Points that are not finite are left out.
    """
    fig, axes = figure(len(panels))
    from matplotlib.ticker import EngFormatter

    for ax, (x_name, y_name, points) in zip(axes, panels):
        points = [(x, y) for x, y in points if math.isfinite(y)]
        ax.set(xlabel=x_name, ylabel=y_name)
        if not points:
            ax.text(0.5, 0.5, "no finite value", color=RED, size=9, ha="center", transform=ax.transAxes)
            ax.set(xticks=[], yticks=[])
            continue
        x, y = zip(*points)
        ax.plot(x, y, color=BLUE, linewidth=1.2, marker="o" if len(x) < 30 else "", markersize=3)
        if min(y) > 0 and max(y) > 20 * min(y):
            logarithmic(ax.yaxis)
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))  # 500, 20k, 2M
    fig.savefig(path)


def families(path, panels):
    """Panels [(name of x, name of y, {name of a line: [(x, y), …]})] as a PNG, with a legend; x is logarithmic.

    A line's colour and marker are the same in all panels.
    """
    fig, axes = figure(len(panels), width=4.6, height=3.6)
    names = list(dict.fromkeys(name for _, _, lines in panels for name in lines))
    for ax, (x_name, y_name, lines) in zip(axes, panels):
        ax.set(xlabel=x_name, ylabel=y_name)
        for name, points in lines.items():
            k = names.index(name)
            look = {"color": (BLUE, RED, GREEN, INK)[k % 4], "marker": "os^Dv"[k % 5], "linestyle": "-" if k < 4 else "--"}
            ax.plot(*zip(*points), label=name, linewidth=1.2, markersize=3, **look)
        logarithmic(ax.xaxis)
    axes[0].legend(fontsize=7, labelcolor=INK, facecolor=PAPER, edgecolor=FAINT)
    fig.savefig(path)
