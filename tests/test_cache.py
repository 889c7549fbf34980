"""The cache of decoded frames: what is in it, going on after a stop, and what it does when it is not as it was written."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, write_mp4
from PIL import Image
from test_data import counting_clip, numbers

from common import cache, checkpoints, video
from common.cache import FrameCache, prepare, read_index
from common.utils import UserError


@pytest.fixture
def videos(tmp_path):
    """Five videos of 10 to 14 frames and one that is none, in a folder."""
    for i in range(5):
        write_mp4(tmp_path / "videos" / f"{i}", counting_clip(10 + i))
    (tmp_path / "videos" / "text.mp4").write_text("no video\n" * 9)
    return sorted((tmp_path / "videos").iterdir())


def ready(tmp_path, videos, **kw):
    prepare(tmp_path / "cache", tmp_path / "videos", videos, 32, **kw)
    return FrameCache(tmp_path / "cache", verify=True)


@pytest.mark.parametrize("workers", [1, 3])
def test_every_frame_of_every_video(tmp_path, videos, workers):
    opened = ready(tmp_path, videos, workers=workers)
    assert opened.skipped == {"text.mp4": "damaged, or not a video"} and len(opened.entries) == 5
    for i in range(5):
        assert numbers(opened.frames(f"{i}.mp4")) == list(range(10 + i))
        assert np.array_equal(opened.frames(f"{i}.mp4"), video.read_frames(videos[i], 32))
    assert len(list((tmp_path / "cache").glob("frames-*.u8"))) == workers


def test_nothing_is_decoded_twice_and_what_is_new_or_changed_is(tmp_path, videos, monkeypatch):
    ready(tmp_path, videos)
    decoded = []
    append = cache.append
    monkeypatch.setattr(cache, "append", lambda paths, *args: (decoded.extend(p.name for p in paths), append(paths, *args))[1])
    assert prepare(tmp_path / "cache", tmp_path / "videos", videos, 32) == 0 and not decoded
    new = write_mp4(tmp_path / "videos" / "new", counting_clip(8))
    write_mp4(tmp_path / "videos" / "3", counting_clip(6, 64, 64))
    opened = ready(tmp_path, [*videos, new])
    assert sorted(decoded) == ["3.mp4", "new.mp4"]
    assert len(opened.frames("new.mp4")) == 8 and len(opened.frames("3.mp4")) == 6 and len(opened.frames("4.mp4")) == 14


def test_frames_that_were_made_anew_are_seen(tmp_path, videos):
    frames = tmp_path / "videos" / "frames"
    frames.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    for i in range(3):
        Image.new("RGB", (32, 32)).save(frames / f"{i}.png")
    opened = ready(tmp_path, [*videos, frames])
    assert not opened.frames("frames").any()
    for i, frame in enumerate(noise):
        Image.fromarray(frame).save(frames / f"{i}.png")  # as many files, of the same names
    assert np.array_equal(ready(tmp_path, [*videos, frames]).frames("frames"), noise)


def test_what_did_not_work_is_tried_anew_when_asked(tmp_path, videos, monkeypatch):
    def hangs(path, *args):
        raise video.BadVideo(path, "the decoder hangs")

    with monkeypatch.context() as slow:
        slow.setattr(video, "run_decoder", hangs)
        assert set(ready(tmp_path, videos[:3]).skipped.values()) == {"the decoder hangs"}
    assert prepare(tmp_path / "cache", tmp_path / "videos", videos[:3], 32) == 0
    assert prepare(tmp_path / "cache", tmp_path / "videos", videos[:3], 32, retry=True) == 3
    assert len(FrameCache(tmp_path / "cache").entries) == 3


def test_a_complete_cache_is_not_written_to_and_another_place_is_one_line(tmp_path, videos, monkeypatch):
    ready(tmp_path, videos)

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache.fcntl, "flock", refuse)
    assert prepare(tmp_path / "cache", tmp_path / "videos", videos, 32) == 0
    with pytest.raises(UserError, match="cannot write the cache.*Permission"):
        prepare(tmp_path / "cache", tmp_path / "videos", videos, 32, retry=True)


@pytest.mark.parametrize("lines", [1, 2, 4, 6])
def test_going_on_after_a_stop_at_any_line(tmp_path, videos, lines):
    opened = ready(tmp_path, videos, workers=2)
    whole = {name: np.array(opened.frames(name)) for name in opened.entries}
    index = tmp_path / "cache" / "index.jsonl"
    text = index.read_text().splitlines(keepends=True)
    index.write_text("".join(text[:lines]) + text[lines][:20])  # and half of the next one
    with open(tmp_path / "cache" / "frames-00.u8", "ab") as f:
        f.write(b"x" * 5000)  # frames without a line
    with pytest.raises(UserError, match="not a complete cache"):
        FrameCache(tmp_path / "cache")
    assert prepare(tmp_path / "cache", tmp_path / "videos", videos, 32, workers=2) == 7 - lines
    again = FrameCache(tmp_path / "cache", verify=True)
    assert len(whole) == 5 and all(np.array_equal(again.frames(name), frames) for name, frames in whole.items())


def test_a_decoder_that_outlives_its_run_spoils_nothing(tmp_path, videos):
    prepare(tmp_path / "cache", tmp_path / "videos", videos[:2], 32, workers=1)
    with open(tmp_path / "cache" / "frames-00.u8", "ab") as orphan:  # its parent was killed, and it goes on writing
        orphan.write(bytes(1000))
        orphan.flush()
        opened = ready(tmp_path, videos, workers=1)
        orphan.write(bytes(3000 * 7))
        orphan.flush()
        write_mp4(tmp_path / "videos" / "0", counting_clip(7))
        opened = ready(tmp_path, videos, workers=1)
    assert [len(opened.frames(f"{i}.mp4")) for i in range(5)] == [7, 11, 12, 13, 14]


def test_a_kill_while_preparing(tmp_path):
    for i in range(40):
        write_mp4(tmp_path / "videos" / f"{i:02d}", counting_clip(12))
    command = [sys.executable, str(ROOT / "data.py"), "--dataset", "folder", "--data-dir", "videos", "--prepare"]
    process = subprocess.Popen([*command, "--resolution", "32"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    while time.time() < deadline and process.poll() is None:
        if any(p.read_text().count("\n") > 5 for p in tmp_path.glob("data/cache/*/index.jsonl")):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    (directory,) = (tmp_path / "data" / "cache").iterdir()
    _, entries, complete = read_index(directory)
    assert 4 < len(entries) < 40 and not complete
    kept = {name: e["start"] for name, e in entries.items()}
    done = subprocess.run([*command, "--resolution", "32", "--verify"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "40 videos" in done.stdout and "all as written" in done.stdout
    _, entries, complete = read_index(directory)
    assert complete and len(entries) == 40 and all(entries[name]["start"] == start for name, start in kept.items())


def test_what_is_not_as_it_was_written_is_found(tmp_path, videos):
    ready(tmp_path, videos, workers=1)
    directory, saved = tmp_path / "cache", tmp_path / "saved"
    shutil.copytree(directory, saved)

    def check(match, verify=False):
        with pytest.raises(UserError, match=match):
            FrameCache(directory, verify)
        shutil.rmtree(directory)
        shutil.copytree(saved, directory)

    with open(directory / "frames-00.u8", "r+b") as f:  # one byte
        f.seek(100)
        byte = f.read(1)
        f.seek(100)
        f.write(bytes([byte[0] ^ 1]))
    check("are not what was written")
    os.truncate(directory / "frames-00.u8", 32 * 32 * 3 * 20)
    check("missing or too few")
    (directory / "frames-00.u8").unlink()
    check("missing or too few")
    text = (directory / "index.jsonl").read_text()
    (directory / "index.jsonl").write_text(text.replace('"frames": 10', '"frames": 9'))
    check("not a complete cache")
    (directory / "index.jsonl").unlink()
    check("not a complete cache")
    FrameCache(directory)


def test_a_cache_of_something_else_is_refused(tmp_path, videos):
    ready(tmp_path, videos)
    with pytest.raises(UserError, match="is a cache of.*--cache-dir"):
        prepare(tmp_path / "cache", tmp_path / "videos", videos, 64)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_caches_and_checkpoints_from_strangers_are_data(tmp_path, videos, monkeypatch):
    from dit import cached_latents

    monkeypatch.chdir(tmp_path)
    ready(tmp_path, videos)
    bomb = pickle.dumps(Bomb())
    for name in ("index.jsonl", "frames-00.u8"):
        (tmp_path / "cache" / name).write_bytes(bomb)
        with pytest.raises(UserError):
            FrameCache(tmp_path / "cache")
    torch.save(Bomb(), "bomb.pt")
    (tmp_path / "raw.pt").write_bytes(bomb)
    for name in ("bomb.pt", "raw.pt"):
        with pytest.raises(UserError):
            checkpoints.load(name, "vae", "")
    (tmp_path / "latents").mkdir()
    np.save(tmp_path / "latents" / "latents.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    (tmp_path / "latents" / "key.json").write_text(json.dumps({}, indent=1))

    class Stage1:
        nerv_config = None

    with pytest.raises((ValueError, UserError)):
        cached_latents(tmp_path / "latents", {}, Stage1, None, 1, 0, torch.device("cpu"))
    assert not (tmp_path / "exploded").exists()
    os.system("touch exploded")
    assert (tmp_path / "exploded").exists(), "the bomb would have worked"


def test_a_full_disk_is_one_line(tmp_path, videos, monkeypatch):
    monkeypatch.setattr(video, "run_decoder", lambda *args: ("av_interleaved_write_frame(): No space left on device", 1))
    with pytest.raises(UserError, match="cannot write the cache.*No space left"):
        prepare(tmp_path / "cache", tmp_path / "videos", videos, 32)
    monkeypatch.undo()
    assert len(ready(tmp_path, videos).entries) == 5, "nothing was noted down as bad"
