"""Videos in, videos out: the built-in shapes, folders of real videos, and files that people can watch.

A clip is float32 [T, 3, H, W] in [-1, 1] with an integer label; frames in files and caches are uint8 [T, H, W, 3].
"""

import itertools
import logging
import math
import random
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Dataset, Sampler

from utils import UserError

# It warns, for every file, that the frames come out at another size than they are stored at: that is the point of scaling.
logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)

DATASETS = ("shapes", "folder", "ucf")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")


SHAPES = ("square", "triangle", "ring")
MOTIONS = ("sideways", "updown", "circle")


class Shapes(Dataset):
    """One bright shape moves over a background of two muted colours; class = shape × motion, drawn when asked for.

    Clip i of a split is the same at every call and on every machine: its random numbers are seeded by (seed, split, i).
    Classes take turns, so that any run of len(classes) neighbours holds one clip of each.
    """

    classes = tuple(f"{shape}_{motion}" for shape in SHAPES for motion in MOTIONS)

    def __init__(self, split="train", resolution=32, num_frames=16, length=None, seed=0):
        self.split, self.resolution, self.num_frames, self.seed = split, resolution, num_frames, seed
        self.length = length or {"train": 8192, "test": 512}[split]
        self.cache = {}  # drawn once: frames by index

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        i %= self.length
        if i not in self.cache:
            self.cache[i] = self.draw(i)
        return to_clip(self.cache[i]), i % len(self.classes)

    def name(self, i):
        return f"clip {i % self.length}"

    def draw(self, i, t=None):
        """Clip i as uint8 frames [T, H, W, 3], at the frame positions t [T], real-valued (default: all of the clip)."""
        t = np.arange(self.num_frames) if t is None else np.asarray(t)
        label = i % len(self.classes)
        shape, motion = SHAPES[label // len(MOTIONS)], MOTIONS[label % len(MOTIONS)]
        rng = np.random.default_rng([self.seed, self.split == "test", i])
        # Paths are sines and circles around a centre, one turn in a clip; lengths are in half frame widths.
        phase, radius, reach = rng.uniform(-math.pi / 4, math.pi / 4), rng.uniform(0.42, 0.52), rng.uniform(0.25, 0.4)
        centre = rng.uniform(-0.08, 0.08, 2)
        angle = 2 * math.pi * t / self.num_frames + phase
        path_x = centre[0] + reach * np.cos(angle) * (motion != "updown")
        path_y = centre[1] + reach * np.sin(angle) * (motion != "sideways")

        pixel = 2 / self.resolution
        grid = (np.arange(self.resolution) + 0.5) * pixel - 1
        x = np.float32(grid - path_x[:, None])[:, None, :]  # [T, 1, W], relative to the shape's centre
        y = np.float32(grid - path_y[:, None])[:, :, None]  # [T, H, 1]
        if shape == "square":
            distance = np.maximum(abs(x), abs(y)) - 0.85 * radius
        elif shape == "triangle":
            distance = np.maximum(abs(x) * 0.866 - y * 0.5, y) - 0.6 * radius
        else:
            distance = abs(np.hypot(x, y) - 0.75 * radius) - 0.25 * radius
        cover = np.clip(0.5 - distance / pixel, 0, 1)[..., None]  # [T, H, W, 1], antialiased

        colour = rng.permutation([rng.uniform(0.9, 1), rng.uniform(0.6, 1), rng.uniform(0.5, 0.7)])
        ends = rng.uniform(0, 0.4, (2, 3))
        tilt = rng.uniform(0, 2 * math.pi)
        ramp = 0.5 + 0.35 * (math.cos(tilt) * grid[None, :] + math.sin(tilt) * grid[:, None])  # [H, W]
        background = np.float32(ends[0] + (ends[1] - ends[0]) * ramp[..., None])
        video = background + cover * (np.float32(colour) - background)
        return (video * 255).round().astype(np.uint8)


class VideoFolder(Dataset):
    """Clips from a directory of videos; the classes are its sub-folders, in alphabetical order.

    A directory that holds videos and no sub-folders of videos is one class, named after it. In training the clip starts
    anywhere in its video, in testing in the middle. Index i is video i % len: i, i + len, i + 2 len, … are other clips of
    it, drawn from i and nothing else, so that a training that knows its step knows its data. Decoded videos are kept in
    memory, at the training size, until they fill cache_gb; the rest are decoded anew each time.

    flip mirrors half of the training clips. crop_scale < 1 cuts each of them out of its frames, a square whose side is that
    share of the frame's or more: decoded larger, so that the smallest one still has the training size.
    """

    def __init__(
        self,
        root,
        split="train",
        resolution=64,
        num_frames=16,
        stride=1,
        classes=None,
        flip=False,
        crop_scale=1.0,
        cache_gb=2.0,
    ):
        self.root, self.split, self.resolution = Path(root), split, resolution
        self.num_frames, self.stride, self.cache_left = num_frames, stride, cache_gb * 2**30
        self.augment = split == "train" and (flip or crop_scale < 1)
        self.flip, self.decoded_size = flip, round(resolution / crop_scale) if split == "train" else resolution
        self.cache = {}
        if not self.root.is_dir():
            raise UserError(f"there is no directory {root}: name one that holds videos with --data-dir")
        files = sorted(p for p in self.root.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file())
        if not files:
            raise UserError(f"{root} holds no videos ({' '.join(VIDEO_SUFFIXES)}): name a directory that does with --data-dir")
        only = (
            classes[0] if classes and len(classes) == 1 else self.root.resolve().name
        )  # the class of files with no sub-folder
        names = [p.relative_to(self.root).parts[0] if p.parent != self.root else only for p in files]
        self.classes = tuple(classes or sorted(set(names)))
        unknown = sorted(set(names) - set(self.classes))
        if unknown:
            raise UserError(
                f"{root} has the class {unknown[0]!r}, which the checkpoint was not trained on: {list(self.classes)}"
            )
        self.items = [(path, self.classes.index(name)) for path, name in zip(files, names)]

    def __len__(self):
        return len(self.items)

    def name(self, i):
        return str(self.items[i % len(self.items)][0])

    def video(self, path):
        if path not in self.cache:
            frames = read_video(path, self.decoded_size)
            if frames.nbytes > self.cache_left:
                return frames
            self.cache_left -= frames.nbytes
            self.cache[path] = frames
        return self.cache[path]

    def __getitem__(self, i):
        path, label = self.items[i % len(self.items)]
        frames, span = self.video(path), (self.num_frames - 1) * self.stride + 1
        if len(frames) < span:
            raise UserError(
                f"{path} has {len(frames)} frames, and a clip takes {span}: use fewer --num-frames or a smaller --stride"
            )
        last = len(frames) - span
        rng = random.Random(i)
        start = rng.randint(0, last) if self.split == "train" else last // 2
        clip = to_clip(frames[start : start + span : self.stride])
        return (self.vary(clip, rng) if self.augment else clip), label

    def vary(self, clip, rng):
        """One random square of the clip [T, 3, H, W], the same in all frames, at the training size; mirrored or not."""
        side = rng.randint(self.resolution, self.decoded_size)
        x, y = (rng.randint(0, self.decoded_size - side) for _ in range(2))
        clip = clip[..., y : y + side, x : x + side]
        if side > self.resolution:
            clip = F.interpolate(clip, (self.resolution, self.resolution), mode="bilinear", antialias=True)
        return clip.flip(-1) if self.flip and rng.random() < 0.5 else clip


UCF_HELP = (
    "UCF-101 is not at {root}: download UCF101.rar from https://www.crcv.ucf.edu/data/UCF101.php, unpack it there so that "
    "{root} holds ApplyEyeMakeup, ApplyLipstick, …, or name the place with --data-dir"
)


def open_dataset(name, data_dir, split, resolution, num_frames, stride=1, classes=None, flip=False, crop_scale=1.0):
    """The data set that --dataset and --data-dir name; the built-in shapes are neither mirrored nor cropped.

    split "test" of a folder is its sibling test/ where data_dir is called train, else the same videos cut at their middle.
    """
    if name == "shapes":
        return Shapes(split, resolution, num_frames)
    if name == "ucf" and not data_dir:
        data_dir = "data/UCF-101"
    if name == "ucf" and not Path(data_dir).is_dir():
        raise UserError(UCF_HELP.format(root=data_dir))
    if not data_dir:
        raise UserError("--dataset folder needs --data-dir PATH, a directory of videos with a sub-folder per class")
    root = Path(data_dir)
    if split == "test" and root.name == "train" and (root.parent / "test").is_dir():
        root = root.parent / "test"
    return VideoFolder(root, split, resolution, num_frames, stride, classes, flip, crop_scale)


class Stream(Sampler):
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


def endless(dataset, stream, workers=0, device=None):
    """Batches (clips [B, T, 3, H, W], labels [B]) of a data set in the order of a Stream, without end."""
    pin = device is not None and device.type == "cuda"
    return iter(DataLoader(dataset, batch_sampler=stream, num_workers=workers, pin_memory=pin))


def fixed_clips(dataset, count):
    """The first clips of a data set spread over its length, the same at every call: (clips [count, …], labels [count])."""
    step = max(1, len(dataset) // count)
    items = [dataset[i] for i in range(0, len(dataset), step)][:count]
    return torch.stack([clip for clip, _ in items]), torch.tensor([label for _, label in items])


# ------------------------------------------------------------------------------------------------------- files to look at


def to_clip(frames):
    """uint8 frames [T, H, W, 3] -> float32 clip [T, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_frames(clip):
    """Clip [..., T, 3, H, W] in [-1, 1] -> numpy uint8 frames [..., T, H, W, 3]."""
    return ((clip.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).byte().movedim(-3, -1).contiguous().numpy()


def read_video(path, resolution):
    """All frames of a video file, shorter side scaled to the resolution, centre crop: uint8 [T, resolution, resolution, 3].

    Raises UserError, with the file's name, where nothing can be decoded.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}")
    side = f"{resolution}:{resolution}"
    filters = f"scale={side}:force_original_aspect_ratio=increase:flags=area,crop={side}"
    reader = imageio_ffmpeg.read_frames(str(path), output_params=["-vf", filters])
    try:
        next(reader)  # a description of the file comes first
        frames = [np.frombuffer(frame, np.uint8) for frame in reader]
    except (OSError, RuntimeError, StopIteration, IndexError, KeyError, AssertionError):
        frames = []
    if not frames or frames[0].size != resolution * resolution * 3:
        raise UserError(f"{path} cannot be decoded as a video: it is damaged, or not a video")
    return np.stack(frames).reshape(-1, resolution, resolution, 3)


def tile(clips):
    """Clips [B, T, 3, H, W] side by side, as many rows as columns or one fewer: one clip [T, 3, rows * H, columns * W]."""
    clips = torch.stack(list(clips))
    columns = math.ceil(math.sqrt(len(clips)))
    rows = math.ceil(len(clips) / columns)
    blank = clips.new_ones(rows * columns - len(clips), *clips.shape[1:])
    grid = torch.cat([clips, blank]).unflatten(0, (rows, columns))  # [rows, columns, T, 3, H, W]
    return grid.permute(2, 3, 0, 4, 1, 5).flatten(4).flatten(2, 3)


def enlarge(frames, smallest=128):
    """Repeat pixels of small frames [T, H, W, 3] a whole number of times, so that a person can see them."""
    factor = max(1, smallest // frames.shape[1])
    return frames.repeat(factor, 1).repeat(factor, 2)


def mark(clip):
    """The clip [T, 3, H, W] with an orange edge: frames that were given, not made."""
    clip, edge = clip.clone(), max(1, clip.shape[-1] // 32)
    inside = F.pad(torch.ones(clip.shape[-2] - 2 * edge, clip.shape[-1] - 2 * edge, dtype=torch.bool), (edge,) * 4)
    return torch.where(inside, clip, torch.tensor([1.0, 0.2, -1.0])[:, None, None])


def write_video(path, clip, fps=12):
    """A clip [T, 3, H, W], H and W even, as path.mp4 (H.264) and path.gif, small ones enlarged."""
    path, frames = Path(path), enlarge(to_frames(clip))
    path.parent.mkdir(parents=True, exist_ok=True)
    size = frames.shape[2], frames.shape[1]
    writer = imageio_ffmpeg.write_frames(f"{path}.mp4", size, fps=fps, quality=8, macro_block_size=2, ffmpeg_log_level="error")
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(f"{path}.gif", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)


def write_sheet(path, rows, titles=None, columns=8):
    """A contact sheet as PNG: rows are videos [T, 3, H, W], columns are frames spread over each; titles stand to the left."""
    strips = []
    for clip in rows:
        picks = np.linspace(0, len(clip) - 1, min(columns, len(clip))).round().astype(int)
        strips.append(np.concatenate(list(enlarge(to_frames(clip[picks]), 64)), 1))  # [H, columns * W, 3]
    margin = max([7 * len(t) for t in titles]) + 8 if titles else 0
    height = strips[0].shape[0]
    image = Image.new("RGB", (margin + max(s.shape[1] for s in strips), len(strips) * (height + 2)), "white")
    draw = ImageDraw.Draw(image)
    for i, strip in enumerate(strips):
        image.paste(Image.fromarray(strip), (margin, i * (height + 2)))
        if titles:
            draw.text((4, i * (height + 2) + height // 2 - 6), titles[i], fill="black")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
