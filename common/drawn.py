"""Data sets that are drawn, not decoded.

`dataset[i]` -> (uint8 frames [T, H, W, 3], label), the same at every call and on every machine. What was drawn first is kept.
"""

import itertools
import math

import numpy as np

KEPT_SHAPES = 2**29  # bytes of drawn frames that Shapes keeps: all 8192 clips of the nano preset, 682 at 128 x 128


class Kept(dict):
    """Frames of clips by index, those drawn first, as many of up to `count` as `limit` bytes hold.

    They are rows of one block: by themselves, among larger arrays that come and go, they would take several times their size.
    """

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
    """

    classes = tuple(f"{shape}_{motion}" for shape in SHAPES for motion in MOTIONS)
    decodes = False

    def __init__(self, role="train", resolution=32, num_frames=16, length=None, seed=0):
        self.role, self.resolution, self.num_frames, self.seed = role, resolution, num_frames, seed
        self.length = length or {"train": 8192, "test": 512}[role]
        self.cache = Kept(self.length, KEPT_SHAPES)

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        i %= self.length
        return self.cache.frames(i, self.draw), i % len(self.classes)

    def name(self, i):
        return f"clip {i % self.length}"

    def draw(self, i, t=None):
        """Clip i as uint8 frames [T, H, W, 3], at the frame positions t [T], real-valued (default: all of the clip)."""
        t = np.arange(self.num_frames) if t is None else np.asarray(t)
        label = i % len(self.classes)
        shape, motion = SHAPES[label // len(MOTIONS)], MOTIONS[label % len(MOTIONS)]
        rng = np.random.default_rng([self.seed, self.role == "test", i])
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
