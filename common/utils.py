"""What both stages share and no reader needs on a first pass: options, processes, steps, the log of a run, error messages."""

import argparse
import contextlib
import csv
import ctypes
import dataclasses
import datetime
import functools
import hashlib
import io
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from common import plot, progress


class UserError(Exception):
    """Something the person at the keyboard can mend: shown as one line, exit status 2, no traceback."""


def run(main):
    """Call a script's main() and turn a UserError into one line on stderr and exit status 2."""
    try:
        main()
        if dist.is_initialized():  # after an error it would wait for the other processes, and nobody would see the traceback
            dist.destroy_process_group()
    except UserError as error:
        for bar in list(tqdm._instances):  # the message gets a line of its own
            bar.close()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


class Interrupt:
    """Inside a `with`, Ctrl-C and SIGTERM only ask: the loop calls `stop` between two steps and ends where it is true.

    A second one does not wait, unless it comes at once: Ctrl-C reaches torchrun too, which then signals its processes again.
    """

    GRACE = 5.0  # seconds in which a signal is taken for an echo of the first

    def __init__(self):
        self.asked = None  # when

    def __enter__(self):
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        if self.asked is None:
            self.asked = time.monotonic()
        elif time.monotonic() - self.asked > self.GRACE:
            raise KeyboardInterrupt

    def stop(self):
        """Whether any process has been asked: the same answer in all, or one of them would wait for the others' next step."""
        return max_over_ranks(self.asked is not None) > 0

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


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


def parse_topic(cls, description, topics):
    """Command line "topic, then options" -> (the function of topics {name: function} that is named, the options)."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    config = parse_options(cls, description, argv=sys.argv[2:] if name in topics else sys.argv[1:])
    if name not in topics:
        raise UserError(f"name a topic first: {', '.join(topics)}")
    return topics[name], config


# ---------------------------------------------------------------------------------------------------------------- machine


def keep_memory():
    """Let the process keep what tensors give back. glibc returns those beyond 32 MB to the system, which clears their pages
    when they come again: a quarter of a CPU's seconds at 128 x 128 (docs/speed.md)."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # what is not glibc has no mallopt
        libc = ctypes.CDLL(None)
        for option_number, value in ((-4, 0), (-2, 2**26), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TOP_PAD, M_TRIM_THRESHOLD
            libc.mallopt(option_number, value)


def pick_device(name):
    """ "auto" -> this process's CUDA device where there is one, set up for speed, else the CPU."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{local}"
    elif name == "auto":
        name = "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name} is not available here: use --device cpu, or leave it out") from None
    device = torch.device(name)
    if device.type == "cpu":
        keep_memory()
    elif device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves float32
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    return device


def start_processes(name):
    """Join the other processes where torchrun started several, one for each GPU; returns (device, rank, world).

    Data-parallel training needs three things beyond this: each rank takes its rows of the batch (data.Stream), batch norm
    and the gradient are averaged over ranks (average_over_ranks, FiniteStep), rank 0 alone writes.
    """
    device = pick_device(name)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device, 0, 1
    alone = device.type == "cuda" and local_processes() <= torch.cuda.device_count()  # on its GPU, as NCCL has it
    cuda = {"backend": "cpu:gloo,cuda:nccl", "device_id": device} if alone else {"backend": "gloo"}
    # Others wait for as long as the first process decodes a data set or encodes it: hours, where the default is 10 minutes.
    dist.init_process_group(**cuda, timeout=datetime.timedelta(days=7))
    return device, dist.get_rank(), dist.get_world_size()


def rows_per_process(batch_size, accumulate, world):
    """Clips that one process takes at a time; UserError where the batch does not divide."""
    parts = accumulate * world
    if batch_size % parts:
        raise UserError(
            f"--batch-size {batch_size} counts the clips of all processes together and does not divide into {world} "
            f"processes x {accumulate} accumulated parts: use a multiple of {parts}"
        )
    return batch_size // parts


class AverageOverRanks(torch.autograd.Function):
    """The mean over processes; so is its gradient. torch.compile takes it as a part of its graph, unlike that of dist.nn. After
    torch's functional collectives, which it takes too, a process with gloo aborted at its end now and then (1 of 12 runs)."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x / dist.get_world_size()

    @staticmethod
    def backward(ctx, gradient):
        return AverageOverRanks.forward(ctx, gradient)


def average_over_ranks(x):
    """The mean of a tensor over all processes, with its gradient; x itself where there is one process."""
    return AverageOverRanks.apply(x) if dist.is_initialized() else x


@torch.no_grad()
def from_first_rank(x):
    """Make a tensor what it is in the first process."""
    if dist.is_initialized():
        if dist.get_rank():
            x.zero_()
        dist.all_reduce(x)


def max_over_ranks(value):
    """The largest of the numbers of all processes. It goes between CPUs, so that no GPU is waited for."""
    value = torch.tensor(float(value))
    if dist.is_initialized():
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


def rank():
    """The number of this process among those of a training; 0 where it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def cores():
    """How many cores this process may use: the machine's, or those that taskset leaves it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def local_processes():
    """How many processes of a training share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def wait_for_all():
    """Until every process has come here."""
    max_over_ranks(0)


def step_generator(device, seed, step):
    """The random numbers of one training step, a function of seed and step alone.

    All processes draw those of the whole batch and keep their own rows, so that a run is the same on any number of
    processes; and a training that goes on at step 1000 needs no memory of what was drawn before.
    """
    return torch.Generator(device).manual_seed(1_000_003 * seed + step)


def autocast(device, bf16):
    """bf16 "auto" | "on" | "off" -> the autocast context: auto is on with CUDA, where the card multiplies bfloat16 natively.

    CPUs compute in float32 unless told otherwise, so that the same command gives the same figures on any of them.
    """
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16 == "on" or (bf16 == "auto" and native))


def wants_compile(device, choice):
    """--compile "auto" | "on" | "off": auto is on with CUDA, where a step repays the minutes that compiling takes."""
    return choice == "on" or (choice == "auto" and device.type == "cuda")


# --------------------------------------------------------------------------------------------------------------- the step


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up, then cosine decay to zero (§A.1)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class FiniteStep:
    """Optimizer steps of a network, its gradient averaged over processes and clipped; those not finite are skipped.

    All of it stays on the device, so that a GPU never waits for the host: the fused optimizers leave weights and moments as
    they are where found_inf is 1. `check` reads the counters, at the steps at which the log is read anyway.
    """

    LIMIT = 20  # skipped steps in a row that end a training

    def __init__(self, network, optimizer, max_norm):
        self.parameters, self.optimizer, self.max_norm = list(network.parameters()), optimizer, max_norm
        self.skipped, self.in_a_row = torch.zeros(2, device=self.parameters[0].device).unbind()
        self.reported = 0

    def __call__(self, loss, lr):
        """A step of size lr from the .grad of the parameters, which it clears; loss is 0-d and this process's."""
        loss, parameters = loss.detach(), [p for p in self.parameters if p.grad is not None]
        if dist.is_initialized():
            flat = torch.cat([loss.float().view(1), *(p.grad.flatten() for p in parameters)])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            loss, *parts = flat.split([1, *(p.numel() for p in parameters)])
            # Copied, not assigned: a fused optimizer wants each gradient in the memory format of its parameter.
            torch._foreach_copy_([p.grad for p in parameters], [part.view_as(p) for p, part in zip(parameters, parts)])
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
        bad = (~torch.isfinite(norm + loss.sum())).float()
        self.skipped += bad
        self.in_a_row.copy_((self.in_a_row + bad) * bad)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.grad_scale, self.optimizer.found_inf = None, bad
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def check(self, step, dataset, stream):
        """A line where steps were skipped; UserError after LIMIT of them in a row, with the clips of the last one."""
        skipped, in_a_row = int(self.skipped), int(self.in_a_row)
        if skipped > self.reported:
            tqdm.write(f"warning: {skipped} steps skipped so far, not finite", file=sys.stderr)
            self.reported = skipped
        if in_a_row >= self.LIMIT:
            clips = ", ".join(dataset.name(i % stream.length) for i in stream.batch(step)[:4])
            raise UserError(
                f"the loss or its gradient was not finite in {in_a_row} steps in a row, last in step {step + 1} with the "
                f"clips {clips}, …: look at them, or go on from the last checkpoint with a smaller --lr"
            )

    def state_dict(self):
        counts = {"skipped": int(self.skipped), "in_a_row": int(self.in_a_row)}
        return {"optimizer": self.optimizer.state_dict(), **counts}

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state["optimizer"])
        self.skipped.fill_(state["skipped"])
        self.in_a_row.fill_(state["in_a_row"])
        self.reported = state["skipped"]


def peak_memory(device):
    """The most memory that this process has held, in GiB: of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema <- decay * ema + (1 - decay) * model, parameters and buffers, which all are floats."""
    torch._foreach_lerp_([*ema.parameters(), *ema.buffers()], [*model.parameters(), *model.buffers()], 1 - decay)


# --------------------------------------------------------------------------------------------------------- what is written


def make_parent(path):
    """Make the directory that path is to be written into, before hours of work depend on it."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def file_name(text):
    """text as part of the name of a file: letters and digits, and _ for all else."""
    return "".join(c if c.isalnum() else "_" for c in text)


@contextlib.contextmanager
def whole_file(path):
    """Inside a `with`, a binary file beside path, which gets its name once it is whole.

    A kill at any moment leaves the old file or the new one, an error the old one. Of several processes, one may write it.
    """
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            yield file
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def python_path(directory):
    """PYTHONPATH of a program that is to find modules in a directory first, and then all that this one finds."""
    return os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])])


def fingerprint(network):
    """A hash of a network's parameters and buffers: a cache of what it made says which one made it."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@functools.cache
def git_revision():
    """The commit this code is at, with + where files were changed since; "" outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


# ------------------------------------------------------------------------------------------------------------- run's log


class RunLog:
    """Progress bar, losses.csv, losses.png and, where tensorboard is installed, its event files, in one directory.

    `add(loss=…, …)` takes 0-d tensors as they are; `step` reads them only every `every` steps, so that a GPU is not made to
    wait. A row of the CSV is the mean over the steps since the last row and over processes; rank 0 writes. A training
    that goes on after `start` steps goes on with the rows up to there.
    """

    def __init__(self, directory, steps, every, start=0, rank=0):
        self.directory, self.every, self.rank, self.steps = Path(directory), every, rank, steps
        self.rows, self.written, self.pending, self.board, before = [], 0, {}, None, 0
        if rank == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            if start and (self.directory / "losses.csv").is_file():
                with open(self.directory / "losses.csv", newline="") as f:
                    rows = [{k: float(v) for k, v in row.items() if v != ""} for row in csv.DictReader(f)]
                self.rows = [row | {"step": int(row["step"])} for row in rows if row["step"] <= start]
                before = self.rows[-1]["seconds"] if self.rows else 0
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(self.directory, purge_step=start or None)
        self.bar = progress.bar(desc=self.directory.name, total=steps, unit="step", disable=rank > 0, initial=start)
        self.start = time.time() - before

    def print(self, line):
        """A line below the bar, from rank 0."""
        if self.rank == 0:
            tqdm.write(line)

    def add(self, **values):
        for k, v in values.items():
            self.pending.setdefault(k, []).append(v.detach())

    def step(self, step):
        """One more step; returns True at those at which the values were read."""
        self.bar.update()
        if (step + 1) % self.every and step + 1 != self.steps:
            return False
        means = torch.stack([torch.stack(v).float().mean() for v in self.pending.values()])
        means = dict(zip(self.pending, average_over_ranks(means).tolist()))
        self.pending = {}
        self.rows.append({"step": step + 1, "seconds": round(time.time() - self.start, 1), **means})
        self.bar.set_postfix_str(" ".join(f"{k} {v:.4g}" for k, v in means.items()))
        if self.board:
            for k, v in means.items():
                self.board.add_scalar(k, v, step + 1)
        return True

    def video(self, step, name, frames):
        """Moving pictures, uint8 [T, H, W, 3], for tensorboard, which plays GIFs among its images."""
        if self.board:
            from tensorboard.compat.proto.summary_pb2 import Summary

            images, gif = [Image.fromarray(frame) for frame in frames], io.BytesIO()
            images[0].save(gif, "GIF", save_all=True, append_images=images[1:], duration=80, loop=0)
            shown = Summary.Image(
                width=frames.shape[2], height=frames.shape[1], colorspace=3, encoded_image_string=gif.getvalue()
            )
            self.board.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=shown)]), step)

    def write(self):
        """losses.csv and losses.png as of now."""
        if self.rank or len(self.rows) == self.written:
            return
        self.written = len(self.rows)
        names = list(dict.fromkeys(k for row in self.rows for k in row))  # the adversarial ones join later
        with open(self.directory / "losses.csv", "w", newline="") as f:
            writer = csv.DictWriter(f, names, restval="")
            writer.writeheader()
            writer.writerows(self.rows)
        curves = [("step", k, [(r["step"], r[k]) for r in self.rows if k in r]) for k in names if k not in ("step", "seconds")]
        plot.curves(self.directory / "losses.png", curves)

    def close(self):
        self.write()
        self.bar.close()
        if self.board:
            self.board.close()
