"""Progress of a loop: a bar on a terminal, and in a log file a line now and then."""

import sys
import time

from tqdm import tqdm

FIRST, LONGEST = 1.0, 30.0  # seconds without a line: at the start, so that speed is seen soon, and later


def bar(iterable=None, desc="", total=None, unit="it", disable=False, **kwargs):
    """A tqdm where stderr is a terminal, else Lines; either takes `for`, `with`, update, set_postfix_str and close.

    desc and unit name the work and one piece of it; kwargs: initial, pieces that were done before; unit_scale, for bytes;
    leave=False, not to leave a trace on a terminal.
    """
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    if sys.stderr.isatty():
        kwargs |= {"disable": disable, "dynamic_ncols": True, "mininterval": 1}
        return tqdm(iterable, desc, total, unit=unit, **kwargs)
    return Lines(iterable, desc, total, unit, disable, **kwargs)


class Lines:
    """Whole lines on stderr: at every tenth of the way, after 1, 2, 4, … and then every 30 seconds, and at the end.

    Carriage returns are for terminals: in a file, tqdm's make one line of megabytes.
    """

    def __init__(self, iterable, desc, total, unit, disable, initial=0, unit_scale=False, leave=True):
        self.iterable, self.total, self.disable, self.n = iterable, total, disable, initial
        self.start = self.last = time.monotonic()
        self.last_n, self.postfix = initial, ""
        self.look = {"initial": initial, "prefix": desc, "unit": unit, "unit_scale": unit_scale, "ncols": 0}

    def update(self, n=1):
        self.n += n
        now = time.monotonic()
        tenth = self.total and 10 * self.n // self.total > 10 * self.last_n // self.total
        waited = now - self.last
        if waited >= FIRST and (tenth or waited >= min(LONGEST, self.last - self.start)):
            self.show(now)

    def show(self, now):
        if not self.disable:
            text = tqdm.format_meter(self.n, self.total, now - self.start, postfix=self.postfix, **self.look)
            print(text, file=sys.stderr, flush=True)
        self.last, self.last_n = now, self.n

    def set_postfix_str(self, text):
        self.postfix = text

    def close(self):
        if self.n > self.last_n:
            self.show(time.monotonic())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def __iter__(self):
        with self:
            for item in self.iterable:
                yield item
                self.update()
