"""Data sets: those that are drawn, and the videos that people have on their disks. Clips go out in a fixed order, fast.

A data set gives `dataset[i]` -> (uint8 frames [T, H, W, 3], label), for any i >= 0; i, i + len, i + 2 len, … are other clips of
the same video. The networks take `video.to_clip` of that. The first thing to run on a new data set is

python data.py --dataset ucf --preview clips.png     eight clips, counts of classes, lengths, sizes, and what is skipped and why
"""

import collections
import hashlib
import itertools
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import utils, video
from common.cache import decode_once, estimated_bytes, stamp
from common.drawn import CELL, Shapes, Sprites
from common.layouts import LAYOUTS, find_root, find_videos
from common.utils import UserError, option
from common.video import printable

LONG_PERIOD = 64  # frames of a turn of shapes-long: four clips of 16
SHAPES = {"shapes": 0, "shapes-long": LONG_PERIOD}  # built in; 0: a clip is a turn
DRAWN = (*SHAPES, "sprites")  # small, and nothing of them is a file of a video
DATASETS = (*SHAPES, *LAYOUTS)
# Options of each, unless named: the paper's stride; one loop at the size it is drawn at.
DEFAULTS = {"taichi": {"stride": 4}, "sprites": {"resolution": CELL, "num_frames": 8}}
CACHE, CACHE_LIMIT = "data/cache", 8 * 2**30  # bytes of frames, up to which a data set is decoded once and kept


# ------------------------------------------------------------------------------------------------------------ clips of videos


class Videos:
    """Clips of videos on a disk. In training a clip starts anywhere in its video, in testing in the middle; flip mirrors half
    of those for training. Both depend on i and nothing else.

    items are (path, label). kept is what cache.decode_once gives; without, a clip is decoded when it is asked for, from the
    first frame of its video on. A video that gives no clip is named once, `skipped` is {path: reason}, and the next one takes
    its place. UserError where none is left.
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
        """A hash of labels and frames, or of large data sets of names, sizes and times; the place of the data is free."""
        states = [f"{label} {zlib.crc32(self.frames[path]) if self.frames else stamp(path)}" for path, label in self.items]
        return hashlib.sha256("\n".join(states).encode()).hexdigest()

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
        """Clip number i, of this video: uint8 [T, H, W, 3]."""
        if path not in self.lengths:
            self.lengths[path] = video.count_frames(path)
        if (spare := self.lengths[path] - self.span) < 0:
            raise video.BadVideo(path, self.too_short(path))
        start = scramble(i) % (spare + 1) if self.train else spare // 2
        if self.frames is None:
            frames = video.read_frames(path, self.size, start, self.span)[:: self.stride]
        else:
            frames = np.asarray(self.frames[path][start : start + self.span : self.stride])
        return np.ascontiguousarray(frames[:, :, ::-1]) if self.flip and self.train and scramble(i) >> 63 else frames

    def skip(self, path, reason):
        if path not in self.skipped:
            self.skipped[path] = reason
            if len(self.skipped) <= 20:
                report(f"skipping {printable(path)}: {reason}")
            elif len(self.skipped) == 21:
                report("skipping more: `python data.py` names all")

    def too_short(self, path):
        return f"it has {self.lengths[path]} frames, and a clip takes {self.span} (--num-frames, --stride)"

    def nothing_left(self):
        path, reason = next(iter(self.skipped.items()))
        raise UserError(f"none of the {len(self.skipped)} videos can be used; {printable(path)}, for one: {reason}")


def scramble(i):
    """A number that follows from i and looks random (splitmix64); a generator would take longer than copying a clip should."""
    z = (i + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    z = (z ^ z >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return z ^ z >> 31


def report(line):
    """One line to the person at the keyboard, above the progress bar, from the first process."""
    if utils.rank() == 0:
        tqdm.write(line)


def open_dataset(config, role, classes=None):
    """The data set that settings name: dataset, data_dir, resolution, num_frames, stride, flip. role is "train" or "test".

    With classes, labels follow that list, and a class that is not in it is an error. All of a small data set is decoded at the
    first call (CACHE_LIMIT); clips of larger ones as training goes.
    """
    c = config
    if c.dataset in SHAPES:
        return Shapes(role, c.resolution, c.num_frames, period=SHAPES[c.dataset], stride=c.stride)
    if c.dataset == "sprites":
        if c.flip:
            raise UserError("sprites are not mirrored, left would be right: leave out --flip")
        return Sprites(find_root(c), role, c.resolution, c.num_frames, c.stride)
    root, items, names, notes = find_videos(c, role)
    for note in notes:
        report(f"left out: {note}")
    if len(names) == 1 and classes and len(classes) == 1:
        names, items = list(classes), [(path, classes[0]) for path, _ in items]  # a folder without classes, of another name
    if unknown := [name for name in names if name not in (classes or names)]:
        raise UserError(
            f"{printable(root)} has the class {unknown[0]!r}, which the checkpoint was not trained on: {list(classes)}"
        )
    number = {name: k for k, name in enumerate(classes or names)}
    items, paths = [(path, number[name]) for path, name in items], [path for path, _ in items]
    many = len(paths) > 50_000  # a system maps 65,530 files at most
    if getattr(c, "cache", "") == "off" or many or estimated_bytes(paths, c.resolution) > CACHE_LIMIT:
        return Videos(items, number, role, c)
    place = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:8]
    directory = (
        Path(getattr(c, "cache_dir", CACHE)) / f"{utils.file_name(root.resolve().name, 40)}-{role}-{c.resolution}-{place}"
    )
    return Videos(items, number, role, c, decode_once(directory, paths, c.resolution))


# ----------------------------------------------------------------------------------------------------------- batches


class Stream:
    """The order in which a training sees its clips: lists of indices into a data set, without end.

    Every clip comes once in a pass, each pass in a new order that follows from the seed alone. A global batch is the next
    batch_size places of that order. It is cut into parts, and of each part every process takes its rows, so that the same
    clips make the same step on any number of processes, and step 1000 can be found without having gone through 999.
    """

    def __init__(self, length, batch_size, seed=0, start=0, parts=1, rank=0, world=1):
        self.length, self.batch_size, self.seed, self.start = length, batch_size, seed, start
        self.parts, self.rank, self.world = parts, rank, world
        self.passes = {}

    def batch(self, step):
        """Indices of the global batch of a step; pass p of clip i is p * length + i."""
        indices = []
        for place in range(step * self.batch_size, (step + 1) * self.batch_size):
            number = place // self.length
            if number not in self.passes:
                generator = torch.Generator().manual_seed(self.seed + 1_000_003 * number)
                order = torch.randperm(self.length, generator=generator)
                self.passes = {k: v for k, v in self.passes.items() if k >= number - 1} | {number: order}
            indices.append(number * self.length + self.passes[number][place % self.length].item())
        return indices

    def __iter__(self):
        rows = self.batch_size // (self.parts * self.world)
        for step in itertools.count(self.start):
            batch = self.batch(step)
            for part in range(self.parts):
                first = (part * self.world + self.rank) * rows
                yield batch[first : first + rows]


def endless(dataset, stream, device=None):
    """Batches (uint8 frames [B, T, H, W, 3], labels [B]) of a data set in the order of a Stream, without end.

    All cores of this process work ahead. For a CUDA device the memory is pinned, so that `to(device, non_blocking=True)`
    returns at once; torch gives it out again when the copy is done.
    """
    workers, ahead, shape = (
        max(1, utils.cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))),
        collections.deque(),
        dataset[0][0].shape,
    )

    def fill(rows, indices):
        labels = []
        for row, i in zip(rows, indices):
            row[...], label = dataset[i]
            labels.append(label)
        return labels

    pool = ThreadPoolExecutor(workers)
    try:
        for indices in stream:
            batch = torch.empty(
                (len(indices), *shape), dtype=torch.uint8, pin_memory=device is not None and device.type == "cuda"
            )
            rows, share = batch.numpy(), -(-len(indices) // workers)
            places = range(0, len(indices), share)
            ahead.append((batch, [pool.submit(fill, rows[k : k + share], indices[k : k + share]) for k in places]))
            if len(ahead) > 2:
                batch, parts = ahead.popleft()
                yield batch, torch.tensor([label for part in parts for label in part.result()])
    finally:
        pool.shutdown(cancel_futures=True)


def spread(dataset, count):
    """Numbers of up to count clips, spread evenly over a data set: one of each video where there are so many."""
    count = min(count, len(dataset))
    return [k * len(dataset) // count for k in range(count)]


def clips(dataset, indices):
    """(clips [B, T, 3, H, W] in [-1, 1], labels [B]) of a data set."""
    items = [dataset[i] for i in indices]
    return torch.stack([video.to_clip(frames) for frames, _ in items]), torch.tensor([label for _, label in items])


def fixed_clips(dataset, count):
    """`clips` of up to count videos spread over a data set, the same at every call."""
    return clips(dataset, spread(dataset, count))


# ------------------------------------------------------------------------------------------------------------------- preview


@dataclass
class Config:
    dataset: str = option("data", "shapes", "built-in, any folder of videos, or as distributed", choices=DATASETS)
    data_dir: str = option("data", "", "where it is, if not in its usual place; classes of a folder are its sub-folders")
    resolution: int = option("data", 128, "height and width in pixels; shorter side scaled, centre cut out")
    num_frames: int = option("data", 16, "frames of a clip")
    stride: int = option("data", 1, "frames of the video per frame of the clip")
    flip: bool = option("data", False, "mirror half of the training clips, left to right")
    cache: str = option("data", "auto", "off: decode clips as they are needed, whatever the size", choices=["auto", "off"])
    cache_dir: str = option("data", CACHE, "where decoded frames are kept")
    preview: str = option("what", "", "PNG to write eight clips into")


def describe(dataset):
    """What a data set of videos holds, in lines: videos of each class, lengths, sizes as stored, what is skipped and why."""
    paths, infos = [path for path, _ in dataset.items], {}

    def look(path):
        try:
            infos[path] = video.probe(path)
        except video.BadVideo as error:
            dataset.skip(path, error.reason)

    with ThreadPoolExecutor(utils.cores()) as pool:
        list(utils.bar(pool.map(look, paths), "looking", len(paths), "video"))
    counts = collections.Counter(dataset.classes[label] for path, label in dataset.items if path in infos)
    yield f"{len(infos)} videos of {len(counts)} classes"
    yield from (f"    {name:32}{count:6}" for name, count in sorted(counts.items()))
    frames = sorted(dataset.lengths.get(path, info.frames) for path, info in infos.items())
    yield f"frames    {frames[0]} to {frames[-1]}, median {frames[len(frames) // 2]}"
    sizes = collections.Counter(f"{info.width} x {info.height}" for info in infos.values()).most_common(5)
    yield "sizes     " + ", ".join(f"{size} ({count})" for size, count in sizes)
    yield from (f"skipped   {printable(path)}: {reason}" for path, reason in sorted(dataset.skipped.items()))


def main():
    config = utils.parse_options(Config, __doc__, lambda args: DEFAULTS.get(args.dataset, {}))
    utils.check_positive(config, "resolution", "num_frames", "stride")
    if config.preview:
        utils.make_parent(config.preview)
    dataset = open_dataset(config, "train")
    print(f"{len(dataset)} clips or videos in {len(dataset.classes)} classes: {', '.join(dataset.classes)}")
    for line in describe(dataset) if config.dataset not in DRAWN else ():
        print(line)
    if config.preview:
        shown, labels = fixed_clips(dataset, 8)
        video.write_sheet(config.preview, shown, [dataset.classes[k] for k in labels])
        print(f"wrote {config.preview}")


if __name__ == "__main__":
    utils.run(main)
