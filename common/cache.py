"""The cache of decoded videos: one memory-mapped file of frames per video, so that reading a clip is a single copy."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import av
import torch

from common import utils, video


def decode_once(directory, paths, size):
    """All frames of videos: ({path: uint8 [T, size, size, 3], memory-mapped}, {path: why it has none}).

    The name of a cache file has the decoder's version and the video's stamp, so a changed video is decoded again, and so is one
    that failed, since the machine may have been at fault. UserError if the directory cannot be written.
    """
    files, failed = {path: directory / f"{av.__version__}-{stamp(path)}.u8" for path in paths}, {}

    def decode(path):
        try:
            with utils.whole(files[path]) as part:
                part.write_bytes(video.read_frames(path, size))  # tofile would not notice a full disk
        except video.BadVideo as error:
            failed[path] = error.reason

    if utils.rank() == 0:
        for old in {*directory.glob("*.u8")} - {*files.values()}:
            old.unlink()
        todo = [path for path in paths if not files[path].is_file()]
        with ThreadPoolExecutor() as pool:
            list(utils.bar(pool.map(decode, todo), "decoding", len(todo), unit="video", disable=not todo))
    utils.max_over_ranks()  # all wait for the first
    there = {path: file for path, file in files.items() if file.is_file()}  # torch's maps keep no file open, numpy's do
    maps = {path: torch.from_file(str(file), False, file.stat().st_size, dtype=torch.uint8) for path, file in there.items()}
    return {path: frames.view(-1, size, size, 3).numpy() for path, frames in maps.items()}, failed


def stamp(path):
    """A hash of name, size, times and inode of a video's file, or of all files of a directory: it changes when a video does."""
    files = video.frame_files(path) if path.is_dir() else [path]
    states = [(os.fsencode(file.name), os.stat(file)) for file in files if os.path.exists(file)]
    states = [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in states]
    return hashlib.sha256(repr(states).encode()).hexdigest()[:32]
