"""The format of all checkpoints, which lives here and nowhere else.

A checkpoint is one torch.save'd dictionary of tensors, numbers and strings, loaded with weights_only=True: it executes no code.

    format    "nerv-diffusion 6"
    stage     "vae", "dit", "vin", "codec" or "fit"
    step      finished steps; with config["seed"] it fixes which clips and random numbers come next (Stream, step_generator)
    config    the settings of the script that wrote it, {name: value}
    classes   the names of the classes; a label is an index into this list
    revision  of the code, from git
    ema       averaged parameters and buffers of the stage's network, which are the ones to use
    training  what resuming needs and using does not: the parameters themselves, optimizers

Each stage adds entries of its own: the sizes of its networks, and dit and vin all of stage 1.

    python -m common.checkpoints dit.pt small.pt     an export for others: half precision, no training state, no paths
"""

import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from common.utils import UserError, bar, git_revision, max_over_ranks, run, whole

FORMAT = "nerv-diffusion 6"


def plain(x):
    """What a file may hold: of networks and optimizers their state, of settings a dictionary, also inside a dictionary."""
    if isinstance(x, dict):
        return {name: plain(value) for name, value in x.items()}
    return plain(x.state_dict()) if hasattr(x, "state_dict") else dataclasses.asdict(x) if dataclasses.is_dataclass(x) else x


def save(path, **content):
    """Write a checkpoint, so that a kill or a full disk (UserError) at any moment leaves the old one or the new one."""
    try:
        with whole(path) as part, open(part, "wb") as f:
            torch.save({"format": FORMAT, "revision": git_revision()} | plain(content), f)
    except RuntimeError as error:  # torch's writer covers an error of the disk with one of its own
        reason = getattr(error.__context__, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"cannot write {path}: {reason}") from None


# Settings that do not change what a training has learned so far, and may differ on --resume: length, machine, places.
FREE = set("steps device bf16 compile recompute out resume save_every ckpt data_dir".split())


def resume(config, stage, **fixed):
    """The checkpoint --out that --resume goes on from, or None.

    UserError where a setting differs from the checkpoint's and is not in FREE, or one of `fixed`, its entries (decoder="NeRV").
    """
    if not (config.resume and Path(config.out).is_file()):
        return None
    ckpt = load(config.out, stage, "the command that you gave")
    if "training" not in ckpt:
        raise UserError(f"{config.out} is an export without the training state: --resume goes on from the original")
    for name, value in dataclasses.asdict(config).items():
        if name not in FREE and value != ckpt["config"].get(name, value):
            raise UserError(
                f"{config.out} was trained with --{name.replace('_', '-')} {ckpt['config'][name]}, not {value}: give the same "
                "options to --resume, or start anew with another --out"
            )
    for name, value in fixed.items():
        if ckpt[name] != value:
            raise UserError(f"{config.out} was trained with another {name}: start anew with another --out")
    return ckpt


def restore(ckpt, parts, ema):
    """Load what resume() gave into {name: network or optimizer} and the averaged network; returns the finished steps."""
    with fitting():
        ema.load_state_dict(ckpt["ema"])
        for name, part in parts.items():
            part.load_state_dict(ckpt["training"][name])
    return ckpt["step"]


def cached(directory, key, count, shape, make, rank=0, world=1, batch_size=64):
    """make([i, …]) -> (values [n, *shape], labels [n]) of 0 … count - 1, made once, each process its share, and kept on disk.

    Returns memory-mapped tensors (float16 [count, *shape], int64 [count]). `key` names what is in them, as JSON: with another
    key all are made anew; what was interrupted goes on.
    """
    key_file, files = directory / "cache.json", [directory / "values.npy", directory / "labels.npy"]
    key = json.dumps(key | {"count": count, "shape": shape})
    if rank == 0 and not (key_file.is_file() and key_file.read_text() == key):
        key_file.unlink(missing_ok=True)
        for file, content in zip(files, (np.zeros((count, *shape), np.float16), np.full(count, -1))):  # -1: not made yet
            with whole(file) as part, open(part, "wb") as f:
                np.save(f, content)  # all of it: where a disk is full only later on, the process ends without a word
        key_file.write_text(key)
    max_over_ranks()  # all wait for the first
    values, labels = (np.load(file, mmap_mode="r+") for file in files)
    todo = [i for i in range(rank * count // world, (rank + 1) * count // world) if labels[i] < 0]
    with bar(total=len(todo), desc="encoding", unit="clip", disable=rank > 0 or not todo) as progress:
        for i in range(0, len(todo), batch_size):
            part = todo[i : i + batch_size]
            made, label = make(part)
            values[part], labels[part] = made.half().cpu().numpy(), label
            progress.update(len(part))
    values.flush(), labels.flush()
    max_over_ranks()
    return tuple(torch.from_numpy(np.load(file, mmap_mode="c")) for file in files)


def load(path, stage, made_by):
    """The checkpoint of a stage, or of one of several, on the CPU; made_by is the command that writes one. UserError."""
    if not Path(path).is_file():
        raise UserError(f"there is no checkpoint {path}: train one with `{made_by}`, or name another")
    with open(path, "rb") as f:
        try:
            ckpt = torch.load(f, map_location="cpu", weights_only=True)
            of_this_version = ckpt["format"] == FORMAT
        except Exception:  # what a foreign file makes the unpickler raise depends on its first bytes
            raise UserError(f"{path} is not a checkpoint, or a damaged one: train it again with `{made_by}`") from None
    if not of_this_version:
        raise UserError(f"{path} is not in the format of this version, {FORMAT!r}: train it again with `{made_by}`")
    if ckpt["stage"] not in (stages := stage if isinstance(stage, tuple) else (stage,)):
        wanted = " or ".join(stages)
        raise UserError(f"{path} is a {ckpt['stage']} checkpoint, and a {wanted} one is needed: train it with `{made_by}`")
    return ckpt


@contextlib.contextmanager
def fitting(found="", wanted=""):
    """Turn what goes wrong when a network is built from a checkpoint of another configuration into a UserError.

    found, wanted: the names of the network's class in the checkpoint and in the code, where it may be a variant.
    """
    try:
        if found != wanted:
            raise ValueError(f"its network is {found!r}, not {wanted!r}")
        yield
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the checkpoint does not fit this code, train it again: {reason}") from None


PRIVATE = {"data_dir", "ckpt", "out"}  # settings that name places on a machine


def exported(ckpt):
    """A checkpoint for others: no `training`, no PRIVATE setting, ema in float16.

    What is out of float16's range stays in float32, and so do batch norm's statistics, whose means reach 30 deviations.
    """

    def short(name, x):
        half = x.half()
        return half if "running_" not in name and (half - x).norm() <= 2**-11 * x.norm() else x

    ckpt = {name: value for name, value in ckpt.items() if name != "training"}
    ckpt["config"] = {name: value for name, value in ckpt["config"].items() if name not in PRIVATE}
    ckpt["ema"] = {name: short(name, x) for name, x in ckpt["ema"].items()}
    return ckpt | ({"vae": exported(ckpt["vae"])} if "vae" in ckpt else {})


def main():
    if len(sys.argv) != 3:
        raise UserError("name two files: python -m common.checkpoints dit.pt small.pt")
    source, out = sys.argv[1:]
    if os.path.exists(out):  # the original, perhaps
        raise UserError(f"{out} is there already: name another file")
    save(out, **exported(load(source, ("dit", "vae", "vin"), "python dit.py")))
    print(f"wrote {out}, {os.path.getsize(out) / 1e6:.2f} MB, from {source}, {os.path.getsize(source) / 1e6:.2f} MB")


if __name__ == "__main__":
    run(main)
