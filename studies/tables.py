"""The tables of results in README.md, docs/compare.md and docs/results.md: python -m studies.tables prints them.

docs/compare.csv has the runs of studies.compare, docs/results.csv what no file of a run has: figures of evaluate.py's reports
and of studies that are gone, each with its interval, commit and data set where they are known.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from common import utils
from common.utils import option
from siblings.results import table

# The comparison: what the method, learning rate and settings of a row's runs contain, and of a column's.
ROWS = {
    "NeRV-Diffusion, the paper's decoder (replicate padding)": ("ours 2 sprites", "--token-dim 64 --lpips"),
    "… with a shared basis (not the paper's)": ("ours 1 sprites", "--pictures"),  # as the option was called
    "frame-wise latent diffusion, Latte's shape": ("frames 4 sprites",),
    "diffusion of space-time patches of pixels": ("pixels 4 sprites",),
}
COLUMNS = {  # column -> (column of compare.csv, digits, settings)
    "latent size": ("numbers", 0, "| 12 min, 0.6, bf16 on"),
    "12 minutes, three seeds": ("gFVD", 0, "| 12 min, 0.6, bf16 on"),
    "an hour, one seed": ("gFVD", 0, "| 60 min, 0.6, bf16 on"),
    "seconds to sample a clip": ("seconds a clip", 2, "| 12 min, 0.6, bf16 on"),
}


@dataclass
class Config:
    docs: str = option("what", "docs", "folder of compare.csv and results.csv")


def measured(runs, words, name, digits):
    """A column's mean (least to most) over those runs that have all words."""
    found = [run for run in runs if all(word in f"{run['method']} {run['lr']} {run['settings']}" for word in words)]
    if not found:
        return "not run"
    values = [float(run[name]) for run in found]
    middle, low, high = (f"{value:,.{digits}f}" for value in (mean(values), min(values), max(values)))
    return f"{middle} ({low} to {high})" if name == "gFVD" and len(values) > 1 else middle


def tables(docs):
    """{(pages, title): {row: {column: text}}}."""
    runs, results = (list(csv.DictReader(Path(docs, name).read_text().splitlines())) for name in ("compare.csv", "results.csv"))
    comparison = {row: {} for row in ROWS}
    for column, (name, digits, more) in COLUMNS.items():
        texts = {row: measured(runs, [*words, more], name, digits) for row, words in ROWS.items()}
        numbers = [text.split()[0] for text in texts.values() if text != "not run"]
        least = min(numbers, key=float) if name != "numbers" else None  # the best of a column is bold
        for row, text in texts.items():
            comparison[row][column] = text.replace(least, f"**{least}**", 1) if text.split()[0] == least else text
    found = {("README.md, docs/compare.md", "gFVD after equal time"): comparison}
    for one in results:
        text = f"{one['value']}{one['unit']}" + (f" ({one['low']} to {one['high']})" if one["low"] else "")
        found.setdefault((one["page"], one["table"]), {}).setdefault(one["row"], {})[one["column"]] = text
    return found


def main():
    config = utils.parse_options(Config, __doc__)
    for (page, title), rows in tables(config.docs).items():
        print(f"\n{page}: {title}\n")
        columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
        table(["", *columns], [[row, *(cells.get(column, "") for column in columns)] for row, cells in rows.items()])


if __name__ == "__main__":
    utils.run(main)
