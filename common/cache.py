"""Videos that are decoded once: the frames of each in a file on the disk, memory-mapped, so that any clip is one copy away."""

import contextlib
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
from tqdm import tqdm

from common import utils, video


def decode_once(directory, paths, size):
    """All frames of videos: ({path: uint8 [T, size, size, 3], memory-mapped}, {path: reason of having none}).

    The file of a video is named by a hash of what tells that it is the same, and of the decoder's version: what changes is
    decoded anew. So is what failed, which may have been the machine's fault. None where the directory cannot be written.
    """
    states = {path: f"{av.__version__} {stamp(path, here=True)}".encode() for path in paths}
    files = {path: directory / f"{hashlib.sha256(state).hexdigest()[:32]}.u8" for path, state in states.items()}
    failed, broken = {}, False

    def decode(path):
        try:
            frames = video.read_frames(path, size)
            with utils.whole(files[path]) as part:
                frames.tofile(part)
        except video.BadVideo as error:
            failed[path] = error.reason

    if utils.rank() == 0:
        todo, pool = [path for path in paths if not files[path].is_file()], ThreadPoolExecutor(utils.cores())
        try:
            for old in {*directory.glob("*.u8")} - {*files.values()}:
                old.unlink()
            list(utils.bar(pool.map(decode, todo), "decoding", len(todo), "video", disable=not todo))
        except (utils.UserError, OSError) as error:
            tqdm.write(f"{error}: clips are decoded as they are needed")
            broken = True
        pool.shutdown(cancel_futures=True)
    if utils.max_over_ranks(broken):
        return None
    there = {path: np.memmap(file, np.uint8, "c") for path, file in files.items() if file.is_file()}
    return {path: frames.reshape(-1, size, size, 3) for path, frames in there.items()}, failed


def estimated_bytes(paths, size):
    """What the frames of these videos will take, from the headers of a few of them."""
    few, frames = paths[:: len(paths) // 16 + 1], 0
    for path in few:
        with contextlib.suppress(video.BadVideo):
            frames += video.probe(path).frames or video.count_frames(path)  # a stream without a container has no header
    return frames / len(few) * len(paths) * size**2 * 3


def stamp(path, here=False):
    """What tells that a video is the one it was: name, size and time of its file, or of all files of a directory.

    here: on this disk, where a file that was made anew at the same size and time has another number or time of change.
    """
    files = video.frame_files(path) if path.is_dir() else [path]
    states = [(os.fsencode(file.name).hex(), os.stat(file)) for file in files if os.path.exists(file)]
    return " ".join(f"{name} {s.st_size} {s.st_mtime_ns}" + f" {s.st_ino} {s.st_ctime_ns}" * here for name, s in states)
