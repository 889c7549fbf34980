"""Tables: on standard output, as Markdown, and in a CSV file that a study goes on with."""

import csv
import itertools
from pathlib import Path

from common.utils import UserError


def table(header, rows):
    """Print rows as a Markdown table: those of a list in even columns, those of an iterator as they come."""
    known = rows if isinstance(rows, list) else [[" " * 12] * len(header)]
    widths = [max(len(str(row[i])) for row in [header, *known]) for i in range(len(header))]
    for row in itertools.chain([header, ["---"] * len(header)], rows):
        print("| " + " | ".join(f"{cell!s:<{width}}" for cell, width in zip(row, widths)) + " |", flush=True)


def read_rows(path, columns):
    """The rows of a CSV file, {column: string}, none where there is no file; UserError where it has other columns."""
    if not Path(path).is_file():
        return []
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != columns:
            raise UserError(f"{path} is not of this version: it has other columns than {', '.join(columns)}")
        return list(reader)


def add_row(path, columns, row):
    """Append a row {column: value} to a CSV file, which is begun where there is none; what has no value is left empty.

    Its directory has to be there: studies make it before they train for hours.
    """
    new = not Path(path).is_file()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerow(row)
