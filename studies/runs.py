"""Helpers of the studies with many trainings: each run is a row of a CSV file, and is not repeated."""

import csv
import time

from common import checkpoints, utils
from common.utils import UserError
from siblings.results import add_row, read_rows


def once(path, columns, key, run):
    """The row {column: string} of a CSV file whose first columns are `key`; if missing, that of run() -> {column: value}."""
    utils.make_parent(path)
    wanted = dict(zip(columns, map(str, key)))
    if done := [row for row in read_rows(path, columns) if wanted.items() <= row.items()]:
        return done[0]
    start, about = time.time(), wanted | {"revision": utils.git_revision()}
    values = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in run().items()}
    add_row(path, columns, about | {"seconds": round(time.time() - start)} | values)
    return once(path, columns, key, run)  # as read from the file


def train(main, argv, out):
    """Run a training main(argv) to its end -> its checkpoint, the file `out`. UserError if it was stopped."""
    main([*map(str, argv), "--out", str(out)])
    ckpt = checkpoints.load(out, ("vae", "dit", "vin"), "this study")
    if ckpt["step"] < ckpt["config"]["steps"]:
        raise UserError("stopped: start again to resume the unfinished runs")
    return ckpt


def seconds_per_step(main, argv, out, least):
    """Time per step, over the second half of a trial, without preparation and compilation; trials grow until they take `least`.

    On a GPU, thirty steps are too short, as kernels are still being selected.
    """
    steps = 30
    utils.RunLog.EVERY = 10  # steps between rows of losses.csv
    while True:
        train(main, [*argv, "--steps", steps], out)
        with open(utils.log_directory(out) / "losses.csv", newline="") as file:
            rows = [(int(row["step"]), float(row["seconds"])) for row in csv.DictReader(file)]
        (first, start), (last, end) = rows[len(rows) // 2 - 1], rows[-1]
        if end > least and end > start:  # losses.csv has tenths of a second
            return (end - start) / (last - first)
        steps *= 10
