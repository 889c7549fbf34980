"""Whole videos at their own size and rate, and frames cut into tiles of the network's size."""

import math
from pathlib import Path

import numpy as np

from common.utils import UserError, make_parent
from common.video import printable, probe, read_frames, to_clip

LARGEST = 2**25  # pixels of a frame


def check_target(target, *sources):
    """UserError, before any work, if `target` cannot be written or is one of the files it is made from."""
    make_parent(target)
    if any(Path(target).exists() and Path(source).exists() and Path(target).samefile(source) for source in sources):
        raise UserError(f"{printable(target)} would overwrite what it is made from: give another file name")


def read_video(path, size=None):
    """(frames, frames per second) of a video: uint8 [T, H, W, 3], or cropped to squares of `size` pixels.

    Images, which have no rate, get 25 frames per second. UserError if it cannot be read or frames are too large.
    """
    frames = read_frames(path, size)
    if math.prod(frames.shape[1:3]) > LARGEST:
        about = f"{frames.shape[2]} x {frames.shape[1]}, over the limit of {LARGEST} pixels"
        raise UserError(f"{printable(path)} has frames of {about}")
    return frames, probe(path).fps


def frame_range(text, count):
    """ "100:140" -> (100, 140), "" -> (0, count). UserError if the video lacks these frames."""
    if not text:
        return 0, count
    numbers = text.split(":")
    first, last = (int(n) if n.isdecimal() else -1 for n in numbers) if len(numbers) == 2 else (-1, -1)
    if not 0 <= first < last <= count:
        raise UserError(f"--frames {text}: the video has frames 0 to {count - 1}, 0:{count} is all")
    return first, last


def cut(frames, count, size):
    """At most `count` frames, uint8 [n, H, W, 3] -> their tiles as clips [tiles, count, 3, size, size], row by row.

    Beyond its edges, a frame is padded with its edge pixels; beyond its end, a clip with its last frame.
    """
    n, height, width, _ = frames.shape
    clip = to_clip(np.pad(frames, ((0, count - n), (0, -height % size), (0, -width % size), (0, 0)), "edge"))
    clip = clip.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # [count, 3, rows, size, columns, size]
    return clip.permute(2, 4, 0, 1, 3, 5).flatten(0, 1)


def join(tiles, height, width):
    """Tiles [..., rows * columns, T, 3, size, size] -> clip [..., T, 3, height, width], without the padding of `cut`."""
    size = tiles.shape[-1]
    tiles = tiles.unflatten(-5, (math.ceil(height / size), math.ceil(width / size)))  # [..., rows, columns, T, 3, size, size]
    clip = tiles.movedim((-6, -5), (-4, -2))  # [..., T, 3, rows, size, columns, size]
    return clip.flatten(-2).flatten(-3, -2)[..., :height, :width]
