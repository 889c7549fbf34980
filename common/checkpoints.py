"""The format of all checkpoints, which lives here and nowhere else.

A checkpoint is one torch.save'd dictionary of tensors, numbers and strings, so that it loads with weights_only=True and never
executes code:

    format    "nerv-diffusion 5"
    stage     "vae", "dit", "vin" or "codec"; "fit" is the state of fit.py, which has format and revision alone of the rest
    step      finished steps; with config["seed"] it says which clips and random numbers come next (Stream, step_generator)
    config    the settings of the script that wrote it, {name: value}
    classes   the names of the classes; a label is an index into this list
    revision  of the code, from git, "" where it does not run from a repository
    ema       averaged parameters and buffers of the stage's network, which are the ones to use
    training  what going on takes and using does not: the parameters themselves, optimizers, the count of skipped steps

Each stage adds entries of its own: the sizes of its networks and the name of their class, and dit and vin the latent scale and
all of stage 1. An export (`sample.py --export`) is a checkpoint too, without `training`, and with ema in float16: exported().
"""

import contextlib
import dataclasses
import os
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from common.utils import UserError, file_name, git_revision, whole_file

FORMAT = "nerv-diffusion 5"


def save(path, final=True, **content):
    """Write a checkpoint, so that a kill at any moment leaves the old one or the new one.

    Where it cannot be written (a full disk), the old one stays: UserError if final, else a line, and training goes on.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as f:
            torch.save({"format": FORMAT, "revision": git_revision(), **content}, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as error:  # torch's writer covers errors of the disk with its own
        while not isinstance(error, OSError) and error.__context__ is not None:
            error = error.__context__
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        kept = "; the one from before is as it was" if path.is_file() else ""
        if final:
            raise UserError(f"cannot write the checkpoint {path}: {reason}{kept}") from None
        tqdm.write(f"warning: cannot write the checkpoint {path}: {reason}{kept}; training goes on", file=sys.stderr)


class Saver:
    """Writes the checkpoints of a training beside it: a file of 8 GB takes the disk some 20 s, a copy in memory takes one.

    One at a time: the next one waits until this one is written, and so does the end of the program.
    """

    def __init__(self, path):
        self.path, self.thread, self.writing = path, ThreadPoolExecutor(1), None

    def __call__(self, final, ema, training, **content):
        """save(path, final, …) of what ema and training are now; where final, it is written on return."""
        if self.writing:
            self.writing.result()
        ema, training = tree_map_only(torch.Tensor, lambda x: x.detach().to("cpu", copy=True), (ema, training))
        self.writing = self.thread.submit(save, self.path, final, ema=ema, training=training, **content)
        if final:
            self.writing.result()


PRIVATE = {"data_dir", "cache_dir", "device", "ckpt", "out", "run_dir"}  # settings that tell of a machine: paths, a card


def exported(ckpt):
    """What others need of a checkpoint: no `training`, no PRIVATE setting (they are then at their defaults), ema in float16.

    Networks load it into float32. What is out of float16's range stays in float32, and so do batch norm's statistics, 1 % of
    the nano VAE: its means reach 30 deviations, and their rounding would cost the tokens about as much as all else.
    """

    def short(name, x):
        half = x.half()
        return half if "running_" not in name and (half - x).norm() <= 2**-11 * x.norm() else x

    config = {name: value for name, value in ckpt["config"].items() if name not in PRIVATE}
    ckpt = ckpt | {"config": config, "ema": {name: short(name, x) for name, x in ckpt["ema"].items()}}
    ckpt.pop("training", None)
    return ckpt | ({"vae": exported(ckpt["vae"])} if "vae" in ckpt else {})


# Settings that do not change what a training has learned so far, and may differ on --resume.
FREE = set(
    "steps cache cache_dir workers device bf16 compile recompute accumulate out resume run_dir log_every save_every".split()
)


def resume(config, stage, **network):
    """The checkpoint that --resume goes on from, or None: --out, where it exists and resuming was asked for.

    A setting that differs from the checkpoint's, and is not in FREE, is an error; so is another decoder or denoiser.
    """
    if not (config.resume and Path(config.out).is_file()):
        return None
    ckpt = load(config.out, stage, f"python {stage}.py")
    if "training" not in ckpt:
        raise UserError(f"{config.out} is an export without the training state: --resume goes on from the original")
    now = dataclasses.asdict(config)
    then = dataclasses.asdict(type(config)()) | ckpt["config"]  # an option that is newer than the checkpoint was at its default
    for name in now:
        if name not in FREE and now[name] != then[name]:
            option = "--" + name.replace("_", "-")
            raise UserError(
                f"{config.out} was trained with {option} {then[name]}, not {now[name]}: give the same options to "
                f"--resume, or start anew with another --out"
            )
    with fitting(ckpt, **network):
        return ckpt


def load(path, stage, made_by):
    """Read a checkpoint of the given stage, or one of several, onto the CPU; made_by names the command that writes one."""
    if not Path(path).is_file():
        raise UserError(f"there is no checkpoint {path}: train one with `{made_by}`, or name another")
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # what a foreign file makes the unpickler raise depends on its first bytes
        raise UserError(f"{path} is not a checkpoint, or a damaged one: train it again with `{made_by}`") from None
    if not isinstance(ckpt, dict) or ckpt.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this program: train one with `{made_by}`")
    stages = stage if isinstance(stage, tuple) else (stage,)
    if ckpt["stage"] not in stages:
        wanted = " or ".join(stages)
        raise UserError(f"{path} is a {ckpt['stage']} checkpoint, and a {wanted} one is needed: train it with `{made_by}`")
    return ckpt


def load_finished(path, stage, made_by):
    """load, for a study that trains in its own process: UserError for a training that a signal cut short."""
    ckpt = load(path, stage, made_by)
    if ckpt["step"] < (steps := ckpt["config"]["steps"]):
        raise UserError(
            f"{path} was interrupted after {ckpt['step']} of {steps} steps; start again to go on with what is not done"
        )
    return ckpt


def study_path(directory, name, settings):
    """Where a study keeps a training of that name: trainings of other settings, a line of text, are other files."""
    return Path(directory) / f"{file_name(name)}_{zlib.crc32(settings.encode()):08x}.pt"


@contextlib.contextmanager
def fitting(ckpt, **network):
    """Turn what goes wrong when a network is built from a checkpoint of another configuration into a UserError.

    network: decoder=class or denoiser=class, whose name has to be the checkpoint's.
    """
    try:
        for role, cls in network.items():
            if ckpt[role] != cls.__name__:
                raise ValueError(f"its {role} is {ckpt[role]!r}, not {cls.__name__!r}")
        yield
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the checkpoint is of another configuration than this code makes, train it again: {reason}") from None
