"""The format of all checkpoints, defined only here.

A checkpoint is a dictionary of tensors, numbers and strings. It is loaded with weights_only=True, so it cannot run code.

    format    "nerv-diffusion 7"
    stage     "vae", "dit", "vin", "codec" or "fit"
    step      finished steps; with config["seed"] it determines the next clips and random numbers (Stream, step_generator)
    config    the settings of the script that wrote it, {name: value}
    classes   the names of the classes; a label is an index into this list
    revision  git revision of the code
    ema       averaged parameters and buffers of the stage's network, for inference
    training  state that only resuming needs: the parameters themselves, optimizers

Each stage adds entries of its own, such as the sizes of its networks; dit and vin include all of stage 1.
"""

import contextlib
import dataclasses
import json
from pathlib import Path

import numpy as np
import torch

from common.utils import UserError, bar, git_revision, max_over_ranks, whole

FORMAT = "nerv-diffusion 7"


def plain(x):
    """Convert to what a checkpoint can hold, recursively: networks and optimizers to state dicts, settings to dictionaries."""
    if isinstance(x, dict):
        return {name: plain(value) for name, value in x.items()}
    return plain(x.state_dict()) if hasattr(x, "state_dict") else dataclasses.asdict(x) if dataclasses.is_dataclass(x) else x


def save(path, **content):
    """Write a checkpoint atomically: after a kill or on a full disk (UserError), the file is the old one or the new one."""
    try:
        with whole(path) as part, open(part, "wb") as f:
            torch.save({"format": FORMAT, "revision": git_revision()} | plain(content), f)
    except RuntimeError as error:  # torch's writer raises its own error in place of the disk's
        raise UserError(f"cannot write {path}: {error.__context__ or error}") from None


# Settings that may differ on --resume, as they do not change what has been learned so far: length, machine, places.
FREE = set("steps device bf16 compile recompute out resume save_every ckpt data_dir".split())


def resume(config, stage, **fixed):
    """The checkpoint at --out that --resume continues, or None.

    UserError if a setting that is not in FREE, or one of the entries `fixed` (decoder="NeRV"), differs from the checkpoint's.
    """
    if not (config.resume and Path(config.out).is_file()):
        return None
    ckpt = load(config.out, stage, "the command that you gave")
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE}
    for name, value in (settings | fixed).items():
        before = (ckpt | ckpt["config"]).get(name, value)
        if value != before:
            what = name if name in fixed else f"--{name.replace('_', '-')}"
            raise UserError(f"{config.out} was trained with {what} {before}, not {value}: use the same, or another --out")
    return ckpt


def restore(ckpt, parts, ema):
    """Load a checkpoint from resume() into {name: network or optimizer} and the averaged network; return the finished steps."""
    with fitting():
        ema.load_state_dict(ckpt["ema"])
        for name, part in parts.items():
            part.load_state_dict(ckpt["training"][name])
    return ckpt["step"]


def cached(directory, key, count, shape, make, rank=0, world=1, batch_size=64):
    """Values computed once by make([i, …]) -> (values [n, *shape], labels [n]) for i in 0 … count - 1, and kept on disk.

    Returns memory-mapped tensors (float16 [count, *shape], int64 [count]). Processes share the work. `key`, as JSON, identifies
    the content: another key recomputes everything; with the same key, an interrupted run continues.
    """
    key_file, files = directory / "cache.json", [directory / "values.npy", directory / "labels.npy"]
    key = json.dumps(key | {"count": count, "shape": shape})
    if rank == 0 and not (key_file.is_file() and key_file.read_text() == key):
        key_file.unlink(missing_ok=True)
        for file, content in zip(files, (np.zeros((count, *shape), np.float16), np.full(count, -1))):  # -1: not made yet
            with whole(file) as part, open(part, "wb") as f:
                np.save(f, content)  # allocates it all: a disk that fills up later kills the process (SIGBUS)
        key_file.write_text(key)
    max_over_ranks()  # all wait for the first
    values, labels = (torch.from_numpy(np.load(file, mmap_mode="r+")) for file in files)
    todo = [i for i in range(rank * count // world, (rank + 1) * count // world) if labels[i] < 0]
    parts = [todo[i : i + batch_size] for i in range(0, len(todo), batch_size)]
    for part in bar(parts, "encoding", unit="batch", disable=rank > 0 or not todo):
        made, labels_of_part = make(part)
        values[part], labels[part] = made.half().cpu(), labels_of_part
    max_over_ranks()
    return values, labels


def load(path, stage, made_by):
    """Load a checkpoint of a stage, or of any of several, on the CPU; made_by: the command that writes one. UserError."""
    if not Path(path).is_file():
        raise UserError(f"there is no checkpoint {path}: train one with `{made_by}`, or give another path")
    with open(path, "rb") as f:
        try:
            ckpt = torch.load(f, map_location="cpu", weights_only=True)
            readable = ckpt["format"] == FORMAT
        except Exception:  # the unpickler may raise anything, depending on the file's first bytes
            readable = False
    if not readable:
        raise UserError(f"{path} is damaged, or not a checkpoint of this version, {FORMAT!r}: train it again with `{made_by}`")
    stages = (stage,) if isinstance(stage, str) else stage
    if ckpt["stage"] not in stages:
        wanted = " or ".join(stages)
        raise UserError(f"{path} is a {ckpt['stage']} checkpoint, but a {wanted} one is needed: train it with `{made_by}`")
    return ckpt


@contextlib.contextmanager
def fitting(found="", wanted=""):
    """Turn errors in building a network from a checkpoint of another configuration into a UserError.

    found, wanted: class names of the network in the checkpoint and in the code, if it may be a variant.
    """
    try:
        if found != wanted:
            raise ValueError(f"its network is {found!r}, not {wanted!r}")
        yield
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the checkpoint does not fit this code, train it again: {reason}") from None
