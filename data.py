"""Data sets: those that are drawn, and the videos that people have on their disks. Clips go out in a fixed order, fast.

A data set gives `dataset[i]` -> (uint8 frames [T, H, W, 3], label), for any i >= 0; i, i + len, i + 2 len, … are other clips of
the same video. The networks take `video.to_clip` of that. The first thing to run on a new data set is

python data.py --dataset ucf --preview out.png      eight clips, counts of classes, lengths, sizes, and what is no good
python data.py --dataset ucf --prepare              decode all of it once, into a cache that training reads (common/cache.py)
"""

import collections
import csv
import hashlib
import itertools
import math
import os
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import progress, utils, video
from common.cache import FrameCache, prepare
from common.drawn import CELL, CLONE, Shapes, Sprites
from common.utils import UserError, option

SHAPES = ("shapes", "shapes-long")  # built in
DRAWN = (*SHAPES, "sprites")  # small, and nothing of them is a file of a video
DATASETS = (*DRAWN, "folder", "ucf", "kinetics", "taichi", "sky")
# Options of each, unless named: the paper's stride; one loop at the size it is drawn at.
DEFAULTS = {"taichi": {"stride": 4}, "sprites": {"resolution": CELL, "num_frames": 8}}
LONG_PERIOD = 64  # frames of a turn of shapes-long: four clips of 16
AUTO_CACHE = 8 * 2**30  # bytes of frames up to which a training prepares a cache without being asked


# --------------------------------------------------------------------------------------------- layouts, as they are distributed


def find_folder(root, role, split):
    """Any directory of videos (video.list_videos); classes are its sub-folders, or one class where there are none.

    Of a directory with train/ in it, or of one called train, the role "test" is the test/ or val/ beside, where there is one.
    """
    if (root / "train").is_dir():
        root = root / "train"
    if role == "test":
        root = part(root.parent, role) if root.name == "train" else nothing_held_out(root)
    paths, others = video.list_videos(root)
    items = [(path, parts[0] if len(parts := path.relative_to(root).parts) > 1 else "") for path in paths]
    notes = [f"{n} files {suffix or 'without a suffix'}" for suffix, n in sorted(others.items())]
    return root, items, sorted({name for _, name in items}), notes


def find_ucf(root, role, split):
    """UCF-101: Class/v_Class_g01_c01.avi. All 13,320 videos, as in the paper; split 1, 2 or 3 takes the official lists."""
    root = locate(root, "UCF-101", lambda p: next(p.glob("*/v_*_g*_c*.*"), None))
    everything = [(path, path.parent.name) for path in sorted(root.glob("*/v_*_g*_c*.*"))]
    classes = sorted({name for _, name in everything})
    if not split:
        if role == "test":
            nothing_held_out(root)
        return root, everything, classes, []
    name = f"{role}list{split:02d}.txt"
    folders = [p / q for p in (root, root.parent) for q in ("ucfTrainTestlist", "")]
    file = next((p / name for p in folders if (p / name).is_file()), None)
    if file is None:
        raise UserError(f"--split {split} takes {name} of UCF101TrainTestSplits-RecognitionTask.zip: unpack it beside {root}")
    listed = [line.split()[0] for line in file.read_text().splitlines() if line.strip()]
    items = [(root / name, name.split("/")[0]) for name in listed if (root / name).is_file()]
    return root, items, classes, missing(listed, items)


def find_kinetics(root, role, split):
    """Kinetics: train/ and val/, with files per class or flat, and a CSV for each (label, youtube_id, time_start, time_end).

    Files are ID_START_END.mp4 with six digits each, or ID.mp4; many are gone. Without a CSV, classes are the sub-folders. val/
    comes before test/, whose labels some releases keep back.
    """
    root = locate(root, "Kinetics", lambda p: any((p / name).is_dir() for name in ("train", "val", "validate")))
    folder = part(root, role, ("val", "validate", "validation", "test"))
    paths, _ = video.list_videos(folder)
    rows = kinetics_rows(root, folder.name)
    if not rows:
        items = [(path, path.relative_to(folder).parts[0]) for path in paths if path.parent != folder]
        if paths and not items:
            raise UserError(
                f"{folder} has no sub-folders, and no {folder.name}.csv with label and youtube_id names the classes"
            )
        return root, items, sorted({name for _, name in items}), []
    by_stem, items = {path.stem: path for path in paths}, []
    for row in rows:
        start, end = (int(float(row.get(k) or 0)) for k in ("time_start", "time_end"))
        path = by_stem.get(f"{row['youtube_id']}_{start:06d}_{end:06d}") or by_stem.get(row["youtube_id"])
        if path:
            items.append((path, row["label"]))
    return root, items, sorted({row["label"] for row in rows}), missing(rows, items)


def kinetics_rows(root, folder):
    """The labelled rows of the table of a folder of Kinetics: kinetics600_train.csv, validate.csv, …; [] where none is."""
    names = {folder} if folder in ("train", "test") else {"val", "validate", "validation"}
    for path in sorted(path for pattern in ("*.csv", "*.txt", "*/*.csv", "*/*.txt") for path in root.glob(pattern)):
        words = re.findall("[a-z]+", path.stem.lower())
        if names & set(words) and "holdout" not in words:
            with open(path, newline="", encoding="utf-8", errors="replace") as f:
                rows = [row for row in csv.DictReader(f) if row.get("label") and row.get("youtube_id")]
            if rows:
                return rows
    return []


def find_taichi(root, role, split):
    """TaiChi-HD: train/ and test/ with MP4s or folders of frames; one class. The paper takes every fourth frame."""
    root = locate(root, "TaiChi-HD", lambda p: (p / "train").is_dir())
    return root, [(path, "taichi") for path in video.list_videos(part(root, role))[0]], ["taichi"], []


def find_sky(root, role, split):
    """Sky Timelapse: sky_train/ and sky_test/ with folders of frames at any depth; one class."""
    root = locate(root, "Sky Timelapse", lambda p: (p / "sky_train").is_dir())
    return root, [(path, "sky") for path in video.list_videos(root / f"sky_{role}")[0]], ["sky"], []


TEST_NAMES = ("test", "val", "validate", "validation")
FIND = {"folder": find_folder, "ucf": find_ucf, "kinetics": find_kinetics, "taichi": find_taichi, "sky": find_sky}
DEFAULT_DIRS = {
    "sprites": "data/Sprites",
    "ucf": "data/UCF-101",
    "kinetics": "data/kinetics600",
    "taichi": "data/taichi",
    "sky": "data/sky_timelapse",
}
SOURCES = {
    "sprites": f"{CLONE} {DEFAULT_DIRS['sprites']}",
    "ucf": "https://www.crcv.ucf.edu/data/UCF101.php",
    "kinetics": "https://github.com/cvdfoundation/kinetics-dataset",
    "taichi": "https://github.com/AliaksandrSiarohin/video-preprocessing",
    "sky": "https://github.com/weixiong-ur/mdgan",
}


def locate(root, what, fits):
    """root itself, a directory in it, or the one it is in: the first that is laid out as the data set is."""
    for place in (root, *sorted(p for p in root.iterdir() if p.is_dir()), root.absolute().parent):
        if fits(place):
            return place
    raise UserError(f"{root} does not look like {what}: {LOOKS[what]}; name the right directory with --data-dir")


LOOKS = {
    "Sprites": f"it should hold body/0.png, hair/0.png and so on, as `{CLONE}` makes it",
    "UCF-101": "it should hold ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi and so on",
    "Kinetics": "it should hold train/ and val/, and a CSV for each that names the classes unless they are sub-folders",
    "TaiChi-HD": "it should hold train/ and test/ with MP4s or folders of frames",
    "Sky Timelapse": "it should hold sky_train/ and sky_test/",
}


def part(root, role, names=TEST_NAMES):
    """The directory of a role in root: train/, or the first of names that is there, or where none is train/ again."""
    if role == "train":
        return root / "train"
    return next((root / name for name in names if (root / name).is_dir()), None) or nothing_held_out(root / "train")


def nothing_held_out(root):
    """Say that the role "test" has no videos of its own, and give the directory back."""
    report(f"nothing is held out of {root}: its own videos stand in for what is called held out")
    return root


def missing(listed, items):
    return [f"{len(listed) - len(items)} of {len(listed)} videos in the list are not there"] if len(items) < len(listed) else []


def find_root(config):
    """The directory that --data-dir or the data set names. UserError, with where to get it, where it is not there."""
    name = config.dataset
    root = Path(config.data_dir or DEFAULT_DIRS.get(name, ""))
    if not config.data_dir and name == "folder":
        raise UserError("--dataset folder needs --data-dir PATH, a directory of videos with a sub-folder per class")
    if not root.is_dir():
        where = f": download it ({SOURCES[name]}), or name the place with --data-dir" if name in SOURCES else ""
        raise UserError(f"there is no directory {root}{where or ': name one that holds videos with --data-dir'}")
    return root


def open_sprites(config, role):
    """The Sprites in --data-dir, or in a directory in it or around it. UserError for options that have no meaning there."""
    if config.flip or config.crop_scale < 1:
        raise UserError("sprites are neither mirrored, left would be right, nor cropped: leave out --flip and --crop-scale")
    root = locate(find_root(config), "Sprites", lambda p: (p / "body").is_dir() and (p / "hair").is_dir())
    return Sprites(root, role, config.resolution, config.num_frames, config.stride)


def find_videos(config, role):
    """What --dataset, --data-dir and --split name: (root, [(path, class name)], class names, notes on what was left out)."""
    root = find_root(config)
    root, items, classes, notes = FIND[config.dataset](root, role, config.split)
    if not items:
        raise UserError(f"{root} holds no videos ({' '.join(video.VIDEO_SUFFIXES)}, frames): name another with --data-dir")
    return root, items, classes, notes


# ------------------------------------------------------------------------------------------------------------ clips of videos


class Videos:
    """Clips of videos on a disk: from a cache of decoded frames, or decoded when asked for, as many frames as it takes.

    items are (path, label). In training a clip starts anywhere in its video, in testing in the middle, and so does each clip
    depend on i and nothing else. flip mirrors half of the training clips. crop_scale < 1 cuts each of them out of its frames, a
    square whose side is that share of the frame's or more.

    A video that gives no clip is named once with its reason, and the next one takes its place; UserError where none is left.
    `skipped` lists them, {path: reason}.
    """

    def __init__(self, items, classes, role, config, root=None, cache=None):
        c = config
        self.classes, self.role, self.cache, self.decodes = tuple(classes), role, cache, cache is None
        self.resolution, self.num_frames, self.stride, self.fps = c.resolution, c.num_frames, c.stride, c.fps
        self.flip, self.size = c.flip and role == "train", decoded_size(c, role)
        self.span = (c.num_frames - 1) * c.stride + 1  # frames of the video from the first to the last of a clip
        self.items, self.bad, self.lock, self.skipped = list(items), {}, threading.Lock(), {}
        if cache:  # all that is wrong is known by now
            names = [os.path.relpath(path, root) for path, _ in self.items]
            for k, name in enumerate(names):
                if name in cache.skipped:
                    self.bad[k] = cache.skipped[name]
                elif len(cache.frames(name)) < self.span:
                    self.bad[k] = self.too_short(len(cache.frames(name)))
            for k, reason in list(self.bad.items())[:20]:
                report(f"skipping {video.printable(self.items[k][0])}: {reason}")
            if len(self.bad) > 20:
                report(f"skipping {len(self.bad) - 20} more, see {cache.directory / 'index.jsonl'}")
            if len(self.bad) == len(self.items):
                raise self.nothing_left()
            self.skipped = {self.name(k): reason for k, reason in self.bad.items()}
            good = [k for k in range(len(self.items)) if k not in self.bad]
            self.items, self.views, self.bad = (
                [self.items[k] for k in good],
                [np.asarray(cache.frames(names[k])) for k in good],
                {},
            )

    def __len__(self):
        return len(self.items)

    def name(self, i):
        return video.printable(self.items[i % len(self.items)][0])

    def __getitem__(self, i):
        for k in range(i % len(self), i % len(self) + len(self)):
            k %= len(self)
            if k not in self.bad:
                try:
                    return self.clip(k, i), self.items[k][1]
                except video.BadVideo as error:
                    with self.lock:
                        if k not in self.bad:
                            self.bad[k] = self.skipped[self.name(k)] = error.reason
                            report(f"skipping {error}")
        raise self.nothing_left()

    def clip(self, k, i):
        """Clip number i, of video k: uint8 [T, H, W, 3]."""
        length = len(self.views[k]) if self.cache else self.length(k)
        if length < self.span:
            raise video.BadVideo(self.items[k][0], self.too_short(length))
        start = scramble(i) % (length - self.span + 1) if self.role == "train" else (length - self.span) // 2
        if self.cache:
            frames = self.views[k][start : start + self.span : self.stride]
        else:
            frames = self.decode(k, start)
        return self.vary(frames, random.Random(i)) if self.flip or self.size > self.resolution else frames

    def length(self, k):
        return frames_at(video.probe(self.items[k][0]), self.fps)

    def decode(self, k, start):
        path = self.items[k][0]
        frames = video.read_clip(path, self.size, start, self.span, self.fps)
        if len(frames) < self.span:
            raise video.BadVideo(path, self.too_short(len(frames)))
        return frames[:: self.stride]

    def vary(self, frames, rng):
        """A random square of the frames [T, H, W, 3], the same in all of them, at the training size; mirrored or not."""
        side = rng.randint(self.resolution, self.size)
        x, y = (rng.randint(0, self.size - side) for _ in range(2))
        frames = frames[:, y : y + side, x : x + side]
        if side > self.resolution:
            size = (self.resolution, self.resolution)
            frames = video.to_frames(F.interpolate(video.to_clip(frames), size, mode="bilinear", antialias=True))
        return np.ascontiguousarray(frames[:, :, ::-1]) if self.flip and rng.random() < 0.5 else frames

    def too_short(self, length):
        return f"it has {length} frames, and a clip takes {self.span} (--num-frames, --chunks, --stride)"

    def nothing_left(self):
        path, reason = next((self.items[k][0], reason) for k, reason in self.bad.items())
        return UserError(f"none of the {len(self.items)} videos can be used; {video.printable(path)}, for one: {reason}")


def frames_at(info, fps):
    """Frames of a video at the rate it is read at, by its header, a video.Info; fps 0 is its own."""
    return round(info.frames * fps / info.fps) if fps and info.fps else info.frames


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


def decoded_size(config, role):
    """Height and width of the frames that clips are cut from: larger where random squares are, so that none is enlarged."""
    return round(config.resolution / config.crop_scale) if role == "train" else config.resolution


def cache_directory(config, root, size):
    """Where the frames of all videos under root are kept, at this size and rate: a name that says it, and a hash."""
    root = Path(root).resolve()
    rate = f"-{config.fps:g}fps" if config.fps else ""
    digest = hashlib.sha256(os.fsencode(root)).hexdigest()[:8]
    return Path(config.cache_dir) / f"{root.parent.name}-{root.name}-{size}{rate}-{digest}"


def estimated_bytes(paths, size, fps):
    """What the frames of these videos will take, from the headers of a few of them."""
    frames = []
    for path in paths[:: len(paths) // 16 + 1]:
        try:
            frames.append(frames_at(video.probe(path), fps))
        except video.BadVideo:
            frames.append(0)
    return sum(frames) / len(frames) * len(paths) * size**2 * 3


def open_dataset(config, role, classes=None):
    """The data set of any settings with the options of Config below; role "train" or "test".

    Where there is no other data for it, "test" is the middle of the training videos. With classes, labels follow that list,
    and a class that is not in it is an error. Small data sets are prepared at once (AUTO_CACHE); larger ones are read from
    their cache where there is one, and decoded as training goes where there is none.
    """
    if config.dataset in SHAPES:
        period = LONG_PERIOD if config.dataset == "shapes-long" else 0
        return Shapes(role, config.resolution, config.num_frames, period=period)
    if config.dataset == "sprites":
        return open_sprites(config, role)
    root, items, names, _ = find_videos(config, role)
    if names == [""]:  # no sub-folders
        names = [classes[0] if classes and len(classes) == 1 else root.resolve().name]
        items = [(path, names[0]) for path, _ in items]
    if unknown := [name for name in names if name not in (classes or names)]:
        raise UserError(f"{root} has the class {unknown[0]!r}, which the checkpoint was not trained on: {list(classes)}")
    number = {name: k for k, name in enumerate(classes or names)}
    items = [(path, number[name]) for path, name in items]
    cache, paths, size = None, [path for path, _ in items], decoded_size(config, role)
    if config.cache != "off":
        directory = cache_directory(config, root, size)
        there = (directory / "index.jsonl").is_file()
        if there or config.cache == "on" or estimated_bytes(paths, size, config.fps) <= AUTO_CACHE:
            if utils.rank() == 0:
                prepare(directory, root, paths, size, config.fps)
            utils.wait_for_all()
            cache = FrameCache(directory)
    return Videos(items, classes or names, role, config, root, cache)


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


def endless(dataset, stream, workers=-1, device=None):
    """Batches (uint8 frames [B, T, H, W, 3], labels [B]) of a data set in the order of a Stream, without end.

    workers: threads that work ahead, each with a decoder process where there is something to decode; -1 is all cores of this
    process. A batch lasts until the next one is asked for; its memory is used again, which is faster than new. For a CUDA
    device it is pinned, and a copy to the GPU that was begun by then (`to(device, non_blocking=True)`) is waited for.
    """
    pin = device is not None and device.type == "cuda"
    workers = workers if workers > 0 else max(1, utils.cores() // utils.local_processes())
    shape, free, ahead = dataset[0][0].shape, [], collections.deque()
    copying = collections.deque()  # pinned batches, each with an event after the copy to the GPU

    def fill(rows, indices):
        labels = []
        for row, i in zip(rows, indices):
            row[...], label = dataset[i]
            labels.append(label)
        return labels

    pool = ThreadPoolExecutor(workers)
    try:
        for indices in stream:
            while copying and copying[0][1].query():
                free.append(copying.popleft()[0])
            batch = free.pop() if free else torch.empty((len(indices), *shape), dtype=torch.uint8, pin_memory=pin)
            share = 1 if dataset.decodes else math.ceil(len(indices) / workers)
            parts = [(batch.numpy()[k : k + share], indices[k : k + share]) for k in range(0, len(indices), share)]
            ahead.append((batch, [pool.submit(fill, *part) for part in parts]))
            if len(ahead) > 1 and (not dataset.decodes or sum(len(b) for b, _ in ahead) > 2 * workers):
                batch, parts = ahead.popleft()
                yield batch, torch.tensor([label for part in parts for label in part.result()])
                if pin:
                    copying.append((batch, torch.cuda.current_stream(device).record_event()))
                else:
                    free.append(batch)
    finally:
        pool.shutdown(cancel_futures=True)


def spread_over(dataset, count):
    """Numbers of up to count clips, spread evenly over a data set: one of each video where there are so many."""
    count = min(count, len(dataset))
    return [i * len(dataset) // count for i in range(count)]


def fixed_clips(dataset, count):
    """The first clips of a data set spread over its length, the same at every call: (clips [count, …], labels [count])."""
    step = max(1, len(dataset) // count)
    items = [dataset[i] for i in range(0, len(dataset), step)][:count]
    return torch.stack([video.to_clip(frames) for frames, _ in items]), torch.tensor([label for _, label in items])


# ------------------------------------------------------------------------------------------------------------------- preview


@dataclass
class Config:
    dataset: str = option(
        "data", "shapes", "built-in shapes, any folder of videos, or one as it is distributed", choices=DATASETS
    )
    data_dir: str = option("data", "", "where it is; classes of a folder are its sub-folders")
    split: int = option("data", 0, "official split of UCF-101; 0 is all videos", choices=[0, 1, 2, 3])
    resolution: int = option("data", 128, "height and width in pixels; shorter side scaled, centre cut out")
    num_frames: int = option("data", 16, "frames of a clip")
    stride: int = option("data", 1, "frames of the video per frame of the clip")
    fps: float = option("data", 0.0, "frames per second that videos are read at; 0 is their own")
    flip: bool = option("data", False, "mirror half of the training clips, left to right")
    crop_scale: float = option("data", 1.0, "train on random squares of the frames, their side this share of it or more")
    cache: str = option("data", "auto", "frames on disk: auto for small data sets", choices=["auto", "on", "off"])
    cache_dir: str = option("data", "data/cache", "directory of the caches")
    prepare: bool = option("what", False, "decode everything once, into a cache; goes on where it was stopped")
    verify: bool = option("what", False, "check every frame of the cache against its checksum")
    preview: str = option("what", "", "PNG to write eight clips into")


def describe(root, items, notes, span, skipped, fps=0.0):
    """What a data set holds, in lines: videos of each class, lengths at fps, sizes, and what is left out and why."""
    skipped, infos = dict(skipped), {}

    def look(item):
        try:
            infos[item[0]] = video.probe(item[0])
        except video.BadVideo as error:
            skipped.setdefault(os.path.relpath(item[0], root), error.reason)

    with ThreadPoolExecutor(utils.cores()) as pool:
        collections.deque(progress.bar(pool.map(look, items), "looking", len(items), "video"), maxlen=0)
    counts = collections.Counter(name for path, name in items if path in infos)
    yield f"{len(infos)} videos of {len(counts)} classes in {root}"
    for name, count in sorted(counts.items()):
        yield f"    {name or root.name:32}{count:6}"
    if infos:
        frames = np.array([frames_at(info, fps) for info in infos.values()])
        seconds = np.array([info.frames / info.fps for info in infos.values() if info.fps])
        yield f"frames    {frames.min()} to {frames.max()}, median {np.median(frames):.0f}"
        if len(seconds):
            yield f"seconds   {seconds.min():.1f} to {seconds.max():.1f}, {seconds.sum() / 3600:.2f} hours in all"
        sizes = collections.Counter(f"{info.width} x {info.height}" for info in infos.values()).most_common()
        more = f", {len(sizes) - 5} other sizes" if len(sizes) > 5 else ""
        yield "sizes     " + ", ".join(f"{size} ({count})" for size, count in sizes[:5]) + more
        if short := int((frames < span).sum()):
            yield f"too short {short}, of which a clip of {span} frames cannot be cut"
    for note in notes:
        yield f"left out  {note}"
    for name, reason in sorted(skipped.items()):
        yield f"skipped   {video.printable(name)}: {reason}"


def main():
    config = utils.parse_options(Config, __doc__, lambda args: DEFAULTS.get(args.dataset, {}))
    utils.check_positive(config, "resolution", "num_frames", "stride")
    skipped = {}
    if config.dataset == "sprites":
        train, test = (open_dataset(config, role) for role in ("train", "test"))
        print(f"{len(train.characters)} characters to train on and {len(test.characters)} held out, in {train.root}")
        print(f"each in {len(train.classes)} classes: {', '.join(train.classes)}")
    elif config.dataset not in SHAPES:
        cached, directories = config.prepare or config.verify, {}  # test and train may share one
        for role in ("test", "train") if cached else ("train",):
            root, items, _, notes = find_videos(config, role)
            if cached:
                size = decoded_size(config, role)
                directory = cache_directory(config, root, size)
                directories[directory] = None
            if config.prepare:
                prepare(directory, root, [path for path, _ in items], size, config.fps, retry=True)
        for directory in directories:
            cache = FrameCache(directory, config.verify)
            skipped, size = cache.skipped, sum(view.nbytes for view in cache.files.values()) / 2**30
            said = ", all as written" if config.verify else ""
            print(f"{directory} holds {len(cache.entries)} videos, {size:.2f} GiB{said}")
        for line in describe(root, items, notes, (config.num_frames - 1) * config.stride + 1, skipped, config.fps):
            print(line)
    if config.preview:
        dataset = open_dataset(config, "train")
        clips, labels = fixed_clips(dataset, 8)
        utils.make_parent(config.preview)
        video.write_sheet(config.preview, clips, [dataset.classes[k] for k in labels])
        print(f"wrote {config.preview}")


if __name__ == "__main__":
    utils.run(main)
