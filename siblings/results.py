"""Results of many runs: tables, CSV files that a study appends to, and line plots."""

import csv
from pathlib import Path

from common.utils import UserError


def table(header, rows):
    """Print rows as a Markdown table with aligned columns."""
    rows = [header, ["---"] * len(header), *rows]
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    for row in rows:
        print("| " + " | ".join(f"{cell!s:<{width}}" for cell, width in zip(row, widths)) + " |")


def read_rows(path, columns):
    """The rows of a CSV file, {column: string}; [] if there is no file. UserError if it has other columns."""
    if not Path(path).is_file():
        return []
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != columns:
            raise UserError(f"{path} is from another version: its columns are not {', '.join(columns)}")
        return list(reader)


def add_row(path, columns, row):
    """Append a row {column: value} to a CSV file, creating it if needed; a missing value is left empty."""
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if not file.tell():
            writer.writeheader()
        writer.writerow(row)


def families(path, panels):
    """Plot panels [(name of x, name of y, {name of a line: [(x, y), …]})] as a PNG, with a legend; x is logarithmic."""
    from matplotlib.figure import Figure  # pyplot would keep figures in memory
    from matplotlib.ticker import LogLocator, NullLocator

    fig = Figure((4.6 * len(panels), 3.6), dpi=110, layout="constrained")
    axes = fig.subplots(1, len(panels), squeeze=False)[0]
    names = list(dict.fromkeys(name for _, _, lines in panels for name in lines))  # each line has one style in all panels
    for ax, (x_name, y_name, lines) in zip(axes, panels):
        ax.set(xlabel=x_name, ylabel=y_name, xscale="log")
        ax.grid(alpha=0.5)
        for name, points in lines.items():
            k = names.index(name)
            ax.plot(*zip(*points), color=f"C{k}", marker="os^Dv"[k % 5], markersize=3, label=name)
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_locator(NullLocator())
    axes[0].legend(fontsize=7)
    fig.savefig(path)
