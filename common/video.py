"""Video files: any of them as frames, and frames as files that people can watch.

Frames are uint8 [T, H, W, 3], as in files and caches; a clip is float32 [T, 3, H, W] in [-1, 1], as in networks.

ffmpeg decodes, in a process of its own: a file that crashes it, or makes it hang, costs that file and no more. Every reader
here scales the shorter side to the size that is asked for and cuts out the centre, or leaves frames at their own size (size
None), with rotation and pixel aspect as players show them. Frames are evenly spaced in time: a file of variable frame rate is
read at its nominal one.
"""

import contextlib
import errno
import functools
import math
import os
import re
import signal
import stat
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common import plot
from common.utils import UserError, make_parent

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".gif", ".mpg", ".mpeg", ".wmv", ".flv")
IMAGE_SUFFIXES = (".png", ".apng", ".webp", ".jpg", ".jpeg", ".bmp")
# Containers that hold pictures themselves; play lists, which make ffmpeg open other files and addresses, are not among them.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,avi,matroska,webm,gif,apng,webp_anim,mpeg,mpegts,mpegvideo,asf,flv,h264,m4v"
MAX_PIXELS = 2**27  # of one frame; more is a file that is made to fill the memory
FASTEST = 121  # frames per second; nominal rates beyond are clock ticks, not frames
WHOLE = "scale='round(iw*sar)':ih:flags=bicubic"  # a frame as seen, at its own size
PPM = ["-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24"]  # which says how large it is: rotation may have turned it
RAW = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-fps_mode", "passthrough", "-threads", "1"]
TIME_LIMIT = 30.0  # seconds without a byte, after which a decoder counts as hanging


NO_PICTURES = "it has no pictures"


class BadVideo(UserError):
    """A file that gives no frames: path and reason, on one line."""

    def __init__(self, path, reason):
        super().__init__(f"{printable(path)}: {reason}")
        self.reason = reason


def printable(path):
    """A path as text that any terminal and any JSON takes, whatever bytes the name is made of."""
    return os.fsencode(path).decode(errors="replace")


# ---------------------------------------------------------------------------------------------------------- finding videos


def list_videos(root):
    """All videos under a directory: (paths in order, {suffix: count} of the files that are none).

    A path is a video file, a directory of frames, an animated image, or a strip: one image with square frames side by side
    or below each other, as MoCoGAN's data come. Links are followed. Hidden files and directories are left out, and so are
    stills beside videos, which are thumbnails.
    """
    videos, others, above = [], {}, {os.fspath(root): {os.path.realpath(root)}}  # a link may lead back up
    for directory, folders, files in os.walk(root, followlinks=True):
        real = {f: os.path.realpath(os.path.join(directory, f)) for f in folders}
        folders[:] = sorted(f for f in folders if not f.startswith(".") and real[f] not in above[directory])
        above |= {os.path.join(directory, f): above[directory] | {real[f]} for f in folders}
        files = sorted((f for f in files if not f.startswith(".")), key=natural)
        images = [f for f in files if f.lower().endswith(IMAGE_SUFFIXES)]
        own = [Path(directory, f) for f in files if f.lower().endswith(VIDEO_SUFFIXES)]
        if images and image_kind(Path(directory, images[0])) != "still":
            own += [Path(directory, f) for f in images]
        elif len(images) > 1 and not own:
            own.append(Path(directory))
        videos += own
        for f in files:
            if not f.lower().endswith(VIDEO_SUFFIXES + IMAGE_SUFFIXES):
                others[Path(f).suffix] = others.get(Path(f).suffix, 0) + 1
    return sorted(videos, key=str), others


def natural(name):
    """A sorting key that puts frame_2 before frame_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def image_kind(path):
    """ "animated", "strip" or "still", of an image file; a damaged one counts as a still."""
    try:
        with Image.open(path) as image:
            short, long = sorted(image.size)
            if getattr(image, "n_frames", 1) > 1:
                return "animated"
            return "strip" if long >= 3 * short and long % short == 0 else "still"
    except Exception:  # whatever a damaged file makes the library raise
        return "still"


@functools.lru_cache(65536)
def video_kind(path):
    """How a path of list_videos is read: "frames" of a directory, "strip", or by the "decoder"."""
    if Path(path).is_dir():
        return "frames"
    images = str(path).lower().endswith(IMAGE_SUFFIXES)
    return "strip" if images and image_kind(path) == "strip" else "decoder"


# --------------------------------------------------------------------------------------------------------- files to frames


class Info(NamedTuple):
    """What the header of a video says: number of frames, frames per second (0 for images), width and height as stored."""

    frames: int
    fps: float
    width: int
    height: int


@functools.lru_cache(65536)
def probe(path):
    """The Info of a video. Raises BadVideo."""
    if (kind := video_kind(path)) != "decoder":
        files = frame_files(path) if kind == "frames" else [path]
        if not files:
            raise BadVideo(path, "it has no frames")
        width, height = image_size(files[0])
        if kind == "frames":
            return Info(len(files), 0.0, width, height)
        short, long = sorted((width, height))
        return Info(long // short, 0.0, short, short)
    check_readable(path)
    text, _ = run_decoder(path, [*decoder("info"), *source(path)])  # without an output it describes its input
    streams = [line for line in text.splitlines() if re.match(r"\s*Stream #", line)]  # a title may say " Video: " as well
    video = next((line for line in streams if " Video: " in line and "attached pic" not in line), None)
    if video is None:
        raise BadVideo(path, explain(text) if " Audio: " not in text else NO_PICTURES)
    size = re.search(r"\b(\d+)x(\d+)\b", re.sub(r"\b0x[0-9A-Fa-f]+", "", video))
    width, height = (int(x) for x in size.groups()) if size else (0, 0)
    rate = re.search(r"([\d.]+)(k?) " + ("fps" if "mpeg1video" in video else "tbr"), video)  # whose tbr counts fields
    fps = float(rate[1]) * (1000 if rate[2] else 1) if rate else 25.0
    fps = fps if fps <= FASTEST else 30.0
    if duration := re.search(r"Duration: (\d+):(\d+):([\d.]+)", text):
        hours, minutes, seconds = (float(x) for x in duration.groups())
        return Info(max(1, round((3600 * hours + 60 * minutes + seconds) * fps)), fps, width, height)
    return Info(len(read_frames(path, 8)), fps, width, height)  # animated images do not say


def read_frames(path, size, start=0, count=None, fps=0.0):
    """Frames of a video, from number start on, uint8 [up to count, size, size, 3]; all of them without a count.

    size None gives whole frames at their own size, [up to count, H, W, 3].
    fps > 0 reads a file at that rate, whatever its own; images, which have none, stay as they are. Fewer frames than count
    come where the video ends. Only what is needed is decoded: the decoder seeks. Raises BadVideo where there are none.
    """
    kind, last = video_kind(path), None if count is None else start + count
    if kind == "decoder" and start and str(path).lower().endswith(IMAGE_SUFFIXES):  # in animated images it cannot seek
        frames = read_frames(path, size, 0, last, fps)[start:]
    elif kind == "decoder":
        # A quarter of a frame early, so that rounding does not lose the first one.
        seconds = (start - 0.25) / (fps or probe(path).fps) if start else 0.0
        with tempfile.TemporaryFile() as out:
            decode(path, size, out, fps, seconds, count)
            skip, height, width = frame_layout(out, 0, size)
            out.seek(0)
            rows = np.fromfile(out, np.uint8).reshape(-1, skip + height * width * 3)
            return rows[:, skip:].reshape(-1, height, width, 3)
    else:
        frames = list(image_frames(path, size, start, last))
    if not len(frames):
        raise BadVideo(path, f"it ends before frame {start}")
    if len({frame.shape for frame in frames}) > 1:
        raise BadVideo(path, "its frames have different sizes")
    return np.stack(frames)


def read_clip(path, size, start, count, fps=0.0):
    """read_frames, but from the first frame where the header promises more than there is: a longer sound, a file cut off."""
    if start:
        with contextlib.suppress(BadVideo):
            if len(frames := read_frames(path, size, start, count, fps)) == count:
                return frames
    return read_frames(path, size, 0, count, fps)


def whole_video(path):
    """All frames of a video at their own size, uint8 [T, H, W, 3], on the disk where a decoder made them. Raises BadVideo."""
    if video_kind(path) != "decoder":
        return read_frames(path, None)
    with tempfile.TemporaryFile() as out:
        count = decode(path, None, out)
        skip, height, width = frame_layout(out, 0, None)
        rows = np.memmap(out, np.uint8, "r", shape=(count, skip + height * width * 3))
    return rows[:, skip:].reshape(count, height, width, 3)


def decode(path, size, out, fps=0.0, start=0.0, count=None, threads=1):
    """Have the frames of a video file written into the open file `out`, as raw RGB at its end; returns how many.

    start is in seconds; threads are the decoder's. Where size is None, each frame comes with a header, see frame_layout. Raises
    BadVideo, and leaves `out` as it was, where there are none.
    """
    check_readable(path)
    limit = ["-frames:v", str(count)] if count else []
    filters = ["-filter_threads", "1", "-vf", f"fps={frame_rate(fps)},{square(size) if size else WHOLE}"]
    filters += RAW if size else PPM
    command = [*decoder("error"), *source(path, start, threads), "-map", "0:V:0", *limit, *filters, "pipe:1"]
    begin = out.seek(0, os.SEEK_END)
    frames = skip = height = width = 0
    try:
        text, _ = run_decoder(path, command, out)
        if (full := os.strerror(errno.ENOSPC)) in text:
            raise OSError(errno.ENOSPC, full)
        skip, height, width = frame_layout(out, begin, size)
        frames = (os.fstat(out.fileno()).st_size - begin) // max(1, skip + height * width * 3)
    finally:
        out.truncate(begin + frames * (skip + height * width * 3))  # no part of a frame stays
    if not frames:
        raise BadVideo(path, explain(text))
    return frames


def frame_layout(out, begin, size):
    """(bytes of header, height, width) of each frame that decode has written into the open file `out`, from `begin` on."""
    if size:
        return 0, size, size
    header = re.match(rb"P6\n(\d+) (\d+)\n255\n", os.pread(out.fileno(), 64, begin))
    return (header.end(), int(header[2]), int(header[1])) if header else (0, 0, 0)


def decode_several(paths, size, out, fps=0.0):
    """Small video files with one decoder, whose start would take longer than one of them, as `decode` does one behind the
    other; returns how many frames each has, or None, with `out` as it was, where any of them gives reason to complain."""
    command, graph, ends = decoder("level+verbose") + ["-filter_complex_threads", "1"], "", ""
    for k, path in enumerate(paths):
        command += source(path)
        graph += f"[{k}:V:0]fps@{k}={frame_rate(fps)},{square(size)},setsar=1,format=rgb24[v{k}];"
        ends += f"[v{k}]"
    graph += f"{ends}concat=n={len(paths)}[out]"
    begin, counts = out.seek(0, os.SEEK_END), None
    try:
        text, status = run_decoder(paths[0], [*command, "-filter_complex", graph, "-map", "[out]", *RAW, "pipe:1"], out)
        # What tells where one video ends and the next begins is what the fps filters say of themselves when they are done.
        said = [(int(k), int(n)) for k, n in re.findall(r"\[fps@(\d+) @ .*\b([1-9]\d*) frames out", text)]
        total = (os.fstat(out.fileno()).st_size - begin) / (size * size * 3)
        well = status == 0 and not re.search(r"\[(error|fatal|panic)\]", text) and sum(n for _, n in said) == total
        if well and len(said) == len(paths):
            counts = [n for _, n in sorted(said)]
    except BadVideo:
        pass
    finally:
        if not counts:
            out.truncate(begin)
    return counts


def decoder(level):
    return [imageio_ffmpeg.get_ffmpeg_exe(), "-v", level, "-nostdin"]


def source(path, start=0.0, threads=1):
    """Options that open a file, and say what may be done with it; names are only names, since there is no shell."""
    seek = ["-ss", f"{start:.6f}"] if start > 0 else []
    safe = ["-max_pixels", str(MAX_PIXELS), "-format_whitelist", CONTAINERS, "-protocol_whitelist", "file"]
    return ["-threads", str(threads), *safe, *seek, "-i", f"file:{Path(path).absolute()}"]


def frame_rate(fps):
    return f"'{fps}'" if fps else f"'if(gt(source_fps,{FASTEST}),30,source_fps)'"


def square(size):
    """Filters that cut out the square in the middle, as seen with the file's pixel aspect, and scale it."""
    return f"crop='min(iw,ih/sar)':'min(ih,iw*sar)':exact=1,scale={size}:{size}:flags=bicubic"


def run_decoder(path, command, out=None):
    """Run a decoder whose standard output is the open file `out`; returns (messages, exit status).

    Kills it, and raises BadVideo, where nothing has been written for TIME_LIMIT seconds.
    """
    # A session of its own, so that all of it can be killed, and Ctrl-C reaches this process alone.
    files = {"stdin": subprocess.DEVNULL, "stdout": out or subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **files, start_new_session=True)
    written, since = 0, time.monotonic()
    try:
        while True:
            try:
                messages = process.communicate(timeout=min(1.0, TIME_LIMIT))[1]
                return messages.decode(errors="replace"), process.returncode
            except subprocess.TimeoutExpired:
                size = os.fstat(out.fileno()).st_size if out else 0
                if size > written:
                    written, since = size, time.monotonic()
                elif time.monotonic() - since > TIME_LIMIT:
                    raise BadVideo(path, f"the decoder hangs: nothing for {TIME_LIMIT:.0f} s") from None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def check_readable(path):
    """BadVideo with the reason, where a path is not a file with something in it that may be read."""
    try:
        info = os.stat(path)
    except OSError as error:
        dangling = os.path.islink(path) and isinstance(error, FileNotFoundError)
        raise BadVideo(path, "a link to nowhere" if dangling else (error.strerror or "cannot be opened")) from None
    if not stat.S_ISREG(info.st_mode):
        raise BadVideo(path, "not a file")
    if info.st_size == 0:
        raise BadVideo(path, "empty")
    if not os.access(path, os.R_OK):
        raise BadVideo(path, "no permission to read it")


def explain(text):
    """The decoder's complaints -> one line for people."""
    if "matches no streams" in text:
        return NO_PICTURES
    if "not on whitelist" in text:
        return "not a video, but a play list or the like"
    lines = [re.sub(r"^(\[.*?\] )+", "", line).strip() for line in text.splitlines() if line.strip()]
    known = any("Invalid data found" in line or "moov atom" in line for line in lines)
    return "damaged, or not a video" if known or not lines else f"cannot be decoded ({lines[-1][:100]})"


def frame_files(directory):
    """The images of a directory of frames, in the order of their numbers."""
    names = [f for f in os.listdir(directory) if f.lower().endswith(IMAGE_SUFFIXES) and not f.startswith(".")]
    return [Path(directory, f) for f in sorted(names, key=natural)]


def image_size(path):
    """(width, height) of an image file. Raises BadVideo."""
    check_readable(path)
    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:  # whatever a damaged file makes the library raise
        raise BadVideo(path, bad_image(error)) from None


def bad_image(error):
    return f"a damaged image ({str(error)[:100] or type(error).__name__})"


def image_frames(path, size, start=0, last=None):
    """Frames start … last of a strip or a directory of frames, one after the other, each uint8 [size, size, 3].

    size None leaves them as they are, [H, W, 3]; so it does in the two readers below.
    """
    if video_kind(path) == "strip":
        yield from read_strip(path, size)[start:last]
    else:
        for file in frame_files(path)[start:last]:
            yield read_image(file, size)


def read_image(path, size):
    """One image as a frame, uint8 [size, size, 3]."""
    check_readable(path)
    try:
        with Image.open(path) as image:
            if size is None:
                return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
            image.draft("RGB", (size, size))  # JPEG: decode no larger than needed
            return np.asarray(
                ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (size, size), Image.Resampling.BICUBIC)
            )
    except Exception as error:
        raise BadVideo(path, bad_image(error)) from None


def read_strip(path, size):
    """All frames of a strip: uint8 [T, size, size, 3]."""
    check_readable(path)
    try:
        with Image.open(path) as image:
            short, long = sorted(image.size)
            size = size or short
            wide, image = image.width > image.height, image.convert("RGB")
            boxes = [(i, 0, i + short, short) if wide else (0, i, short, i + short) for i in range(0, long, short)]
            return np.stack([image.resize((size, size), Image.Resampling.BICUBIC, box) for box in boxes])
    except Exception as error:
        raise BadVideo(path, bad_image(error)) from None


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


def cut(frames, count, size):
    """Up to `count` frames, uint8 [n, H, W, 3] -> their tiles as clips [tiles, count, 3, size, size], row by row.

    What is beyond an edge repeats the edge; after the last frame it repeats the last frame.
    """
    n, height, width, _ = frames.shape
    clip = to_clip(np.pad(frames, ((0, count - n), (0, -height % size), (0, -width % size), (0, 0)), "edge"))
    clip = clip.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # [count, 3, rows, size, columns, size]
    return clip.permute(2, 4, 0, 1, 3, 5).flatten(0, 1)


def join(tiles, height, width):
    """Tiles [..., rows * columns, T, 3, size, size] -> clip [..., T, 3, height, width]; what `cut` added is cut off."""
    size = tiles.shape[-1]
    tiles = tiles.unflatten(-5, (math.ceil(height / size), math.ceil(width / size)))  # [..., rows, columns, T, 3, size, size]
    clip = tiles.movedim((-6, -5), (-4, -2))  # [..., T, 3, rows, size, columns, size]
    return clip.flatten(-2).flatten(-3, -2)[..., :height, :width]


def frame_range(text, count):
    """ "100:140" -> (100, 140), "" -> (0, count). UserError where the video has no such frames."""
    if not text:
        return 0, count
    numbers = text.split(":")
    first, last = (int(n) if n.isdigit() else -1 for n in numbers) if len(numbers) == 2 else (-1, -1)
    if not 0 <= first < last <= count:
        raise UserError(f"--frames {text}: the video has frames 0 to {count - 1}, 0:{count} is all")
    return first, last


def enlarge(frames, smallest=128):
    """Repeat pixels of small frames [T, H, W, 3] a whole number of times, so that a person can see them."""
    factor = max(1, smallest // frames.shape[1])
    return frames.repeat(factor, 1).repeat(factor, 2)


def mark(clip):
    """The clip [T, 3, H, W] with an orange edge: frames that were given, not made."""
    clip, edge = clip.clone(), max(1, clip.shape[-1] // 32)
    inside = F.pad(torch.ones(clip.shape[-2] - 2 * edge, clip.shape[-1] - 2 * edge, dtype=torch.bool), (edge,) * 4)
    return torch.where(inside, clip, torch.tensor([1.0, 0.2, -1.0])[:, None, None])


def write_mp4(path, clips, fps=12):
    """Clips [T, 3, H, W] of one video, H and W even, one behind the other as path.mp4 (H.264), small ones enlarged.

    clips may be a generator: each part is written as it comes, and a video of any length takes the memory of one.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    send(f"{path}.mp4", (enlarge(to_frames(clip)) for clip in clips), fps, quality=8, macro_block_size=2)


def write_video(path, clip, fps=12):
    """A clip [T, 3, H, W], H and W even, as path.mp4 (H.264) and path.gif, small ones enlarged."""
    write_mp4(path, [clip], fps)
    frames = enlarge(to_frames(clip))
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(f"{path}.gif", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)


def write_frames(path, parts, fps):
    """Frames in parts, each uint8 [n, H, W, 3], as one video at its own size; returns how many frames there are.

    .mkv is lossless (FFV1), .mp4 is H.264 that looks so. UserError for other suffixes and where it cannot be written.
    """
    codecs = {".mp4": ("libx264", ["-crf", "12"]), ".mkv": ("ffv1", [])}
    if Path(path).suffix.lower() not in codecs:
        raise UserError(f"{printable(path)}: name a file that ends in {' or '.join(codecs)}")
    make_parent(path)
    codec, settings = codecs[Path(path).suffix.lower()]
    try:
        return send(str(path), parts, fps, codec, quality=None, macro_block_size=1, output_params=settings)
    except OSError as error:
        raise UserError(f"cannot write {printable(path)}: {str(error).strip().splitlines()[0]}") from None


def send(path, parts, fps, codec="libx264", **options):
    """Frames in parts, each uint8 [n, H, W, 3], to ffmpeg, which writes the file `path`; returns how many frames there are.

    No part of a video stays where it does not come to its end.
    """
    writer, count = None, 0
    try:
        for part in parts:
            if writer is None:
                height, width = part.shape[1:3]
                pixels = "gbrp" if codec == "ffv1" else "yuv420p" if height % 2 == width % 2 == 0 else "yuv444p"
                options |= {"fps": fps, "codec": codec, "pix_fmt_out": pixels, "ffmpeg_log_level": "error"}
                writer = imageio_ffmpeg.write_frames(path, (width, height), **options)
                writer.send(None)
            for frame in part:
                writer.send(np.ascontiguousarray(frame))
            count += len(part)
        writer.close()
    except BaseException:
        if writer:
            writer.close()
            Path(path).unlink(missing_ok=True)
        raise
    return count


def write_sheet(path, rows, titles=None, columns=8):
    """A contact sheet as PNG: rows are videos [T, 3, H, W], columns are frames spread over each; titles stand to the left."""
    strips = []
    for clip in rows:
        picks = np.linspace(0, len(clip) - 1, min(columns, len(clip))).round().astype(int)
        strips.append(np.concatenate(list(enlarge(to_frames(clip[picks]), 64)), 1))  # [H, columns * W, 3]
    height, margin = strips[0].shape[0], 0
    if titles:
        titles = [" ".join(printable(title).split()) for title in titles]
        size = max(14, height // 6)  # a sheet of large frames is shown smaller
        font = ImageFont.truetype(plot.font_file(), size)
        margin = math.ceil(max(font.getlength(title) for title in titles)) + size
    image = Image.new("RGB", (margin + max(s.shape[1] for s in strips), len(strips) * (height + 2)), "white")
    draw = ImageDraw.Draw(image)
    for i, strip in enumerate(strips):
        image.paste(Image.fromarray(strip), (margin, i * (height + 2)))
        if titles:
            draw.text((margin - size // 2, i * (height + 2) + height // 2), titles[i], "black", font, "rm")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
