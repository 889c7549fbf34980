"""Videos that are decoded once: their frames in one array on the disk, memory-mapped, so that any clip is one copy away."""

import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from common import utils, video
from common.utils import UserError


def decode_once(directory, root, paths, size):
    """All frames of videos: ({path: uint8 [T, size, size, 3], memory-mapped}, {path: reason} of those without any).

    directory/frames-*.u8 holds what one run has decoded; index.json says where each video begins, and what its files were
    called, how large and how old they were: one made anew is decoded anew. What failed is tried again each time.
    """
    names, failed, lock = {os.path.relpath(path, root): path for path in paths}, {}, threading.Lock()

    def read_index():
        try:
            index = json.loads((directory / "index.json").read_bytes())
            ends = {file.name: file.stat().st_size for file in directory.glob("frames-*.u8")}
            videos = {k: v for k, v in index["videos"].items() if v[2] + v[3] * size * size * 3 <= ends.get(v[1], -1)}
            return {"videos": videos, "failed": dict(index["failed"])}
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
            return {"videos": {}, "failed": {}}

    def decode(name):
        with tempfile.SpooledTemporaryFile(2**26, dir=directory) as frames:  # a long video must not fill the memory
            try:
                count = sum(frames.write(frame.tobytes()) for frame in video.iterate(names[name], size)) // (size * size * 3)
                if not count:
                    raise video.BadVideo(name, video.NOTHING)
            except video.BadVideo as error:
                failed[name] = error.reason
            with lock:
                bar.update()
                if name not in failed:
                    index["videos"][name] = [stamps[name], file.name, out.tell(), count]
                    frames.seek(0)
                    shutil.copyfileobj(frames, out, 2**20)

    index, stamps = read_index(), {name: stamp(path) for name, path in names.items() if utils.rank() == 0}
    if todo := [name for name in stamps if index["videos"].get(name, [""])[0] != stamps[name]]:
        pool = ThreadPoolExecutor(max(1, utils.cores() // utils.local_processes()))
        file = directory / f"frames-{time.time_ns()}.u8"
        index["videos"] = {name: entry for name, entry in index["videos"].items() if name not in todo}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with utils.whole_file(file) as out, utils.bar(desc="decoding", total=len(todo), unit="video") as bar:
                list(pool.map(decode, todo))
            index["failed"] = failed
            with utils.whole_file(directory / "index.json") as out:
                out.write(json.dumps(index).encode())
            used = {entry[1] for entry in index["videos"].values()}
            for old in directory.glob("frames-*"):
                if old.name not in used and (old == file or time.time() - old.stat().st_mtime > 86400):  # or another's, at work
                    old.unlink()
        except OSError as error:
            raise UserError(f"cannot write the cache {video.printable(directory)}: {error.strerror}") from None
        finally:
            pool.shutdown(cancel_futures=True)
    utils.wait_for_all()
    index, arrays, found = read_index(), {}, {}
    for name in names.keys() & index["videos"].keys():
        _, file, start, count = index["videos"][name]
        arrays[file] = arrays[file] if file in arrays else np.memmap(directory / file, np.uint8, "c")
        found[names[name]] = arrays[file][start : start + count * size * size * 3].reshape(count, size, size, 3)
    return found, {names[name]: reason for name, reason in index["failed"].items() if name in names}


def stamp(path):
    """What tells that a video is not the one it was: the name, size and time of its file, or of all files of a directory."""
    try:
        files = video.frame_files(path) if path.is_dir() else [path]
        states = [(file.name, os.stat(file)) for file in files]
    except OSError:
        return "gone"
    said = "\n".join(f"{name} {state.st_size} {state.st_mtime_ns}" for name, state in states)
    return hashlib.sha256(os.fsencode(said)).hexdigest()[:16]
