"""The scripts as their users meet them. Few are real processes, an import of torch takes seconds; the others run here."""

import argparse
import csv
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SMALL_DIT, script, write_mp4
from PIL import Image

import data
import vae
from common import checkpoints, utils, video


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """Two videos of 20 frames, a.mp4 and b.mp4, a short one, and a text file with the name of one."""
    root = tmp_path_factory.mktemp("clips")
    shapes = data.Shapes(num_frames=20)
    for name, i in (("a", 0), ("b", 5)):
        write_mp4(root / name, video.to_clip(shapes[i][0]))
    write_mp4(root / "short", video.to_clip(shapes[0][0])[:10])
    (root / "text.mp4").write_text("this is not a video\n" * 40)
    return root


def messages(stderr):
    """The lines of stderr, progress bars aside."""
    lines = re.split(r"[\r\n]+", stderr)
    return [line for line in lines if line.strip() and not re.fullmatch(r"\w+: +\d+% \d+/\d+ \[.*\]", line)]


def check_error(stderr, *words):
    assert "Traceback" not in stderr
    (line,) = messages(stderr)
    assert line.startswith("error: ")
    for word in words:
        assert word in line


# -------------------------------------------------------------------------------------------------------------------- --help


def test_help_shows_the_defaults_of_the_preset(call, capsys):
    assert call("vae.py", "--preset S --help") == 0
    large = " ".join(capsys.readouterr().out.split())
    assert call("vae.py", "--help") == 0
    small = " ".join(capsys.readouterr().out.split())
    assert "pixels: 32, 64, 128, 256 (default: 128)" in large and "pixels: 32, 64, 128, 256 (default: 32)" in small
    steps = vae.preset_defaults(argparse.Namespace(dataset="shapes", preset=""))["steps"]
    assert "optimizer steps (default: 2000000)" in large and f"optimizer steps (default: {steps})" in small


def test_options_reach_the_checkpoint(trained):
    config = checkpoints.load(trained / "vae.pt", "vae", "")["config"]
    assert (config["steps"], config["batch_size"], config["seed"], config["preset"]) == (2, 4, 1, "nano")
    for name, value in vae.preset_defaults(argparse.Namespace(dataset="shapes", preset="")).items():
        assert name in ("steps", "batch_size") or config[name] == value  # nano's, which were not named


# ---------------------------------------------------------------------------------------------------------------- end to end


def test_training_leaves_checkpoints_losses_and_sheets(trained):
    for stage, curves in (("vae", {"loss", "l2", "kl"}), ("dit", {"loss"})):
        ckpt = checkpoints.load(trained / f"{stage}.pt", stage, "")
        assert ckpt["step"] == 2 and ckpt["classes"] == list(data.Shapes.classes)
        run = trained / "runs" / stage
        with open(run / "losses.csv") as f:
            rows = list(csv.DictReader(f))
        assert rows and set(rows[-1]) == {"step", "seconds"} | curves and rows[-1]["step"] == "2"
        assert all(0 < float(rows[-1][k]) < 1e4 for k in curves)
        for name in ("losses.png", "step0000002.png"):
            with Image.open(run / name) as image:
                assert min(image.size) > 60
    assert not list(trained.rglob("*.part"))


def written(folder, frames, count):
    """Checks that the sheet, the tiled video and count videos of so many frames are in out/samples; returns their names."""
    out = sorted(p.stem for p in folder.glob("*.mp4"))
    assert len(out) == count
    for path in [*folder.glob("*.mp4"), folder.with_suffix(".mp4")]:
        assert video.read_frames(path, 32).shape == (frames, 32, 32, 3)
        with Image.open(path.with_suffix(".gif")) as image:
            assert image.format == "GIF" and image.n_frames > 1
    with Image.open(folder.with_suffix(".png")) as image:
        assert image.width >= 8 * 64 and image.height == count * 66
    return out


def test_sample_every_class_in_a_process_of_its_own(trained, tmp_path):
    done = script("sample.py", "--ckpt", trained / "dit.pt", "--steps", 2, cwd=tmp_path)
    assert done.returncode == 0 and messages(done.stderr) == []
    names = written(tmp_path / "out" / "samples" / "samples", 16, 9)
    assert names == [f"{i:02d}_{name}" for i, name in enumerate(data.Shapes.classes)]
    assert "out/samples/samples.png" in done.stdout


def test_sample_classes_by_name_and_number(trained, call, tmp_path):
    assert call("sample.py", f"--ckpt {trained}/dit.pt --steps 2 --classes 3 ring_circle --count 2 --out-dir o") == 0
    names = written(tmp_path / "o" / "samples", 16, 4)
    assert names == ["00_triangle_sideways", "01_triangle_sideways", "02_ring_circle", "03_ring_circle"]


def test_sample_is_repeatable(trained, call, tmp_path):
    for i, seed in enumerate((1, 1, 2)):
        assert call("sample.py", f"--ckpt {trained}/dit.pt --steps 2 --classes 0 1 --seed {seed} --out-dir o{i}") == 0
    first, again, other = ((tmp_path / f"o{i}" / "samples.png").read_bytes() for i in range(3))
    assert first == again != other


def test_more_frames_and_some_beyond_the_end(trained, call, tmp_path):
    options = "--steps 2 --classes 0 --time-scale 2 --extrapolate 2 --sampler ddpm --guidance 1"
    assert call("sample.py", f"--ckpt {trained}/dit.pt {options}") == 0
    written(tmp_path / "out" / "samples" / "samples", 2 * 16 + 2 * 2, 1)


def test_interpolate_between_generated_videos(trained, call, tmp_path):
    assert call("sample.py", f"--ckpt {trained}/dit.pt --steps 2 --interp") == 0
    names = written(tmp_path / "out" / "samples" / "interp", 16, 7)
    assert names[0] == "00_0.00" and names[3] == "03_0.50" and names[6] == "06_1.00"


@pytest.mark.parametrize("stage", ["vae", "dit"])
def test_interpolate_between_files(trained, call, tmp_path, videos, stage):
    files = f"{videos}/a.mp4 {videos}/b.mp4"
    assert call("sample.py", f"--ckpt {trained}/{stage}.pt --interp {files} {videos}/a.mp4 --interp-steps 3") == 0
    names = written(tmp_path / "out" / "samples" / "interp", 16, 5)
    assert names == ["00_0.00", "01_0.50", "02_1.00", "03_1.50", "04_2.00"]
    assert call("sample.py", f"--ckpt {trained}/{stage}.pt --reconstruct {files}") == 0
    ends, reconstructions = (
        [video.to_clip(video.read_frames(tmp_path / "out" / "samples" / name, 32)) for name in names]
        for names in (
            ("interp/00_0.00.mp4", "interp/02_1.00.mp4"),
            ("reconstruct/01_reconstructed.mp4", "reconstruct/03_reconstructed.mp4"),
        )
    )
    assert vae.psnr(torch.stack(ends), torch.stack(reconstructions)) > 35  # the walk starts and ends at the videos


def test_reconstruct(trained, call, tmp_path, videos, capsys):
    assert call("sample.py", f"--ckpt {trained}/vae.pt --reconstruct {videos}/a.mp4") == 0
    assert re.search(r"PSNR \d+\.\d+ dB", capsys.readouterr().out)
    names = written(tmp_path / "out" / "samples" / "reconstruct", 16, 2)
    assert names == ["00_real", "01_reconstructed"]
    original = video.to_clip(video.read_frames(videos / "a.mp4", 32))[:16]
    real = video.to_clip(video.read_frames(tmp_path / "out" / "samples" / "reconstruct" / "00_real.mp4", 32))
    assert vae.psnr(original[None], real[None]) > 25


def test_reconstruct_with_more_frames(trained, call, tmp_path, videos):
    assert call("sample.py", f"--ckpt {trained}/vae.pt --reconstruct {videos}/a.mp4 --time-scale 2") == 0
    decoded = video.read_frames(tmp_path / "out" / "samples" / "reconstruct" / "01_reconstructed.mp4", 32)
    assert len(decoded) == 32


def test_train_on_a_folder(call, folder, tmp_path):
    tiny = "--steps 1 --batch-size 2"
    assert call("vae.py", f"--dataset folder --data-dir {folder}/train --preset nano --resolution 64 {tiny}") == 0
    assert call("dit.py", f"--no-cache-latents {tiny}") == 0
    ckpt = checkpoints.load("dit.pt", "dit", "")
    assert ckpt["classes"] == ["ring_circle", "square_updown"] and ckpt["vae"]["nerv_config"]["resolution"] == 64
    assert call("sample.py", "--classes square_updown --steps 2") == 0
    assert video.read_frames("out/samples/samples/00_square_updown.mp4", 64).shape == (16, 64, 64, 3)


# -------------------------------------------------------------------------------------------------------------------- Ctrl-C


def interrupt(cwd, program, *args):
    """Start a training, send Ctrl-C once some steps are done, and wait for its end: (exit status, stdout, stderr)."""
    with open(cwd / "stdout", "w") as out, open(cwd / "stderr", "w") as err:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / program), "--steps", "100000", "--batch-size", "4", *args],
            cwd=cwd, stdout=out, stderr=err,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what a background job would ignore
        )  # fmt: skip
        try:
            deadline = time.time() + 60
            while time.time() < deadline and not re.search(r" [1-9]\d*/100000", (cwd / "stderr").read_text()):
                assert process.poll() is None, (cwd / "stderr").read_text()
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            process.wait(60)
        finally:
            process.kill()
    return process.returncode, (cwd / "stdout").read_text(), (cwd / "stderr").read_text()


def test_ctrl_c_leaves_checkpoints_that_work(tmp_path, call):
    said, saved = [], []
    for program, stage, options in (
        ("vae.py", "vae", ("--num-frames", "4")),
        ("dit.py", "dit", ("--num-latents", "8", *SMALL_DIT)),
    ):
        status, out, err = interrupt(tmp_path, program, *options)
        assert status == 0 and "Traceback" not in err and messages(err) == []
        said.append(int(re.search(r"interrupted after (\d+) steps", out)[1]))
        saved.append(checkpoints.load(tmp_path / f"{stage}.pt", stage, "")["step"])
        assert said[-1] > 0 and f"wrote {stage}.pt" in out
    assert call("sample.py", "--classes 0 --steps 2") == 0
    assert said == saved


def test_a_demo_that_is_ended_leaves_no_training_behind(tmp_path):
    training = tmp_path / "training"  # instead of python
    training.write_text("#!/bin/sh\necho up\nexec sleep 60\n")
    training.chmod(0o755)
    code = "import sys, demo; sys.executable = sys.argv.pop(); demo.weights = print; demo.utils.run(demo.main)"
    process = subprocess.Popen([sys.executable, "-c", code, training], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert "up\n" in process.stdout
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)  # to the end of all that have its stdout, the training too
    assert process.returncode == 130


# ----------------------------------------------------------------------------------------------------------------- bad input


def test_errors_of_real_processes(trained, videos, tmp_path):
    # What Python and its libraries say on their own, warnings for instance, shows only here.
    done = script("sample.py", "--ckpt", trained / "vae.pt", "--reconstruct", videos / "text.mp4", cwd=tmp_path)
    assert done.returncode == 2
    check_error(done.stderr, "text.mp4")
    done = script("vae.py", "--dataset", "ucf", cwd=tmp_path)
    assert done.returncode == 2
    check_error(done.stderr, "https://www.crcv.ucf.edu", "data/UCF-101", "--data-dir")


@pytest.mark.parametrize(
    "options, words",
    [
        ("--dataset folder --data-dir nowhere", ["nowhere", "--data-dir"]),
        ("--dataset folder --data-dir empty", ["empty", "no videos"]),
        ("--dataset folder", ["--data-dir"]),
        ("--dataset ucf", ["https://www.crcv.ucf.edu", "data/UCF-101"]),
        ("--dataset ucf --data-dir nowhere", ["https://www.crcv.ucf.edu", "nowhere"]),
        ("--num-frames 15", ["num_frames 15", "multiple"]),
        ("--resolution 48", ["resolution 48", "64"]),
        ("--resolution 0", ["resolution 0"]),
        ("--num-tokens 0", ["positive"]),
        ("--batch-size 0", ["batch"]),
        ("--batch-size 8 --accumulate 3", ["--batch-size 8", "multiple of 3"]),
        ("--device nonsense", ["--device", "nonsense"]),
        ("--grad-clip 0", ["--grad-clip 0", "positive"]),
        ("--resolution 16 --gan-weight 0.1", ["--gan-weight", "--resolution 32"]),
        ("--dataset folder --data-dir {folder}/train --num-frames 32", ["16 frames", "32"]),
        ("--dataset folder --data-dir {folder}/train --stride 2", ["16 frames", "31"]),
    ],
)
def test_bad_input_of_vae(options, words, call, capsys, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    assert call("vae.py", f"--preset nano --steps 1 --batch-size 2 {options.format(folder=folder)}") == 2
    check_error(capsys.readouterr().err, *words)
    assert not (tmp_path / "vae.pt").exists()


def test_a_batch_of_one_trains_or_says_why_not(call, capsys):
    # Batch norm over a single clip has no deviation to divide by.
    status = call("vae.py", "--preset nano --steps 1 --batch-size 1")
    if status:
        assert status == 2
        check_error(capsys.readouterr().err, "--batch-size")


@pytest.fixture
def files(trained, tmp_path):
    """What is not a checkpoint, or not the right one, in the directory of the test."""
    (tmp_path / "text.pt").write_text("this is not a checkpoint\n" * 40)
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"model": torch.zeros(3)}, tmp_path / "other.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    torch.save(utils.UserError("code"), tmp_path / "code.pt")
    whole = (trained / "dit.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize("program", ["dit.py", "sample.py"])
@pytest.mark.parametrize("name", ["none", "text", "empty", "other", "tensor", "code", "cut"])
def test_what_is_not_a_checkpoint(program, name, call, capsys, files):
    assert call(program, f"--ckpt {name}.pt") == 2
    check_error(capsys.readouterr().err, f"{name}.pt", "python vae.py" if program == "dit.py" else "python dit.py")


def test_checkpoints_never_run_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return (exec, ("open('ran', 'w')",))

    torch.save({"format": checkpoints.FORMAT, "stage": "vae", "model": Payload()}, tmp_path / "vae.pt")
    with pytest.raises(utils.UserError):
        checkpoints.load(tmp_path / "vae.pt", "vae", "")


@pytest.mark.parametrize(
    "options, words",
    [
        ("--ckpt {trained}/dit.pt", ["dit.pt", "python vae.py"]),
        ("--ckpt {trained}/vae.pt --dataset folder --data-dir {folder}/train", ["ring_circle", "classes"]),
        ("--ckpt {trained}/vae.pt --dataset folder --data-dir nowhere", ["nowhere"]),
        ("--ckpt {trained}/vae.pt --dataset ucf", ["https://www.crcv.ucf.edu"]),
        ("--ckpt {trained}/vae.pt --device nonsense", ["--device"]),
    ],
)
def test_bad_input_of_dit(options, words, call, capsys, trained, folder, tmp_path):
    if "{folder}/train" in options:  # a name that no class of the shapes has
        write_mp4(tmp_path / "videos" / "somersault" / "clip", video.to_clip(data.Shapes()[0][0]))
        options, words = options.format(trained=trained, folder="{folder}").replace("{folder}/train", "videos"), ["somersault"]
    assert call("dit.py", options.format(trained=trained)) == 2
    check_error(capsys.readouterr().err, *words)
    assert not (tmp_path / "dit.pt").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        ("--ckpt {trained}/vae.pt", ["vae.pt", "stage 2", "python dit.py"]),
        ("--ckpt {trained}/vae.pt --interp", ["vae.pt", "python dit.py"]),
        ("--ckpt {trained}/dit.pt --classes nonsense", ["nonsense", "ring_circle"]),
        ("--ckpt {trained}/dit.pt --classes 9", ["9", "ring_circle"]),
        ("--ckpt {trained}/dit.pt --interp --classes 1", ["--interp", "two"]),
        ("--ckpt {trained}/dit.pt --interp {videos}/a.mp4", ["--interp", "two"]),
        ("--ckpt {trained}/dit.pt --interp {videos}/a.mp4 {videos}/none.mp4", ["none.mp4"]),
        ("--ckpt {trained}/dit.pt --reconstruct {videos}/text.mp4", ["text.mp4"]),
        ("--ckpt {trained}/dit.pt --reconstruct {videos}/none.mp4", ["none.mp4"]),
        ("--ckpt {trained}/dit.pt --reconstruct {videos}/short.mp4", ["short.mp4", "10 frames", "16"]),
        ("--ckpt {trained}/dit.pt --reconstruct {videos}/a.mp4 --stride 2", ["a.mp4", "20 frames", "31"]),
        ("--ckpt {trained}/dit.pt --steps 0", ["--steps"]),
        ("--ckpt {trained}/dit.pt --steps 1001 --classes 0", ["--steps"]),
        ("--ckpt {trained}/dit.pt --device nonsense", ["--device"]),
    ],
)
def test_bad_input_of_sample(options, words, call, capsys, trained, videos, tmp_path):
    assert call("sample.py", options.format(trained=trained, videos=videos)) == 2
    check_error(capsys.readouterr().err, *words)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_configuration(call, capsys, trained, tmp_path):
    ckpt = checkpoints.load(trained / "vae.pt", "vae", "")
    ckpt["nerv_config"]["width"] *= 2
    torch.save(ckpt, tmp_path / "wider.pt")
    ckpt["nerv_config"]["colour"] = "red"
    torch.save(ckpt, tmp_path / "unknown.pt")
    for name in ("wider", "unknown"):
        assert call("dit.py", f"--ckpt {name}.pt --steps 1") == 2
        check_error(capsys.readouterr().err, "another configuration")
