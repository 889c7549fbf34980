"""The study of long videos: its measures on shapes whose truth is known, and its rows."""

import csv
import math

import numpy as np
import pytest
import torch

import data
import dit
import fvd
import vae
from common.video import to_clip
from studies import long


def test_the_shape_is_tracked_and_another_subject_is_seen():
    shapes = data.Shapes(num_frames=64, period=64)
    for i in range(9):
        colour, side, centre = long.track(shapes[i][0])
        assert np.isfinite(centre).all() and np.ptp(side) < 0.1 and np.ptp(colour, 0).max() < 0.05
        assert long.path_error(centre, 64) < 0.02 and np.ptp(centre, 0).max() > 0.4  # a third of a pixel
        wrong = np.roll(centre, 20, 0) * (np.arange(64) < 32)[:, None] + centre * (np.arange(64) >= 32)[:, None]
        assert long.path_error(wrong, 64) > 0.05
    other = np.concatenate([shapes[0][0][:16], *(shapes[i][0][16:32] for i in (9, 18, 27))])
    same, different = long.subject(shapes[0][0], 16), long.subject(other, 16)
    assert max(same) < 0.03 and different[0] > same[0] + 0.02 and different[1] > same[1] + 0.02


@pytest.mark.parametrize("overlap, chunks, jump", [(0, 3, 5.0), (0, 3, 1.0), (1, 3, 3.0), (0, 1, math.nan)])
def test_seam_is_the_jump_over_the_steps_within(overlap, chunks, jump):
    steps = torch.ones(chunks * (4 - overlap) + overlap - 1)
    steps[3 - overlap : (chunks - 1) * (4 - overlap) : 4 - overlap] = jump  # in a fade, the largest step counts
    level = torch.cat([torch.zeros(1), steps.cumsum(0)])
    clips = 0.01 * level[None, :, None, None, None].expand(2, -1, 3, 2, 2)
    assert long.seam(clips, 4, overlap) == pytest.approx(jump, rel=1e-4, nan_ok=True)


def test_rows_train_sample_and_are_not_done_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dit, "generate", lambda *args, generate=dit.generate, **kw: generate(*args[:2], 1, **kw))
    monkeypatch.setattr(long, "train_classifier", lambda *args: None)
    monkeypatch.setattr(long, "classify", lambda classifier, clips: torch.arange(len(clips)) % 9)
    monkeypatch.setattr(fvd, "load_detector", lambda *args: lambda clips: clips.reshape(len(clips), -1)[:, ::999])
    rows = ["reconstructed", "one after the other", "one network", "full attention", "interface, neighbours, overlap 2"]
    small = "--resolution 16 --num-frames 12 --num-tokens 8 --token-dim 8 --width 8 --batch-size 2 --steps 1"
    options = [f"--vae-options={small} --decode-frames 1", "--vin-options=--batch-size 2 --num-latents 4 --chunks 2"]
    options += ["--dit-options=--width 24 --heads 2 --depth 1 --batch-size 2 --num-latents 4 --extras muon"]
    options += ["--chunks", "3", "--seconds", "1e-9", "--videos", "2", "--out-dir", str(tmp_path), "--only", *rows]
    long.main(options)
    with open(tmp_path / "runs.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["row"] for row in found] == rows and all(row["shape"] == "1" for row in found)
    assert all(math.isfinite(float(row[name])) for row in found for name in ("seam", "path", "fvd_start", "fvd_across"))
    # FLOPs of one evaluation of the DiT: maps of 12 w² a token, attention, and conditions; of two, with guidance.
    w, N = 24, 8 * 3
    flops = 24 * N * w * w + 4 * N**2 * w + 12 * w * w + 2 * N * 8 * w * 2 + 3 * (2 * 256 * w + 2 * w * w) + 4 * w * w
    assert float(found[3]["gflop"]) == pytest.approx(2 * flops / 20 / 1e9, rel=1e-3)  # over 20 steps, of which one was taken
    monkeypatch.setattr(long, "Study", lambda config: pytest.fail("done again"))
    long.main(options)
    assert "| interface, neighbours, overlap 2 |" in capsys.readouterr().out


def test_frames_between_shown_ones_are_compared_at_their_own_times(trained, monkeypatch, capsys):
    shapes = data.Shapes("test", 32, 16)

    def perfect(network, clips, device, t):
        drawn = [to_clip(shapes.draw(i, t.numpy())) for i in (0, 256)]
        assert torch.equal(clips, torch.stack([x[::2] for x in drawn]))  # every second is shown
        return torch.stack(drawn)

    monkeypatch.setattr(vae, "reconstruct", perfect)
    long.main(f"--between {trained}/vae.pt --videos 2 --scale 2".split())
    shown, other = capsys.readouterr().out.splitlines()
    assert shown.split()[:2] == ["shown", "16"] and other.split()[:2] == ["between", "15"]
    assert "PSNR 100.00 dB, of the blend 100.00 dB" in shown
    assert "PSNR 100.00 dB" in other and float(other.split()[-2]) < 40
