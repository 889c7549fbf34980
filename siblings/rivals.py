"""Baselines: x264, x265 and SVT-AV1 (through PyAV), each with one thread, at a slow preset and tuned for PSNR.

Sizes are of raw bitstreams, which play without a container, whose tables take 800 bytes or more in an MP4. Colours
are 4:2:0 inside, as in most videos.
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

os.environ.setdefault("SVT_LOG", "1")  # only errors
SCALE = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
MESSAGES = re.compile(rb"\0?\0\0\x01\x06.*?(?=\0?\0\0\x01)", re.DOTALL)  # x264's message about itself, 600 bytes


class Rival(NamedTuple):
    encoder: str
    form: str  # format of its raw files
    worst: int  # the largest CRF
    options: dict


# Without assembler, which at 32 x 48 pixels overwrites its memory: the bytes are the same, and it takes four times as long.
X265 = {"preset": "veryslow", "tune": "psnr", "x265-params": "info=0:log-level=error:pools=none:frame-threads=1:no-asm=1"}
RIVALS = {
    "x264": Rival("libx264", "h264", 51, {"preset": "veryslow", "tune": "psnr"}),
    "x265": Rival("libx265", "hevc", 51, X265),
    "av1": Rival("libsvtav1", "obu", 63, {"preset": "2", "svtav1-params": "lp=1:tune=1"}),
}


def available():
    """The names of RIVALS that this PyAV supports."""
    return [name for name, rival in RIVALS.items() if rival.encoder in av.codecs_available]


def encode(name, frames, fps, crf):
    """Encode frames, uint8 [T, H, W, 3], by one of RIVALS at a CRF -> the bytes of a raw file."""
    rival, (_, height, width, _) = RIVALS[name], frames.shape
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), "edge")
    encoder = av.CodecContext.create(rival.encoder, "w")
    encoder.height, encoder.width = frames.shape[1:3]
    encoder.framerate = Fraction(fps).limit_denominator(10_000)
    encoder.time_base, encoder.pix_fmt, encoder.thread_count = 1 / encoder.framerate, "yuv420p", 1
    encoder.options = rival.options | {"crf": str(crf)}
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
    """The bytes of encode -> its frames, uint8. UserError if they are not the frames [T, H, W, 3] that were encoded."""
    # What a stream declares is ignored: x264's and x265's chroma would be shifted by half a pixel, for 1.3 dB on GRID.
    colours = {"src_colorspace": "ITU601", "src_color_range": "MPEG", "interpolation": SCALE}
    with av.open(io.BytesIO(data), format=RIVALS[name].form) as file:
        bare = [av.VideoFrame.from_ndarray(frame.to_ndarray(), "yuv420p") for frame in file.decode(video=0)]
    frames = [frame.reformat(format="rgb24", **colours).to_ndarray() for frame in bare]
    if len(frames) != shape[0]:
        raise UserError(f"{name} encoded {shape[0]} frames, which decode to {len(frames)}")
    return np.stack(frames)[:, : shape[1], : shape[2]]


def there_and_back(frames, fps, path, name, crf):
    """Encode and decode, as rd.Point.run."""
    begin = time.time()
    data = encode(name, frames, fps, crf)
    return len(data), time.time() - begin, decode(name, data, frames.shape)


def points(names, crfs):
    """The points of a comparison: each named codec at each CRF up to its worst. Prints a line for each missing codec."""
    found = []
    for name in names:
        if name not in available():
            print(f"{name} is skipped: this PyAV has no {RIVALS[name].encoder}", file=sys.stderr)
            continue
        few = [crf for crf in sorted(crfs) if 0 <= crf <= RIVALS[name].worst]
        found += [rd.Point(name, f"crf {crf}", functools.partial(there_and_back, name=name, crf=crf)) for crf in few]
    return found


def within(name, frames, fps, budget):
    """(frames, bytes) of a codec at its best CRF within a budget of bytes, or at its worst if none fits."""
    made = functools.cache(lambda crf: encode(name, frames, fps, crf))
    low, high = 0, RIVALS[name].worst
    while low < high:  # sizes decrease with CRF
        middle = (low + high) // 2
        low, high = (low, middle) if len(made(middle)) <= budget else (middle + 1, high)
    return decode(name, made(low), frames.shape), len(made(low))
