"""What one would use instead: x264, x265 and SVT-AV1 by ffmpeg, each with one thread at its slow best, and its smallest file.

encode(name, frames, fps, crf, path) -> (bytes, "raw" or "mp4", file);  decode(name, file, shape) -> the frames of that file

Files are counted whole. A raw bitstream needs no tables of a container, 800 bytes and more of an MP4, and plays all the same.
What x264 and x265 write of themselves into the stream (x264 600 bytes, more than many a clip) is left out: no decoder asks for
it. Colours are 4:2:0 inside, as videos mostly are, or 4:4:4 ("-444"), which is better for frames that were scaled down, and
which SVT-AV1 lacks.
"""

import functools
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import imageio_ffmpeg
import numpy as np

from common import rd
from common.utils import UserError
from common.video import printable


class Rival(NamedTuple):
    """An encoder of ffmpeg's: its name there, options, those that tune it for PSNR, its raw files and what unpacks them."""

    encoder: str
    options: str
    for_psnr: str
    raw: str
    unpack: str
    worst: int  # the largest CRF
    pixels: str = "yuv420p"


RIVALS = {
    "x264": Rival(
        "libx264",
        "-preset veryslow -threads 1 -bsf:v filter_units=remove_types=6",  # of type 6 are messages (SEI)
        "-tune psnr",
        "h264",
        "-bsf:v h264_mp4toannexb",  # named: ffmpeg takes the length of a first unit of 256 to 511 bytes for a start code
        51,
    ),
    "x265": Rival(
        "libx265",
        "-preset veryslow -x265-params info=0:log-level=error:pools=none:frame-threads=1",
        "-tune psnr",
        "hevc",
        "-bsf:v hevc_mp4toannexb",
        51,
    ),
    "av1": Rival("libsvtav1", "-preset 2 -svtav1-params lp=1:tune=0", "-svtav1-params lp=1:tune=1", "obu", "", 63),
}
for name in ("x264", "x265"):
    RIVALS[f"{name}-444"] = RIVALS[name]._replace(pixels="yuv444p")


BITEXACT = "-map_metadata -1 -fflags +bitexact".split()  # ffmpeg does not sign an MP4
# The same matrix and range there and back, whatever a stream says of itself, and no short cuts in between.
SCALE = "scale=flags=bicubic+accurate_rnd+full_chroma_int"


def ffmpeg(arguments, what, data=None):
    """Run ffmpeg; returns its standard output. UserError, with `what` it was to do, where it fails."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *([] if data is not None else ["-nostdin"]), *arguments]
    done = subprocess.run(command, input=data, capture_output=True, env=os.environ | {"SVT_LOG": "1"})
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise UserError(f"ffmpeg cannot {what}: {lines[0][:200]}")
    return done.stdout


@functools.cache
def available():
    """The names of RIVALS that this ffmpeg has."""
    encoders = ffmpeg(["-hide_banner", "-encoders"], "list its encoders").decode(errors="replace")
    return tuple(name for name, rival in RIVALS.items() if re.search(rf"\b{rival.encoder}\b", encoders))


def padded(name, shape):
    """The shape of frames [T, H, W, 3] as an encoder takes them: even height and width, for 4:2:0."""
    count, height, width, _ = shape
    odd = RIVALS[name].pixels == "yuv420p"
    return count, height + odd * (height % 2), width + odd * (width % 2), 3


def encode(name, frames, fps, crf, path, for_psnr=True):
    """Frames, uint8 [T, H, W, 3], at one of RIVALS' constant quality -> (bytes, container, the path of the file they are in).

    `path` is without a suffix. The container is "raw" or "mp4", whichever is smaller.
    """
    rival, shape = RIVALS[name], padded(name, frames.shape)
    frames = np.ascontiguousarray(np.pad(frames, [(0, more - n) for n, more in zip(frames.shape, shape)], "edge"))
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{shape[2]}x{shape[1]}", "-r", f"{fps:.6f}", "-i", "pipe:0"]
    colours = ["-vf", f"{SCALE}:out_color_matrix=bt601:out_range=tv,format={rival.pixels}"]
    options = rival.options
    if rival.encoder == "libx265" and min(shape[1:3]) < 64:
        options += ":no-asm=1"  # the same bytes; x265 of 2026, with AVX, overwrites its memory at 4:4:4 and 32 x 48
    encoder = ["-c:v", rival.encoder, "-crf", str(crf), *options.split(), *(rival.for_psnr.split() if for_psnr else [])]
    mp4, raw = Path(f"{path}.mp4"), Path(f"{path}.{rival.raw}")
    ffmpeg([*source, *colours, *encoder, *BITEXACT, f"file:{mp4}"], f"encode with {name}", frames.reshape(-1).data)
    unpack = ["-c", "copy", *rival.unpack.split(), "-f", rival.raw, f"file:{raw}"]
    ffmpeg(["-i", f"file:{mp4}", *unpack], f"unpack what {name} wrote")
    return min((raw.stat().st_size, "raw", raw), (mp4.stat().st_size, "mp4", mp4))


def decode(name, path, shape):
    """A file of encode -> its frames, uint8, which have to be of the shape [T, H, W, 3] that was encoded."""
    form = "mp4" if Path(path).suffix == ".mp4" else RIVALS[name].raw
    colours = ["-vf", f"{SCALE}:in_color_matrix=bt601:in_range=tv,format=rgb24"]
    output = ["-f", "rawvideo", "-fps_mode", "passthrough", "-threads", "1", "pipe:1"]
    data = ffmpeg(["-f", form, "-i", f"file:{path}", *colours, *output], f"decode {printable(path)}")
    whole = padded(name, shape)
    if len(data) != math.prod(whole):
        raise UserError(f"{printable(path)} does not decode to the {shape[0]} frames of {shape[2]} x {shape[1]} that went in")
    return np.frombuffer(data, np.uint8).reshape(whole)[:, : shape[1], : shape[2]]


def both_ways(frames, fps, path, name, crf, for_psnr):
    """What rd.Point.run is to give."""
    begin = time.time()
    size, kind, file = encode(name, frames, fps, crf, path, for_psnr)
    return size, kind, time.time() - begin, decode(name, file, frames.shape)


def points(names, crfs, av1_crfs, for_psnr):
    """The points of a comparison: each of the named codecs, by each CRF of its list. A line for those that ffmpeg lacks."""
    found = []
    for name in names:
        if name not in available():
            print(f"{name} is left out: this ffmpeg has no {RIVALS[name].encoder}", file=sys.stderr)
            continue
        option, crfs_of = ("--av1-crf", av1_crfs) if name == "av1" else ("--crf", crfs)
        for crf in sorted(crfs_of):
            if not 0 <= crf <= RIVALS[name].worst:
                raise UserError(f"{option} {crf}: {name} takes 0 to {RIVALS[name].worst}")
            run = functools.partial(both_ways, name=name, crf=crf, for_psnr=for_psnr)
            found.append(rd.Point(name, f"crf {crf}", run))
    return found
