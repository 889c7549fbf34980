"""bench.loader: every way to a clip ends in the same clip, and the table says which model it was of."""

import functools

import numpy as np
import pytest
import torch

import codec
import vae
from bench import loader


@pytest.fixture
def videos():
    x = np.arange(32)
    wave = 127 + 100 * np.sin((x + 3 * np.arange(24)[:, None, None]) / 9) * np.cos(x[:, None] / 7)
    return [np.stack([wave, 255 - wave, wave[:, ::-1]], -1).astype(np.uint8)]  # [24, 32, 32, 3]


def test_h264_gives_the_clips_that_went_in(videos, tmp_path):
    real = loader.to_clips(np.moveaxis(videos[0], 3, 1), 8)
    assert real.shape == (3, 8, 3, 32, 32) and real.min() >= -1 and real.max() > 0.7
    path = loader.h264(videos[0], 10, tmp_path / "a.mp4", ["-x264-params", "keyint=8:scenecut=0"])
    made = {"ffmpeg": loader.ffmpeg(path, 8, 32)}
    if loader.pyav_is_there():
        made["PyAV"] = loader.pyav(path, 8)
        made["PyAV, random"] = torch.cat([loader.pyav(path, 8, first) for first in (0, 8, 16)])
    for name, clips in made.items():
        assert clips.shape == real.shape and (clips - real).square().mean() < 0.01, name  # colours in their order, too


def test_raw_clips_are_all_of_them(videos, tmp_path):
    planar = [np.ascontiguousarray(np.moveaxis(videos[0], 3, 1))]
    planar[0].tofile(tmp_path / "0.raw")
    order = np.random.default_rng(0)
    assert loader.places(planar, 10) == [(0, 0), (0, 10)]
    assert loader.raw(planar, 10, 16, order) == loader.from_disk([tmp_path / "0.raw"], [planar[0].shape], 10, 16, order) == 20


def test_the_table(monkeypatch, capsys):
    monkeypatch.setitem(codec.ENCODERS, "fastnerv", vae.EncoderConfig(width=24, depth=2, heads=2, patch=(2, 8, 8)))
    sizes = {"resolution": 32, "num_frames": 4, "width": 4, "tokens": (3, 8, 0), "token_dims": (8, 6, 0)}
    monkeypatch.setattr(codec, "CodecConfig", functools.partial(codec.CodecConfig, **sizes))
    loader.clips(loader.Config(videos=2, frames=9, repeats=1, crf=[30]))
    said = capsys.readouterr().out
    for line in ("codec.Loader ", "codec.Loader, bfloat16", "H.264, crf 30, ffmpeg", "raw, in memory", "raw, on disk"):
        assert f"| {line}" in said
    assert "2 videos, 18 frames of 32 x 32" in said and "untrained" in said
