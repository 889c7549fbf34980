"""The study of what lies between frames and between videos, on clips whose truth is known, and one small run."""

import numpy as np
import pytest
import torch

import vae
from common import video
from common.utils import UserError
from studies import between


class Pixels:
    """Features that cost nothing."""

    meta = {"features": "random", "protocol": "videogpt"}

    def __call__(self, clips):
        return clips.reshape(len(clips), -1)[:, ::97] / 255.0


class Ramp:
    """An autoencoder whose clips are a ramp in time: the token is its start and its slope."""

    class nerv_config:
        num_frames = 3

    def encode(self, clips, steps=0):
        level = clips.mean((2, 3, 4))  # [B, T]
        return torch.stack([level[:, 0], (level[:, -1] - level[:, 0]) / 2], 1)[:, None], None

    def decode(self, tokens, t):
        level = tokens[:, 0, :1] + tokens[:, 0, 1:] * t.float()
        return level[:, :, None, None, None].expand(-1, -1, 3, 8, 8)


def ramps(frames, stride):
    start, slope = torch.tensor([-0.5, 0.1]), torch.tensor([0.2, -0.1])
    level = start[:, None] + slope[:, None] * torch.arange(frames) / stride
    return level[:, :, None, None, None].expand(-1, -1, 3, 8, 8)


def test_blends_are_of_both_neighbours_by_how_near_they_are():
    frames = torch.tensor([[0.0, 1.0, 4.0]])[..., None]
    assert between.blended(frames, 1).flatten().tolist() == [0, 1, 4]
    assert between.blended(frames, 2).flatten().tolist() == [0, 0.5, 1, 2.5, 4]
    assert between.blended(frames, 4)[0, [1, 5]].flatten().tolist() == [0.25, 1.75]


def test_frames_between_are_asked_of_the_network_and_not_of_the_file():
    fine = ramps(5, 2).clone()
    rows = dict(between.between_frames(Ramp(), fine, 2, torch.device("cpu")))
    assert len(rows) == 4 and min(rows.values()) > 90  # a ramp is its own blend, and the network knows it
    fine[:, 1::2] += 0.5  # a file with something else between
    rows = list(between.between_frames(Ramp(), fine, 2, torch.device("cpu")))
    assert rows[0][1] > 90 and all(value < 13 for _, value in rows[1:])


def test_partners_are_of_the_same_class_and_others():
    labels = np.array([0, 1, 0, 2, 1, 0, 2])
    found = between.partners(labels)
    assert (labels[found] == labels).all() and (found != np.arange(7)).all() and sorted(found) == list(range(7))


def test_halfway_between_videos_is_halfway_between_their_tokens():
    clips = torch.stack([torch.full((3, 3, 8, 8), level) for level in (-0.4, 0.4)])
    rows, shown = between.between_videos(Ramp(), clips, np.array([0, 0]), Pixels(), torch.device("cpu"))
    assert [name for name, *_ in rows] == ["reconstructions", "halfway between tokens", "halfway between pixels"]
    assert rows[0][1] < 1e-4 < rows[1][1]  # two grey clips are not a dark one and a bright one
    assert shown["halfway between tokens"].abs().max() < 1e-6 and torch.equal(shown["other"], clips.flip(0))


def test_a_run_on_files_of_which_training_left_out_every_second_frame(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fvd.load_detector", lambda *a, **kw: Pixels())
    clips = torch.rand(6, 7, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for k, clip in enumerate(clips):
        for role in ("train", "test"):
            (tmp_path / role / "ab"[k % 2]).mkdir(parents=True, exist_ok=True)
            video.write_mp4(tmp_path / role / "ab"[k % 2] / f"{k}", [clip], 12)
    options = "--preset nano --resolution 16 --num-frames 4 --num-tokens 8 --token-dim 8 --pos-size 4 --mixing 0 --stride 2"
    argv = ["--dataset", "folder", "--data-dir", str(tmp_path / "train"), "--cache", "off", *options.split()]
    argv += ["--lpips", "none", "--batch-size", "4", "--steps", "1", "--run-dir", str(tmp_path / "run")]
    vae.main([*argv, "--out", str(tmp_path / "vae.pt")])
    words = ["--ckpt", str(tmp_path / "vae.pt"), "--features", "random", "--out", str(tmp_path / "new" / "sheet.png")]
    with pytest.raises(UserError, match="two clips of each class"):
        between.main([*words, "--clips", "2"])
    capsys.readouterr()
    between.main(words)
    printed = capsys.readouterr().out
    assert "6 held-out clips, of which every 2. frame is shown" in printed
    assert "FVD on random I3D features to the real clips" in printed and (tmp_path / "new" / "sheet.png").is_file()
