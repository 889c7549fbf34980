"""Data sets, synthetic ones and videos on disk, and a fast loader with a reproducible order of clips.

`dataset[i]` -> (uint8 frames [T, H, W, 3], label) for any i >= 0; i, i + len, i + 2 len, … are clips of one video, which
differ only for videos on disk, in training. `video.to_clip` turns frames into network input. Run this first on a new data set:

python data.py --dataset ucf --preview clips.png     eight clips, counts of classes, lengths, sizes, and why videos are skipped
"""

import collections
import contextlib
import hashlib
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import utils, video
from common.cache import decode_once, stamp
from common.drawn import CELL, Shapes, Sprites
from common.layouts import LAYOUTS, TRAIN, find_videos
from common.utils import UserError, option
from common.video import printable

LONG_PERIOD = 64  # of the motion of shapes-long, in frames: four clips of 16
SHAPES = {"shapes": 0, "shapes-long": LONG_PERIOD}  # name: period; 0: the length of a clip
DRAWN = (*SHAPES, "sprites")  # without video files
DATASETS = (*SHAPES, *LAYOUTS)
# Defaults that differ by data set: the paper's stride; one loop at its original size.
DEFAULTS = {"taichi": {"stride": 4}, "sprites": {"resolution": CELL, "num_frames": 8}}
CACHE, CACHE_LIMIT = "data/cache", 8 * 2**30  # data sets of up to this many bytes are decoded once and cached


# ------------------------------------------------------------------------------------------------------------ clips of videos


class Videos:
    """Clips of videos on disk. Training clips start at a random frame, and with `flip` half of them are mirrored; test clips
    are taken from the middle. The random choices depend only on i.

    items are (path, label). kept is the result of cache.decode_once; without it, each access decodes the video from its first
    frame. A video that yields no clip is reported once, recorded in `skipped` {path: reason}, and replaced by the next one.
    UserError if none is left.
    """

    def __init__(self, items, classes, role, config, kept=None):
        self.classes, self.train, self.size, self.flip = tuple(classes), role == "train", config.resolution, config.flip
        self.stride, self.span = config.stride, (config.num_frames - 1) * config.stride + 1  # frames from first to last
        self.items, self.skipped, self.lengths = list(items), {}, {}
        self.frames, failed = kept or (None, {})
        if kept:
            for path, _ in items:
                self.lengths[path] = len(self.frames.get(path, ()))
                if self.lengths[path] < self.span:
                    self.skip(path, failed.get(path) or self.too_short(path))
            self.items = [item for item in items if item[0] not in self.skipped] or self.nothing_left()

    def __len__(self):
        return len(self.items)

    def identity(self):
        """A hash of labels, and of names, sizes, times and inodes: it changes when a video or its class does."""
        return hashlib.sha256(repr([(label, stamp(path)) for path, label in self.items]).encode()).hexdigest()

    def __getitem__(self, i):
        for k in range(i, i + len(self)):
            path, label = self.items[k % len(self)]
            if path not in self.skipped:
                try:
                    return self.clip(path, i), label
                except video.BadVideo as error:
                    self.skip(path, error.reason)
        self.nothing_left()

    def clip(self, path, i):
        """Clip i, from this video: uint8 [T, H, W, 3]."""
        if path not in self.lengths:
            self.lengths[path] = video.count_frames(path)
        if (spare := self.lengths[path] - self.span) < 0:
            raise video.BadVideo(path, self.too_short(path))
        start = scramble(i) % (spare + 1) if self.train else spare // 2
        frames = self.frames[path][start:] if self.frames else video.read_frames(path, self.size, start, self.span)
        frames = np.asarray(frames[: self.span : self.stride])
        return np.ascontiguousarray(frames[:, :, ::-1]) if self.flip and self.train and scramble(i) >> 63 else frames

    def skip(self, path, reason):
        if path not in self.skipped:
            self.skipped[path] = reason
            report(f"skipping {printable(path)}: {reason}")

    def too_short(self, path):
        return f"it has {self.lengths[path]} frames, but a clip needs {self.span} (--num-frames, --stride)"

    def nothing_left(self):
        path, reason = next(iter(self.skipped.items()))
        raise UserError(f"none of the {len(self.skipped)} videos can be used; for example, {printable(path)}: {reason}")


def scramble(i):
    """A pseudorandom hash of i (splitmix64); constructing a generator would take longer than copying a clip."""
    z = (i + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    z = (z ^ z >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return z ^ z >> 31


def report(line):
    """Print a line above the progress bar, from the first process."""
    if utils.rank() == 0:
        tqdm.write(line)


def find_root(config):
    """The directory of a data set: --data-dir, its parent if that is train/, or the default. UserError, with the source."""
    usual, source = LAYOUTS[config.dataset]
    given = Path(config.data_dir or usual)
    if config.dataset == "folder" and not config.data_dir:
        raise UserError("--dataset folder needs --data-dir, a directory with a sub-folder of videos for each class")
    if not given.is_dir():
        raise UserError(f"there is no directory {printable(given)}: give another --data-dir ({source})")
    root = given.resolve()  # links and relative paths, too
    return root.parent if root.name.lower() in TRAIN else root


def estimated_bytes(paths, size):
    """Estimated size in bytes of the decoded frames of these videos, from the headers of a few of them."""
    few, frames = paths[:: len(paths) // 16 + 1], 0
    for path in few:
        with contextlib.suppress(video.BadVideo):
            frames += video.probe(path).frames
    return frames / len(few) * len(paths) * size**2 * 3


def open_dataset(config, role, classes=None):
    """Open the data set of a config (dataset, data_dir, resolution, num_frames, stride, flip). role is "train" or "test".

    If `classes` is given, labels are indices into it; UserError for a class that is not in it. A data set of up to CACHE_LIMIT
    is decoded in the first call; clips of larger ones are decoded on demand.
    """
    if config.dataset in SHAPES:
        return Shapes(role, config.resolution, config.num_frames, period=SHAPES[config.dataset], stride=config.stride)
    if config.dataset == "sprites":
        if config.flip:
            raise UserError("sprites cannot be mirrored, which would swap left and right: leave out --flip")
        return Sprites(find_root(config), role, config.resolution, config.num_frames, config.stride)
    root, items, names, notes = find_videos(find_root(config), config.dataset, role)
    for note in notes:
        report(f"left out: {note}")
    if len(names) == 1 and classes and len(classes) == 1:
        names, items = list(classes), [(path, classes[0]) for path, _ in items]  # a folder without classes, renamed
    if unknown := [name for name in names if name not in (classes or names)]:
        raise UserError(f"{printable(root)} has the class {unknown[0]!r}, but the checkpoint has {list(classes)}")
    number = {name: k for k, name in enumerate(classes or names)}
    items, paths = [(path, number[name]) for path, name in items], [path for path, _ in items]
    # Linux maps 65,530 files at most.
    if getattr(config, "cache", "") == "off" or len(paths) > 50_000 or estimated_bytes(paths, config.resolution) > CACHE_LIMIT:
        return Videos(items, number, role, config)
    place = hashlib.sha256(os.fsencode(root)).hexdigest()[:8]
    name = f"{utils.file_name(root.name, 40)}-{role}-{config.resolution}-{place}"
    kept = decode_once(Path(getattr(config, "cache_dir", CACHE)) / name, paths, config.resolution)
    return Videos(items, number, role, config, kept)


# ----------------------------------------------------------------------------------------------------------- batches


class Stream:
    """The order of clips in a training: an infinite sequence of lists of indices into a data set.

    Every epoch has a new random order, which depends only on the seed. A global batch is the next batch_size indices. It is
    split into parts, and each process takes its rows of each part, so that a step uses the same clips on any number of
    processes. Step 1000 can be computed without the 999 before it.
    """

    def __init__(self, length, batch_size, seed=0, start=0, parts=1, rank=0, world=1):
        self.length, self.batch_size, self.seed, self.start = length, batch_size, seed, start
        self.parts, self.rank, self.world = parts, rank, world
        self.orders = {}  # of the last two epochs

    def batch(self, step):
        """Indices of the global batch of a step; clip i in epoch e has the index e * length + i."""
        indices = []
        for position in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, i = divmod(position, self.length)
            if epoch not in self.orders:
                generator = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch)
                order = torch.randperm(self.length, generator=generator)
                self.orders = {k: v for k, v in self.orders.items() if k >= epoch - 1} | {epoch: order}
            indices.append(epoch * self.length + self.orders[epoch][i].item())
        return indices

    def __iter__(self):
        rows = self.batch_size // (self.parts * self.world)
        for step in itertools.count(self.start):
            batch = self.batch(step)
            for part in range(self.parts):
                first = (part * self.world + self.rank) * rows
                yield batch[first : first + rows]


def endless(dataset, stream, device=None):
    """Yield batches (uint8 frames [B, T, H, W, 3], labels [B]) of a data set in the order of a Stream, without end.

    All cores of this process prefetch. For a CUDA device the memory is pinned, so that `to(device, non_blocking=True)` returns
    at once; torch reuses the memory only after the copy.
    """
    ahead, shape, cuda = collections.deque(), dataset[0][0].shape, device is not None and device.type == "cuda"

    def fill(row, i):
        row[...], label = dataset[i]
        return label

    pool = ThreadPoolExecutor(max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    try:
        for indices in stream:
            batch = torch.empty((len(indices), *shape), dtype=torch.uint8, pin_memory=cuda)
            ahead.append((batch, [pool.submit(fill, row, i) for row, i in zip(batch.numpy(), indices)]))
            if len(ahead) > 2:
                batch, labels = ahead.popleft()
                yield batch, torch.tensor([label.result() for label in labels])
    finally:
        pool.shutdown(cancel_futures=True)


def spread(dataset, count):
    """Indices of up to `count` clips, evenly spaced over a data set, or over synthetic ones sorted by class; one of a video."""
    order, count = range(len(dataset)), min(count, len(dataset))
    order = sorted(order, key=dataset.label) if hasattr(dataset, "label") else order
    return [order[(2 * k + 1) * len(order) // (2 * count)] for k in range(count)]


def clips(dataset, indices):
    """(clips [B, T, 3, H, W] in [-1, 1], labels [B]) at the indices of a data set."""
    items = [dataset[i] for i in indices]
    return torch.stack([video.to_clip(frames) for frames, _ in items]), torch.tensor([label for _, label in items])


def fixed_clips(dataset, count):
    """`clips` of up to `count` videos, spread over a data set, the same at every call."""
    return clips(dataset, spread(dataset, count))


# ------------------------------------------------------------------------------------------------------------------- preview


@dataclass
class Config:
    dataset: str = option("data", "shapes", "built-in, a folder of videos, or public ones as distributed", choices=DATASETS)
    data_dir: str = option("data", "", "its directory, if not the default; sub-folders of a folder are classes")
    resolution: int = option("data", 128, "height and width in pixels; shorter side scaled, centre cropped")
    num_frames: int = option("data", 16, "frames of a clip")
    stride: int = option("data", 1, "frames of the video per frame of the clip")
    flip: bool = option("data", False, "mirror half of the training clips, left to right")
    cache: str = option("data", "auto", "off: decode clips on demand, whatever the size", choices=["auto", "off"])
    cache_dir: str = option("data", CACHE, "directory for decoded frames")
    preview: str = option("what", "", "PNG file for a preview of eight clips")


def describe(dataset):
    """Print classes, lengths and sizes, as stored, of a data set of videos; skip those that cannot be opened."""
    found = []
    for path, label in utils.bar(dataset.items, "looking", unit="video"):
        try:
            info = video.probe(path)
            found.append((dataset.classes[label], dataset.lengths.get(path, info.frames), f"{info.width} x {info.height}"))
        except video.BadVideo as error:
            dataset.skip(path, error.reason)
    classes, frames, sizes = zip(*(found or dataset.nothing_left()))
    for name, count in sorted(collections.Counter(classes).items()):
        print(f"    {name:32}{count:6}")
    print(f"frames    {min(frames)} to {max(frames)}, median {np.median(frames):g}")
    print("sizes     " + ", ".join(f"{size} ({count})" for size, count in collections.Counter(sizes).most_common(5)))


def main():
    config = utils.parse_options(Config, __doc__, lambda args: DEFAULTS.get(args.dataset, {}))
    utils.check_positive(config, "resolution", "num_frames", "stride")
    dataset = open_dataset(config, "train")
    print(f"{len(dataset)} clips or videos in {len(dataset.classes)} classes: {', '.join(dataset.classes)}")
    if config.dataset not in DRAWN:
        describe(dataset)
    if config.preview:
        shown, labels = fixed_clips(dataset, 8)
        video.write_sheet(config.preview, shown, [dataset.classes[k] for k in labels])
        print(f"wrote {config.preview}")


if __name__ == "__main__":
    utils.run(main)
