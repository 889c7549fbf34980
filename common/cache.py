"""Videos that are decoded once: their frames in one array on the disk, memory-mapped, so that any clip is one copy away."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np

from common import utils, video


def decode_once(directory, paths, size):
    """All frames of videos: ({path: uint8 [T, size, size, 3], memory-mapped}, {path: reason} of those without any).

    directory/KEY.u8 has the frames, one video after the other, and KEY.json how many of each, or why there are none. KEY is a
    hash of names, sizes and times of all files and of the decoder's version: what changes is decoded anew.
    """
    key = hashlib.sha256("\n".join([av.__version__, *map(stamp, paths)]).encode()).hexdigest()[:16]
    frames_file, index_file = directory / f"{key}.u8", directory / f"{key}.json"

    def decode(path):
        try:
            return video.read_frames(path, size)
        except video.BadVideo as error:
            return error.reason

    def stale():  # also where a file that failed now decodes: it may have been the machine's fault
        entries = json.loads(index_file.read_text()) if index_file.is_file() and frames_file.is_file() else None
        failed = [path for path, entry in zip(paths, entries or ()) if isinstance(entry, str)]
        return entries is None or any(not isinstance(decode(path), str) for path in failed)

    if utils.rank() == 0 and stale():
        for old in directory.glob("[0-9a-f]*"):
            old.unlink()
        index = []
        with utils.whole_file(frames_file) as out, ThreadPoolExecutor(utils.cores()) as pool:
            with utils.bar(desc="decoding", total=len(paths), unit="video") as bar:
                for k in range(0, len(paths), 64):  # so many results at most wait in memory
                    for found in pool.map(decode, paths[k : k + 64]):
                        index.append(found if isinstance(found, str) else len(found))
                        out.write(b"" if isinstance(found, str) else found.tobytes())
                        bar.update()
        with utils.whole_file(index_file) as out:
            out.write(json.dumps(index).encode())
    utils.wait_for_all()
    index, start = json.loads(index_file.read_text()), 0
    frames = np.memmap(frames_file, np.uint8, "c") if frames_file.stat().st_size else np.empty(0, np.uint8)
    found, failed = {}, {path: entry for path, entry in zip(paths, index) if isinstance(entry, str)}
    for path, count in zip(paths, index):
        if path not in failed:
            found[path] = frames[start : (start := start + count * size * size * 3)].reshape(count, size, size, 3)
    return found, failed


def stamp(path):
    """What tells that a video is not the one it was: name, size and time of its file, or of all files of a directory."""
    files = video.frame_files(path) if path.is_dir() else [path]
    states = [(os.fsencode(file.name).hex(), os.stat(file)) for file in files if file.exists()]
    return " ".join(f"{name} {state.st_size} {state.st_mtime_ns}" for name, state in states)
