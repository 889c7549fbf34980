"""The scripts as their users meet them: help, wrong use in one line with status 2, what a training leaves behind."""

import argparse
import csv
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from PIL import Image

import data
import vae
from common import checkpoints, utils

ROOMS = ("", "common", "siblings", "studies", "bench")
SCRIPTS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for room in ROOMS
    for path in (ROOT / room).glob("*.py")
    if "__main__" in path.read_text()
)


def messages(stderr):
    """The lines of stderr, progress bars aside."""
    lines = re.split(r"[\r\n]+", stderr)
    return [line for line in lines if line.strip() and not re.fullmatch(r"\w+: +\d+%.*\d+/\d+ \[.*\]", line)]


def check_error(stderr, *words):
    assert "Traceback" not in stderr
    (line,) = messages(stderr)
    assert line.startswith("error: ")
    for word in words:
        assert word in line


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_every_option_with_its_default(name, call, capsys):
    assert call(name, "--help") == 0
    options = re.split(r"\n  --", capsys.readouterr().out)[1:]
    if name != "studies.variants":  # all others are those of vae.py and dit.py
        assert options and all("(default:" in " ".join(option.split()) for option in options)


def test_help_shows_the_defaults_of_the_preset(call, capsys):
    steps = vae.preset_defaults(argparse.Namespace(dataset="shapes", preset=""))["steps"]
    for options, resolution, number in (("--preset S --help", 128, 2_000_000), ("--help", 32, steps)):
        assert call("vae.py", options) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert re.search(rf"--resolution RESOLUTION [^(]*\(default: {resolution}\)", text)
        assert f"optimizer steps (default: {number})" in text


def test_training_leaves_checkpoints_losses_and_sheets(trained):
    for stage, curves in (("vae", {"loss", "l2", "kl"}), ("dit", {"loss"})):
        ckpt, run = checkpoints.load(trained / f"{stage}.pt", stage, ""), trained / "runs" / stage
        assert ckpt["step"] == 2 and ckpt["classes"] == list(data.Shapes.classes) and ckpt["revision"] == utils.git_revision()
        assert "model" in ckpt["training"] and "training" not in ckpt.get("vae", {})
        with open(run / "losses.csv") as f:
            rows = list(csv.DictReader(f))
        assert set(rows[-1]) == {"step", "seconds", "skipped"} | curves and rows[-1]["step"] == "2"
        assert all(0 < float(rows[-1][k]) < 1e4 for k in curves)
        with Image.open(run / "step0000002.png") as image:
            assert min(image.size) > 60
    assert not list(trained.rglob("*.part"))
    config = checkpoints.load(trained / "vae.pt", "vae", "")["config"]
    for name, value in vae.preset_defaults(argparse.Namespace(dataset="shapes", preset="")).items():
        assert name in ("steps", "batch_size") or config[name] == value  # nano's, which were not named


def test_running_out_of_memory_names_the_options_that_help(capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    with pytest.raises(SystemExit, match="2"):
        utils.run(main)
    check_error(capsys.readouterr().err, "CUDA out of memory. Use --recompute, --accumulate 2")


def test_an_error_of_a_real_process_is_one_line(tmp_path):
    # What Python and its libraries print on their own, warnings for instance, shows only here.
    command = [sys.executable, ROOT / "vae.py", "--dataset", "ucf"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stdout == ""
    check_error(done.stderr, "https://www.crcv.ucf.edu", "data/UCF-101", "--data-dir")


@pytest.mark.parametrize(
    "options, words",
    [
        ("--dataset folder --data-dir nowhere", "nowhere --data-dir"),
        ("--dataset folder --data-dir {folder} --num-frames 32", "16 frames 32"),
        ("--num-frames 15", "num_frames multiple"),
        ("--resolution 48", "resolution 48 64"),
        ("--batch-size 8 --accumulate 3", "--batch-size multiple of 3"),
        ("--preset XL", "--preset XL"),
        ("--nonsense 3", "--nonsense --help"),
        ("--dataset folder", "--data-dir directory"),
        ("--lr nan", "--lr nan range"),
        ("--seed 99999999999999", "--seed 99999999999999 range"),
        ("--extras nonsense", "--extras nonsense mixing"),
        ("--resolution 16 --gan-weight 0.1", "--gan-weight --resolution 32"),
        ("--out folder.pt", "folder.pt directory"),
        (f"--out {'n' * 253}.pt", "name too long"),
    ],
)
def test_wrong_use_of_vae(options, words, call, capsys, folder, tmp_path):
    (tmp_path / "folder.pt").mkdir()
    assert call("vae.py", f"--preset nano --steps 1 --batch-size 2 {options.format(folder=folder)}") == 2
    check_error(capsys.readouterr().err, *words.split())
    assert not (tmp_path / "vae.pt").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        ("--ckpt {trained}/dit.pt", "dit.pt python vae.py"),
        ("--cond-frames 16", "--cond-frames 16 frames"),
        ("--heads 5", "--heads --width"),
        ("--out {trained}/vae.pt", "--out vae.pt overwrite --ckpt"),
        ("--extras components=4", "--extras components=4 MxK"),
        ("--out runs/", "runs"),
    ],
)
def test_wrong_use_of_dit(options, words, call, capsys, trained, tmp_path):
    (tmp_path / "runs").mkdir()
    assert call("dit.py", f"--ckpt {trained}/vae.pt --steps 1 {options.format(trained=trained)}") == 2
    check_error(capsys.readouterr().err, *words.split())
    assert not (tmp_path / "dit.pt").exists() and not list((tmp_path / "runs").rglob("*.npy"))  # before anything is encoded


@pytest.mark.parametrize("program", ["dit.py", "sample.py", "evaluate.py"])
def test_what_is_not_a_checkpoint_or_of_another_version(program, call, capsys, trained, tmp_path):
    class Code:
        def __reduce__(self):
            return (exec, ("open('ran', 'w')",))

    (tmp_path / "text.pt").write_text("this is not a checkpoint\n" * 40)
    (tmp_path / "empty.pt").touch()
    torch.save({"model": torch.zeros(3)}, tmp_path / "other.pt")
    torch.save({"format": checkpoints.FORMAT, "stage": "vae", "ema": Code()}, tmp_path / "code.pt")
    torch.save({"format": "nerv-diffusion 5", "stage": "vae"}, tmp_path / "old.pt")
    whole = (trained / "dit.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    for name in ("none", "text", "empty", "other", "code", "old", "cut"):
        assert call(program, f"--ckpt {name}.pt") == 2
        check_error(capsys.readouterr().err, f"{name}.pt", "python dit.py" if program == "sample.py" else "python vae.py")
    assert not (tmp_path / "ran").exists()
