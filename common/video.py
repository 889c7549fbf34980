"""Video files: any of them as frames, and frames as files that people can watch.

Frames are uint8 [T, H, W, 3], as in files; a clip is float32 [T, 3, H, W] in [-1, 1], as in networks.

PyAV decodes in order, and frame k is the k-th that comes out of the decoder: no rate, no time and no header has a part in it.
Readers scale the shorter side to the size that is asked for and cut out the centre, or leave frames at their own size (size
None), with rotation and pixel aspect as players show them.
"""

import collections
import contextlib
import errno
import itertools
import math
import os
import re
import stat
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common import plot
from common.utils import UserError, printable, whole

# In the order in which files of one name are taken: a GIF beside an MP4 is a preview.
VIDEO_SUFFIXES = tuple(
    ".mp4 .m4v .mov .qt .avi .divx .mkv .webm .y4m .ogv .ogg .ogm .ts .m2ts .mts .mpg .mpeg .m1v .m2v .vob .3gp .3g2 .wmv .asf "
    ".flv .f4v .mxf .dv .ivf .h264 .264 .hevc .h265 .265 .mjpeg .mjpg .gif".split()
)
IMAGE_SUFFIXES = (".png", ".apng", ".webp", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
SUFFIXES = VIDEO_SUFFIXES + IMAGE_SUFFIXES
# Containers that hold pictures themselves; play lists, which make a decoder open other files and addresses, are not among them.
SAFE = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,avi,matroska,webm,yuv4mpegpipe,ogg,mpegts,mpeg,mpegvideo,asf,flv,mxf,dv,ivf,"
    "h264,hevc,m4v,mjpeg,gif",
}
NOTHING = "damaged, or not a video"
MAX_PIXELS = 2**27  # of one frame; more is a file that is made to fill the memory
PQ, HLG = 16, 18  # transfer functions of high dynamic range (ITU-T H.273)
TO_BT709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])  # of BT.2020's RGB
TURNED = {(1, 0): 0, (0, -1): 1, (-1, 0): 2, (0, 1): 3}  # first row of a display matrix -> quarter turns to the left


class BadVideo(UserError):
    """A file that gives no frames: path and reason, on one line."""

    def __init__(self, path, reason):
        super().__init__(f"{printable(path)}: {reason}")
        self.reason = reason


# ---------------------------------------------------------------------------------------------------------- finding videos


def list_videos(root):
    """All videos under a directory: (paths in order, notes on what was left out, a line each).

    A path is a video file, a directory of frames, or an animated image; all that differ in their suffix are one video. Links
    are followed, once. Hidden files are left out in silence; stills beside videos are thumbnails.
    """
    left_out, above = collections.Counter(), {os.fspath(root): {os.path.realpath(root)}}  # a link may lead back up
    found = collections.defaultdict(list)  # path without a suffix -> (rank, path, kind) of all that are of this name
    unreadable = lambda error: left_out.update([f"folders that cannot be read ({error.strerror})"])  # noqa: E731
    for directory, folders, files in os.walk(root, onerror=unreadable, followlinks=True):
        real = {f: os.path.realpath(os.path.join(directory, f)) for f in folders}
        ours = {f for f in folders if os.path.isfile(os.path.join(directory, f, "losses.csv"))}  # a training's sheets
        folders[:] = sorted(f for f in folders if f[0] != "." and f not in ours and real[f] not in above[directory])
        above |= {os.path.join(directory, f): above[directory] | {real[f]} for f in folders}
        paths = [Path(directory, f) for f in sorted(files, key=natural) if not f.startswith(".")]
        own, images = ([p for p in paths if p.suffix.lower() in kind] for kind in (VIDEO_SUFFIXES, IMAGE_SUFFIXES))
        for path in (p for p in paths if p.suffix.lower() not in SUFFIXES):
            left_out[f"files {printable(path.suffix) or 'without a suffix'}"] += 1
        if images and is_animated(images[0]):
            own += images
        elif len(images) > 1 and not own:
            found[directory].append((len(SUFFIXES), Path(directory), "folders of frames"))
        elif images:
            left_out["still images, too few for a video or beside videos"] += len(images)
        for path in own:
            found[os.fspath(path.with_suffix(""))].append((SUFFIXES.index(path.suffix.lower()), path, f"files {path.suffix}"))
    for (_, first, _), *again in map(sorted, found.values()):
        left_out.update(f"{kind} beside a {first.suffix} of the same name" for *_, kind in again)
    videos = sorted((min(names)[1] for names in found.values()), key=str)
    return videos, [f"{count} {what}" for what, count in sorted(left_out.items())]


def natural(name):
    """A sorting key that puts frame_2 before frame_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def frame_files(directory):
    """The images of a directory of frames, in the order of their numbers."""
    names = [f for f in os.listdir(directory) if f.lower().endswith(IMAGE_SUFFIXES) and not f.startswith(".")]
    return [Path(directory, f) for f in sorted(names, key=natural)]


def is_animated(path):
    with contextlib.suppress(BadVideo), image_of(path) as image:
        return getattr(image, "n_frames", 1) > 1


# --------------------------------------------------------------------------------------------------------- files to frames


# What the header of a video says, true or not; fps is 0 for images, width and height are as stored.
Info = collections.namedtuple("Info", "frames fps width height")


def probe(path):
    """The Info of a video. Raises BadVideo."""
    if is_images(path):
        files = frame_files(path) if os.path.isdir(path) else []
        with image_of(files[0] if files else path) as image:
            return Info(len(files) or getattr(image, "n_frames", 1), 0.0, *image.size)
    with opened(path) as (container, stream):
        fps = float(stream.average_rate or stream.base_rate or 25)
        seconds = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
        return Info(stream.frames or round(seconds * fps), fps, stream.width, stream.height)


def count_frames(path):
    """How many frames a video has: a file is decoded, since headers err. Raises BadVideo."""
    if is_images(path):
        return probe(path).frames
    with opened(path) as (container, stream):
        if count := sum(1 for _ in decoded(path, container, stream)):
            return count
    raise BadVideo(path, NOTHING)


def read_frames(path, size, start=0, count=None):
    """Frames of a video, from number start on, uint8 [up to count, size, size, 3]; all of them without a count.

    size None gives whole frames at their own size, [up to count, H, W, 3]. Fewer frames than count come where the video ends.
    Raises BadVideo where there are none.
    """
    frames = list(iterate(path, size, start, None if count is None else start + count))
    if not frames:
        raise BadVideo(path, f"it ends before frame {start}" if start else NOTHING)
    if len({frame.shape for frame in frames}) > 1:
        raise BadVideo(path, "its frames have different sizes")
    return np.stack(frames)


def iterate(path, size, start=0, stop=None):
    """The frames of read_frames one by one, uint8 [size, size, 3] each. Raises BadVideo."""
    if os.path.isdir(path):
        yield from (read_image(file, size) for file in frame_files(path)[start:stop])
    elif is_images(path):
        with image_of(path) as image:
            for k in range(getattr(image, "n_frames", 1))[start:stop]:
                image.seek(k)
                yield picture(image, size)
    else:
        with opened(path) as (container, stream):
            frames = itertools.islice(decoded(path, container, stream), start, stop)
            yield from scaled(path, frames, size, float(stream.sample_aspect_ratio or 1))


def is_images(path):
    return os.path.isdir(path) or str(path).lower().endswith(IMAGE_SUFFIXES)


@contextlib.contextmanager
def opened(path):
    """(container, its stream of pictures) of a video file. Raises BadVideo."""
    check_readable(path)
    try:
        container = av.open(f"file:{Path(path).absolute()}", options=SAFE, metadata_errors="replace")
    except (av.FFmpegError, OSError) as error:
        known = {av.error.ArgumentError: "not a video, but a play list or the like", av.error.InvalidDataError: NOTHING}
        raise BadVideo(path, known.get(type(error)) or error.strerror or str(error)) from None
    with container:
        cover = av.stream.Disposition.attached_pic
        stream = next((s for s in container.streams.video if s.codec_context and not s.disposition & cover), None)
        if stream is None:
            raise BadVideo(path, "it has no pictures")
        if stream.width * stream.height > MAX_PIXELS:
            raise BadVideo(path, f"its frames of {stream.width} x {stream.height} are too large")
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        stream.codec_context.thread_count = 1  # whoever reads many files has a thread for each
        yield container, stream


def decoded(path, container, stream):
    """The frames of a video as PyAV has them, in the order in which they are shown; damaged packets are passed over."""
    packets, packet = container.demux(stream), stream
    while packet is not None:
        frames = []
        try:
            packet = next(packets, None)
            frames = stream.decode(packet)  # None brings what the decoder still holds, also where the file was cut off
        except av.FFmpegError as error:
            if error.errno in (errno.EIO, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT):  # not the file's fault
                raise BadVideo(path, error.strerror) from None
        yield from frames


def scaled(path, frames, size, aspect):
    """PyAV's frames, with pixels of this aspect, as arrays: uint8 [size, size, 3], or [H, W, 3] where size is None."""
    graph = before = None
    for frame in frames:
        hdr = int(frame.color_trc) in (PQ, HLG)
        looks = (frame.width, frame.height, frame.format.name, int(frame.colorspace), int(frame.color_range), hdr)
        try:
            if looks != before:
                graph, before = scaler(*looks, size, aspect), looks
            graph.push(frame)
            image = graph.pull().to_ndarray()
        except (av.FFmpegError, ValueError) as error:
            raise BadVideo(path, f"cannot be scaled ({error})") from None
        yield upright(to_sdr(image, int(frame.color_trc)) if hdr else image, frame)


def scaler(width, height, pixels, colours, levels, hdr, size, aspect):
    """A graph of filters from frames of this kind to RGB: the square in the middle, as it is seen, or all."""
    aspect = aspect if 1 / 16 < aspect < 16 else 1
    shape = f"{size}:{size}" if size else f"{round(width * aspect)}:{height}"
    graph = av.filter.Graph()
    graph.threads = 1
    source = f"video_size={width}x{height}:pix_fmt={pixels}:time_base=1/25:colorspace={colours}:range={levels}"
    chain = [graph.add("buffer", source), graph.add("scale", f"{shape}:flags=bicubic")]
    if size:
        chain.insert(1, graph.add("crop", f"{min(width, height / aspect)}:{min(height, width * aspect)}:exact=1"))
    chain += [graph.add("format", "rgb48le" if hdr else "rgb24"), graph.add("buffersink")]
    graph.link_nodes(*chain).configure()
    return graph


def to_sdr(image, transfer):
    """16 bits of BT.2020, PQ or HLG (ITU-R BT.2100) -> 8 bits of BT.709: white, 203 cd/m², is 255, and what is brighter too."""
    x = image / 65535
    if transfer == PQ:
        power = x ** (1 / 78.84375)
        light = 10_000 * (np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (1 / 0.1593017578125)
    else:  # for a screen of 1000 cd/m²
        scene = np.where(x <= 0.5, x**2 / 3, (np.exp((x - 0.55991073) / 0.17883277) + 0.28466892) / 12)
        light = 1000 * scene * (scene @ [0.2627, 0.6780, 0.0593])[..., None] ** 0.2
    return (255 * (light / 203 @ TO_BT709.T).clip(0, 1) ** (1 / 2.4)).round().astype(np.uint8)


def upright(image, frame):
    """A frame [H, W, 3], mirrored and turned as the file's display matrix has it."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    a, b, _, c, d = np.sign(np.frombuffer(matrix, np.int32)[:5]).tolist()
    if a * d - b * c < 0:
        image, a, b = image[:, ::-1], -a, -b
    return np.rot90(image, TURNED.get((a, b), 0))


def check_readable(path):
    """BadVideo with the reason, where a path is not a file with something in it."""
    try:
        info = os.stat(path)
    except OSError as error:
        raise BadVideo(path, error.strerror or "cannot be opened") from None
    if not (stat.S_ISREG(info.st_mode) and info.st_size):
        raise BadVideo(path, "empty" if stat.S_ISREG(info.st_mode) else "not a file")


@contextlib.contextmanager
def image_of(path):
    """A PIL image of a file, inside a `with`; whatever a damaged one makes the library raise becomes BadVideo."""
    check_readable(path)
    try:
        with Image.open(path) as image:
            yield image
    except BadVideo:
        raise
    except Exception as error:
        raise BadVideo(path, f"a damaged image ({str(error)[:100] or type(error).__name__})") from None


def read_image(path, size):
    """One image as a frame, uint8 [size, size, 3], or [H, W, 3] where size is None. Raises BadVideo."""
    with image_of(path) as image:
        if size:
            image.draft("RGB", (size, size))  # JPEG: decode no larger than needed
        return picture(image, size)


def picture(image, size):
    if image.mode == "F" or image.mode == "I" and image.format != "PNG":
        raise BadVideo(image.filename, f"its depth is not read (mode {image.mode})")
    if image.mode.startswith("I"):  # 16 bits, of which PIL would keep the lower ones
        image = Image.fromarray((np.asarray(image).astype(np.int64) // 257).astype(np.uint8))
    image = ImageOps.exif_transpose(image).convert("RGB")
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC) if size else image)


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
    """Repeat pixels of small frames [T, H, W, 3] a whole number of times, so that a person can see them."""
    factor = max(1, smallest // frames.shape[1])
    return frames.repeat(factor, 1).repeat(factor, 2)


def mark(clip):
    """The clip [T, 3, H, W] with an orange edge: frames that were given, not made."""
    clip, edge = clip.clone(), max(1, clip.shape[-1] // 32)
    inside = F.pad(torch.ones(clip.shape[-2] - 2 * edge, clip.shape[-1] - 2 * edge, dtype=torch.bool), (edge,) * 4)
    return torch.where(inside, clip, torch.tensor([1.0, 0.2, -1.0])[:, None, None])


def write_mp4(path, clips, fps=12):
    """Clips [T, 3, H, W] of one video, one behind the other as path.mp4 (H.264), small ones enlarged. Raises UserError.

    clips may be a generator: each part is written as it comes, and a video of any length takes the memory of one.
    """
    write_frames(f"{path}.mp4", (enlarge(to_frames(clip)) for clip in clips), fps, crf=10)


def write_video(path, clip, fps=12):
    """A clip [T, 3, H, W] as path.mp4 (H.264) and path.gif, small ones enlarged. Raises UserError."""
    write_mp4(path, [clip], fps)
    images = [Image.fromarray(frame) for frame in enlarge(to_frames(clip))]
    with whole(f"{path}.gif") as part:
        images[0].save(part, "GIF", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)


def write_frames(path, parts, fps, crf=12):
    """Frames in parts, each uint8 [n, H, W, 3], as one video at its own size; returns how many frames there are.

    .mkv is lossless (FFV1), .mp4 is H.264 of quality crf. UserError for other suffixes and where it cannot be written.
    """
    kinds = {".mp4": ("mp4", "libx264", {"crf": str(crf)}), ".mkv": ("matroska", "ffv1", {})}
    if Path(path).suffix.lower() not in kinds:
        raise UserError(f"{printable(path)}: name a file that ends in {' or '.join(kinds)}")
    container, codec, options = kinds[Path(path).suffix.lower()]
    stream, count = None, 0
    with whole(path, av.FFmpegError) as part:
        with av.open(f"file:{part.absolute()}", "w", format=container) as out:
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
        with av.open(f"file:{part.absolute()}") as written:
            if (found := sum(packet.size > 0 for packet in written.demux(video=0))) != count:
                raise UserError(f"cannot write {printable(path)}: {found} of {count} frames were written")
    return count


def write_sheet(path, rows, titles=None, columns=8):
    """A contact sheet as PNG: rows are videos [T, 3, H, W], columns are frames spread over each; titles stand to the left."""
    strips = []
    for clip in rows:
        picks = np.linspace(0, len(clip) - 1, min(columns, len(clip))).round().astype(int)
        strips.append(np.concatenate(list(enlarge(to_frames(clip[picks]), 64)), 1))  # [H, columns * W, 3]
    height, margin = strips[0].shape[0], 0
    if titles:
        titles = [printable(" ".join(title.split())) for title in titles]
        size = max(14, height // 6)  # a sheet of large frames is shown smaller
        font = ImageFont.truetype(plot.font_file(), size)
        margin = math.ceil(max(font.getlength(title) for title in titles)) + size
    image = Image.new("RGB", (margin + max(s.shape[1] for s in strips), len(strips) * (height + 2)), "white")
    draw = ImageDraw.Draw(image)
    for i, strip in enumerate(strips):
        image.paste(Image.fromarray(strip), (margin, i * (height + 2)))
        if titles:
            draw.text((margin - size // 2, i * (height + 2) + height // 2), titles[i], "black", font, "rm")
    with whole(path) as part:
        image.save(part, "PNG")
