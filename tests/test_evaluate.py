"""The evaluation of a checkpoint: its figures, its report, and going on where it was."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_mp4

import data
import dit
import evaluate
import fvd
from common import checkpoints, utils, video
from common.utils import UserError
from vae import load_vae, reconstruct


class Colors:
    """Stands in for I3D: the mean colours of a clip's eighths and its first frame's corner, so that features differ."""

    meta = {"features": "random stand-in", "protocol": "stylegan-v"}

    def __init__(self):
        self.calls = 0

    def __call__(self, clips, names=None):
        self.calls += 1
        x = np.asarray(clips, np.float32) / 255
        b, t = x.shape[:2]
        return np.concatenate([x.reshape(b, 8, -1, 3).mean(2).reshape(b, -1), x[:, 0, :4, :4].reshape(b, -1)], 1)


@pytest.fixture
def detector(monkeypatch):
    stand_in = Colors()
    monkeypatch.setattr(evaluate, "SHOWN", 3)
    monkeypatch.setattr(fvd, "load_detector", lambda *args: stand_in)
    return stand_in


def settings(trained, name, tmp_path, **kw):
    options = dict(out_dir=str(tmp_path / "eval"), videos=20, batch_size=4, bootstrap=20, judge_clips=64, steps=2)
    options |= dict(lpips="none", device="cpu", cache_dir=str(tmp_path / "cache"))
    return evaluate.Config(ckpt=str(trained / name), **options | kw)


def run(config):
    evaluate.main(config)
    return json.loads((Path(config.out_dir) / "results.json").read_text())


def test_stage_1_is_what_its_parts_give(trained, tmp_path, detector):
    found = run(settings(trained, "vae.pt", tmp_path))
    results = found["results"]
    assert set(results) == {"rFVD on random I3D features", "PSNR", "PSNR of each clip's own time average", "SSIM"}
    vae = load_vae(checkpoints.load(trained / "vae.pt", "vae", ""))
    test_set = data.Shapes("test", 32, 16)
    real = np.stack([test_set[i * len(test_set) // 20][0] for i in range(20)])
    clips = video.to_clip(real)
    with torch.no_grad():
        made = video.to_frames(vae.decode(vae.encode(clips)[0], torch.arange(16)))
    error = np.square(real / 255 - made / 255).mean((2, 3, 4))
    assert results["PSNR"]["value"] == pytest.approx(-10 * np.log10(error).mean(), abs=1e-3)
    value = fvd.frechet_distance_of(detector(real), detector(made))
    assert results["rFVD on random I3D features"]["value"] == pytest.approx(value, rel=1e-4)
    for r in results.values():
        assert r["low"] <= r["value"] <= r["high"] and r["clips"] == 20
    assert found["skipped"] == {} and "revision" in found["about"]["trained"]
    assert found["about"]["features"] == "random stand-in, protocol stylegan-v"


def test_a_square_is_measured_by_itself(trained, tmp_path, detector):
    results = run(settings(trained, "vae.pt", tmp_path, videos=4, square=[8, 4, 24, 20]))["results"]
    vae = load_vae(checkpoints.load(trained / "vae.pt", "vae", ""))
    test_set = data.Shapes("test", 32, 16)
    real = np.stack([test_set[i * len(test_set) // 4][0] for i in range(4)])
    with torch.no_grad():
        made = video.to_frames(vae.decode(vae.encode(video.to_clip(real))[0], torch.arange(16)))
    still = np.broadcast_to(real.mean(1, keepdims=True), real.shape)
    for name, other in (("PSNR in the square", made), ("PSNR of the time average in the square", still)):
        error = np.square(real / 255 - other / 255)[:, :, 4:20, 8:24].mean((2, 3, 4))
        assert results[name]["value"] == pytest.approx(-10 * np.log10(error).mean(), abs=1e-3)
    error = np.square(real / 255 - still / 255).mean((2, 3, 4))
    assert results["PSNR of each clip's own time average"]["value"] == pytest.approx(-10 * np.log10(error).mean(), abs=1e-3)


@pytest.mark.parametrize("square", [[8, 4, 8, 20], [0, 0, 33, 32], [-1, 0, 4, 4]])
def test_a_square_has_to_lie_in_the_frame(trained, tmp_path, detector, square):
    with pytest.raises(UserError, match="32 x 32"):
        run(settings(trained, "vae.pt", tmp_path, square=square))


def test_stage_2_and_its_report(trained, tmp_path, detector, capsys):
    config = settings(trained, "dit.pt", tmp_path)
    results = run(config)["results"]
    for name in (
        "rFVD on random I3D features",
        "gFVD on random I3D features",
        "class agreement",
        "clips with a dissolved frame",
        "diversity, of that of real clips",
    ):
        assert np.isfinite(results[name]["value"]), name
    assert "FVD" not in [name.strip("rg") for name in results]  # random features are never called FVD
    page = (Path(config.out_dir) / "report.html").read_text()
    assert page.count("data:video/mp4;base64,") == 4 * 3 and "data:image/png;base64," in page
    assert not re.search(r'(src|href)="(?!data:)', page)  # it needs no other file
    assert "class agreement" in capsys.readouterr().out

    # generated clips are those of dit.generate, a seed for each batch
    ckpt = checkpoints.load(trained / "dit.pt", "dit", "")
    model, vae, scale = dit.load_dit(ckpt)
    train_set = data.Shapes("train", 32, 16)
    indices = [i * len(train_set) // 20 for i in range(20)]
    real = np.stack([train_set[i][0] for i in indices])
    made = []
    for k in range(5):
        labels = torch.tensor([train_set[i][1] for i in indices[4 * k : 4 * k + 4]])
        with torch.no_grad():
            tokens = dit.generate(model, labels, config.steps, config.guidance, config.sampler, 4 * k)
            made.append(video.to_frames(vae.decode(tokens / scale, torch.arange(16))))
    value = fvd.frechet_distance_of(detector(real), detector(np.concatenate(made)))
    assert results["gFVD on random I3D features"]["value"] == pytest.approx(value, rel=1e-3)
    # and beside them stand as many held-out clips, real and reconstructed
    held_out = data.Shapes("test", 32, 16)
    others = np.stack([held_out[i * len(held_out) // 20][0] for i in range(20)])
    refined = reconstruct(vae, video.to_clip(others), torch.device("cpu"), refine=dit.refine_steps(ckpt))
    for title, clips in (("real clips", others), ("reconstructions", video.to_frames(refined))):
        value = fvd.frechet_distance_of(detector(real), detector(clips))
        assert results[f"gFVD on random I3D features of {title}"]["value"] == pytest.approx(value, rel=1e-3)


def test_the_worst_frame_finds_the_clip_that_dissolves():
    torch.manual_seed(0)
    clips = torch.rand(6, 8, 3, 32, 32)
    clips[:, 3] *= 0.9  # frames differ a little in real clips too
    assert torch.allclose(evaluate.worst_frame(clips), torch.full((6,), 0.81), atol=0.15)
    clips[4, 5] = torch.nn.functional.avg_pool2d(clips[4, 5], 5, 1, 2)
    assert evaluate.worst_frame(clips).argmin() == 4 and evaluate.worst_frame(clips)[4] < 0.1
    assert evaluate.worst_frame(torch.zeros(1, 4, 3, 32, 32)).isfinite().all()


def test_it_goes_on_where_it_was(trained, tmp_path, detector):
    config = settings(trained, "dit.pt", tmp_path)
    whole = run(config)["results"]
    work = next(Path(config.out_dir).glob("work-*"))
    (work / "reconstructed-00003.npz").unlink()
    (work / "generated-00001.npz").unlink()
    (work / "generated-00002.npz.part").write_bytes(b"half")
    judge = (work / "judge.pt").stat().st_mtime_ns
    detector.calls = 0
    assert run(config)["results"] == whole
    assert detector.calls == 2  # made clips of two batches: those of real ones are remembered
    assert (work / "judge.pt").stat().st_mtime_ns == judge


def test_features_of_real_clips_are_remembered_for_other_checkpoints(trained, tmp_path, detector):
    run(settings(trained, "vae.pt", tmp_path))
    assert detector.calls == 10  # five batches, real and made
    detector.calls = 0
    first = run(settings(trained, "dit.pt", tmp_path, out_dir=str(tmp_path / "other")))["results"]
    assert detector.calls == 15  # made; real and generated of stage 2
    detector.meta = detector.meta | {"features": "random others"}
    detector.calls = 0
    again = run(settings(trained, "dit.pt", tmp_path, out_dir=str(tmp_path / "other")))["results"]
    assert detector.calls == 20 and again == first
    detector.calls = 0
    (tmp_path / "cache/features").rename(tmp_path / "cache/gone")
    assert run(settings(trained, "vae.pt", tmp_path, videos=8))["results"]["PSNR"]["clips"] == 8 and detector.calls == 4


def test_what_was_measured_otherwise_is_not_taken(trained, tmp_path, detector):
    config = settings(trained, "vae.pt", tmp_path)
    run(config)
    detector.calls = 0
    config.videos = 16
    assert run(config)["results"]["PSNR"]["clips"] == 16 and detector.calls == 8
    assert len(list(Path(config.out_dir).glob("work-*"))) == 2


def test_clips_and_code_that_changed_are_measured_anew(trained, tmp_path, detector, monkeypatch):
    config = settings(trained, "vae.pt", tmp_path)
    run(config)
    monkeypatch.setattr(data.Shapes, "__len__", lambda self: 45)  # half of the clips are gone
    run(config)
    monkeypatch.setattr(utils, "git_revision", lambda: "another")
    run(config)
    assert len(list(Path(config.out_dir).glob("work-*"))) == 3


def test_nothing_is_called_held_out_where_nothing_is(trained, tmp_path, detector):
    """All of UCF-101, say: what is tested are the videos that were trained on, and they are no floor of gFVD."""
    for i in range(4):
        write_mp4(tmp_path / "clips" / "square_updown" / str(i), torch.rand(16, 3, 32, 32) * 2 - 1)
    ckpt = checkpoints.load(trained / "dit.pt", "dit", "")
    ckpt["vae"]["config"] |= {"dataset": "folder", "data_dir": str(tmp_path / "clips")}
    torch.save(ckpt, tmp_path / "dit.pt")
    found = run(settings(tmp_path, "dit.pt", tmp_path))
    assert "gFVD on random I3D features" in found["results"] and not any(" of recon" in name for name in found["results"])
    assert "4 of them in the place of held-out ones" in found["about"]["data"]
    write_mp4(tmp_path / "clips" / "train" / "square_updown" / "5", torch.rand(16, 3, 32, 32) * 2 - 1)
    (tmp_path / "clips" / "square_updown").rename(tmp_path / "clips" / "train" / "square_updown" / "more")
    for i in range(2):
        write_mp4(tmp_path / "clips" / "test" / "square_updown" / str(i), torch.rand(16, 3, 32, 32) * 2 - 1)
    results = run(settings(tmp_path, "dit.pt", tmp_path))["results"]
    clips = {name: results[f"gFVD on random I3D features{name}"]["clips"] for name in ("", " of real clips")}
    assert clips == {"": 5, " of real clips": 2}  # fewer are held out, and their count says so


def test_processes_share_the_batches(tmp_path, monkeypatch):
    seen = []

    def measure(indices, start):
        seen.append(start)
        return {"x": np.array(indices)}

    def others():  # what the barrier of the first process waits for: that the second has measured its share
        monkeypatch.setattr(utils, "wait_for_all", lambda: None)
        evaluate.batches(tmp_path, "kind", range(10), 3, measure, 1, 2)

    monkeypatch.setattr(utils, "wait_for_all", others)
    found = evaluate.batches(tmp_path, "kind", range(10), 3, measure, 0, 2)
    assert seen == [0, 6, 3, 9] and found["x"].tolist() == list(range(10))


def test_diversity():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(12, 5)), np.repeat([0, 1], 6)
    once = np.ones(12)
    pairs = [np.linalg.norm(x[i] - x[j]) for i in range(12) for j in range(12) if i != j and labels[i] == labels[j]]
    assert evaluate.diversity(x, labels, once) == pytest.approx(np.mean(pairs))
    assert evaluate.diversity(np.ones((12, 5)), labels, once) == 0
    twice = np.where(np.arange(12) == 3, 2, 1)  # a clip that is drawn twice has no distance to itself
    repeated = np.append(np.arange(12), 3)
    pairs = [
        np.linalg.norm(x[i] - x[j]) for a, i in enumerate(repeated) for b, j in enumerate(repeated)
        if i != j and labels[i] == labels[j]
    ]  # fmt: skip
    assert evaluate.diversity(x, labels, twice) == pytest.approx(np.mean(pairs))
    same = evaluate.diversity_result(x, x, labels, fvd.Config(bootstrap=10))
    assert [same[name] for name in ("value", "low", "high")] == pytest.approx([100] * 3)


def test_intervals():
    values = np.random.default_rng(0).normal(5, 2, 400)
    r = evaluate.mean_result(values, fvd.Config(bootstrap=500))
    assert r["high"] - r["low"] == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.15)
    assert "low" not in evaluate.mean_result(values, fvd.Config(bootstrap=0))
    hits = evaluate.share_result(np.ones(20, bool))
    assert hits["value"] == 100 and 80 < hits["low"] < 90 and hits["high"] == 100


def test_bad_input(trained, tmp_path, detector):
    with pytest.raises(UserError, match="no checkpoint"):
        evaluate.main(evaluate.Config(ckpt=str(tmp_path / "none.pt")))
    with pytest.raises(UserError, match="--videos"):
        evaluate.main(settings(trained, "vae.pt", tmp_path, videos=0))
    with pytest.raises(UserError, match="--steps 1001"):
        evaluate.main(settings(trained, "vae.pt", tmp_path, steps=1001))
    with pytest.raises(UserError, match="two held-out clips"):
        evaluate.main(settings(trained, "vae.pt", tmp_path, videos=1))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        evaluate.main(settings(trained, "vae.pt", tmp_path, out_dir=str(tmp_path / "file")))
