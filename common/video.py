"""Reading frames from video files, and writing frames to videos and contact sheets.

Frames are uint8 [T, H, W, 3], as in files; a clip is float32 [T, 3, H, W] in [-1, 1], as in networks. Frame k is the k-th from
PyAV's decoder, whatever frame rate, timestamps and headers say. Rotation and pixel aspect are applied, as players do.
"""

import collections
import contextlib
import itertools
import math
import os
import re
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageDraw, ImageFont

from common.utils import UserError, printable, whole

VIDEO_SUFFIXES = tuple(".mp4 .m4v .mov .avi .mkv .webm .y4m .ogv .ts .mpg .mpeg .3gp .wmv .flv .gif .apng".split())
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# Containers that hold the frames themselves. Playlists are left out: they make a decoder open other files and URLs.
SAFE = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,avi,matroska,yuv4mpegpipe,ogg,mpegts,mpeg,mpegvideo,asf,flv,gif,apng,"
    "png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe,image2",  # image2: JPEGs of 2 KB or more
    "pattern_type": "none",  # %03d.png is the name of one image
}
DAMAGED, NOTHING = (av.error.InvalidDataError, av.error.ArgumentError), "damaged, or not a video"


class BadVideo(UserError):
    """A file that gives no frames: path and reason, on one line."""

    def __init__(self, path, reason):
        super().__init__(f"{printable(path)}: {reason}")
        self.reason = reason


def list_videos(root):
    """All videos under a directory: (sorted paths, notes on what was left out, a line each).

    A path is a video file or, where there is none, a directory of frames. Links are followed, but not in circles. Hidden files
    are ignored without a note.
    """
    paths, left_out, seen = [], collections.Counter(), set()
    for directory, folders, files in os.walk(root, followlinks=True):
        seen.add(os.path.realpath(directory))
        folders[:] = sorted(f for f in folders if f[0] != "." and os.path.realpath(Path(directory, f)) not in seen)
        others = {Path(directory, name) for name in files if name[0] != "."}
        found = {path for path in others if path.suffix.lower() in VIDEO_SUFFIXES}
        if not found and len(images := frame_files(directory)) > 1:
            found, others = {Path(directory)}, others.difference(images)
        paths += found
        left_out.update(printable(path.suffix) or "without a suffix" for path in others - found)
    return sorted(paths, key=str), [f"{count} files {suffix}" for suffix, count in sorted(left_out.items())]


def frame_files(directory):
    """The images of a directory of frames, in numerical order: frame_2 comes before frame_10."""
    names = [f for f in os.listdir(directory) if f.lower().endswith(IMAGE_SUFFIXES) and f[0] != "."]
    return [Path(directory, f) for f in sorted(names, key=lambda f: re.sub(r"\d+", lambda number: number[0].zfill(20), f))]


Info = collections.namedtuple("Info", "frames fps width height")  # width and height as stored


def probe(path):
    """The Info of a video by its header, which may be wrong. Raises BadVideo."""
    images = frame_files(path) if os.path.isdir(path) else []
    with opened(images[0] if images else path) as (container, stream):
        fps = float(stream.average_rate or stream.guessed_rate or 25)
        count = len(images) or stream.frames or round((container.duration or 0) / av.time_base * fps)
        return Info(count, fps, stream.width, stream.height)


def count_frames(path):
    """The number of frames of a video, by decoding it. Raises BadVideo."""
    return len(frame_files(path)) if os.path.isdir(path) else sum(1 for _ in decoded(path))


def read_frames(path, size, start=0, count=None):
    """Up to `count` frames of a video (None: all), from frame `start` on: uint8 [up to count, size, size, 3].

    The shorter side is scaled to `size` and the centre cropped; None keeps frames as they are, [up to count, H, W, 3]. Fewer
    than `count` are returned if the video ends. Raises BadVideo if there are none.
    """
    stop, reformatter = None if count is None else start + count, VideoReformatter()  # which keeps its tables
    if os.path.isdir(path):
        frames = [read_frames(file, size, 0, 1)[0] for file in frame_files(path)[start:stop]]
    else:
        frames = [scaled(*frame, size, reformatter) for frame in itertools.islice(decoded(path), start, stop)]
    if len({frame.shape for frame in frames}) != 1:
        raise BadVideo(path, "its frames have different sizes" if frames else NOTHING)
    return np.stack(frames)


@contextlib.contextmanager
def opened(path):
    """Context: (container, video stream) of a file; FFmpeg and disk errors inside the `with` become BadVideo."""
    if not os.path.isfile(path):  # opening a pipe, say, would block
        raise BadVideo(path, "not a file")
    try:
        with av.open(f"file:{os.path.abspath(path)}", options=SAFE, metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if stream is None or stream.codec_context is None:
                raise BadVideo(path, "it has no video stream")
            half = {"err_detect": "explode"} if str(path).lower().endswith(IMAGE_SUFFIXES) else {}  # reject truncated images
            stream.codec_context.options = {"max_pixels": str(2**27)} | half  # larger frames are meant to exhaust memory
            stream.codec_context.thread_count = 1  # callers that read many files use a thread per file
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise BadVideo(path, NOTHING if isinstance(error, DAMAGED) else error.strerror) from None


def decoded(path):
    """Yield PyAV's frames of a video file in display order, each with its pixel aspect. Damaged packets are skipped."""
    with opened(path) as (container, stream):
        for packet in container.demux(stream):
            with contextlib.suppress(*DAMAGED):
                yield from ((frame, float(stream.sample_aspect_ratio or 1)) for frame in stream.decode(packet))


def scaled(frame, aspect, size, reformatter):
    """A PyAV frame with this pixel aspect as an array: uint8 [size, size, 3], or [H, W, 3] if size is None."""
    width, height = round(frame.width * (aspect if 1 / 4 < aspect < 4 else 1)), frame.height
    if size:  # even sides: odd ones take 50 % longer; at most 16,384, against hostile files
        shorter = min(width, height)
        width, height = (min(max(size, 2 * round(side * size / shorter / 2)), 2**14) for side in (width, height))
    # HDR (PQ and HLG, ITU-T H.273) to BT.709: reference white, 203 cd/m², becomes 255; brighter values are clipped.
    colours = {"dst_color_trc": 1, "dst_color_primaries": 1} if frame.color_trc in (16, 18) else {}
    image = reformatter.reformat(frame, width, height, "rgb24", interpolation="BICUBIC", threads=1, **colours).to_ndarray()
    if size:
        top, left = (height - size) // 2, (width - size) // 2
        image = image[top : top + size, left : left + size]
    return np.rot90(image, round(frame.rotation / 90))


def to_clip(frames):
    """uint8 frames [..., T, H, W, 3], array or tensor -> clip [..., T, 3, H, W] in [-1, 1], on the same device."""
    return torch.as_tensor(frames).movedim(-1, -3).float().div_(127.5).sub_(1)


def to_frames(clip, smallest=1):
    """Clip [..., T, 3, H, W] in [-1, 1] -> numpy uint8 frames [..., T, H, W, 3]; below `smallest`, pixels are repeated."""
    frames = ((clip.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).byte().movedim(-3, -1).contiguous().numpy()
    factor = max(1, smallest // frames.shape[-3])
    return frames.repeat(factor, -3).repeat(factor, -2) if factor > 1 else frames


def tile(clips):
    """Clips [B, T, 3, H, W] side by side, as many rows as columns or one fewer: one clip [T, 3, rows * H, columns * W]."""
    columns = math.ceil(math.sqrt(len(clips)))
    clips = [*clips] + [torch.ones_like(clips[0])] * (-len(clips) % columns)
    return torch.cat([torch.cat(clips[i : i + columns], 3) for i in range(0, len(clips), columns)], 2)


def write_mp4(path, clips, fps=12):
    """Write clips [T, 3, H, W], concatenated, as path.mp4 (H.264), small ones enlarged; a generator's as they arrive."""
    write_frames(f"{path}.mp4", (to_frames(clip, 128) for clip in clips), fps, crf=10)


def write_frames(path, parts, fps, crf=12):
    """Write frames, an iterable of uint8 [n, H, W, 3], as one video at their own size; returns the number of frames.

    .mkv is lossless (FFV1), .mp4 is H.264 of quality crf. UserError for other suffixes or if it cannot be written.
    """
    codec = {".mp4": "libx264", ".mkv": "ffv1"}.get(Path(path).suffix.lower())
    if not codec:
        raise UserError(f"{printable(path)}: give a file name that ends in .mp4 or .mkv")
    container, count = "mp4" if codec == "libx264" else "matroska", 0
    with whole(path) as part, av.open(f"file:{part.absolute()}", "w", format=container) as out:
        for count, frame in enumerate(itertools.chain.from_iterable(parts), 1):
            if count == 1:
                stream = out.add_stream(codec, Fraction(fps).limit_denominator(10_000), options={"crf": str(crf)})
                stream.height, stream.width = frame.shape[:2]
                odd = stream.height % 2 or stream.width % 2
                stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv444p" if odd else "yuv420p"
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")
            out.mux(stream.encode(picture.reformat(format=stream.pix_fmt, interpolation="BICUBIC")))
        if not count:
            raise UserError(f"{printable(path)}: there is no frame at these times")
        out.mux(stream.encode())
    return count


def write_sheet(path, rows, titles, columns=8):
    """Write a contact sheet as PNG: rows are videos [T, 3, H, W], columns evenly spaced frames; titles are on the left."""
    picks = [np.linspace(0, len(clip) - 1, min(columns, len(clip))).round().astype(int) for clip in rows]
    strips = [np.concatenate(list(to_frames(clip[few], 64)), 1) for clip, few in zip(rows, picks)]
    height = strips[0].shape[0] + 2
    titles = [printable(" ".join(title.split())) for title in titles]
    font = ImageFont.load_default(max(14, height // 6))  # large frames get a large font: viewers scale the sheet down
    margin = math.ceil(max(map(font.getlength, titles)) + font.size)
    image = Image.new("RGB", (margin + max(strip.shape[1] for strip in strips), len(strips) * height), "white")
    for i, (strip, title) in enumerate(zip(strips, titles)):
        image.paste(Image.fromarray(strip), (margin, i * height))
        ImageDraw.Draw(image).text((margin - font.size // 2, i * height + height // 2), title, "black", font, "rm")
    with whole(path) as part:
        image.save(part, "PNG")
