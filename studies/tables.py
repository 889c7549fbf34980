"""The tables of results in README.md, docs/compare.md and docs/results.md: python -m studies.tables prints them.

They are in docs/results.csv, each figure with its interval, commit and data set if known. Those of the comparison
are means over runs in docs/compare.csv, which a test recomputes.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

from common import utils
from common.utils import option
from siblings.results import table


@dataclass
class Config:
    docs: str = option("what", "docs", "folder of results.csv")


def tables(docs):
    """{(pages, title): {row: {column: text}}}."""
    found = {}
    for one in csv.DictReader(Path(docs, "results.csv").read_text().splitlines()):
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
