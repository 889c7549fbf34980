"""Reading frames from video files, and writing frames to videos, GIFs and contact sheets.

Frames are uint8 [T, H, W, 3], as in files; a clip is float32 [T, 3, H, W] in [-1, 1], as in networks.

PyAV decodes in order, and frame k is the k-th from the decoder, whatever frame rate, timestamps and headers say. Readers scale
the shorter side to the requested size and crop the centre, or keep the original size (size None). Rotation and pixel aspect are
applied, as players do.
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

# In order of preference among files of the same name: a GIF beside an MP4 is a preview.
VIDEO_SUFFIXES = tuple(
    ".mp4 .m4v .mov .qt .avi .divx .mkv .webm .y4m .ogv .ogg .ogm .ts .m2ts .mts .mpg .mpeg .m1v .m2v .vob .3gp .3g2 .wmv .asf "
    ".flv .f4v .mxf .dv .ivf .h264 .264 .hevc .h265 .265 .mjpeg .mjpg .gif .apng".split()
)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# Containers that hold the frames themselves. Playlists are left out: they make a decoder open other files and URLs.
SAFE = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,avi,matroska,webm,yuv4mpegpipe,ogg,mpegts,mpeg,mpegvideo,asf,flv,mxf,dv,ivf,"
    "h264,hevc,m4v,mjpeg,gif,apng,png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe,image2",  # image2: JPEGs of 2 KB or more
    "pattern_type": "none",  # %03d.png is the name of one image
}
DAMAGED, NOTHING = (av.error.InvalidDataError, av.error.ArgumentError), "damaged, or not a video"
MAX_PIXELS = 2**27  # of one frame; larger ones are meant to exhaust memory
HDR = (16, 18)  # the transfer functions PQ and HLG (ITU-T H.273)


class BadVideo(UserError):
    """A file that gives no frames: path and reason, on one line."""

    def __init__(self, path, reason):
        super().__init__(f"{printable(path)}: {reason}")
        self.reason = reason


# ---------------------------------------------------------------------------------------------------------- finding videos


def list_videos(root):
    """All videos under a directory: (sorted paths, notes on what was left out, a line each).

    A path is a video file or a directory of frames; files that differ only in suffix are one video. Links are followed, each
    target once. Hidden files are ignored without a note; images beside videos (thumbnails) or a losses.csv (plots), with one.
    """
    left_out, seen = collections.Counter(), {os.path.realpath(root)}
    found = collections.defaultdict(list)  # path without suffix -> (preference, path) of all with this name
    for directory, folders, files in os.walk(root, followlinks=True):
        real = {os.path.realpath(os.path.join(directory, f)): f for f in sorted(folders, reverse=True) if f[0] != "."}
        folders[:] = sorted(f for place, f in real.items() if place not in seen)
        seen |= set(real)
        images = frame_files(directory)
        for path in (Path(directory, f) for f in files if f[0] != "."):
            if (suffix := path.suffix.lower()) in VIDEO_SUFFIXES:
                found[os.fspath(path.with_suffix(""))].append((VIDEO_SUFFIXES.index(suffix), path))
            elif suffix not in IMAGE_SUFFIXES:
                left_out[f"files {printable(path.suffix) or 'without a suffix'}"] += 1
        videos = any(f.lower().endswith(VIDEO_SUFFIXES) for f in files)
        if len(images) > 1 and not videos and "losses.csv" not in files:
            found[os.fspath(Path(directory))].append((len(VIDEO_SUFFIXES), Path(directory)))
        elif images:
            left_out["still images, too few for a video or beside videos"] += len(images)
    for (_, first), *again in map(sorted, found.values()):
        left_out.update(f"{path.suffix or 'folders of frames'} beside a {first.suffix} of the same name" for _, path in again)
    return sorted((min(names)[1] for names in found.values()), key=str), [f"{n} {what}" for what, n in sorted(left_out.items())]


def frame_files(directory):
    """The images of a directory of frames, in numerical order: frame_2 comes before frame_10."""
    names = [f for f in os.listdir(directory) if f.lower().endswith(IMAGE_SUFFIXES) and f[0] != "."]
    return [Path(directory, f) for f in sorted(names, key=lambda f: re.sub(r"\d+", lambda number: number[0].zfill(20), f))]


# --------------------------------------------------------------------------------------------------------- files to frames


# The header of a video, which may be wrong; fps is 0 for images, width and height are as stored.
Info = collections.namedtuple("Info", "frames fps width height")


def probe(path):
    """The Info of a video. Raises BadVideo."""
    images = frame_files(path) if os.path.isdir(path) else []
    with opened(images[0] if images else path) as (container, stream):
        fps = float(stream.average_rate or 25)
        seconds = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
        return Info(len(images) or stream.frames or round(seconds * fps), 0.0 if images else fps, stream.width, stream.height)


def count_frames(path):
    """The number of frames of a video, by decoding it, since headers may be wrong. Raises BadVideo."""
    if os.path.isdir(path):
        return len(frame_files(path))
    with opened(path) as (container, stream):
        if count := sum(1 for _ in decoded(container, stream)):
            return count
    raise BadVideo(path, NOTHING)


def read_frames(path, size, start=0, count=None):
    """Up to `count` frames of a video (None: all), from frame `start` on: uint8 [up to count, size, size, 3].

    size None keeps whole frames at their own size, [up to count, H, W, 3]. Fewer than `count` are returned if the video ends.
    Raises BadVideo if there are none.
    """
    frames = list(iterate(path, size, start, None if count is None else start + count))
    if not frames:
        raise BadVideo(path, f"it ends before frame {start}" if start else NOTHING)
    if len({frame.shape for frame in frames}) > 1:
        raise BadVideo(path, "its frames have different sizes")
    return np.stack(frames)


def iterate(path, size, start=0, stop=None):
    """Yield the frames of read_frames one by one, uint8 [size, size, 3] each. Raises BadVideo."""
    if os.path.isdir(path):
        for file in frame_files(path)[start:stop]:
            yield from read_frames(file, size, 0, 1)
        return
    reformatter = VideoReformatter()  # keeps its tables from frame to frame
    with opened(path) as (container, stream):
        for frame in itertools.islice(decoded(container, stream), start, stop):
            yield scaled(frame, size, float(stream.sample_aspect_ratio or 1), reformatter)


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
            if stream.width * stream.height > MAX_PIXELS:
                raise BadVideo(path, f"its frames of {stream.width} x {stream.height} are too large")
            half = {"err_detect": "explode"} if str(path).lower().endswith(IMAGE_SUFFIXES) else {}  # reject truncated images
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)} | half
            stream.codec_context.thread_count = 1  # callers that read many files use a thread per file
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise BadVideo(path, NOTHING if isinstance(error, DAMAGED) else error.strerror) from None


def decoded(container, stream):
    """Yield PyAV's frames of a video in display order; damaged packets are skipped."""
    for packet in container.demux(stream):
        with contextlib.suppress(*DAMAGED):
            yield from stream.decode(packet)


def scaled(frame, size, aspect, reformatter):
    """A PyAV frame with this pixel aspect as an array: uint8 [size, size, 3], or [H, W, 3] if size is None."""
    width, height = round(frame.width * (aspect if 1 / 4 < aspect < 4 else 1)), frame.height
    if size:  # even sides: odd ones take 50 % longer; at most 16,384, against hostile files
        shorter = min(width, height)
        width, height = (min(max(size, 2 * round(side * size / shorter / 2)), 2**14) for side in (width, height))
    # HDR to BT.709: reference white, 203 cd/m², becomes 255; brighter values are clipped.
    colours = {"dst_color_trc": 1, "dst_color_primaries": 1} if frame.color_trc in HDR else {}
    image = reformatter.reformat(frame, width, height, "rgb24", interpolation="BICUBIC", threads=1, **colours).to_ndarray()
    if size:
        top, left = (height - size) // 2, (width - size) // 2
        image = image[top : top + size, left : left + size]
    return np.rot90(image, round(frame.rotation / 90))


# ---------------------------------------------------------------------------------------------------------- frames to files


def to_clip(frames):
    """uint8 frames [..., T, H, W, 3], array or tensor -> clip [..., T, 3, H, W] in [-1, 1], on the same device."""
    return torch.as_tensor(frames).movedim(-1, -3).float().div_(127.5).sub_(1)


def to_frames(clip):
    """Clip [..., T, 3, H, W] in [-1, 1] -> numpy uint8 frames [..., T, H, W, 3]."""
    return ((clip.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).byte().movedim(-3, -1).contiguous().numpy()


def tile(clips):
    """Clips [B, T, 3, H, W] side by side, as many rows as columns or one fewer: one clip [T, 3, rows * H, columns * W]."""
    clips = torch.stack(list(clips))
    columns = math.ceil(math.sqrt(len(clips)))
    rows = math.ceil(len(clips) / columns)
    blank = clips.new_ones(rows * columns - len(clips), *clips.shape[1:])
    grid = torch.cat([clips, blank]).unflatten(0, (rows, columns))  # [rows, columns, T, 3, H, W]
    return grid.permute(2, 3, 0, 4, 1, 5).flatten(4).flatten(2, 3)


def enlarge(frames, smallest=128):
    """Enlarge small frames [T, H, W, 3] by repeating pixels an integer number of times, for viewing."""
    factor = max(1, smallest // frames.shape[1])
    return frames.repeat(factor, 1).repeat(factor, 2)


def mark(clip):
    """The clip [T, 3, H, W] with an orange border, which marks given frames."""
    edge = max(1, clip.shape[-1] // 32)
    marked = torch.tensor([1.0, 0.2, -1.0])[:, None, None].expand_as(clip).clone()
    marked[..., edge:-edge, edge:-edge] = clip[..., edge:-edge, edge:-edge]
    return marked


def write_mp4(path, clips, fps=12):
    """Write clips [T, 3, H, W], concatenated, as path.mp4 (H.264), small ones enlarged. Raises UserError.

    clips may be a generator: each clip is written as it arrives, so memory use does not depend on the length of the video.
    """
    write_frames(f"{path}.mp4", (enlarge(to_frames(clip)) for clip in clips), fps, crf=10)


def write_video(path, clip, fps=12):
    """Write a clip [T, 3, H, W] as path.mp4 (H.264) and path.gif, small ones enlarged. Raises UserError."""
    write_mp4(path, [clip], fps)
    images = [Image.fromarray(frame) for frame in enlarge(to_frames(clip))]
    with whole(f"{path}.gif") as part:
        images[0].save(part, "GIF", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)


def write_frames(path, parts, fps, crf=12):
    """Write frames, an iterable of uint8 [n, H, W, 3], as one video at their own size; returns the number of frames.

    .mkv is lossless (FFV1), .mp4 is H.264 of quality crf. UserError for other suffixes or if it cannot be written.
    """
    kinds = {".mp4": ("mp4", "libx264", {"crf": str(crf)}), ".mkv": ("matroska", "ffv1", {})}
    if Path(path).suffix.lower() not in kinds:
        raise UserError(f"{printable(path)}: give a file name that ends in {' or '.join(kinds)}")
    container, codec, options = kinds[Path(path).suffix.lower()]
    stream, count = None, 0
    with whole(path) as part, av.open(f"file:{part.absolute()}", "w", format=container) as out:
        for frame in itertools.chain.from_iterable(parts):
            if stream is None:
                stream = out.add_stream(codec, Fraction(fps).limit_denominator(10_000), options=options)
                stream.height, stream.width = frame.shape[:2]
                odd = stream.height % 2 or stream.width % 2
                stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv444p" if odd else "yuv420p"
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")
            out.mux(stream.encode(picture.reformat(format=stream.pix_fmt, interpolation="BICUBIC")))
            count += 1
        out.mux(stream.encode())
    return count


def write_sheet(path, rows, titles=None, columns=8):
    """Write a contact sheet as PNG: rows are videos [T, 3, H, W], columns evenly spaced frames; titles are on the left."""
    strips = []
    for clip in rows:
        picks = np.linspace(0, len(clip) - 1, min(columns, len(clip))).round().astype(int)
        strips.append(np.concatenate(list(enlarge(to_frames(clip[picks]), 64)), 1))  # [H, columns * W, 3]
    height = strips[0].shape[0] + 2
    titles = [printable(" ".join(title.split())) for title in titles or [""] * len(strips)]
    font = ImageFont.load_default(max(14, height // 6))  # large frames get a large font: viewers scale the sheet down
    margin = math.ceil(max(map(font.getlength, titles)) + font.size) if any(titles) else 0
    image = Image.new("RGB", (margin + max(strip.shape[1] for strip in strips), len(strips) * height), "white")
    draw = ImageDraw.Draw(image)
    for i, (strip, title) in enumerate(zip(strips, titles)):
        image.paste(Image.fromarray(strip), (margin, i * height))
        draw.text((margin - font.size // 2, i * height + height // 2), title, "black", font, "rm")
    with whole(path) as part:
        image.save(part, "PNG")
