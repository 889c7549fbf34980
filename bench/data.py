"""How fast and how safely data come in: `python -m bench.data loader | prepare | hour | fuzz`, one table each.

loader     clips per second from the cache, against a plain copy of the same bytes
prepare    decoding a folder of MP4s (--data-dir) into the cache, against plain ffmpeg and, where it is installed, PyAV
hour       time and memory that preparing an hour of 1080p takes
fuzz       damaged variants of the videos in --data-dir, prepared and read clip by clip
"""

import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import imageio_ffmpeg
import numpy as np

import data
from common import cache, utils, video
from common.tables import table
from common.utils import UserError, option


@dataclass
class Config:
    data_dir: str = option("what", "", "folder of videos, of prepare and fuzz")
    resolution: int = option("what", 128, "height and width of the frames")
    batch_size: int = option("what", 32, "clips per batch, of loader")
    repeats: int = option("what", 7, "measurements, in turns with those of the reference")
    variants: int = option("what", 240, "damaged files, of fuzz")


def compare(runs, repeats):
    """Call each of runs {name: function -> amount of work} in turns; {name: work per second of each call}."""
    rates = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            work = run()
            rates[name].append(work / (time.perf_counter() - start))
    return rates


def rows_of(rates, reference, unit):
    """Table rows: median, spread, and the ratio to the reference within each turn, median and spread too."""
    for name, values in rates.items():
        ratio = [a / b for a, b in zip(values, rates[reference])]
        yield [
            name, f"{statistics.median(values):.1f} {unit}", f"{min(values):.1f} to {max(values):.1f}",
            f"{statistics.median(ratio):.2f}", f"{min(ratio):.2f} to {max(ratio):.2f}",
        ]  # fmt: skip


HEADER = ["what", "median", "range", "against the reference", "range"]


def loader(config):
    """16-frame clips out of a cache of 64 videos of 64 frames, in the order of a training."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "videos"
        for i in range(64):
            shapes = data.Shapes(resolution=config.resolution, num_frames=64)
            video.write_video(root / f"{i}", video.to_clip(shapes[i][0]))
            (root / f"{i}.gif").unlink()
        settings = data.Config("folder", str(root), resolution=config.resolution, cache="on", cache_dir=f"{directory}/cache")
        dataset = data.open_dataset(settings, "train")
        batches = data.endless(dataset, data.Stream(len(dataset), config.batch_size))
        shape = (config.batch_size, settings.num_frames, config.resolution, config.resolution, 3)
        # The reference reads as much memory as the cache is large, so that it finds no more in the processor's caches.
        source = np.random.default_rng(0).integers(0, 255, (16, *shape), np.uint8)
        target = [np.zeros(shape, np.uint8) for _ in range(2)]
        for _ in range(20):
            next(batches)

        def load():
            for _ in range(32):
                next(batches)
            return 32 * config.batch_size

        def copy():
            for i in range(32):
                target[i % 2][...] = source[i % 16]
            return 32 * config.batch_size

        rates = compare({"a copy of the same bytes": copy, "the loader": load}, config.repeats)
    table(HEADER, rows_of(rates, "a copy of the same bytes", "clips / s"))


# The same frames with the least that does it: one ffmpeg a file, or PyAV's bindings to the same libraries, on every core.


def plain_ffmpeg(job):
    path, size, out = job
    filters = f"crop='min(iw,ih)':'min(iw,ih)',scale={size}:{size}:flags=bicubic"
    exe = imageio_ffmpeg.get_ffmpeg_exe()
    command = [exe, "-y", "-v", "error", "-nostdin", "-threads", "1", "-i", path, "-vf", filters]
    subprocess.run([*command, "-f", "rawvideo", "-pix_fmt", "rgb24", out], check=True)


def plain_pyav(job):
    import av

    path, size, out = job
    with av.open(str(path)) as container, open(out, "wb") as f:
        stream = container.streams.video[0]
        stream.thread_count = 1
        graph, chain = av.filter.Graph(), []
        chain.append(graph.add_buffer(template=stream))
        chain.append(graph.add("crop", "'min(iw,ih)':'min(iw,ih)'"))
        chain.append(graph.add("scale", f"{size}:{size}:flags=bicubic"))
        chain += [graph.add("format", "rgb24"), graph.add("buffersink")]
        for a, b in zip(chain[:-1], chain[1:]):
            a.link_to(b)
        graph.configure()
        for frame in container.decode(stream):
            graph.push(frame)
            plane = graph.pull().planes[0]
            f.write(np.frombuffer(plane, np.uint8).reshape(size, plane.line_size)[:, : 3 * size].tobytes())


def prepare(config):
    """Videos per second into the cache, hashes and index included; a new cache each time."""
    paths, cores, size = video.list_videos(config.data_dir)[0], utils.cores(), config.resolution
    if not paths:
        raise UserError("name a folder of videos with --data-dir")
    with tempfile.TemporaryDirectory() as directory:
        directory, turn = Path(directory), iter(range(10**6))

        def jobs():  # new files each time, here too
            place = directory / f"plain{next(turn)}"
            place.mkdir()
            return [(path, size, place / f"{i}.raw") for i, path in enumerate(paths)]

        def ours():
            cache.prepare(directory / f"cache{next(turn)}", config.data_dir, paths, size)
            return len(paths)

        def ffmpeg():
            with ThreadPoolExecutor(cores) as pool:
                list(pool.map(plain_ffmpeg, jobs()))
            return len(paths)

        runs = {"plain ffmpeg": ffmpeg, "data.py --prepare": ours}
        try:
            import av  # noqa: F401

            pool = ProcessPoolExecutor(cores, get_context("forkserver"))
            list(pool.map(plain_pyav, jobs()))  # its processes are there before the clock starts
            runs["plain PyAV"] = lambda: len(list(pool.map(plain_pyav, jobs())))
        except ImportError:
            print("PyAV is not installed, and not measured")
        rates = compare(runs, config.repeats)
        opened, plain, same = cache.FrameCache(next(directory.glob("cache*"))), next(directory.glob("plain*")), 0
        for i, path in enumerate(paths):
            frames = opened.frames(os.path.relpath(path, config.data_dir))
            same += abs(frames.astype(int) - np.fromfile(plain / f"{i}.raw", np.uint8).reshape(frames.shape)).max() <= 1
    fastest = max((name for name in rates if name.startswith("plain")), key=lambda name: statistics.median(rates[name]))
    table(HEADER, rows_of(rates, fastest, "videos / s"))
    print(f"reference: {fastest}; frames of {same} of {len(paths)} videos are the same to one grey level")


def hour(config):
    """A minute of test pattern and noise, 1080p, 25 frames a second, 5 Mbit/s, put behind itself sixty times."""
    exe = imageio_ffmpeg.get_ffmpeg_exe()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "videos"
        root.mkdir()
        pattern = "testsrc2=size=1920x1080:rate=25:duration=60,noise=alls=8:allf=t"
        fast = ["-c:v", "libx264", "-preset", "veryfast", "-b:v", "5M", "-pix_fmt", "yuv420p"]
        subprocess.run([exe, "-v", "error", "-f", "lavfi", "-i", pattern, *fast, f"{directory}/minute.mp4"], check=True)
        loop = [exe, "-v", "error", "-stream_loop", "59", "-i", f"{directory}/minute.mp4", "-c", "copy", str(root / "hour.mp4")]
        subprocess.run(loop, check=True)
        code = "import sys; from common import cache; "
        code += "cache.prepare(sys.argv[1], sys.argv[2], [sys.argv[2] + '/hour.mp4'], int(sys.argv[3])); "
        code += "import resource as r; print(*(r.getrusage(k).ru_maxrss for k in (r.RUSAGE_SELF, r.RUSAGE_CHILDREN)))"
        start = time.time()
        command = [sys.executable, "-c", code, f"{directory}/cache", str(root), str(config.resolution)]
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True, check=True)
        seconds, frames = time.time() - start, len(cache.FrameCache(f"{directory}/cache").frames("hour.mp4"))
        own, decoder = (int(x) / 2**20 for x in done.stdout.split())
        size = os.path.getsize(root / "hour.mp4") / 2**30
    table(
        ["video", "frames", "time", "memory of Python", "of the decoder", "together"],
        [[f"1 h, 1920 x 1080, {size:.2f} GiB", frames, f"{seconds:.0f} s ({frames / seconds:.0f} frames / s)",
          f"{own:.2f} GiB", f"{decoder:.2f} GiB", f"{own + decoder:.2f} GiB"]],
    )  # fmt: skip


def damaged(content, rng):
    """Bytes with some of them changed, or cut off, or both."""
    content = bytearray(content)
    kind = rng.choice(["flipped", "cut", "both"])
    if kind != "cut":
        for _ in range(rng.choice([1, 10, 100, 1000, 10000])):
            content[rng.randrange(len(content))] = rng.randrange(256)
    if kind != "flipped":
        first = rng.choice([0, 0, 0, rng.randrange(len(content))])
        content = content[first : rng.randrange(first, len(content)) + 1]
    return bytes(content)


def fuzz(config):
    """Every variant goes through preparing, and through decoding as training does without a cache."""
    sources = [path for path in video.list_videos(config.data_dir)[0] if path.is_file()]
    if not sources:
        raise UserError("name a folder of videos with --data-dir")
    rng, outcomes = random.Random(0), {"prepared": Counter(), "read clip by clip": Counter()}
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "videos"
        root.mkdir()
        for i in range(config.variants):
            source = sources[i % len(sources)]
            (root / f"{i:04d}{source.suffix}").write_bytes(damaged(source.read_bytes(), rng))
        settings = data.Config("folder", str(root), resolution=32, num_frames=2, cache_dir=f"{directory}/cache")
        start, slowest = time.time(), 0.0
        for name, mode in (("prepared", "on"), ("read clip by clip", "off")):
            settings.cache = mode
            dataset = data.open_dataset(settings, "train")
            for i in range(len(dataset)):
                begin = time.time()
                dataset[i]
                slowest = max(slowest, time.time() - begin)
            skipped = dataset.cache.skipped if dataset.cache else dataset.bad
            outcomes[name].update(reason.split(" (")[0] for reason in skipped.values())
            outcomes[name]["gives frames"] = config.variants - len(skipped)
    kinds = sorted(set().union(*outcomes.values()), key=lambda k: -outcomes["prepared"][k])
    table(["outcome", *outcomes], [[kind, *(counts[kind] for counts in outcomes.values())] for kind in kinds])
    print(f"{config.variants} variants of {len(sources)} files in {time.time() - start:.0f} s, slowest clip {slowest:.1f} s")


TOPICS = {"loader": loader, "prepare": prepare, "hour": hour, "fuzz": fuzz}


def main():
    topic, config = utils.parse_topic(Config, __doc__, TOPICS)
    topic(config)


if __name__ == "__main__":
    utils.run(main)
