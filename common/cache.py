"""The cache of decoded videos: one memory-mapped file of frames per video, so that reading a clip is a single copy."""

import contextlib
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
from tqdm import tqdm

from common import utils, video


def decode_once(directory, paths, size):
    """All frames of videos: ({path: uint8 [T, size, size, 3], memory-mapped}, {path: why it has none}).

    The name of a cache file is a hash of the video's stamp and of the decoder's version, so a changed video is decoded again.
    So is one that failed, since the machine may have been at fault. Returns None if the directory cannot be written.
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
            list(utils.bar(pool.map(decode, todo), "decoding", len(todo), unit="video", disable=not todo))
        except (utils.UserError, OSError) as error:
            tqdm.write(f"{error}: decoding clips on demand instead")
            broken = True
        pool.shutdown(cancel_futures=True)
    if utils.max_over_ranks(broken):
        return None
    there = {path: np.memmap(file, np.uint8, "c") for path, file in files.items() if file.is_file()}
    return {path: frames.reshape(-1, size, size, 3) for path, frames in there.items()}, failed


def estimated_bytes(paths, size):
    """Estimated size in bytes of the decoded frames of these videos, from the headers of a few of them."""
    few, frames = paths[:: len(paths) // 16 + 1], 0
    for path in few:
        with contextlib.suppress(video.BadVideo):
            frames += video.probe(path).frames or video.count_frames(path)  # a raw stream has no header
    return frames / len(few) * len(paths) * size**2 * 3


def stamp(path, here=False):
    """A string that changes when a video changes: name, size and time of its file, or of all files of a directory.

    here: add inode and change time, which on the same disk also reveal a file replaced by one of equal size and time.
    """
    files = video.frame_files(path) if path.is_dir() else [path]
    states = [(os.fsencode(file.name).hex(), os.stat(file)) for file in files if os.path.exists(file)]
    return " ".join(f"{name} {s.st_size} {s.st_mtime_ns}" + f" {s.st_ino} {s.st_ctime_ns}" * here for name, s in states)
