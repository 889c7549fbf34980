"""What all scripts share. A first reading needs only BatchNorm, step_generator, FiniteStep and update_ema."""

import argparse
import contextlib
import csv
import dataclasses
import datetime
import functools
import hashlib
import math
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed._functional_collectives import all_reduce  # torch.compile supports its gradient
from tqdm import tqdm


class UserError(Exception):
    """Something the user can fix: shown as one line, exit status 2, no traceback."""


def run(main):
    """Call a script's main(); report a UserError in one line on stderr, with exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names may hold any bytes
    try:
        main()
        if dist.is_initialized():  # not after an error: it would wait for the other processes
            dist.destroy_process_group()
    except (UserError, OSError, torch.OutOfMemoryError) as error:  # OSError: no permission, no space
        advice = " Use --recompute, --accumulate 2, a smaller --batch-size or fewer --decode-frames, if available."
        reason = printable(str(error).splitlines()[0]) + advice * isinstance(error, torch.OutOfMemoryError)
        tqdm.write(f"error: {reason}", file=sys.stderr)  # on its own line, below a progress bar
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


class Interrupt:
    """Inside a `with`, Ctrl-C and SIGTERM only set a flag; the loop checks stop() between steps."""

    def __enter__(self):
        self.asked = False
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        self.asked = True  # may come twice: under torchrun, from the terminal and from torchrun

    def stop(self):
        """Whether any process was asked to stop: the same answer in all, or one would wait for the others' next step."""
        return max_over_ranks(self.asked) > 0

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def option(group, default, help, **kwargs):
    """A dataclass field that is also a command-line option; kwargs go to argparse (choices, nargs, metavar)."""
    own = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return dataclasses.field(**own, metadata={"group": group, "help": help, **kwargs})


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see --help")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter): ...


def parse_options(cls, description, presets=None, argv=None, topics=None):
    """Parse the command line into an instance of the dataclass cls; --help groups the options and shows their defaults.

    presets(argparse.Namespace) -> {name: value}: defaults that depend on the given options (--preset and --dataset, say).
    topics {name: function}: the first argument chooses one, and the result is (its function, the options).
    """
    parser = Parser(description=description, formatter_class=HelpFormatter, add_help=False, allow_abbrev=False)
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
    if topics:
        parser.add_argument("topic", choices=topics, help="what to do")
    options = vars(parser.parse_args(argv))
    for name, value in options.items():
        if (isinstance(value, float) and not math.isfinite(value)) or (name == "seed" and abs(value) >= 2**40):
            raise UserError(f"--{name.replace('_', '-')} {value}: out of range")
    return (topics[options.pop("topic")], cls(**options)) if topics else cls(**options)


def check_positive(config, *names):
    """UserError for the first of the named settings that is not positive."""
    for name in names:
        if getattr(config, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be positive")


def pick_device(name="auto"):
    """ "auto" -> this process's CUDA device, configured for speed, or the CPU if there is none. UserError."""
    if name in ("auto", "cuda"):
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else name.replace("auto", "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name} is not available here: use --device cpu, or leave it out") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    return device


def start_processes(name="auto"):
    """Join the other processes if torchrun started several, one per GPU; returns (device, rank, world).

    Each rank takes its rows of the batch, batch statistics and gradients are averaged, and only rank 0 writes.
    """
    device = pick_device(name)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device, 0, 1
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes on this machine
    alone = device.type == "cuda" and here <= torch.cuda.device_count()  # one process per GPU, as NCCL requires
    cuda = {"backend": "cpu:gloo,cuda:nccl", "device_id": device} if alone else {"backend": "gloo"}
    # The others wait while rank 0 decodes or encodes a data set, which takes hours; the default timeout is 10 minutes.
    dist.init_process_group(**cuda, timeout=datetime.timedelta(days=7))
    return device, dist.get_rank(), dist.get_world_size()


def start_training(config, *positive, device="auto"):
    """Check the settings of a training and start its processes -> device, rank, world, clips per process and forward pass.

    UserError if a setting is not positive (steps, batch_size, save_every and those in `positive`), if the processes cannot
    share the batch evenly, or, before hours of work, if --out or the log cannot be written.
    """
    check_positive(config, "steps", "batch_size", "save_every", *positive)
    device, rank, world = start_processes(device)
    parts = world * getattr(config, "accumulate", 1)
    if config.batch_size % parts:
        raise UserError(f"--batch-size {config.batch_size}, of all processes together, must be a multiple of {parts}")
    if Path(config.out).resolve() == Path(getattr(config, "ckpt", "")).resolve():
        raise UserError(f"--out {config.out} would overwrite --ckpt")
    make_parent(config.out)
    make_parent(log_directory(config.out) / "losses.csv")
    torch.manual_seed(config.seed)
    return device, rank, world, config.batch_size // parts


def average_over_ranks(x):
    """The differentiable mean of a tensor over all processes; x itself if there is only one."""
    return all_reduce(x, "sum", dist.group.WORLD) / dist.get_world_size() if dist.is_initialized() else x


@torch.no_grad()
def from_first_rank(network):
    """Copy all parameters and buffers of a network from the first process to the others."""
    for x in network.state_dict().values() if dist.is_initialized() else ():
        dist.broadcast(x, 0)


class BatchNorm(nn.Module):
    """Batch norm of [B, features] with statistics over the clips of all processes, on CPUs and GPUs."""

    def __init__(self, features, momentum=0.1, eps=1e-5):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def statistics(self, x):
        """Mean and variance of a batch x [B, features]; updates the running ones."""
        mean = average_over_ranks(x.mean(0))
        var = average_over_ranks((x - mean).square().mean(0))
        with torch.no_grad():
            for running, now in ((self.running_mean, mean), (self.running_var, var)):
                running.lerp_(torch.where(now.isfinite(), now, running), self.momentum)  # not finite in a skipped step
        return mean, var

    def forward(self, x):
        mean, var = self.statistics(x.float()) if self.training else (self.running_mean, self.running_var)
        return (x - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias


def max_over_ranks(value=0):
    """The maximum over all processes, which wait for each other here. It uses the CPU, so GPUs are not synchronized."""
    value = torch.tensor(float(value))
    if dist.is_initialized():
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


def rank():
    """The rank of this process; 0 if it is the only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def step_generator(device, seed, step):
    """The generator of one training step. It depends on seed and step alone, so a resumed run needs no generator state. All
    processes draw numbers for the whole batch and keep their own rows: the result does not depend on how many there are."""
    return torch.Generator(device).manual_seed(1_000_003 * seed + step)


def autocast(device, bf16="auto"):
    """bf16 "auto" | "on" | "off" -> the autocast context; auto: on if the GPU supports bfloat16, off on CPUs."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16 == "on" or (bf16 == "auto" and native))


def wants_compile(device, choice):
    """Whether to compile, by --compile "auto" | "on" | "off"; auto: with CUDA only, where it repays minutes of compiling."""
    return choice == "on" or (choice == "auto" and device.type == "cuda")


def training_steps(start, config, save):
    """Yield the steps of a training, from `start` to config.steps - 1, or until Ctrl-C.

    Rank 0 calls save(finished steps) after every config.save_every steps and after the last one.
    """
    with Interrupt() as interrupt:
        for step in range(start, config.steps):
            yield step
            last = interrupt.stop() or step + 1 == config.steps
            if rank() == 0 and (last or (step + 1) % config.save_every == 0):
                save(step + 1)
            if last:
                return


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up, then cosine decay to zero (§A.1)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class FiniteStep:
    """Optimizer steps with the gradient averaged over processes and clipped to norm 1; steps that are not finite are skipped.

    No value leaves the device, so a GPU never waits for the host: an optimizer changes nothing if its found_inf is 1.
    """

    def __init__(self, network, optimizer):
        self.parameters, self.optimizer = list(network.parameters()), optimizer

    def __call__(self, loss, lr):
        """One step with the parameters' .grad, which it clears; loss: 0-d, of this process -> 1.0 if it was skipped, or 0.0."""
        loss, parameters = loss.detach(), [p for p in self.parameters if p.grad is not None]
        if dist.is_initialized():
            flat = average_over_ranks(torch.cat([loss.float().view(1), *(p.grad.flatten() for p in parameters)]))
            loss, *parts = flat.split([1, *(p.numel() for p in parameters)])
            # Copied, not assigned: a fused optimizer needs each gradient in its parameter's memory format.
            torch._foreach_copy_([p.grad for p in parameters], [part.view_as(p) for p, part in zip(parameters, parts)])
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        bad = (~torch.isfinite(norm + loss.sum())).float()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.grad_scale, self.optimizer.found_inf = None, bad
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return bad

    def state_dict(self):
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state["optimizer"])


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema <- decay * ema + (1 - decay) * model, parameters and buffers; the decay is smaller in early steps."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_([*ema.parameters(), *ema.buffers()], [*model.parameters(), *model.buffers()], weight)


def millions(network):
    """Number of parameters of a network, in millions."""
    return sum(p.numel() for p in network.parameters()) / 1e6


def printable(text):
    """A path or name, made of any bytes, as one line of printable text."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in os.fsdecode(text))


def file_name(text, limit=200):
    """text as part of a file name: letters, digits and "-" stay, all else becomes _; 1 to `limit` bytes."""
    return re.sub(r"[^\w-]", "_", str(text)).encode()[:limit].decode(errors="ignore") or "_"


@contextlib.contextmanager
def whole(path):
    """Context: a temporary path to write to, renamed to `path` once complete. UserError if it cannot be written."""
    path = Path(path)
    part = path.parent / f".{uuid.uuid4().hex}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():  # os.replace would make /dev/null a file
            raise UserError(f"cannot write {path}: it is a directory, or not a regular file")
        yield part
        if part.exists():
            os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def make_parent(path):
    """Create the directory of a file to be written later; UserError, before hours of work, if the file cannot be written."""
    with whole(path) as part:
        part.touch()  # only writing reveals a read-only disk
        part.unlink()


def fingerprint(state):
    """A hash of the tensors of a network or state dict, which identifies what was computed with it."""
    digest = hashlib.sha256()
    for name, x in (state.state_dict() if isinstance(state, nn.Module) else state).items():
        digest.update(name.encode() + x.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@functools.cache
def git_revision():
    """The commit of this code, with + if files have changed since; "" outside a repository."""
    command = "git describe --always --abbrev=12 --dirty=+"  # through a shell, git may be missing
    return subprocess.run(command, shell=True, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


# A progress bar that updates every second on a terminal and every 30 seconds in a log file.
bar = functools.partial(tqdm, mininterval=1 if sys.stderr.isatty() else 30, dynamic_ncols=True)


def log_directory(out):
    """Directory for the log of the training that writes `out`: runs/NAME beside NAME.pt."""
    return Path(out).parent / "runs" / Path(out).stem


class RunLog:
    """Progress bar, and losses.csv in log_directory(out), written by rank 0.

    `add(loss=…, …)` takes 0-d tensors; `step` reads them only every EVERY steps, to avoid synchronizing with the GPU. A row of
    the CSV is the mean over the steps since the last row and over processes.
    """

    EVERY = 50

    def __init__(self, out, steps, start=0, rank=0):
        self.out, self.directory, self.rank, self.steps = out, log_directory(out), rank, steps
        self.rows, self.pending, self.file = [], {}, self.directory / "losses.csv"
        if start and self.file.is_file():
            rows = csv.DictReader(self.file.read_text().splitlines())
            self.rows = [row for row in rows if int(row["step"]) <= start]
        self.bar = bar(desc=self.directory.name, total=steps, unit="step", disable=rank > 0, initial=start)
        self.start = time.time() - (float(self.rows[-1]["seconds"]) if self.rows else 0)

    def print(self, line):
        """Print a line above the bar, with the elapsed seconds, from rank 0."""
        if self.rank == 0:
            tqdm.write(f"{time.time() - self.start:.0f} s: {line}")

    def add(self, **values):
        for k, v in values.items():
            self.pending.setdefault(k, []).append(v.detach())

    def step(self, step):
        """Count a step. UserError if FiniteStep skipped all of them since the last row."""
        self.bar.update()
        if (step + 1) % self.EVERY and step + 1 != self.steps:
            return
        means = average_over_ranks(torch.stack([torch.stack(v).float().mean() for v in self.pending.values()]))
        means, self.pending = dict(zip(self.pending, means.tolist())), {}
        if means.get("skipped") == 1:
            raise UserError(f"no finite loss or gradient to step {step + 1}: check the data, or --resume with a smaller --lr")
        row = {"step": step + 1, "seconds": f"{time.time() - self.start:.1f}"}
        self.rows.append(row | {k: f"{v:.9g}" for k, v in means.items()})  # float32, exactly
        self.bar.set_postfix_str(" ".join(f"{k} {v:.4g}" for k, v in means.items() if v or k != "skipped"), refresh=False)

    def write(self):
        """Write losses.csv."""
        names = list(dict.fromkeys(k for row in self.rows for k in row))  # the adversarial losses start later
        with whole(self.file) as part, open(part, "w") as f:
            writer = csv.DictWriter(f, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)

    def close(self):
        self.print(f"wrote {self.out}; losses and sheets are in {self.directory}")
        self.bar.close()
