"""What both stages share and no reader needs on a first pass: options, checkpoints, the log of a run, error messages.

The checkpoint format lives here and nowhere else. A checkpoint is one torch.save'd dictionary of tensors, numbers and
strings, so that it loads with weights_only=True and never executes code:

    format   "nerv-diffusion 1"
    stage    "vae" or "dit"
    config   the settings of the script that wrote it, {name: value}
    classes  the names of the classes; a label is an index into this list
    model    the parameters and buffers of the stage's network; each stage adds its own entries beside it
"""

import argparse
import contextlib
import csv
import dataclasses
import math
import os
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

FORMAT = "nerv-diffusion 1"


class UserError(Exception):
    """Something the person at the keyboard can mend: shown as one line, exit status 2, no traceback."""


def run(main):
    """Call a script's main() and turn a UserError into one line on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        for bar in list(tqdm._instances):  # the message gets a line of its own
            bar.close()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


# ---------------------------------------------------------------------------------------------------------------- options


def option(group, default, help, **kwargs):
    """A dataclass field that is also a command-line option; kwargs go to argparse (choices, nargs, metavar)."""
    metadata = {"group": group, "help": help, **kwargs}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show the default of each option, and the description as it is written."""


def check_positive(config, *names):
    """UserError for the first of the named settings that is not positive."""
    for name in names:
        if getattr(config, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: it must be positive")


def parse_options(cls, description, presets=None, argv=None):
    """Command line -> an instance of the dataclass cls, options grouped in --help with their defaults.

    presets(argparse.Namespace) -> {name: value} may change the defaults once the options it looks at (--preset and
    --dataset, say) are known; --help then shows the defaults of the preset that was asked for.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter, add_help=False)
    groups = {}
    for f in dataclasses.fields(cls):
        kw = dict(f.metadata)
        group = kw.pop("group")
        default = f.default_factory() if f.default is dataclasses.MISSING else f.default
        if isinstance(default, bool):
            kw["action"] = argparse.BooleanOptionalAction
        elif default is not None and not isinstance(default, list):
            kw["type"] = type(default)
        group = groups.setdefault(group, parser.add_argument_group(group))
        group.add_argument("--" + f.name.replace("_", "-"), default=default, **kw)
    if presets:
        known, _ = parser.parse_known_args(argv)
        parser.set_defaults(**presets(known))
    parser.add_argument("-h", "--help", action="help", help="show this message and exit")
    return cls(**vars(parser.parse_args(argv)))


def pick_device(name):
    """ "auto" -> the first CUDA device where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name} is not available here: use --device cpu, or leave it out") from None
    return torch.device(name)


def autocast(device, bf16):
    """bf16 "auto" | "on" | "off" -> the autocast context: auto is on where the hardware multiplies bfloat16 natively."""
    native = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16 == "on" or (bf16 == "auto" and native))


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up, then cosine decay to zero (§A.1)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ------------------------------------------------------------------------------------------------------------ checkpoints


def make_parent(path):
    """Make the directory that path is to be written into, before hours of work depend on it."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def save_checkpoint(path, **content):
    """Write a checkpoint, first beside it and then renamed, so that an interrupt never leaves half a file."""
    path = Path(path)
    make_parent(path)
    part = path.with_name(path.name + ".part")
    torch.save({"format": FORMAT, **content}, part)
    os.replace(part, path)


def load_checkpoint(path, stage, made_by):
    """Read a checkpoint of the given stage, or one of several, onto the CPU; made_by names the command that writes one."""
    if not Path(path).is_file():
        raise UserError(f"there is no checkpoint {path}: train one with `{made_by}`, or name another")
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # what a foreign file makes the unpickler raise depends on its first bytes
        raise UserError(f"{path} is not a checkpoint, or a damaged one: train it again with `{made_by}`") from None
    if not isinstance(ckpt, dict) or ckpt.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this program: train one with `{made_by}`")
    if ckpt["stage"] not in (stage if isinstance(stage, tuple) else (stage,)):
        raise UserError(f"{path} is a {ckpt['stage']} checkpoint, and a {stage} one is needed: train it with `{made_by}`")
    return ckpt


@contextlib.contextmanager
def fitting_checkpoint():
    """Turn what goes wrong when a network is built from a checkpoint of another configuration into a UserError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the checkpoint is of another configuration than this code makes, train it again: {reason}") from None


# ------------------------------------------------------------------------------------------------------------- run's log


class RunLog:
    """Progress bar, losses.csv and losses.png of one training, in one directory.

    `log(step, loss=…, …)` takes 0-d tensors as they are; they are read only every `every` steps, so that a GPU is not made
    to wait. A row of the CSV is the mean over the steps since the last row.
    """

    def __init__(self, directory, steps, every):
        self.directory, self.every = Path(directory), every
        self.directory.mkdir(parents=True, exist_ok=True)
        self.bar = tqdm(total=steps, desc=self.directory.name, unit="step", dynamic_ncols=True, mininterval=1)
        self.rows, self.pending, self.start = [], [], time.time()

    def log(self, step, **values):
        self.pending.append({k: v.detach() if torch.is_tensor(v) else v for k, v in values.items()})
        self.bar.update()
        if (step + 1) % self.every == 0 or step + 1 == self.bar.total:
            row = {"step": step + 1, "seconds": round(time.time() - self.start, 1)}
            for key in values:
                row[key] = sum(float(p[key]) for p in self.pending) / len(self.pending)
            self.pending = []
            self.rows.append(row)
            self.bar.set_postfix_str(" ".join(f"{k} {v:.4g}" for k, v in row.items() if k not in ("step", "seconds")))

    def write(self):
        """losses.csv and losses.png as of now."""
        if not self.rows:
            return
        with open(self.directory / "losses.csv", "w", newline="") as f:
            writer = csv.DictWriter(f, self.rows[0])
            writer.writeheader()
            writer.writerows(self.rows)
        steps = [r["step"] for r in self.rows]
        curves = {k: [r[k] for r in self.rows] for k in self.rows[0] if k not in ("step", "seconds")}
        plot(self.directory / "losses.png", steps, curves)

    def close(self):
        self.write()
        self.bar.close()


def plot(path, x, curves):
    """Line plots below each other, one for each of curves {name: values}, with the range of each axis, as a PNG."""
    width, height, left, top = 720, 150, 90, 24
    image = Image.new("RGB", (width, (height + top + 20) * len(curves)), "white")
    draw = ImageDraw.Draw(image)
    for i, (name, values) in enumerate(curves.items()):
        y0 = i * (height + top + 20) + top
        finite = [v for v in values if math.isfinite(v)] or [0]
        low, high = min(finite), max(finite)
        span_x, span_y = max(x[-1] - x[0], 1), (high - low) or 1
        draw.rectangle([left, y0, width - 10, y0 + height], outline="#bbbbbb")
        draw.text((left, y0 - 16), name, fill="black")
        draw.text((4, y0), f"{high:.4g}", fill="black")
        draw.text((4, y0 + height - 12), f"{low:.4g}", fill="black")
        draw.text((left, y0 + height + 3), f"step {x[0]}", fill="black")
        draw.text((width - 80, y0 + height + 3), f"{x[-1]}", fill="black")
        points = [
            (left + (width - 10 - left) * (a - x[0]) / span_x, y0 + height * (high - b) / span_y)
            for a, b in zip(x, values)
            if math.isfinite(b)
        ]
        if len(points) > 1:
            draw.line(points, fill="#1f77b4", width=2)
    image.save(path)
