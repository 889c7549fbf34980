"""Rate and distortion: other codecs there and back, the distance of curves, measures; degraded clips and what undoes them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import degrade, plot, rd, rivals
from common.utils import UserError
from common.video import to_clip

NAN = pytest.approx(math.nan, nan_ok=True)


@pytest.fixture(scope="module")
def frames():
    """uint8 [10, 66, 71, 3]: grey waves that move, in colours that change slowly over the frame."""
    t, y, x = np.arange(10)[:, None, None], np.arange(66)[:, None], np.arange(71)
    wave = 120 + 60 * np.sin((x + 3 * t) / 9) * np.cos((y - t) / 7)
    return np.stack([wave, wave + y / 3, wave - x / 3], -1).clip(0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------- the other codecs


@pytest.mark.parametrize("name", list(rivals.RIVALS))
def test_what_a_codec_writes_is_counted_and_decodes(name, frames, tmp_path):
    frames = frames[:5]
    if name not in rivals.available():
        pytest.skip(f"this ffmpeg has no {rivals.RIVALS[name].encoder}")
    sizes, errors = [], []
    for crf in (15, 45):
        size, kind, path = rivals.encode(name, frames, 25, crf, tmp_path / "a")
        files = {path.suffix: path.stat().st_size for path in tmp_path.iterdir()}
        assert size == path.stat().st_size == min(files.values()) and len(files) == 2
        assert kind == ("mp4" if path.suffix == ".mp4" else "raw")
        made = [rivals.decode(name, tmp_path / f"a{suffix}", frames.shape) for suffix in files]
        assert made[0].shape == frames.shape and np.array_equal(*made)  # the container does not matter
        assert not any(word in path.read_bytes() for word in (b"x264", b"x265", b"Lavc", b"SVT"))
        sizes.append(size)
        errors.append(np.square(made[0] - frames.astype(float)).mean())
    assert sizes[1] < sizes[0] and errors[0] < errors[1] and errors[0] < 10  # colours come back as they were
    with pytest.raises(UserError, match="6 frames"):
        rivals.decode(name, path, (6, *frames.shape[1:]))


def test_first_units_of_any_length_are_unpacked(frames, tmp_path):
    if "x264" not in rivals.available():
        pytest.skip("this ffmpeg has no x264")
    lengths = []  # of the first picture
    for crf in (8, 14, 18, 30):
        _, _, path = rivals.encode("x264", frames[:2], 25, crf, tmp_path / "a")
        start, *units = path.read_bytes().split(b"\0\0\1")
        assert not start.strip(b"\0") and [unit[0] & 31 for unit in units] == [7, 8, 5, 1]
        lengths.append(len(units[2]))
    assert any(256 <= n < 512 for n in lengths)  # as numbers of four bytes these begin like a start code


def test_codecs_that_ffmpeg_lacks_are_left_out_in_a_line(monkeypatch, capsys):
    monkeypatch.setattr(rivals, "available", lambda: ("x264", "av1"))
    points = rivals.points(["x264", "x265", "av1"], [40, 30], [50], True)
    assert [(point.codec, point.setting) for point in points] == [("x264", "crf 30"), ("x264", "crf 40"), ("av1", "crf 50")]
    assert capsys.readouterr().err == "x265 is left out: this ffmpeg has no libx265\n"


def test_a_failing_encoder_is_one_line(frames, monkeypatch, tmp_path):
    monkeypatch.setitem(rivals.RIVALS, "x264", rivals.RIVALS["x264"]._replace(encoder="nothing"))
    with pytest.raises(UserError, match="ffmpeg cannot encode with x264") as error:
        rivals.encode("x264", frames, 25, 30, tmp_path / "a")
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------------- curves


@pytest.mark.parametrize("factor", [0.3, 0.9, 2.5])
def test_bd_rate_of_a_shifted_curve_is_the_factor(factor):
    curve = [(0.02, 24.1), (0.05, 28.3), (0.09, 30.2), (0.3, 34.9), (1.1, 39.0)]
    share, low, high = rd.bd_rate(curve, [(factor * rate, quality) for rate, quality in reversed(curve)])
    assert share == pytest.approx(factor - 1, rel=1e-12) and (low, high) == (24.1, 39.0)
    limited = rd.bd_rate(curve, [(factor * rate, quality) for rate, quality in curve], below=0.09)
    assert limited == (pytest.approx(factor - 1), 24.1, pytest.approx(30.2))


def test_bd_rate_of_lines_over_the_overlap():
    # Log rate is linear in quality: 10 and 8 dB an octave, equal at 30 dB. Over 30 to 40 dB the mean distance is 1 / 8 octaves.
    a = [(2 ** ((q - 30) / 10), q) for q in (20, 28, 33, 40)]
    b = [(2 ** ((q - 30) / 8), q) for q in (30, 35, 47)]
    assert rd.bd_rate(a, b) == (pytest.approx(2 ** (5 / 8 - 5 / 10) - 1), 30, 40)
    assert rd.bd_rate(b, a) == (pytest.approx(2 ** (5 / 10 - 5 / 8) - 1), 30, 40)


def test_bd_rate_where_there_is_none():
    curve = [(0.1, 30.0), (0.2, 33.0)]
    for other in ([], [(0.1, 31.0)], [(0.1, 20.0), (0.2, 29.0)], [(0.1, 32.0), (0.2, 31.0)]):
        assert rd.bd_rate(curve, other) == rd.bd_rate(other, curve) == (NAN, NAN, NAN)
    assert rd.bd_rate(curve, curve, below=0.05) == (NAN, NAN, NAN)


def test_a_front_has_no_point_that_another_one_beats():
    points = [(3, 30.0), (1, 20.0), (2, 25.0), (2.5, 24.0), (2, 22.0), (4, 30.0), (5, 31.0)]
    assert rd.front(points) == [(1, 20.0), (2, 25.0), (3, 30.0), (5, 31.0)]


# --------------------------------------------------------------------------------------------------------------- measures


def test_ms_ssim_takes_the_largest_window_that_fits():
    torch.manual_seed(0)
    for size in (33, 64, 65, 100, 128, 160, 161, 200):
        side = rd.window(size, 200)
        x = torch.rand(2, 3, size, 200) * 2 - 1
        assert rd.ms_ssim(x, x).tolist() == pytest.approx([1, 1]) and (rd.ms_ssim(x, -x) < 0.5).all()
        if side < 11:
            with pytest.raises(AssertionError):  # the package's own limit
                rd.pytorch_msssim.ms_ssim(x, x, win_size=side + 2)
    assert rd.window(64, 200) == 3 and rd.window(400, 161) == 11 and rd.window(32, 200) == 0
    assert rd.ms_ssim(torch.zeros(2, 3, 32, 200), torch.zeros(2, 3, 32, 200)).isnan().all()


def test_measures_pool_over_videos_and_batches(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    videos = [(rng.integers(0, 256, (n, 40, 36, 3), np.uint8), 25) for n in (3, 20)]
    made = {n: np.clip(v.astype(int) + step, 0, 255).astype(np.uint8) for (v, _), n, step in zip(videos, (3, 20), (9, -2))}
    point = rd.Point("a", "b", lambda frames, fps, path: (100, "raw", 0.5, made[len(frames)]), model=1000)
    row = rd.measure(point, videos, tmp_path, lpips=lambda x, y: x.sub(y).abs().mean().item())
    error = np.concatenate([v - made[len(v)].astype(float) for v, _ in videos])
    assert row["psnr"] == pytest.approx(10 * math.log10(255**2 / np.square(error).mean()))
    assert row["lpips"] == pytest.approx(np.abs(error).mean() / 127.5, rel=1e-4)
    similar = [rd.ms_ssim(to_clip(v), to_clip(made[len(v)])) for v, _ in videos]
    assert row["ms-ssim"] == pytest.approx(torch.cat(similar).mean().item(), rel=1e-4)
    pixels = 23 * 40 * 36
    assert row["bpp"] == 1600 / pixels and row["bpp with model"] == 9600 / pixels and row["seconds"] == 1
    assert (row["videos"], row["frames"], row["bytes"], row["file"]) == (2, 23, 200, "raw")


def test_curves_of_codecs_are_drawn(tmp_path):
    lines = {f"codec {k}": [(0.01 * (k + 1), 20.0 + k), (0.1, 30.0 + k)] for k in range(9)}
    plot.families(tmp_path / "a.png", [("rate", "quality", lines), ("rate", "other", {"codec 3": [(1, 1)]})])
    assert Path(tmp_path / "a.png").stat().st_size > 10_000


# ------------------------------------------------------------------------------------------------------------ degradation


@pytest.fixture(scope="module")
def clips(frames):
    return torch.stack([to_clip(frames[:4, :64, :64]), to_clip(frames[4:8, :64, 7:])])


@pytest.fixture(scope="module")
def draws():
    return degrade.draw(2, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", degrade.KINDS[1:])
def test_degraded_clips_are_of_8_bits_and_can_be_bettered(kind, clips, draws):
    clips = clips.sign() * 0.7 if kind == "blur" else clips  # what is smooth, a blur leaves as it is

    def error(x):
        return (x - clips).square().mean().item()

    damaged = degrade.degrade(clips, kind, draws)
    levels = (damaged + 1) * 127.5
    assert damaged.shape == clips.shape and damaged.abs().max() <= 1.001 and (levels - levels.round()).abs().max() < 1e-3
    name, better = degrade.classic(damaged, kind, draws)
    assert name and better.shape == clips.shape and error(better) < 0.5 * error(damaged) and error(damaged) > 1e-4


def test_down4_is_the_mean_of_squares(clips, draws):
    damaged = degrade.degrade(clips, "down4", draws)
    assert damaged[1, 2, 0, 9, 14].item() == pytest.approx(clips[1, 2, 0, 8:12, 12:16].mean().item(), abs=1 / 255)
    assert (damaged[..., 8, 12] == damaged[..., 11, 15]).all()


def test_blur_is_a_gaussian(clips, draws):
    place = torch.arange(-12.0, 13)
    weights = torch.exp(-(place**2) / 8)
    weights = weights[:, None] * weights
    weights = (weights / weights.sum()).expand(3, 1, 25, 25)
    padded = F.pad(clips[0], (12,) * 4, mode="replicate")  # the frame's inside does not see its edges
    wanted = F.conv2d(padded, weights, groups=3)[..., 12:-12, 12:-12]
    damaged = degrade.degrade(clips, "blur", draws)[0, ..., 12:-12, 12:-12]
    assert (damaged - wanted).abs().max() < 1.1 / 255
    grey = torch.full((1, 1, 3, 16, 16), 52.5 / 127.5)
    torch.testing.assert_close(degrade.degrade(grey, "blur", draws), grey)  # to the edge


def test_holes_are_where_the_draws_say(clips, draws):
    damaged = degrade.degrade(clips, "mask", draws)
    hole = (draws < 0.25).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None, None].expand_as(clips)
    assert 0.1 < hole.float().mean() < 0.4 and (damaged[hole].abs() < 1.01 / 255).all()
    torch.testing.assert_close(damaged[~hole], clips[~hole])
    _, filled = degrade.classic(damaged, "mask", draws)
    assert torch.equal(filled[~hole], damaged[~hole])
    assert degrade.degrade(clips, "none", draws) is clips
