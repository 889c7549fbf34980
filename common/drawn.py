"""Data sets that are drawn, not decoded: moving shapes, and the characters of Sprites.

`dataset[i]` -> (uint8 frames [T, H, W, 3], label), the same at every call and on every machine. What was drawn first is kept.
"""

import itertools
import math
from pathlib import Path

import numpy as np
import torch.nn.functional as F

from common import video
from common.utils import UserError

LIMIT = 2**30  # bytes of drawn frames that a data set keeps: all of Shapes at nano's size, all of Sprites at its own


class ClipCache(dict):
    """Frames of clips by index, those drawn first, as many of up to `count` as `limit` bytes hold, in one block."""

    def __init__(self, count, limit):
        self.count, self.limit, self.block, self.rows = count, limit, None, itertools.count()

    def frames(self, i, draw):
        """draw(i), or what it gave before."""
        if i in self:
            return self[i]
        frames = draw(i)
        if self.block is None:
            self.block = np.empty((min(self.count, self.limit // frames.nbytes), *frames.shape), np.uint8)
        # Clips come back in a new order, so that those drawn first are as good as any; the latest ones would all be gone.
        if (row := next(self.rows)) < len(self.block):
            self.block[row] = frames
            self[i] = self.block[row]
        return frames


# -------------------------------------------------------------------------------------------------------------------- shapes


SHAPES = ("square", "triangle", "ring")
MOTIONS = ("sideways", "updown", "circle")


class Shapes:
    """One bright shape moves over a background of two muted colours; class = shape × motion, drawn when asked for.

    Clip i of a role, train or test, is the same at every call and on every machine: its random numbers are seeded by
    (seed, role, i). Classes take turns, so that any run of len(classes) neighbours holds one clip of each.

    A clip is one turn of the path. With a period, in frames, a turn takes that long whatever the length of the clip, and begins
    anywhere on the path; clip i is then the beginning of any longer clip i.
    """

    classes = tuple(f"{shape}_{motion}" for shape in SHAPES for motion in MOTIONS)

    def __init__(self, role="train", resolution=32, num_frames=16, length=None, seed=0, period=0):
        self.role, self.resolution, self.num_frames, self.seed, self.period = role, resolution, num_frames, seed, period
        self.length = length or {"train": 8192, "test": 512}[role]
        self.cache = ClipCache(self.length, LIMIT)

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        i %= self.length
        return self.cache.frames(i, self.draw), i % len(self.classes)

    def name(self, i):
        return f"clip {i % self.length}"

    def identity(self):
        return f"shapes {self.resolution} {self.num_frames} {self.length} {self.seed} {self.period}"

    def draw(self, i, t=None):
        """Clip i as uint8 frames [T, H, W, 3], at the frame positions t [T], real-valued (default: all of the clip)."""
        t = np.arange(self.num_frames) if t is None else np.asarray(t)
        label = i % len(self.classes)
        shape, motion = SHAPES[label // len(MOTIONS)], MOTIONS[label % len(MOTIONS)]
        rng = np.random.default_rng([self.seed, self.role == "test", i])
        # Paths are sines and circles around a centre; lengths are in half frame widths.
        phase, radius, reach = rng.uniform(-math.pi / 4, math.pi / 4), rng.uniform(0.42, 0.52), rng.uniform(0.25, 0.4)
        centre = rng.uniform(-0.08, 0.08, 2)
        angle = 2 * math.pi * t / (self.period or self.num_frames) + phase * (4 if self.period else 1)
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
        cover = np.clip(0.5 - distance / pixel, 0, 1)  # [T, H, W], antialiased

        colour = rng.permutation([rng.uniform(0.9, 1), rng.uniform(0.6, 1), rng.uniform(0.5, 0.7)])
        ends = rng.uniform(0, 0.4, (2, 3))
        tilt = rng.uniform(0, 2 * math.pi)
        ramp = 0.5 + 0.35 * (math.cos(tilt) * grid[None, :] + math.sin(tilt) * grid[:, None])  # [H, W]
        video = np.empty((*cover.shape, 3), np.uint8)
        for c in range(3):  # one channel at a time: broadcasting along three is slow
            background = np.float32(ends[0, c] + (ends[1, c] - ends[0, c]) * ramp)
            video[..., c] = ((background + cover * (np.float32(colour[c]) - background)) * 255).round()
        return video


# ------------------------------------------------------------------------------------------------------------------- sprites


CLONE = "git clone https://github.com/YingzhenLi/Sprites"
LAYERS = ("body", "shoes", "bottomwear", "topwear", "hair")  # from below to above
ATTRIBUTES = ("body", "bottomwear", "topwear", "hair")  # that characters differ in, by 0.png to 5.png; all wear shoes/1.png
CHOICES, TRAIN_CHARACTERS = 6, 1000
CELL, ROWS, COLUMNS = 64, 21, 13  # of a sheet
LOOPS = {  # cells along the rows, of the action to the left; the front is one row further down, the right two
    "spellcard": (13, 14, 15, 16, 17, 18, 17, 13),
    "walk": (118, 119, 120, 121, 122, 123, 124, 125),
    "slash": (169, 170, 171, 172, 173, 174, 173, 169),
}
DIRECTIONS = ("left", "front", "right")


class Sprites:
    """A character of the Liberated Pixel Cup walks, slashes or casts a spell, on black (Li & Mandt 2018, arXiv:1803.02991).

    root holds the layers as CLONE makes them. A character is one of 6 bodies, bottoms, tops and hairs each; class = action x
    direction. 1000 of the 1296 characters are for training, and the others for testing. Clips 9k to 9k + 8 are the classes of
    one character. A clip is the loop of 8 frames, repeated or cut off: its frame t is the loop's stride * t mod 8. Multiples
    of 64 repeat pixels, so that edges stay as sharp as they are drawn; other sizes are antialiased.

    UserError where a layer is missing or no sheet of 21 x 13 cells.
    """

    classes = tuple(f"{action}_{direction}" for action in LOOPS for direction in DIRECTIONS)

    def __init__(self, root, role="train", resolution=CELL, num_frames=8, stride=1):
        self.root, self.resolution = Path(root), resolution
        # The permutation of the authors' frame_to_npy.py: the same characters are held out. Its generator is frozen (NEP 19).
        order = np.random.RandomState(423).permutation(CHOICES ** len(ATTRIBUTES))
        self.characters = order[:TRAIN_CHARACTERS] if role == "train" else order[TRAIN_CHARACTERS:]
        cells = [
            [loop[t * stride % len(loop)] + COLUMNS * row for t in range(num_frames)]
            for loop in LOOPS.values()
            for row in range(len(DIRECTIONS))
        ]
        used = sorted({cell for loop in cells for cell in loop})
        self.places = [[used.index(cell) for cell in loop] for loop in cells]  # of the cells of each class among those kept
        self.sheets = {
            (layer, k): read_cells(self.root / layer / f"{k}.png", used)
            for layer in LAYERS
            for k in (range(CHOICES) if layer in ATTRIBUTES else [1])
        }
        self.cache = ClipCache(len(self), LIMIT)

    def __len__(self):
        return len(self.characters) * len(self.classes)

    def __getitem__(self, i):
        i %= len(self)
        return self.cache.frames(i, self.draw), self.label(i)

    def name(self, i):
        numbers = " ".join(f"{layer} {k}" for layer, k in self.character(i % len(self)).items() if layer in ATTRIBUTES)
        return f"{self.classes[self.label(i % len(self))]} of {numbers}"

    def identity(self):
        return f"sprites {self.resolution} {self.places}"

    def label(self, i):
        """The class of clip i. Were it i mod 9, every ninth or 90th clip, as a few are taken of all, would be of one class."""
        return (i + i // 9 + i // 81 + i // 729) % 9

    def character(self, i):
        """The number of the sheet of each layer in clip i."""
        number = int(self.characters[i // len(self.classes)])
        chosen = {layer: number // CHOICES**k % CHOICES for k, layer in enumerate(reversed(ATTRIBUTES))}
        return {layer: chosen.get(layer, 1) for layer in LAYERS}

    def draw(self, i):
        """Clip i as uint8 frames [T, H, W, 3]."""
        places, frames = self.places[self.label(i)], np.uint16(0)
        for layer in self.character(i).items():
            colour, through = (cells[places] for cells in self.sheets[layer])
            frames = frames * through + colour
            frames += frames >> 8  # a division by 255 that rounds, and so the very bytes of PIL's alpha_composite
            frames >>= 8
        frames = np.ascontiguousarray(frames.astype(np.uint8).transpose(0, 2, 3, 1))  # [T, 64, 64, 3]
        if self.resolution == CELL:
            return frames
        if self.resolution % CELL == 0:
            return frames.repeat(self.resolution // CELL, 1).repeat(self.resolution // CELL, 2)
        size = (self.resolution, self.resolution)
        return video.to_frames(F.interpolate(video.to_clip(frames), size, mode="bilinear", antialias=True))


def read_cells(path, numbers):
    """Cells of a sheet as Sprites.draw lays them over others, uint16: colour * alpha + 128, to round, [n, 3, 64, 64], and
    255 - alpha [n, 1, 64, 64]. UserError for any file but a sheet."""
    try:
        with video.image_of(path) as image:
            if image.size != (COLUMNS * CELL, ROWS * CELL):
                size = f"{image.width} x {image.height} pixels, and a sheet {COLUMNS * CELL} x {ROWS * CELL}"
                raise video.BadVideo(path, f"it has {size}")
            sheet = np.asarray(image.convert("RGBA"), np.uint16)
    except video.BadVideo as error:
        raise UserError(f"{error}; get the layers anew: {CLONE}") from None
    cells = sheet.reshape(ROWS, CELL, COLUMNS, CELL, 4).transpose(0, 2, 4, 1, 3).reshape(-1, 4, CELL, CELL)[numbers]
    alpha = cells[:, 3:]
    return cells[:, :3] * alpha + np.uint16(128), 255 - alpha
