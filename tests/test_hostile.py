"""Files that are broken, strange, or made to do harm: none ends a training, each is named once with its reason."""

import errno
import itertools
import os
import random
import wave
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_video import animated, encode, grey

from common import video
from common.video import BadVideo, count_frames, probe, read_frames
from data import Config, open_dataset

CLIPS = ROOT.parent / "shared" / "data" / "clips"


def make_hostile(root):
    """A folder with one file of each kind: {name: a part of the reason} of those that cannot be read, and how many can."""
    root.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (20, 32, 32, 3), np.uint8)
    whole = encode(root / "good.mp4", noise).read_bytes()
    (root / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (root / "zero.mp4").write_bytes(b"")
    (root / "text.mp4").write_text("I am not a video.\n" * 50)
    (root / "noise.mp4").write_bytes(random.Random(0).randbytes(9000))
    (root / "really avi.mp4").write_bytes(encode(root / "x.avi", noise).read_bytes())
    (root / "x.avi").unlink()
    encode(root / "one frame.mp4", noise[:1])
    encode(root / "odd.mov", noise[:, :31, :3], "png", pixels="rgb24")
    encode(root / "one pixel.mov", noise[:, :1, :1], "png", pixels="rgb24")
    for name in ("naïve 日本語 ‮ name's $(touch exploded); `touch exploded` %d %03d", "-i", "concat:a|b", "new\nline"):
        (root / f"{name}.mp4").write_bytes(whole)
    Path(os.fsdecode(bytes(root) + b"/not utf8 \xff\xfe.mp4")).write_bytes(whole)
    (root / "dangling.mp4").symlink_to(root / "nowhere")
    (root / "loop.mp4").symlink_to(root / "loop.mp4")
    (root / "folder.mp4").mkdir()
    os.mkfifo(root / "pipe.mp4")
    # Play lists: text that tells a decoder to open other files, or addresses.
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n"
    (root / "list.mp4").write_text(f"ffconcat version 1.0\nfile '{root}/good.mp4'\n")
    (root / "hls.ts").write_text(hls.format(f"file://{root}/good.mp4"))
    (root / "net.mp4").write_text(hls.format("http://127.0.0.1:9/a.ts"))
    (root / "dash.mkv").write_text('<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"></MPD>')
    (root / "sdp.avi").write_text("v=0\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n")
    with wave.open(str(root / "sound.mp4"), "wb") as out:
        out.setparams((1, 2, 8000, 0, "NONE", ""))
        out.writeframes(bytes(8000))
    for name in ("frames", "broken"):
        (root / name).mkdir()
        for k, frame in enumerate(noise):
            Image.fromarray(frame).save(root / name / f"{k}.png")
    (root / "broken" / "3.png").write_bytes((root / "frames" / "3.png").read_bytes()[:50])
    animated(root / "bomb.gif", noise, 100)  # which says that it is of 65,535 x 65,535 pixels
    (root / "bomb.gif").write_bytes((small := (root / "bomb.gif").read_bytes())[:6] + b"\xff" * 4 + small[10:])
    return {
        "zero.mp4": "not a video", "text.mp4": "not a video", "noise.mp4": "not a video", "one frame.mp4": "it has 1 frames",
        "dangling.mp4": "not a file", "loop.mp4": "not a file", "pipe.mp4": "not a file", "list.mp4": "not a video",
        "hls.ts": "not a video", "net.mp4": "not a video", "dash.mkv": "not a video", "sdp.avi": "not a video",
        "bomb.gif": "", "cut.mp4": "not a video", "sound.mp4": "not a video", "broken": "damaged",
    }, 10  # fmt: skip


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_every_kind_of_bad_file_is_named_once_with_its_reason(tmp_path, mode, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "videos"
    reasons, good = make_hostile(root)
    config = Config("folder", str(root), resolution=32, num_frames=10, cache=mode)
    dataset = open_dataset(config, "train")
    for i in range(2 * (good + len(reasons))):
        frames, label = dataset[i]
        assert frames.shape == (10, 32, 32, 3) and frames.std() > 1
    named = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipping")]
    for name, reason in reasons.items():
        (line,) = [line for line in named if f"/{name}: " in line]
        assert reason in line
    assert len(named) == len(reasons) == len(dataset.skipped)
    assert len({path for path, _ in dataset.items} - set(dataset.skipped)) == good
    assert not (tmp_path / "exploded").exists() and not (root / "exploded").exists()


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


def test_240_damaged_files_neither_hang_nor_crash(tmp_path):
    kinds = {"a.mp4": {}, "b.mkv": {}, "c.avi": {"codec": "mpeg4", "bf": 2}, "d.webm": {"codec": "libvpx-vp9"},
             "e.ts": {"container": "mpegts"}, "f.mpg": {"codec": "mpeg2video"}}  # fmt: skip
    sources = [encode(tmp_path / name, grey(12), **options) for name, options in kinds.items()]
    animated(tmp_path / "g.gif", grey(12), 70), animated(tmp_path / "h.apng", grey(12), 70)
    sources += [tmp_path / "g.gif", tmp_path / "h.apng"] + [CLIPS / "video_90.mov"] * CLIPS.is_dir()

    def read(i):
        rng, source = random.Random(i), sources[i % len(sources)]
        path = tmp_path / f"fuzz{i}{source.suffix}"
        path.write_bytes(damage(source.read_bytes(), rng))
        try:
            frames = read_frames(path, 16)
            assert frames.shape[1:] == (16, 16, 3) and probe(path)
            assert count_frames(path) == len(frames) and np.array_equal(
                read_frames(path, 16, len(frames) // 2), frames[len(frames) // 2 :]
            )
            return 1
        except BadVideo as error:
            assert path.name in str(error) and "\n" not in str(error)
            return 0

    with ThreadPoolExecutor(2) as pool:
        assert 0 < sum(pool.map(read, range(240))) < 240


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOMEM, errno.ESTALE])
@pytest.mark.parametrize("cache", ["auto", "off"])
def test_failures_of_the_machine_are_no_property_of_a_video(tmp_path, monkeypatch, number, cache):
    """In the middle of a file, which is not taken for its end."""
    for name in ("a.mkv", "b.mkv"):
        encode(tmp_path / name, grey(24))
    config = Config("folder", str(tmp_path), resolution=32, num_frames=4, cache=cache, cache_dir=str(tmp_path / ".cache"))
    failed, decoded = [], video.decoded

    def failing(container, stream):
        yield from itertools.islice(decoded(container, stream), 9)
        if not failed and container.name.endswith("a.mkv"):
            failed.append(container)
            raise av.error.OSError(number, os.strerror(number))
        yield from decoded(container, stream)

    monkeypatch.setattr(video, "decoded", failing)
    dataset = open_dataset(config, "train")
    assert {dataset[i][0].shape for i in range(9)} == {(4, 32, 32, 3)}
    assert list(dataset.skipped.values()) == [os.strerror(number)]
    again = open_dataset(config, "train")
    assert len(again) == 2 and again[0][0].shape and not again.skipped
