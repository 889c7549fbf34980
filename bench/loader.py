"""How fast clips come to a training: `python -m bench.loader clips`, one table. .nerv files against H.264, RAM and disk.

The same videos (--data-dir, or moving shapes) as .nerv files by codec.Loader, as H.264 files by PyAV where it is installed and
by ffmpeg, each with one thread on every core, and as raw frames in memory and on disk. What comes out is the same each time:
float32 clips [T, 3, R, R] in [-1, 1], and nothing is transposed for it. H.264 comes in two ways: whole files from the first
frame to the last, which is the fastest that it can be read, and clips in random order, as all others come, out of files with
a key frame at the start of each clip.
"""

import itertools
import os
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import codec
import data
from bench.data import compare
from common import checkpoints, rivals, utils, video
from common.tables import table
from common.utils import option


@dataclass
class Config:
    data_dir: str = option("what", "", "folder of videos, of which those to train on are taken; default: moving shapes")
    ckpt: str = option("what", "", "checkpoint of `codec.py train`; default: preset fastnerv, untrained, which is as fast")
    videos: int = option("what", 16, "so many videos")
    frames: int = option("what", 64, "at most so many frames of each")
    crf: list = option("what", [23, 40], "constant qualities of the H.264 files", nargs="+", type=int)
    batch_size: int = option("what", 16, "clips per batch")
    repeats: int = option("what", 5, "measurements, in turns")


def untrained(path):
    """A checkpoint of preset fastnerv as `train` would begin: how fast it is does not depend on what it knows."""
    torch.manual_seed(0)
    model = codec.Codec(codec.CodecConfig(), codec.ENCODERS["fastnerv"])
    fields = {"codec_config": vars(model.config), "encoder_config": vars(model.vit_config), "ema": model.state_dict()}
    torch.save({"format": checkpoints.FORMAT, "stage": "codec", "config": {"rate": 0.0}, **fields}, path)
    return path


def read(config, size):
    """uint8 videos [F, size, size, 3]."""
    if not config.data_dir:
        drawn = data.Shapes(resolution=size, num_frames=config.frames)
        return [np.asarray(drawn[i][0]) for i in range(config.videos)]
    paths = [path for path, _ in data.find_folder(Path(config.data_dir), "train", 0)[1]]
    return [video.read_frames(path, size, 0, config.frames) for path in paths[: config.videos]]


def pyav_is_there():
    try:
        import av  # noqa: F401
    except ImportError:
        print("PyAV is not installed, and not measured")
        return False
    return True


def h264(frames, crf, path, more):
    """Frames, uint8 [F, H, W, 3], as an MP4 of x264's, by the preset that is common; returns its path."""
    _, height, width, _ = frames.shape
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", "25", "-i", "pipe:0"]
    encoder = ["-c:v", "libx264", "-crf", str(crf), "-pix_fmt", "yuv420p", *more, path]
    rivals.ffmpeg([*source, *encoder], "encode H.264", np.ascontiguousarray(frames).tobytes())
    return path


def planes(frame):
    """A frame of PyAV's as uint8 [3, H, W]."""
    found = [
        np.frombuffer(p, np.uint8).reshape(p.height, p.line_size)[:, : p.width] for p in frame.reformat(format="gbrp").planes
    ]
    return np.stack([found[2], found[0], found[1]])


def pyav(path, length, first=None):
    """A file's clips, or the one that begins at frame `first`, [N, T, 3, H, W]; on one thread, without Python's lock."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        if first:
            container.seek(int(first / stream.average_rate / stream.time_base), stream=stream)
        frames = itertools.islice(container.decode(stream), None if first is None else length)
        return to_clips(np.stack([planes(frame) for frame in frames]), length)


def ffmpeg(path, length, size):
    planar = ["-f", "rawvideo", "-pix_fmt", "gbrp", "pipe:1"]
    out = rivals.ffmpeg(["-threads", "1", "-i", path, *planar], "decode H.264")
    return to_clips(np.frombuffer(bytearray(out), np.uint8).reshape(-1, 3, size, size), length)[:, :, [2, 0, 1]]


def to_clips(frames, length):
    """uint8 [F, 3, H, W] -> [N, T, 3, H, W] in [-1, 1], of the whole clips."""
    frames = torch.from_numpy(frames[: len(frames) // length * length])
    return frames.float().div_(127.5).sub_(1).unflatten(0, (-1, length))


def on_all_cores(function, jobs):
    """function(*job) -> clips, of all jobs, as many at a time as there are cores; returns how many frames came."""
    with ThreadPoolExecutor(utils.cores()) as pool:
        return sum(len(clips) * clips.shape[1] for clips in pool.map(lambda job: function(*job), jobs))


def raw(videos, length, batch_size, order):
    """Random clips of arrays, in memory or mapped from disk, as batches."""
    where, count = order.permutation(places(videos, length)), 0
    for few in (where[k : k + batch_size] for k in range(0, len(where), batch_size)):
        count += to_clips(np.concatenate([videos[i][first : first + length] for i, first in few]), length).shape[0] * length
    return count


def places(videos, length):
    """[(number of a video, first frame)] of all clips."""
    return [(i, first) for i, frames in enumerate(videos) for first in range(0, len(frames) - length + 1, length)]


def from_disk(paths, shapes, length, batch_size, order):
    """The same from files that the system was asked to forget."""
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return raw([np.memmap(p, np.uint8, "r", shape=s) for p, s in zip(paths, shapes)], length, batch_size, order)


def ours(loader):
    """A pass over the clips of codec.Loader."""
    indices = data.Stream(len(loader), loader.batch_size)
    batches = itertools.islice(indices, len(loader) // loader.batch_size)
    return sum(len(clips) for clips in map(loader.batch, batches)) * loader.codec.config.num_frames


@torch.no_grad()
def clips(config):
    """Frames a second of each way, and what the files take; the encoder of .nerv is not timed."""
    rows, order = [], np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        (directory / "nerv").mkdir()
        ckpt = config.ckpt or untrained(directory / "untrained.pt")
        _, model, _ = codec.open_codec(codec.Decode(str(ckpt)))
        size, T = model.config.resolution, model.config.num_frames
        videos, sizes, runs = read(config, size), {}, {}
        planar = [np.ascontiguousarray(np.moveaxis(frames, 3, 1)) for frames in videos]
        for i, frames in enumerate(videos):
            codec.write_video(directory / "nerv" / f"{i}.nerv", model, frames, 25.0, [6], 1.0, 0, 0.0, 16, quiet=True)
            planar[i].tofile(directory / f"{i}.raw")
        for name, bf16 in (("codec.Loader", "off"), ("codec.Loader, bfloat16", "on")):
            loader = codec.Loader(directory / "nerv", str(ckpt), min(config.batch_size, len(videos)), device="cpu", bf16=bf16)
            sizes[name] = sum(path.stat().st_size for path in (directory / "nerv").iterdir())
            runs[name] = lambda loader=loader: ours(loader)
        first, second = (runs[name].__defaults__[0].batch([0]) for name in sizes)
        for crf in config.crf:
            files = {}
            for kind, more in (("", []), (", random", ["-x264-params", f"keyint={T}:scenecut=0"])):
                files[kind] = [h264(frames, crf, directory / f"{i}{kind}-{crf}.mp4", more) for i, frames in enumerate(videos)]
            ways = {"ffmpeg": (partial(ffmpeg, length=T, size=size), "", [(path,) for path in files[""]])}
            if pyav_is_there():
                ways["PyAV"] = partial(pyav, length=T), "", ways["ffmpeg"][2]
                jobs = [(files[", random"][i], T, first) for i, first in order.permutation(places(videos, T)).tolist()]
                ways["PyAV, random clips"] = pyav, ", random", jobs
            for name, (way, kind, jobs) in ways.items():
                runs[f"H.264, crf {crf}, {name}"] = partial(on_all_cores, way, jobs)
                sizes[f"H.264, crf {crf}, {name}"] = sum(path.stat().st_size for path in files[kind])
        runs["raw, in memory"] = lambda: raw(planar, T, config.batch_size, order)
        paths, shapes = [directory / f"{i}.raw" for i in range(len(videos))], [frames.shape for frames in planar]
        runs["raw, on disk"] = lambda: from_disk(paths, shapes, T, config.batch_size, order)
        rates = compare(runs, config.repeats)
    total, fastest = sum(map(len, videos)), max(statistics.median(v) for n, v in rates.items() if n.startswith("H.264"))
    for name, values in rates.items():
        middle, took = statistics.median(values), sizes.get(name, sum(frames.nbytes for frames in videos))
        spread = f"{min(values):.0f} to {max(values):.0f}"
        rows.append([name, f"{middle:.0f}", spread, f"{middle / fastest:.2f}", f"{took / total:.0f}"])
    table(["what", "frames / s", "range", "against the fastest H.264", "bytes a frame"], rows)
    far = 10 * np.log10(4 / (first - second).square().mean().clamp_min(1e-10).item())
    what = "untrained" if not config.ckpt else "of the checkpoint"
    print(f"{len(videos)} videos, {total} frames of {size} x {size}, {torch.get_num_threads()} threads, model {what}")
    print(f"bfloat16 is {far:.1f} dB from float32")


TOPICS = {"clips": clips}


def main():
    topic, config = utils.parse_topic(Config, __doc__, TOPICS)
    topic(config)


if __name__ == "__main__":
    utils.run(main)
