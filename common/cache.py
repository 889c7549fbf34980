"""A data set decoded once: every frame of every video at the training size, memory-mapped, so that any clip is one copy away.

directory/
    frames-00.u8, …   uint8 frames [size, size, 3], one behind the other; one file for each decoder of each run
    index.jsonl       what is in them, a line of JSON each:
                          {"format": …, "key": {…}}                           what the cache is of
                          {"video": name, "bytes": of the file, "file": 0, "start": frame, "frames": n, "crc": CRC-32 of them}
                          {"video": name, "bytes": of the file, "skipped": reason}
                          {"complete": sha256 of all lines before}            there when all videos have been through

A line is written when its frames are, so a run that was stopped goes on where it was. Nothing in a cache is ever executed.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import queue
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from common import progress, utils, video
from common.utils import UserError, whole_file

FORMAT = "nerv-diffusion frames 1"


def read_index(directory):
    """(header or None, {video: entry}, complete) of an index, as far as it goes; what follows a damaged line is not read."""
    header, entries, digest = None, {}, hashlib.sha256()
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        for line in open(Path(directory) / "index.jsonl", "rb"):
            entry = json.loads(line)
            if header is None:
                header = {"format": entry["format"], "key": entry["key"]}
            elif "complete" in entry:
                return header, entries, entry["complete"] == digest.hexdigest()
            else:
                entries[entry["video"]] = entry
            digest.update(line)
    return header, entries, False


def crc_of(path, begin, length):
    """CRC-32 of bytes begin … begin + length of a file, read piece by piece: against bad disks, not against bad people."""
    crc, piece = 0, memoryview(bytearray(2**18))
    with open(path, "rb", buffering=0) as f:
        f.seek(begin)
        while length > 0 and (count := f.readinto(piece[:length])):
            crc, length = zlib.crc32(piece[:count], crc), length - count
    return crc


def prepare(directory, root, videos, size, fps=0.0, workers=0, retry=False):
    """Decode videos (paths below root) into the cache at directory; those that are in it already stay as they are.

    Uses all cores unless told otherwise, a decoder process on each; memory does not grow with the length of a video. Files
    that cannot be decoded are noted with their reason, and tried anew with retry. Returns the number of videos that were not
    there before. A cache that lacks nothing may be where nobody can write. UserError where one that lacks something is.
    """
    directory, workers, frame_bytes = Path(directory), workers or utils.cores(), size * size * 3
    paths = {os.path.relpath(path, root): path for path in videos}
    key = {"root": video.printable(Path(root).resolve()), "size": size, "fps": fps}

    def lacking():
        header, entries, complete = read_index(directory)
        if header and header != {"format": FORMAT, "key": key}:
            raise UserError(f"{directory} is a cache of {header}, not of {key}: remove it, or name another with --cache-dir")
        again = {name for name, entry in entries.items() if retry and "skipped" in entry}
        todo = [name for name in paths if name in again or entries.get(name, {}).get("bytes") != file_size(paths[name])]
        return todo, entries, complete and not todo

    if lacking()[-1]:
        return 0
    with contextlib.ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(open(directory / "lock", "w")), fcntl.LOCK_EX)  # another process may be at it
        except OSError as error:
            raise UserError(f"cannot write the cache {directory}: {error.strerror}") from None
        todo, entries, nothing = lacking()
        if nothing:
            return 0

        # Forget what a run that was stopped left behind: half a line, frames without a line.
        with whole_file(directory / "index.jsonl") as index:
            for line in [{"format": FORMAT, "key": key}, *(entries[name] for name in entries if name not in set(todo))]:
                index.write(json.dumps(line).encode() + b"\n")
        ends = {}
        for e in entries.values():
            if "frames" in e:
                ends[e["file"]] = max(ends.get(e["file"], 0), e["start"] + e["frames"])
        for path in directory.glob("frames-[0-9]*.u8"):
            if (k := int(path.stem.removeprefix("frames-"))) in ends:
                os.truncate(path, ends[k] * frame_bytes)
            else:
                path.unlink()
        # Always new files: a decoder whose parent was killed may still be at the end of an old one.
        files = queue.SimpleQueue()  # a worker takes one, appends to it, and gives it back
        first = max(ends, default=-1) + 1
        for k in range(first, first + workers):
            files.put((k, stack.enter_context(open(directory / f"frames-{k:02d}.u8", "ab+"))))

        index, one_at_a_time = stack.enter_context(open(directory / "index.jsonl", "a")), threading.Lock()
        bar = stack.enter_context(progress.bar(total=len(todo), desc="preparing", unit="video"))

        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []  # of the calling thread alone
        jobs = list(groups(todo, paths))
        threads = max(1, workers // len(jobs)) if jobs else 1  # a few long videos take all cores, too

        def work(group):
            k, file = files.get()
            try:
                if cores:  # the threads of one decoder are quickest on one core, next to each other's frames
                    os.sched_setaffinity(0, cores[k % len(cores) :][:1] if len(group) > 1 else cores)
                for name, result in zip(group, append([paths[name] for name in group], size, fps, file, threads)):
                    entry = {"video": name, "bytes": file_size(paths[name]), **result}
                    with one_at_a_time:
                        index.write(json.dumps(entry | ({"file": k} if "frames" in result else {})) + "\n")
                        index.flush()
                        bar.update()
            finally:
                files.put((k, file))

        pool = ThreadPoolExecutor(workers)
        try:
            list(pool.map(work, jobs))
        except OSError as error:
            raise UserError(f"cannot write the cache {directory}: {error.strerror}") from None
        finally:
            pool.shutdown(cancel_futures=True)
        digest = hashlib.sha256((directory / "index.jsonl").read_bytes()).hexdigest()
        index.write(json.dumps({"complete": digest}) + "\n")
    return len(todo)


def groups(names, paths, most=2**22, count=16):
    """Lists of names: small video files several at a time, for which starting a decoder is most of the work; others alone."""
    small, total = [], 0
    for name in names:
        size = file_size(paths[name])
        if size > most // 4 or video.video_kind(paths[name]) != "decoder":
            yield [name]
            continue
        if len(small) == count or total + size > most:
            yield small
            small, total = [], 0
        small.append(name)
        total += size
    if small:
        yield small


def append(paths, size, fps, file, threads=1):
    """Append the frames of videos to an open file; yields {"start", "frames", "crc"} or {"skipped"} of each, see above."""
    frame_bytes = size * size * 3
    start = file.seek(0, os.SEEK_END) // frame_bytes
    counts = video.decode_several(paths, size, file, fps) if len(paths) > 1 else None
    for k, path in enumerate(paths):
        try:
            count = counts[k] if counts else write_frames(path, size, fps, file, threads)
            yield {"start": start, "frames": count, "crc": crc_of(file.name, start * frame_bytes, count * frame_bytes)}
            start += count
        except video.BadVideo as error:
            yield {"skipped": error.reason}


def write_frames(path, size, fps, file, threads=1):
    """Append the frames of one video to an open file; returns how many."""
    if video.video_kind(path) == "decoder":
        return video.decode(path, size, file, fps, threads=threads)
    start, count = file.seek(0, os.SEEK_END), 0
    try:
        for frame in video.image_frames(path, size):
            file.write(frame.tobytes())
            count += 1
    except video.BadVideo:
        file.truncate(start)
        raise
    file.flush()
    return count


def file_size(path):
    """Bytes of a file, or of all files of a directory: what tells that a video is another one than it was."""
    with contextlib.suppress(OSError):
        if not os.path.isdir(path):
            return os.stat(path).st_size
        with os.scandir(path) as entries:
            return sum(entry.stat().st_size for entry in entries)
    return -1


class FrameCache:
    """A prepared cache, opened: `frames(name)` is a memory-mapped uint8 [T, size, size, 3], `skipped` {name: reason}.

    The index is checked against its hash, the frame files against their sizes, and of the videos a few, spread over the
    whole, against theirs; all of them with verify=True. Raises UserError where something is not as it was written.
    """

    def __init__(self, directory, verify=False):
        self.directory = Path(directory)
        header, entries, complete = read_index(directory)
        if not header or header["format"] != FORMAT or not complete:
            raise UserError(f"{directory} is not a complete cache of frames: make it with `python data.py --prepare`")
        try:
            self.size, self.files = int(header["key"]["size"]), {}
            self.skipped = {name: str(e["skipped"]) for name, e in entries.items() if "skipped" in e}
            self.entries = {name: e for name, e in entries.items() if "skipped" not in e}
            ends = {}
            for e in self.entries.values():
                ends[e["file"]] = max(ends.get(e["file"], 0), e["start"] + e["frames"])
            for k, end in ends.items():
                shape = (end, self.size, self.size, 3)
                self.files[k] = np.memmap(self.directory / f"frames-{k:02d}.u8", np.uint8, "c", shape=shape)
        except (OSError, KeyError, TypeError, ValueError):
            raise UserError(f"the frames of {directory} are missing or too few: remove it and prepare it again") from None
        names = list(self.entries)
        some = names if verify else names[:: len(names) // 8 + 1]
        for name in progress.bar(some, "verifying", unit="video", disable=not verify):
            e, frame_bytes = self.entries[name], self.size**2 * 3
            path = self.directory / f"frames-{e['file']:02d}.u8"
            if crc_of(path, e["start"] * frame_bytes, e["frames"] * frame_bytes) != e["crc"]:
                raise UserError(f"the frames of {name} in {directory} are not what was written: remove it and prepare it again")

    def frames(self, name):
        e = self.entries[name]
        return self.files[e["file"]][e["start"] : e["start"] + e["frames"]]
