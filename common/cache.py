"""Videos that are decoded once: their frames in one array on the disk, memory-mapped, so that any clip is one copy away."""

import contextlib
import hashlib
import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
from tqdm import tqdm

from common import utils, video


def decode_once(directory, paths, size):
    """All frames of videos: ({path: uint8 [T, size, size, 3], memory-mapped}, {path: reason of having none}, {path: hash}).

    directory/KEY.u8 has the frames, one video after the other, and KEY.json how many of each and their hash, or why there are
    none. KEY is a hash of the states of all files and of the decoder's version: what changes is decoded anew. None where the
    directory cannot be written.
    """
    key = hashlib.sha256("\n".join([av.__version__, *(stamp(path, True) for path in paths)]).encode()).hexdigest()[:16]
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

    def write():
        index = []
        with utils.whole_file(frames_file) as out, ThreadPoolExecutor(utils.cores()) as pool:
            with utils.bar(desc="decoding", total=len(paths), unit="video") as bar:
                for k in range(0, len(paths), 64):  # so many results at most wait in memory
                    for found in pool.map(decode, paths[k : k + 64]):
                        index.append(found if isinstance(found, str) else [len(found), zlib.crc32(found)])
                        out.write(b"" if isinstance(found, str) else found.tobytes())
                        bar.update()
        with utils.whole_file(index_file) as out:
            out.write(json.dumps(index).encode())

    if utils.rank() == 0 and stale():
        with contextlib.suppress(OSError):
            for old in directory.glob("[0-9a-f]*"):
                old.unlink()
        try:
            write()
        except utils.UserError as error:
            tqdm.write(f"{error}: clips are decoded as they are needed")
    utils.wait_for_all()
    if not index_file.is_file():
        return None
    index, start = json.loads(index_file.read_text()), 0
    frames = np.memmap(frames_file, np.uint8, "c") if frames_file.stat().st_size else np.empty(0, np.uint8)
    found, failed, hashes = {}, {}, {}
    for path, entry in zip(paths, index):
        if isinstance(entry, str):
            failed[path] = entry
        else:
            count, hashes[path] = entry
            found[path] = frames[start : (start := start + count * size * size * 3)].reshape(count, size, size, 3)
    return found, failed, hashes


def estimated_bytes(paths, size):
    """What the frames of these videos will take, from the headers of a few of them."""
    few, frames = paths[:: len(paths) // 16 + 1], 0
    for path in few:
        with contextlib.suppress(video.BadVideo):
            frames += video.probe(path).frames or video.count_frames(path)  # a stream without a container has no header
    return frames / len(few) * len(paths) * size**2 * 3


def stamp(path, here=False):
    """What tells that a video is not the one it was: name, size and time of its file, or of all files of a directory.

    here: on this disk, where a file that was made anew at the same size and time has another number or time of change.
    """
    files = video.frame_files(path) if path.is_dir() else [path]
    states = [(os.fsencode(file.name).hex(), os.stat(file)) for file in files if os.path.exists(file)]
    return " ".join(f"{name} {s.st_size} {s.st_mtime_ns}" + f" {s.st_ino} {s.st_ctime_ns}" * here for name, s in states)
