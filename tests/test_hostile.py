"""Files that are broken, strange, or made to do harm: none ends a training, each is named once with its reason."""

import contextlib
import errno
import itertools
import os
import random
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image
from test_video import FILES, animated, encode, grey, made

from common import video
from common.video import BadVideo, count_frames, probe, read_frames
from data import Config, open_dataset


def make_hostile(root):
    """A folder with one file of each kind: {name: a part of the reason} of those that cannot be read, and how many can."""
    root.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (20, 32, 32, 3), np.uint8)
    whole, gif = encode(root / "good.mp4", noise).read_bytes(), animated(root / "bomb.gif", noise, 100).read_bytes()
    encode(root / "x.avi", noise).rename(root / "really avi.mp4")
    encode(root / "odd.mov", noise[:, :31, :3], "png", pixels="rgb24")
    encode(root / "one pixel.mov", noise[:, :1, :1], "png", pixels="rgb24")
    for name in ("naïve \u202e $(touch exploded); `touch exploded` %d %03d", "-i", "concat:a|b", "new\nline", "\udcff\udcfe"):
        (root / f"{name}.mp4").write_bytes(whole)
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n"
    texts = {  # also play lists, which tell a decoder to open other files, or addresses
        "zero.mp4": "", "text.mp4": "I am not a video.\n" * 50, "list.mp4": f"ffconcat version 1.0\nfile '{root}/good.mp4'\n",
        "hls.ts": hls.format(f"file://{root}/good.mp4"), "net.mp4": hls.format("http://127.0.0.1:9/a.ts"),
        "dash.mkv": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"></MPD>',
        "sdp.avi": "v=0\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
    }  # fmt: skip
    contents = {name: text.encode() for name, text in texts.items()}
    contents |= {"noise.mp4": random.Random(0).randbytes(9000), "cut.mp4": whole[: len(whole) // 2]}
    contents["bomb.gif"] = gif[:6] + b"\xff" * 4 + gif[10:]  # which says that it is of 65,535 x 65,535 pixels
    for name, content in contents.items():
        (root / name).write_bytes(content)
    encode(root / "one frame.mp4", noise[:1])
    with av.open(str(root / "sound.mov"), "w") as out:
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        sound.sample_rate = 8000
        out.mux(out.add_stream("pcm_s16le", 8000, layout="mono").encode(sound))
    (root / "dangling.mp4").symlink_to(root / "nowhere")
    (root / "loop.mp4").symlink_to(root / "loop.mp4")
    (root / "folder.mp4").mkdir()
    os.mkfifo(root / "pipe.mp4")
    for name in ("frames", "broken"):
        (root / name).mkdir()
        for k, frame in enumerate(noise):
            Image.fromarray(frame).save(root / name / f"{k}.png")
    (root / "broken" / "3.png").write_bytes((root / "frames" / "3.png").read_bytes()[:50])
    reasons = {"one frame.mp4": "it has 1 frames", "sound.mov": "no video stream", "broken": "damaged"}
    reasons |= dict.fromkeys(("dangling.mp4", "loop.mp4", "pipe.mp4"), "not a file")
    return dict.fromkeys(contents, "not a video") | {"bomb.gif": ""} | reasons, 10


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
    """A copy of bytes with some changed, or cut, or both."""
    content = bytearray(content)
    for _ in range(rng.choice([0, 0, 1, 10, 200, 3000])):
        content[rng.randrange(len(content))] = rng.randrange(256)
    first = rng.choice([0, 0, 0, rng.randrange(len(content))])
    return content[first : rng.choice([len(content), rng.randrange(first, len(content))])]


def test_240_damaged_files_neither_hang_nor_crash(tmp_path):
    sources = [made(tmp_path / name) for name in FILES]

    def read(i):
        source = sources[i % len(sources)]
        path = tmp_path / f"fuzz{i}{source.suffix}"
        path.write_bytes(damage(source.read_bytes(), random.Random(i)))
        try:
            frames = read_frames(path, 16)
        except BadVideo as error:
            assert path.name in str(error) and "\n" not in str(error)
            return 0
        few = len(frames) // 2
        assert probe(path) and frames.shape == (count_frames(path), 16, 16, 3)
        assert np.array_equal(read_frames(path, 16, few), frames[few:])
        return 1

    with ThreadPoolExecutor(2) as pool:
        assert 0 < sum(pool.map(read, range(240))) < 240


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_failures_of_the_machine_are_no_property_of_a_video(tmp_path, monkeypatch, cache):
    """In the middle of a file, which is not taken for its end."""
    for name in ("a.mkv", "b.mkv"):
        encode(tmp_path / name, grey(24))
    config = Config("folder", str(tmp_path), resolution=32, num_frames=4, cache=cache, cache_dir=str(tmp_path / ".cache"))
    failed, opened = [], video.opened

    def nine(packets):
        yield from itertools.islice(packets, 9)
        failed.append(True)
        raise av.error.OSError(errno.EIO, os.strerror(errno.EIO))

    @contextlib.contextmanager
    def failing(path):
        with opened(path) as (container, stream):
            broken = SimpleNamespace(demux=lambda stream: nine(container.demux(stream)), duration=container.duration)
            yield broken if path.name == "a.mkv" and not failed else container, stream

    monkeypatch.setattr(video, "opened", failing)
    dataset = open_dataset(config, "train")
    assert {dataset[i][0].shape for i in range(9)} == {(4, 32, 32, 3)}
    assert list(dataset.skipped.values()) == [os.strerror(errno.EIO)]
    again = open_dataset(config, "train")
    assert len(again) == 2 and again[0][0].shape and not again.skipped
