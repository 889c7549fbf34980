"""Files that are broken, strange, or made to do harm: none ends a training, each is named once with its reason."""

import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from conftest import ROOT, script, write_mp4
from PIL import Image
from test_data import counting_clip

from common import video
from common.utils import UserError
from common.video import BadVideo, probe, read_frames
from data import Config, find_videos, open_dataset

SHARED = ROOT.parent / "shared" / "data" / "clips"


def encode(path, size="32x32", frames=20, options=(), source="testsrc"):
    """A video made by ffmpeg itself, with any options."""
    exe = imageio_ffmpeg.get_ffmpeg_exe()
    command = [
        exe,
        "-y",
        "-v",
        "error",
        "-f",
        "lavfi",
        "-i",
        f"{source}{':' if '=' in source else '='}size={size}:rate=10",
        "-frames:v",
        str(frames),
    ]
    subprocess.run([*command, *options, f"file:{path}"], check=True, stdin=subprocess.DEVNULL)
    return path


def strip_of(path, size):
    Image.new("RGB", size, (10, 90, 200)).save(path)


def make_hostile(root):
    """A folder with one file of each kind: {name: None where it can be read, else a part of the reason}."""
    root.mkdir()
    whole = encode(root / "good.mp4").read_bytes()
    (root / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (root / "zero.mp4").write_bytes(b"")
    (root / "text.mp4").write_text("I am not a video.\n" * 50)
    (root / "noise.mp4").write_bytes(random.Random(0).randbytes(9000))
    (root / "avi named so.mp4").write_bytes(encode(root / "x.avi").read_bytes())
    (root / "x.avi").unlink()
    exe = imageio_ffmpeg.get_ffmpeg_exe()
    subprocess.run([exe, "-y", "-v", "error", "-f", "lavfi", "-i", "sine=duration=2", f"{root}/sound.mp4"], check=True)
    encode(root / "one frame.mp4", frames=1)
    encode(root / "thin.mp4", "4x4000", options=("-pix_fmt", "yuv420p"))
    encode(root / "odd.mkv", "3x401", options=("-c:v", "ffv1"))
    encode(root / "one pixel.mkv", "1x1", options=("-c:v", "ffv1"))
    encode(root / "ten bits.mp4", options=("-pix_fmt", "yuv420p10le"))
    encode(root / "alpha.mov", options=("-c:v", "png", "-pix_fmt", "rgba"))
    encode(root / "grey.mkv", options=("-c:v", "ffv1", "-pix_fmt", "gray16le"))
    encode(root / "naïve 日本語 ‮ name's $(touch exploded); `touch exploded` %d %03d.mp4")
    encode(root / "-i.mp4")
    encode(root / "concat:a|b.mp4")
    (root / "new\nline.mp4").write_bytes(whole)
    Path(os.fsdecode(bytes(root) + b"/not utf8 \xff\xfe.mp4")).write_bytes(whole)
    (root / "dangling.mp4").symlink_to(root / "nowhere")
    (root / "loop.mp4").symlink_to(root / "loop.mp4")
    (root / "folder.mp4").mkdir()
    os.mkfifo(root / "pipe.mp4")
    # Play lists: text that tells a decoder to open other files, or addresses.
    (root / "list.mp4").write_text(f"ffconcat version 1.0\nfile '{root}/good.mp4'\n")
    (root / "hls.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{root}/good.mp4\n#EXT-X-ENDLIST\n")
    Image.new("L", (20000, 20000)).save(root / "bomb.gif")
    return {
        "zero.mp4": "empty", "text.mp4": "damaged, or not a video", "noise.mp4": "damaged, or not a video",
        "sound.mp4": "no pictures", "one frame.mp4": "it has 1 frames", "dangling.mp4": "a link to nowhere",
        "loop.mp4": "symbolic links", "pipe.mp4": "not a file", "list.mp4": "not a video",
        "hls.mp4": "damaged, or not a video", "bomb.gif": "", "cut.mp4": "damaged, or not a video",
    }  # fmt: skip


GOOD = 13  # of the files above


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile") / "videos"
    return root, make_hostile(root)


@pytest.mark.parametrize("mode", ["on", "off"])
def test_every_kind_of_bad_file_is_named_once_with_its_reason(hostile, tmp_path, mode, capsys, monkeypatch):
    root, reasons = hostile
    monkeypatch.chdir(tmp_path)
    config = Config("folder", str(root), resolution=32, num_frames=10, cache=mode)
    dataset = open_dataset(config, "train")
    total = len(find_videos(config, "train")[1])
    for i in range(2 * total):
        frames, label = dataset[i]
        assert frames.shape == (10, 32, 32, 3) and label == 0 and frames.std() > 1
    named = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipping")]
    assert len(named) == len(reasons), named
    for name, reason in reasons.items():
        (line,) = [line for line in named if f"/{name}: " in line]
        assert reason in line
    assert total == len(reasons) + GOOD
    assert not (tmp_path / "exploded").exists() and not (root / "exploded").exists()


@pytest.mark.parametrize("mode", ["on", "off"])
def test_a_training_goes_through_and_one_with_bad_files_only_says_so(tmp_path, mode):
    for i in range(3):
        write_mp4(tmp_path / "videos" / f"{i}", counting_clip(20))
    for name in ("a.mp4", "z.mp4"):
        (tmp_path / "videos" / name).write_text("no")
    options = ("--preset", "nano", "--num-frames", 4, "--steps", 2, "--batch-size", 4, "--cache", mode)
    options += ("--dataset", "folder", "--data-dir")
    done = script("vae.py", *options, "videos", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "vae.pt").is_file(), done.stderr
    (tmp_path / "bad").mkdir()
    for name in ("a.mp4", "z.mp4"):
        (tmp_path / "bad" / name).write_text("no")
    done = script("vae.py", *options, "bad", "--out", "none.pt", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "none.pt").exists()
    assert "error: none of the 2 videos can be used" in done.stderr and "a.mp4" in done.stderr
    assert sum("skipping" in line and "z.mp4" in line for line in done.stdout.splitlines()) == 1


@pytest.fixture
def hanging(tmp_path, monkeypatch):
    """A decoder that hangs on files called stuck, after some bytes, with a child that holds its pipes open."""
    real = imageio_ffmpeg.get_ffmpeg_exe()
    fake = tmp_path / "decoder"
    fake.write_text(f'#!/bin/sh\ncase "$*" in *stuck*) head -c 5000 /dev/zero; sleep 98765 & wait;; esac\nexec "{real}" "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(fake))
    monkeypatch.setattr(video.imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(fake))
    monkeypatch.setattr(video, "TIME_LIMIT", 1.0)


@pytest.mark.parametrize("mode", ["on", "off"])
def test_a_decoder_that_hangs_is_killed(hanging, tmp_path, mode, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_mp4(tmp_path / "videos" / "well", counting_clip(20))
    write_mp4(tmp_path / "videos" / "other", counting_clip(20)).rename(tmp_path / "videos" / "stuck.mp4")
    start = time.monotonic()
    dataset = open_dataset(Config("folder", "videos", resolution=32, cache=mode), "train")
    assert all(dataset[i][0].std() > 1 for i in range(4))
    assert time.monotonic() - start < 20
    assert "stuck.mp4: the decoder hangs: nothing for 1 s" in capsys.readouterr().out
    sleeping = subprocess.run(["pgrep", "-f", "sleep 98765"], capture_output=True, text=True).stdout.split()
    assert not sleeping, "the whole group of processes is killed"


def test_a_slow_decoder_is_not_a_hanging_one(tmp_path, monkeypatch):
    path = write_mp4(tmp_path / "clip", counting_clip(20))
    real = imageio_ffmpeg.get_ffmpeg_exe()
    slow = tmp_path / "slow"
    script = f'import sys,subprocess,time\nout=subprocess.run(["{real}",*sys.argv[1:]],capture_output=True).stdout\n'
    script += "for i in range(0,len(out),8000):\n  sys.stdout.buffer.write(out[i:i+8000]); sys.stdout.flush(); time.sleep(.3)\n"
    slow.write_text(f"#!{sys.executable}\n{script}")
    slow.chmod(0o755)
    monkeypatch.setattr(video, "TIME_LIMIT", 1.0)
    monkeypatch.setattr(video.imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(slow))
    assert len(read_frames(path, 32)) == 20


def test_no_permission(tmp_path, monkeypatch):
    path = write_mp4(tmp_path / "clip", counting_clip(20))
    path.chmod(0)
    if os.geteuid() == 0:  # to whom nothing is forbidden
        monkeypatch.setattr(video.os, "access", lambda *args: False)
    with pytest.raises(BadVideo, match="clip.mp4: no permission"):
        read_frames(path, 32)


def damage(content, rng):
    """A copy of bytes with some flipped, or cut, or both."""
    content = bytearray(content)
    if rng.random() < 0.6:
        for _ in range(rng.choice([1, 10, 200, 3000])):
            content[rng.randrange(len(content))] = rng.randrange(256)
    if rng.random() < 0.6:
        content = content[: rng.randrange(1, len(content))]
    if rng.random() < 0.2:
        content = content[rng.randrange(len(content)) :]
    return bytes(content)


def test_fuzzed_files(tmp_path):
    """A sample of what `python -m bench.data fuzz` does at length."""
    sources = [write_mp4(tmp_path / "clip", counting_clip(12)), encode(tmp_path / "a.mkv"), encode(tmp_path / "b.avi")]
    rng, read = random.Random(0), 0
    for i in range(24):
        source = sources[i % len(sources)]
        path = tmp_path / f"fuzz{i}{source.suffix}"
        path.write_bytes(damage(source.read_bytes(), rng))
        try:
            assert read_frames(path, 16).shape[1:] == (16, 16, 3)
            assert probe(path).frames > 0
            read += 1
        except BadVideo as error:
            assert path.name in str(error) and "\n" not in str(error)
    assert 0 < read < 24


def test_damaged_images(tmp_path):
    config = Config("folder", str(tmp_path / "videos"), resolution=16, num_frames=4, cache_dir=str(tmp_path / "cache"))
    for name in ("whole", "broken"):
        folder = tmp_path / "videos" / name
        folder.mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (20, 20), (40 * i, 0, 0)).save(folder / f"{i}.png")
    (tmp_path / "videos" / "broken" / "3.png").write_bytes((tmp_path / "videos" / "whole" / "3.png").read_bytes()[:50])
    for mode in ("on", "off"):
        dataset = open_dataset(replace(config, cache=mode), "train")
        assert {dataset[i][0].shape for i in range(6)} == {(4, 16, 16, 3)}
        if mode == "on":
            assert len(dataset) == 1
    strip = tmp_path / "s" / "strip.png"
    strip.parent.mkdir()
    Image.fromarray(np.zeros((10, 100, 3), np.uint8)).save(strip)
    strip.write_bytes(strip.read_bytes()[:60])
    with pytest.raises((BadVideo, UserError)):
        read_frames(strip, 16)


@pytest.mark.skipif(not SHARED.is_dir(), reason="shared/data is not here")
def test_the_rotated_one_stands_upright():
    info = probe(SHARED / "video_90.mov")
    assert (info.width, info.height) == (568, 320)
    upright = read_frames(SHARED / "video_90.mov", 64)[0].astype(int)
    exe = imageio_ffmpeg.get_ffmpeg_exe()
    command = [exe, "-v", "error", "-noautorotate", "-i", SHARED / "video_90.mov", "-vf", "crop=320:320,scale=64:64"]
    raw = subprocess.run([*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], capture_output=True).stdout
    stored = np.frombuffer(raw, np.uint8).reshape(-1, 64, 64, 3)[0].astype(int)
    turned = [abs(np.rot90(stored, k) - upright).mean() for k in range(4)]
    assert turned[3] < 3 < min(turned[:3]), "a display matrix of -90 degrees is a quarter turn clockwise"


def test_pixel_aspect_is_honoured(tmp_path):
    """64 x 64 stored pixels, each twice as wide as high, are a picture of 128 x 64, of which the middle 64 x 64 is seen."""
    options = ("-vf", "drawbox=x=16:w=32:color=white:t=fill,setsar=2", "-pix_fmt", "yuv444p")
    path = encode(tmp_path / "wide.mp4", "64x64", 5, options, source="color=c=black")
    frames = read_frames(path, 32)
    assert frames[:, 4:-4, 2:-2].min() > 230
