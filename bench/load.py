"""How fast videos load, as batches for training: from weights, from H.264 and from memory (FastNeRV, Fig. 9).

python -m bench.load --data-dir clips/train

Videos are 8 frames of 256 × 256. Weights and H.264 are decoded anew each time, from bytes in memory; the model is not trained,
which takes as long. All rows are measured in turns.
"""

import io
import itertools
import math
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import av
import numpy as np
import torch

import data
from bench.speed import measure, spread
from common import utils, video
from common.utils import option
from siblings import codec, rivals
from siblings.results import table
from siblings.videofile import VideoFile


@dataclass
class Config:
    videos: list = option("what", [1, 4, 16, 64], "in a batch", nargs="+", type=int)
    threads: list = option("what", [1, 2], "that decode", nargs="+", type=int)
    data_dir: str = option("what", "", "folder of videos; default: the built-in shapes")
    repeats: int = option("what", 5, "measurements, after one that is not counted")
    device: str = option("what", "auto", "cpu, cuda, cuda:1, …; auto: CUDA where there is one")


def h264(stream):
    """A raw stream -> frames uint8 [8, 256, 256, 3], as a loader decodes them."""
    with av.open(io.BytesIO(stream), format="h264") as file:
        file.streams.video[0].codec_context.thread_count = 1
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def main():
    config = utils.parse_options(Config, __doc__)
    utils.check_positive(config, "repeats")
    device, count = utils.pick_device(config.device), math.lcm(*config.videos)
    source = {"dataset": "folder", "data_dir": config.data_dir} if config.data_dir else {}
    clips = data.open_dataset(data.Config(**source, resolution=256, num_frames=8), "train")
    frames = np.stack([clips[i][0] for i in range(count)])  # uint8 [count, 8, 256, 256, 3]
    streams = [rivals.encode("x264", clip, 25, crf=40) for clip in frames]
    model = codec.Codec(codec.CodecConfig(), codec.ENCODERS["fastnerv"]).to(device).eval()
    with tempfile.TemporaryDirectory() as folder:
        untrained = {"config": {"degrade": "none", "rate": 0}}
        codec.write_video(frames.reshape(-1, 256, 256, 3), 25, f"{folder}/a.nerv", model, untrained, codec.BITS, 1.0, 0)
        file = VideoFile(f"{folder}/a.nerv", model, "")

    def of_streams(chosen, pool):
        return video.to_clip(np.stack(list(pool.map(h264, [streams[i] for i in chosen])))).to(device)

    def all_videos(threads, B, batch_of):
        """Every video once, B at a time."""
        torch.set_num_threads(threads)
        for chosen in np.random.default_rng(0).permutation(count).reshape(-1, B):
            batch_of(chosen)

    runs, rows = {}, {}
    for threads, B in itertools.product(config.threads, config.videos):
        loaders = {kind: codec.load_clips([file], model, B, bf16=bf16) for kind, bf16 in (("", "off"), (", bfloat16", "on"))}
        ways = {f"weights{kind}": lambda chosen, loader=loader: next(loader) for kind, loader in loaders.items()}
        ways["H.264"] = partial(of_streams, pool=ThreadPoolExecutor(threads))
        ways["raw frames in memory"] = lambda chosen: video.to_clip(frames[chosen]).to(device)
        runs |= {(way, threads, B): partial(all_videos, threads, B, batch_of) for way, batch_of in ways.items()}
    for (way, threads, _), seconds in measure(runs, config.repeats, device).items():
        rows.setdefault((way, threads), [way, threads]).append(spread([count / each for each in seconds]))
    table(["videos / s from", "threads", *(f"{B} in a batch" for B in config.videos)], list(rows.values()))
    sizes = sum(model.config.codes) * codec.BITS / 8, np.mean([len(stream) for stream in streams]), frames[0].nbytes
    print("\nbytes of a video: weights {:.0f} before entropy coding, H.264 {:.0f}, raw {:.0f}".format(*sizes))


if __name__ == "__main__":
    utils.run(main)
