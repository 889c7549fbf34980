"""What sample.py writes: generated, interpolated, reconstructed and predicted videos, under names that leave no directory."""

import re

import pytest
import torch
from conftest import write_mp4
from test_cli import check_error, messages

import data
import dit
import sample
import vae
from common import checkpoints, video


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two videos of 20 frames, a.mp4 and b.mp4, and short ones of 10 and of 4."""
    root, shapes = tmp_path_factory.mktemp("clips"), data.Shapes(num_frames=20)
    for name, i, length in (("a", 0, 20), ("b", 5, 20), ("short", 0, 10), ("four", 0, 4)):
        write_mp4(root / name, video.to_clip(shapes[i][0])[:length])
    return root


def written(folder, frames, count):
    """Checks that the sheet, the tiled video and `count` videos of so many frames are there; returns their names."""
    names = sorted(path.stem for path in folder.glob("*.mp4"))
    assert len(names) == count and folder.with_suffix(".png").is_file()
    for path in [*folder.glob("*.mp4"), folder.with_suffix(".mp4")]:
        assert video.read_frames(path, 32).shape == (frames, 32, 32, 3)
    return names


def test_every_class_then_some_by_name_and_number_and_a_seed_names_videos(trained, call, tmp_path, capsys):
    assert call("sample.py", f"--ckpt {trained}/dit.pt --steps 2") == 0
    out, err = capsys.readouterr()
    assert "out/samples/samples.png" in out and messages(err) == []
    names = written(tmp_path / "out" / "samples" / "samples", 16, 9)
    assert names == [f"{i:02d}_{name}" for i, name in enumerate(data.Shapes.classes)]
    for seed in (1, 2):
        options = f"--steps 2 --classes 3 ring_circle --count 2 --seed {seed} --out-dir o{seed}"
        assert call("sample.py", f"--ckpt {trained}/dit.pt {options}") == 0
    names = written(tmp_path / "o1" / "samples", 16, 4)
    assert names == ["00_triangle_sideways", "01_triangle_sideways", "02_ring_circle", "03_ring_circle"]
    assert (tmp_path / "o1" / "samples.png").read_bytes() != (tmp_path / "o2" / "samples.png").read_bytes()


def test_more_frames_and_some_beyond_the_end(trained, call, tmp_path, videos):
    options = f"--reconstruct {videos}/a.mp4 --time-scale 2 --extrapolate 2"
    assert call("sample.py", f"--ckpt {trained}/vae.pt {options}") == 0
    written(tmp_path / "out" / "samples" / "reconstruct", 2 * 16 + 2 * 2, 2)
    config = sample.Config(ckpt=str(trained / "vae.pt"), time_scale=3, extrapolate=2)
    t = sample.Sampler(config, dit.load_dit, vae.load_vae).t
    assert t[0] == 0 and len(t) == 48 + 6 and torch.allclose(t, torch.arange(54) * 15 / 47)


def test_interpolation_walks_from_video_to_video(trained, call, tmp_path, videos):
    assert call("sample.py", f"--ckpt {trained}/vae.pt --interp {videos}/a.mp4 {videos}/b.mp4") == 0  # takes stage 1 alone
    assert call("sample.py", f"--ckpt {trained}/dit.pt --steps 2 --interp") == 0
    names = written(tmp_path / "out" / "samples" / "interp", 16, 7)
    assert (names[0], names[3], names[6]) == ("00_0_00", "03_0_50", "06_1_00")
    a, b = torch.randn(2, 4, 3)
    walk, titles = sample.interpolate([a, b])
    torch.testing.assert_close(walk[2], a + 2 / 6 * (b - a))
    assert titles[2] == "0.33" and torch.equal(walk[0], a) and torch.equal(walk[6], b)
    assert len(sample.interpolate([a, b, a])[0]) == 13


def test_reconstruction(trained, call, tmp_path, videos, capsys):
    psnr = []
    for options in ("", "--refine 10"):
        assert call("sample.py", f"--ckpt {trained}/vae.pt --reconstruct {videos}/a.mp4 {options}") == 0
        psnr.append(float(re.search(r"PSNR (\d+\.\d+) dB", capsys.readouterr().out)[1]))
    assert psnr[1] > psnr[0]
    assert written(tmp_path / "out" / "samples" / "reconstruct", 16, 2) == ["00_real", "01_reconstructed"]
    original = video.to_clip(video.read_frames(videos / "a.mp4", 32))[:16]
    real = video.to_clip(video.read_frames(tmp_path / "out" / "samples" / "reconstruct" / "00_real.mp4", 32))
    assert vae.psnr(original[None], real[None]) > 25


def test_prediction(predictor, call, tmp_path, videos, capsys):
    options = f"--predict {videos}/a.mp4 {videos}/short.mp4 --count 2 --steps 3 --guidance 1.5"
    assert call("sample.py", f"--ckpt {predictor} {options}") == 0
    # The long one has the frames that are predicted, too; the short one only those that are given.
    names = written(tmp_path / "out" / "samples" / "predict", 16, 5)
    assert names == [f"{i:02d}_{n}" for i, n in enumerate(["real", *["predicted"] * 4])]
    out = capsys.readouterr().out
    assert re.search(r"PSNR of the predicted frames \d+\.\d+ dB, of copies of the last given frame \d+\.\d+ dB", out)
    real, predicted = (video.read_frames(tmp_path / f"out/samples/predict/{name}.mp4", 32).astype(int) for name in names[:2])
    apart = abs(predicted - real).mean((1, 2, 3))
    assert (apart[:5] < 3).all() and (apart[5:] > 3).all()
    sheet = video.read_frames(tmp_path / "out/samples/predict.png", None)[
        0, 63, -8 * 64 + 32 :: 64
    ]  # 8 of 16 frames of the first row
    assert [bool((abs(pixel - [255, 153, 0]) < 3).all()) for pixel in sheet.astype(int)] == [True] * 3 + [False] * 5  # orange


def test_predicted_videos_are_refined_on_the_given_frames_only(predictor, monkeypatch):
    clip = video.to_clip(data.Shapes()[0][0])
    other, error = torch.cat([clip[:5], -clip[5:]]), {}
    monkeypatch.setattr(dit, "generate", lambda model, labels, *args: torch.zeros(len(labels), *args[-1].shape[1:]))
    for name, frames, steps in (("plain", clip, 0), ("fitted", clip, 20), ("other", other, 20)):
        sampler = sample.Sampler(sample.Config(ckpt=str(predictor), refine=steps), dit.load_dit, vae.load_vae)
        decoded = sampler.decode(sampler.generate([0], frames[None]))[:, :5]
        error[name] = (decoded - clip[None, :5]).square().mean()
    assert error["fitted"] < 0.9 * error["plain"] and error["other"] == error["fitted"]


@pytest.mark.parametrize(
    "options, words",
    [
        ("{trained}/vae.pt", "vae.pt stage 2 python dit.py"),
        ("{trained}/dit.pt --classes nonsense", "nonsense ring_circle"),
        ("{trained}/dit.pt --classes ²", "² ring_circle"),
        ("{trained}/dit.pt --interp --classes 1", "--interp two"),
        ("{trained}/dit.pt --interp {videos}/a.mp4 {videos}/none.mp4", "none.mp4"),
        ("{trained}/dit.pt --reconstruct {videos}/short.mp4", "short.mp4 10 16"),
        ("{trained}/dit.pt --predict {videos}/a.mp4", "--cond-frames 5"),
        ("{predictor} --predict {videos}/four.mp4", "four.mp4 4 5"),
        ("{predictor} --predict {videos}/a.mp4 --time-scale 0.05", "--time-scale 0.05 5"),
        ("{predictor} --predict {videos}/a.mp4 --classes 0 1", "--classes 1"),
        ("{trained}/dit.pt --fps 0", "--fps"),
    ],
)
def test_wrong_use(options, words, call, capsys, trained, predictor, videos, tmp_path):
    options = options.format(trained=trained, videos=videos, predictor=predictor)
    assert call("sample.py", f"--ckpt {options}") == 2
    check_error(capsys.readouterr().err, *words.split())
    assert not list(tmp_path.rglob("*.mp4")) + list(tmp_path.rglob("*.png"))


NAMES = ["../../../../escaped", "carry/hold", "²", "", "..", "n" * 300, "\udcff", "nul\0", "new\nline"]


def test_class_names_of_a_strangers_checkpoint_stay_in_the_directory(call, trained, tmp_path, capsys):
    ckpt = torch.load(trained / "dit.pt", weights_only=True)
    place, ckpt["classes"] = tmp_path / "a" / "b", NAMES  # as many as there were
    checkpoints.save("evil.pt", **{name: value for name, value in ckpt.items() if name not in ("format", "revision")})
    assert call("sample.py", f"--ckpt evil.pt --steps 1 --out-dir {place}/out") == 0
    videos = sorted((place / "out" / "samples").glob("*.mp4"))
    assert [path.name[:3] for path in videos] == [f"{i:02d}_" for i in range(len(NAMES))]
    assert {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")} == {"a", "evil.pt"}
    assert all(re.fullmatch(r"[\w-]+\.\w+", path.name) for path in (place / "out" / "samples").iterdir())
    assert call("sample.py", ["--ckpt", "evil.pt", "--steps", 1, "--out-dir", place / "one", "--classes", "²"]) == 0
    capsys.readouterr()
    assert call("sample.py", "--ckpt evil.pt --classes nonsense") == 2
    check_error(capsys.readouterr().err, "nonsense", "carry/hold", r"nul\x00", r"new\nline")
