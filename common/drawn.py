"""Synthetic data sets, drawn instead of decoded: moving shapes, and the characters of Sprites.

`dataset[i]` -> (uint8 frames [T, H, W, 3], label), the same at every call and on every machine.
"""

import math
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from PIL import Image

from common.video import to_clip, to_frames

LIMIT = 2**30  # bytes of frames that a data set caches: enough for all of Shapes at nano's size, and of Sprites at its own


class Drawn:
    """A data set defined by `length`, draw(i) -> uint8 frames [T, H, W, 3] and label(i); caches the first clips up to LIMIT."""

    def __init__(self, length):
        self.length, self.cache = length, {}

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        i %= len(self)
        frames = self.cache[i] if i in self.cache else self.draw(i)
        # The first clips, not the latest: each pass has a new order, in which the latest would rarely be hit.
        if (len(self.cache) + 1) * frames.nbytes <= LIMIT:
            self.cache[i] = frames
        return frames, self.label(i)


MOTIONS = ("sideways", "updown", "circle")


class Shapes(Drawn):
    """One bright shape moves over a background of two muted colours; class = shape × motion.

    Random numbers are seeded by role (train or test) and i. Classes alternate. A clip is one period of the motion. If `period`
    is given, in frames, it does not depend on the clip's length and the motion starts at a random phase, so that clip i is a
    prefix of any longer clip i. stride: frames of the video per frame of the clip.
    """

    classes = tuple(f"{shape}_{motion}" for shape in ("square", "triangle", "ring") for motion in MOTIONS)

    def __init__(self, role="train", resolution=32, num_frames=16, length=None, period=0, stride=1):
        super().__init__(length or {"train": 8192, "test": 512}[role])
        self.role, self.resolution, self.num_frames, self.period, self.stride = role, resolution, num_frames, period, stride

    def label(self, i):
        return i % len(self.classes)

    def identity(self):
        return f"shapes {self.resolution} {self.num_frames} {self.length} {self.period}"

    def draw(self, i, t=None):
        """Clip i as uint8 frames [T, H, W, 3], at real-valued times t [T] in frames (default: those of the clip)."""
        t = np.arange(self.num_frames) * self.stride if t is None else np.asarray(t)
        shape, motion = self.classes[self.label(i)].split("_")
        rng = np.random.default_rng([0, self.role == "test", i])
        # Paths are sines and circles around a centre; lengths are in half frame widths.
        phase, radius, reach = rng.uniform(-math.pi / 4, math.pi / 4), rng.uniform(0.42, 0.52), rng.uniform(0.25, 0.4)
        centre = rng.uniform(-0.08, 0.08, 2)
        angle = 2 * math.pi * t / (self.period or self.num_frames * self.stride) + phase * (4 if self.period else 1)
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


CLONE = "git clone https://github.com/YingzhenLi/Sprites"
LAYERS = {"body": range(6), "shoes": [1], "bottomwear": range(6), "topwear": range(6), "hair": range(6)}  # from below to above
CELL, COLUMNS = 64, 13  # of a sheet
# Cell numbers, row by row, of each action facing left; front is one row further down, right two.
LOOPS = {"spellcard": [*range(13, 19), 17, 13], "walk": [*range(118, 126)], "slash": [*range(169, 175), 173, 169]}


class Sprites(Drawn):
    """A character of the Liberated Pixel Cup walks, slashes or casts a spell, on black (Li & Mandt 2018, arXiv:1803.02991).

    root is the directory that CLONE makes. A character combines one of 6 bodies, 6 bottoms, 6 tops and 6 hairs; class = action
    x direction; clips 9k to 9k + 8 are the classes of one character. A clip is the loop of 8 frames, repeated or truncated.
    Multiples of 64 repeat pixels, which keeps edges sharp; other sizes are antialiased.

    OSError if a layer is missing or damaged.
    """

    classes = tuple(f"{action}_{direction}" for action in LOOPS for direction in ("left", "front", "right"))

    def __init__(self, root, role="train", resolution=CELL, num_frames=8, stride=1):
        self.resolution = resolution
        # As in the authors' frame_to_npy.py, so that the same characters are held out. numpy keeps RandomState stable (NEP 19).
        order = np.random.RandomState(423).permutation(6**4)
        self.characters = order[:1000] if role == "train" else order[1000:]
        super().__init__(len(self.characters) * len(self.classes))
        steps = [t * stride % 8 for t in range(num_frames)]
        self.cells = [[loop[t] + COLUMNS * row for t in steps] for loop in LOOPS.values() for row in range(3)]
        files = {(layer, k): Path(root) / layer / f"{k}.png" for layer in LAYERS for k in LAYERS[layer]}
        self.sheets = {sheet: Image.open(file).convert("RGBA") for sheet, file in files.items()}

    def identity(self):
        return f"sprites {self.resolution} {self.cells}"

    def label(self, i):
        """The class of clip i. Not i mod 9, with which an evenly spaced sample (every ninth clip, say) would have one class."""
        return (i + i // 9 + i // 81 + i // 729) % 9

    def draw(self, i):
        """Clip i as uint8 frames [T, H, W, 3]."""
        frames, n = [], int(self.characters[i // 9])
        numbers = (n // 216, 1, n // 36 % 6, n // 6 % 6, n % 6)  # sheet of each of LAYERS
        for cell in self.cells[self.label(i)]:
            frame, (y, x) = Image.new("RGBA", (CELL, CELL), "black"), divmod(cell, COLUMNS)
            for layer in zip(LAYERS, numbers):
                frame.alpha_composite(self.sheets[layer], source=(x * CELL, y * CELL, (x + 1) * CELL, (y + 1) * CELL))
            frames.append(np.asarray(frame)[..., :3])
        frames = np.stack(frames)
        if self.resolution % CELL == 0:
            return frames.repeat(self.resolution // CELL, 1).repeat(self.resolution // CELL, 2)
        size = (self.resolution, self.resolution)
        return to_frames(F.interpolate(to_clip(frames), size, mode="bilinear", antialias=True))
