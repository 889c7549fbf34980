"""`python sample.py --export`: a checkpoint for others, small, without paths of this machine, and as good as the original."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from test_cli import check_error

import dit
import evaluate
import fvd
import vae
from common import checkpoints


def parts(ckpt):
    """The stages that a checkpoint carries, each with config and ema."""
    return [ckpt, *([ckpt["vae"]] if "vae" in ckpt else [])]


@pytest.mark.parametrize("stage", ["vae", "dit"])
def test_it_is_as_small_as_it_goes_and_says_so(stage, trained, call, capsys, tmp_path):
    assert call("sample.py", f"--ckpt {trained}/{stage}.pt --export small.pt") == 0
    original, small = (checkpoints.load(path, stage, "") for path in (trained / f"{stage}.pt", "small.pt"))
    sizes = [path.stat().st_size for path in (tmp_path / "small.pt", trained / f"{stage}.pt")]
    after, before = (f"{size / 1e6:.2f} MB" for size in sizes)
    assert capsys.readouterr().out == f"wrote small.pt, {after}, from {trained}/{stage}.pt, {before}\n"
    tensors = [x for part in parts(small) for x in part["ema"].values()]
    assert sizes[0] < sum(x.nbytes for x in tensors) + 1000 * len(tensors)  # nothing else of any size is in it
    for part, whole in zip(parts(small), parts(original), strict=True):
        assert set(whole) - set(part) <= {"training"} and "training" not in part
        assert all(part[name] == whole[name] for name in ("format", "revision", "step", "classes"))
        assert {name: x.shape for name, x in part["ema"].items()} == {name: x.shape for name, x in whole["ema"].items()}
        for name, x in part["ema"].items():
            if "running_" in name:
                assert x.dtype == torch.float32, name
            elif whole["ema"][name].square().mean() > 1e-6:  # others are, after two steps, about as small as float16 goes
                assert x.dtype == torch.float16, name
    assert not list(tmp_path.glob("*.part"))


def test_float32_stays_where_float16_does_not_hold_it():
    torch.manual_seed(0)
    x = torch.randn(1000)
    ema = {"weight": x, "large": 1e5 * x, "small": 1e-6 * x, "norm.running_var": x.square(), "zero": 0 * x, "none": x[:0]}
    ema["broken"] = torch.tensor([1.0, float("nan")])
    ckpt = {"config": {}, "ema": ema, "training": {}}
    found = checkpoints.exported(ckpt)["ema"]
    assert {name for name, y in found.items() if y.dtype == torch.float16} == {"weight", "zero", "none"}
    assert all(torch.equal(found[name], ema[name]) for name in ("large", "small", "norm.running_var"))
    assert "training" in ckpt and ema["weight"].dtype == torch.float32  # what it was made from is as it was


def test_it_generates_the_same_clips(trained, call):
    """Float16 has eleven bits, and a PSNR of 60 dB is a thousandth of the range."""
    assert call("sample.py", f"--ckpt {trained}/dit.pt --export small.pt") == 0
    clips = []
    for path in (trained / "dit.pt", "small.pt"):
        model, autoencoder, scale = dit.load_dit(checkpoints.load(path, "dit", ""))
        assert {p.dtype for net in (model, autoencoder) for p in net.state_dict().values()} == {torch.float32}
        tokens = dit.generate(model, torch.arange(9), steps=5, seed=0)
        with torch.no_grad():
            clips.append(autoencoder.decode(tokens / scale, torch.arange(16)))
    assert 60 < vae.psnr(*clips) < 100  # 100 is to the bit


@pytest.mark.parametrize("stage", ["vae", "dit"])
def test_a_training_does_not_go_on_from_it(stage, trained, call, capsys):
    options = "--ckpt {trained}/vae.pt --num-latents 8" if stage == "dit" else ""
    assert call("sample.py", f"--ckpt {trained}/{stage}.pt --export small.pt") == 0
    capsys.readouterr()
    tiny = f"--steps 4 --batch-size 4 --seed 1 {options.format(trained=trained)}"
    assert call(f"{stage}.py", f"{tiny} --out small.pt --resume") == 2
    check_error(capsys.readouterr().err, "small.pt", "export", "training state")


@pytest.mark.parametrize("name", ["dit.pt", "./dit.pt", "link.pt", "other.pt", "folder"])
def test_no_file_is_written_over(name, trained, call, capsys, tmp_path):
    (tmp_path / "dit.pt").write_bytes((trained / "dit.pt").read_bytes())
    (tmp_path / "link.pt").symlink_to("dit.pt")
    (tmp_path / "other.pt").write_text("hours of training")
    (tmp_path / "folder").mkdir()
    assert call("sample.py", f"--export {name}") == 2
    check_error(capsys.readouterr().err, name)
    assert (tmp_path / "dit.pt").read_bytes() == (trained / "dit.pt").read_bytes()
    assert (tmp_path / "other.pt").read_text() == "hours of training"


def test_every_setting_that_may_name_a_place_is_private():
    fields = [field for stage in (vae, dit) for field in dataclasses.fields(stage.Config)]
    free_text = {field.name for field in fields if field.type is str and not field.metadata.get("choices")}
    assert free_text == checkpoints.PRIVATE


class Colours:
    """Stands in for I3D: the mean colour of each frame."""

    meta = {"features": "random stand-in", "protocol": "stylegan-v"}

    def __call__(self, clips, names=None):
        return np.asarray(clips, np.float32).mean((2, 3)).reshape(len(clips), -1)


def test_it_works_elsewhere_given_the_data(folder, call, capsys, tmp_path, monkeypatch):
    """A training on a folder, exported: no path is in the file, and every script takes it once it knows where the data are."""
    where, tiny = f"--data-dir {folder}/train", "--steps 1 --batch-size 2"
    assert call("vae.py", f"--dataset folder {where} --preset nano --cache-dir {tmp_path}/cache {tiny}") == 0
    assert call("dit.py", f"--ckpt {tmp_path}/vae.pt --num-latents 4 {tiny} --cache-dir {tmp_path}/cache") == 0
    for name in ("vae", "dit"):
        assert call("sample.py", f"--ckpt {name}.pt --export small/{name}.pt") == 0
        content = [(tmp_path / path / f"{name}.pt").read_bytes() for path in (".", "small")]
        assert [str(folder).encode() in data for data in content] == [True, False]
        assert str(tmp_path).encode() not in content[1]

    capsys.readouterr()
    again = f"--ckpt small/vae.pt --num-latents 4 {tiny} --out again.pt"
    assert call("dit.py", again) == 2
    check_error(capsys.readouterr().err, "--data-dir")
    assert call("dit.py", f"{again} {where}") == 0
    assert call("sample.py", "--ckpt again.pt --classes ring_circle --steps 2") == 0
    assert call("sample.py", "--ckpt small/dit.pt --classes ring_circle --steps 2") == 0
    assert call("sample.py", f"--ckpt small/vae.pt --reconstruct {folder}/test/ring_circle/3.mp4") == 0
    capsys.readouterr()
    assert call("demo.py", f"--skip-training --out-dir small --judge-clips 6 --per-class 1 {where}") == 0
    assert re.search(r"class agreement, 2 generated clips +\d+\.\d %", capsys.readouterr().out)

    monkeypatch.setattr(fvd, "load_detector", lambda *args: Colours())
    for name in ("vae", "dit"):
        options = dict(ckpt=f"small/{name}.pt", data_dir=f"{folder}/train", lpips="none", device="cpu", bootstrap=0)
        evaluate.main(evaluate.Config(videos=2, judge_clips=6, steps=2, **options))
        assert "PSNR" in capsys.readouterr().out
