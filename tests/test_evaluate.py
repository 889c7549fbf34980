"""The evaluation of a checkpoint: its figures against plain computations, its report, several processes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, torchrun, write_mp4

import data
import dit
import evaluate
import fvd
import vae as stage1
from common import checkpoints, video
from common.utils import UserError


class Colours:
    """Stands in for I3D: the mean colours of a clip's eighths and its first frame's corner, so that features differ."""

    meta = {"features": "random stand-in", "protocol": "stylegan-v"}

    def __call__(self, clips):
        x = np.asarray(clips, np.float32) / 255
        b, t = x.shape[:2]
        return np.concatenate([x.reshape(b, 8, -1, 3).mean(2).reshape(b, -1), x[:, 0, :4, :4].reshape(b, -1)], 1)


@pytest.fixture
def detector(monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH", 4)
    monkeypatch.setattr(fvd, "load_detector", lambda *args: Colours())
    return Colours()


def settings(trained, name, tmp_path, **kw):
    options = dict(videos=10, bootstrap=20, classifier_clips=64, steps=2, lpips="none", device="cpu")
    options = {"ckpt": trained / name, "out_dir": tmp_path / "eval"} | options | kw
    return [str(word) for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]


def run(argv):
    evaluate.main(argv)
    return json.loads(Path(argv[argv.index("--out-dir") + 1], "results.json").read_text())


def spread(dataset, count=10):
    return np.stack([dataset[i][0] for i in data.spread(dataset, count)])


def test_stage_1_is_what_its_parts_give(trained, tmp_path, detector):
    found = run(settings(trained, "vae.pt", tmp_path))
    results = found["results"]
    assert set(results) == {"rFVD on random I3D features", "PSNR", "PSNR of each clip's own time average", "SSIM"}
    vae = stage1.load_vae(checkpoints.load(trained / "vae.pt", "vae", ""))
    real = spread(data.Shapes("test", 32, 16))
    with torch.no_grad():
        made = video.to_frames(vae.decode(vae.encode(video.to_clip(real))[0], torch.arange(16)))
    for name, other in (("PSNR", made), ("PSNR of each clip's own time average", real.mean(1, keepdims=True))):
        error = np.square(real / 255 - other / 255).mean((2, 3, 4))
        assert results[name]["value"] == pytest.approx(-10 * np.log10(error).mean(), abs=1e-3)
    frames = (video.to_clip(clips).flatten(0, 1).double() / 2 + 0.5 for clips in (real, made))
    assert results["SSIM"]["value"] == pytest.approx(evaluate.ssim(*frames, data_range=1).item(), abs=1e-4)
    value = fvd.frechet_distance_of(detector(real), detector(made))
    assert results["rFVD on random I3D features"]["value"] == pytest.approx(value, rel=1e-4)
    for r in results.values():
        assert r["low"] <= r["value"] <= r["high"] and r["clips"] == 10
    assert found["skipped"] == {} and found["about"]["features"] == "random stand-in, protocol stylegan-v"


def test_stage_2_and_its_report(trained, tmp_path, detector, capsys, monkeypatch):
    classified, real = [], evaluate.classify
    monkeypatch.setattr(evaluate, "classify", lambda classifier, clips: (classified.append(clips), real(classifier, clips))[1])
    results = run(settings(trained, "dit.pt", tmp_path))["results"]
    for name in ("classifier accuracy", "classifier accuracy of the real clips", "clips with a blurred frame"):
        assert 0 <= results[name]["low"] <= results[name]["value"] <= results[name]["high"] <= 100
    assert results["diversity, of that of real clips"]["value"] > 0
    assert "FVD" not in [name.strip("rg") for name in results]  # random features are never called FVD
    page = (tmp_path / "eval" / "report.html").read_text()
    assert page.count("data:video/mp4;base64,") == 4
    assert not re.search(r'(src|href)="(?!data:)', page)  # it needs no other file
    out = capsys.readouterr().out
    assert all(name in out and name in page.replace("&#x27;", "'") for name in results)

    # generated clips are those of dit.generate, a seed for each batch
    model, vae, latent_map = dit.load_dit(checkpoints.load(trained / "dit.pt", "dit", ""))
    train_set, held_out = data.Shapes("train", 32, 16), data.Shapes("test", 32, 16)
    labels = torch.tensor([train_set[i][1] for i in data.spread(train_set, 10)])
    made = []
    for k in range(0, 10, 4):
        latents = dit.generate(model, labels[k : k + 4], steps=2, guidance=evaluate.Config.guidance, seed=k)
        made.append(video.to_frames(stage1.decode_all(vae, latent_map.inverse(latents), torch.arange(16))))
    assert torch.equal(torch.cat(classified[3:]), video.to_clip(np.concatenate(made)))
    others = spread(held_out)
    assert torch.equal(torch.cat(classified[:3]), video.to_clip(others)), "the classifier has seen the training clips"
    reconstructed = video.to_frames(stage1.reconstruct(vae, video.to_clip(others), torch.device("cpu")))
    for title, clips in (("", np.concatenate(made)), (" of real clips", others), (" of reconstructions", reconstructed)):
        value = fvd.frechet_distance_of(detector(spread(train_set)), detector(clips))
        assert results[f"gFVD on random I3D features{title}"]["value"] == pytest.approx(value, rel=1e-3)


def test_predictions(predictor, tmp_path, detector, monkeypatch):
    """The distance is of five real frames and eleven predicted ones, PSNR of those eleven; later frames are not looked at."""
    calls = []

    def given_latents(model, labels, steps, guidance, sampler, seed, given):
        calls.append((labels.tolist(), seed))
        return given

    monkeypatch.setattr(dit, "generate", given_latents)
    results = run(settings(predictor.parent, "dit.pt", tmp_path, seed=7))["results"]
    real = spread(data.Shapes("test", 32, 16))
    _, vae, latent_map = dit.load_dit(checkpoints.load(predictor, "dit", ""))
    with torch.no_grad():
        known = video.to_clip(real) * (torch.arange(16) < 5).view(16, 1, 1, 1)
        tokens = latent_map.inverse(latent_map(vae.encode(known)[0]))
        decoded = video.to_frames(vae.decode(tokens, torch.arange(16)))
    for title, clips in (("predicted frames", decoded), ("copies of the last given frame", real[:, 4:5].repeat(16, 1))):
        error = np.square(real[:, 5:] / 255 - clips[:, 5:] / 255).mean((2, 3, 4))
        assert results[f"PSNR of {title}"]["value"] == pytest.approx(-10 * np.log10(error).mean(), abs=1e-3)
    made = np.concatenate([real[:, :5], decoded[:, 5:]], 1)
    for title, clips in (("predictions", made), ("predictions, given frames decoded", decoded)):
        value = fvd.frechet_distance_of(detector(real), detector(clips))
        assert results[f"gFVD on random I3D features of {title}"]["value"] == pytest.approx(value, rel=1e-3)
    assert calls == [([9] * 4, 7), ([9] * 4, 11), ([9] * 2, 15)]  # class 9 is none
    assert "rFVD on random I3D features" in results and not any("classifier" in name for name in results)


def test_the_worst_frame_finds_the_clip_with_a_blurred_frame():
    torch.manual_seed(0)
    clips = torch.rand(6, 8, 3, 32, 32)
    clips[:, 3] *= 0.9  # frames differ a little in real clips too
    assert torch.allclose(evaluate.worst_frame(clips), torch.full((6,), 0.81), atol=0.15)
    clips[4, 5] = torch.nn.functional.avg_pool2d(clips[4, 5], 5, 1, 2)
    assert evaluate.worst_frame(clips).argmin() == 4 and evaluate.worst_frame(clips)[4] < 0.1
    assert evaluate.worst_frame(torch.zeros(1, 4, 3, 32, 32)).isfinite().all()


def test_a_classifier_learns_and_from_few_clips_too():
    train_set = data.Shapes(length=72)
    clips, labels = data.fixed_clips(train_set, 36)
    assert not evaluate.train_classifier(train_set, 9, 1, "cpu").training  # fewer than a batch
    assert evaluate.accuracy(evaluate.train_classifier(train_set, 9, 640, "cpu"), clips, labels) > 0.5


def test_nothing_is_called_held_out_where_nothing_is(trained, tmp_path, detector):
    """All of UCF-101, say: what is tested are the videos that were trained on, and they are no floor of gFVD."""
    for i in range(4):
        write_mp4(tmp_path / "clips" / "square_updown" / str(i), torch.rand(16, 3, 32, 32) * 2 - 1)
    ckpt = checkpoints.load(trained / "dit.pt", "dit", "")
    ckpt["vae"]["config"] |= {"dataset": "folder", "data_dir": str(tmp_path / "clips")}
    torch.save(ckpt, tmp_path / "<i>dit.pt")
    found = run(settings(tmp_path, "<i>dit.pt", tmp_path))
    assert "gFVD on random I3D features" in found["results"] and not any(" of recon" in name for name in found["results"])
    assert "4 videos, 0 held out" in found["about"]["data"]
    assert "&lt;i&gt;dit.pt" in (page := (tmp_path / "eval" / "report.html").read_text()) and "<i>" not in page


PROCESS = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import evaluate, fvd, test_evaluate
evaluate.BATCH, fvd.load_detector = 4, lambda *args: test_evaluate.Colours()
evaluate.main("--videos 10 --bootstrap 0 --classifier-clips 64 --steps 2 --lpips none --device cpu --ckpt".split() + [{ckpt!r}])
"""


def test_two_processes_share_the_work(trained, tmp_path, detector):
    alone = run(settings(trained, "dit.pt", tmp_path, bootstrap=0))["results"]
    (tmp_path / "run.py").write_text(PROCESS.format(root=str(ROOT), tests=str(ROOT / "tests"), ckpt=str(trained / "dit.pt")))
    torchrun("run.py", cwd=tmp_path)
    both = json.loads((tmp_path / "out/eval/results.json").read_text())["results"]
    assert both.keys() == alone.keys()
    for name in alone:
        assert both[name]["value"] == pytest.approx(alone[name]["value"], rel=1e-5), name


def test_diversity_and_intervals():
    rng = np.random.default_rng(0)
    x, y, labels = rng.normal(size=(12, 5)), rng.normal(size=(12, 5)), np.repeat([0, 1], 6)

    def mean_distance(x, rows):
        pairs = [(i, j) for i in rows for j in rows if i != j and labels[i] == labels[j]]
        return np.mean([np.linalg.norm(x[i] - x[j]) for i, j in pairs])

    result = evaluate.diversity_result(x, y, labels, evaluate.Config(bootstrap=1))
    assert result["value"] == pytest.approx(100 * mean_distance(y, range(12)) / mean_distance(x, range(12)))
    rows = np.random.default_rng(0).integers(12, size=12)  # a clip that is drawn twice has no distance to itself
    assert result["low"] == result["high"] == pytest.approx(100 * mean_distance(y, rows) / mean_distance(x, rows))
    values = np.random.default_rng(0).normal(5, 2, 400)
    r = evaluate.mean_result(values, evaluate.Config(bootstrap=500))
    assert r["high"] - r["low"] == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_a_report_that_cannot_be_written_is_said_before_the_work(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "over_processes", None)
    (tmp_path / "eval" / "report.html").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot write"):
        evaluate.main(settings(trained, "dit.pt", tmp_path))
