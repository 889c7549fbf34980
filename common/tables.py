"""Tables on standard output, as Markdown."""

import itertools


def table(header, rows):
    """Print rows as a Markdown table: those of a list in even columns, those of an iterator as they come."""
    known = rows if isinstance(rows, list) else [[" " * 12] * len(header)]
    widths = [max(len(str(row[i])) for row in [header, *known]) for i in range(len(header))]
    for row in itertools.chain([header, ["---"] * len(header)], rows):
        print("| " + " | ".join(f"{cell!s:<{width}}" for cell, width in zip(row, widths)) + " |", flush=True)
