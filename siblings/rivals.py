"""What one would use instead: x264, x265 and SVT-AV1 (by PyAV), each with one thread, at its slow best and tuned for PSNR.

Raw bitstreams are counted: they need no tables of a container, 800 bytes and more of an MP4, and play all the same. Colours
are 4:2:0 inside, as videos mostly are.
"""

import functools
import io
import os
import re
import sys
import time
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import Interpolation

from common.utils import UserError
from siblings import rd

os.environ.setdefault("SVT_LOG", "1")  # errors alone
# The same matrix and range there and back, whatever a stream says of itself, and no short cuts in between.
SCALE = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
MESSAGES = re.compile(rb"\0?\0\0\x01\x06.*?(?=\0?\0\0\x01)", re.DOTALL)  # what x264 writes of itself, 600 bytes


class Rival(NamedTuple):
    encoder: str
    form: str  # of its raw files
    worst: int  # the largest CRF
    options: dict


X265 = {"preset": "veryslow", "tune": "psnr", "x265-params": "info=0:log-level=error:pools=none:frame-threads=1"}
RIVALS = {
    "x264": Rival("libx264", "h264", 51, {"preset": "veryslow", "tune": "psnr"}),
    "x265": Rival("libx265", "hevc", 51, X265),
    "av1": Rival("libsvtav1", "obu", 63, {"preset": "2", "svtav1-params": "lp=1:tune=1"}),
}


def available():
    """The names of RIVALS that this PyAV has."""
    return [name for name, rival in RIVALS.items() if rival.encoder in av.codecs_available]


def encode(name, frames, fps, crf):
    """Frames, uint8 [T, H, W, 3], at one of RIVALS' constant quality -> the bytes of a raw file."""
    rival, (_, height, width, _) = RIVALS[name], frames.shape
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), "edge")
    encoder = av.CodecContext.create(rival.encoder, "w")
    encoder.height, encoder.width = frames.shape[1:3]
    encoder.framerate = Fraction(fps).limit_denominator(10_000)
    encoder.time_base, encoder.pix_fmt, encoder.thread_count = 1 / encoder.framerate, "yuv420p", 1
    encoder.options = rival.options | {"crf": str(crf)}
    if name == "x265" and min(height, width) < 64:  # the same bytes; with AVX it overwrites its memory at 32 x 48
        encoder.options |= {"x265-params": X265["x265-params"] + ":no-asm=1"}
    packets = []
    for k, frame in enumerate(frames):
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")
        colours = {"dst_colorspace": "ITU601", "dst_color_range": "MPEG", "interpolation": SCALE}
        picture = picture.reformat(format="yuv420p", **colours)
        picture.pts = k
        packets += encoder.encode(picture)
    data = b"".join(map(bytes, packets + encoder.encode(None)))
    return MESSAGES.sub(b"", data) if rival.form == "h264" else data


def decode(name, data, shape):
    """The bytes of encode -> its frames, uint8, which have to be of the shape [T, H, W, 3] that was encoded."""
    colours = {"src_colorspace": "ITU601", "src_color_range": "MPEG", "interpolation": SCALE}
    with av.open(io.BytesIO(data), format=RIVALS[name].form) as file:
        frames = [frame.reformat(format="rgb24", **colours).to_ndarray() for frame in file.decode(video=0)]
    if len(frames) != shape[0]:
        raise UserError(f"what {name} wrote of {shape[0]} frames decodes to {len(frames)}")
    return np.stack(frames)[:, : shape[1], : shape[2]]


def there_and_back(frames, fps, path, name, crf):
    """What rd.Point.run is to give."""
    begin = time.time()
    data = encode(name, frames, fps, crf)
    return len(data), time.time() - begin, decode(name, data, frames.shape)


def points(names, crfs):
    """The points of a comparison: each of the named codecs by each CRF up to its worst. A line for those that are not there."""
    found = []
    for name in names:
        if name not in available():
            print(f"{name} is left out: PyAV has no {RIVALS[name].encoder} here", file=sys.stderr)
            continue
        few = [crf for crf in sorted(crfs) if 0 <= crf <= RIVALS[name].worst]
        found += [rd.Point(name, f"crf {crf}", functools.partial(there_and_back, name=name, crf=crf)) for crf in few]
    return found


def within(name, frames, fps, budget):
    """(frames, bytes) of a codec at its best constant quality within a budget of bytes, or at its worst beyond it."""
    made = functools.cache(lambda crf: encode(name, frames, fps, crf))
    low, high = 0, RIVALS[name].worst
    while low < high:  # sizes fall with CRF
        middle = (low + high) // 2
        low, high = (low, middle) if len(made(middle)) <= budget else (middle + 1, high)
    return decode(name, made(low), frames.shape), len(made(low))
