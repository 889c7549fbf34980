"""Tables: on standard output, as Markdown, and in a CSV file that a study goes on with."""

import csv
from pathlib import Path

from common.utils import UserError


def table(header, rows):
    """Print rows as a Markdown table in even columns."""
    rows = [header, ["---"] * len(header), *rows]
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    for row in rows:
        print("| " + " | ".join(f"{cell!s:<{width}}" for cell, width in zip(row, widths)) + " |")


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
    """Append a row {column: value} to a CSV file, which is begun where there is none; what has no value is left empty."""
    new = not Path(path).is_file()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerow(row)
