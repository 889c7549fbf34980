"""Rate and distortion: other codecs there and back, the distance of curves, measures; degraded clips."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.video import to_clip
from siblings import rd, rivals
from siblings.degrade import degrade

NAN = pytest.approx(math.nan, nan_ok=True)


@pytest.fixture(scope="module")
def frames():
    """uint8 [10, 66, 71, 3]: grey waves that move, in colours that change slowly over the frame."""
    t, y, x = np.arange(10)[:, None, None], np.arange(66)[:, None], np.arange(71)
    wave = 120 + 60 * np.sin((x + 3 * t) / 9) * np.cos((y - t) / 7)
    return np.stack([wave, wave + y / 3, wave - x / 3], -1).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", list(rivals.RIVALS))
def test_what_a_codec_writes_is_small_and_decodes(name, frames):
    if name not in rivals.available():
        pytest.skip(f"PyAV has no {rivals.RIVALS[name].encoder} here")
    files = [rivals.encode(name, frames[:5], 25, crf) for crf in (15, 45)]
    made = [rivals.decode(name, data, frames[:5].shape) for data in files]
    errors = [np.square(clip - frames[:5].astype(float)).mean() for clip in made]
    assert len(files[1]) < len(files[0]) < 3000 and errors[0] < errors[1] and errors[0] < 4  # colours come back as they were
    assert not any(word in files[0] for word in (b"x264", b"x265", b"Lavc", b"SVT"))
    best, size = rivals.within(name, frames[:5], 25, len(files[0]))
    assert len(files[1]) < size <= len(files[0]) and best.shape == made[0].shape
    assert rivals.within(name, frames[:5], 25, 1)[1] < len(files[1])  # the fewest that it takes


def test_bd_rate_is_the_mean_distance_over_the_overlap():
    # Log rate is linear in quality: 10 and 8 dB an octave, equal at 30 dB. Over 30 to 40 dB the mean distance is 1 / 8 octaves.
    a = [(2 ** ((q - 30) / 10), q) for q in (20, 28, 33, 40)]
    b = [(2 ** ((q - 30) / 8), q) for q in (30, 35, 47)]
    beaten = [(2.5, 29.0), (1.9, 32.9)]  # points of which a curve takes no notice
    assert rd.bd_rate(a + beaten, b[::-1]) == (pytest.approx(2 ** (5 / 8 - 5 / 10) - 1), 30, 40)
    for other in ([], [(0.1, 31.0)], [(0.1, 2.0), (0.2, 19.0)], [(0.1, 32.0), (0.2, 31.0)]):
        assert rd.bd_rate(a, other) == rd.bd_rate(other, a) == (NAN, NAN, NAN)


@pytest.mark.parametrize("size, side", [(33, 3), (64, 3), (65, 5), (161, 11)])
def test_ms_ssim_takes_the_largest_window_that_fits(size, side):
    x = torch.rand(2, 3, size, 200) * 2 - 1
    assert rd.ms_ssim(x, x).tolist() == pytest.approx([1, 1])
    wanted = rd.pytorch_msssim.ms_ssim(x + 1, 0.9 * x + 1, data_range=2, size_average=False, win_size=side)
    assert torch.equal(rd.ms_ssim(x, 0.9 * x), wanted) and rd.ms_ssim(x[..., :32], x[..., :32]).isnan().all()


def test_measures_pool_over_videos_and_batches(tmp_path):
    rng = np.random.default_rng(0)
    videos = [(rng.integers(0, 256, (n, 40, 36, 3), np.uint8), 25) for n in (3, 20)]
    made = {n: np.clip(v.astype(int) + step, 0, 255).astype(np.uint8) for (v, _), n, step in zip(videos, (3, 20), (9, -2))}
    point = rd.Point("a", "b", lambda frames, fps, path: (100, 0.5, made[len(frames)]), model=1000)
    row = rd.measure(point, videos, tmp_path)
    error = np.concatenate([v - made[len(v)].astype(float) for v, _ in videos])
    assert row["psnr"] == pytest.approx(10 * math.log10(255**2 / np.square(error).mean()))
    similar = [rd.ms_ssim(to_clip(v), to_clip(made[len(v)])) for v, _ in videos]
    assert row["ms-ssim"] == pytest.approx(torch.cat(similar).mean().item(), rel=1e-4)
    assert row["bpp"] == 1600 / (23 * 40 * 36) and row["bpp with model"] == 9600 / (23 * 40 * 36) and row["seconds"] == 1
    assert (row["videos"], row["frames"], row["bytes"]) == (2, 23, 200)


def test_degraded_clips_are_what_they_are_called(frames):
    clips = torch.stack([to_clip(frames[:4, :64, :64]), to_clip(frames[4:8, :64, 7:])])
    draws = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(1))
    small, blurred, holed = (degrade(clips, kind, draws) for kind in ("down4", "blur", "mask"))
    assert degrade(clips, "none", draws) is clips
    assert small[1, 2, 0, 9, 14].item() == pytest.approx(clips[1, 2, 0, 8:12, 12:16].mean().item(), abs=1 / 255)
    assert (small[..., 8, 12] == small[..., 11, 15]).all()
    weights = torch.exp(-(torch.arange(-12.0, 13) ** 2) / 8)
    weights = weights[:, None] * weights
    wanted = F.conv2d(clips.flatten(0, 1), (weights / weights.sum()).expand(3, 1, 25, 25), groups=3)
    assert (blurred.flatten(0, 1)[..., 12:-12, 12:-12] - wanted).abs().max() < 1.1 / 255  # away from the edges
    hole = (draws < 0.25).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None, None].expand_as(clips)
    assert 0.1 < hole.float().mean() < 0.4 and (holed[hole].abs() < 1.01 / 255).all()
    torch.testing.assert_close(holed[~hole], clips[~hole])
