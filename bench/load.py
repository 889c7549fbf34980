"""Loading speed of videos in training batches: from weights, from H.264 and from raw frames in memory (FastNeRV, Fig. 9).

python -m bench.load --data-dir clips/train

Videos have 8 frames of 256 × 256. Weights, one byte per code, and H.264 are decoded each time. The model is untrained, which
does not change its speed. Measurements of all rows alternate, on OMP_NUM_THREADS threads.
"""

import io
import math
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


@dataclass
class Config:
    videos: list = option("what", [1, 4, 16, 64], "videos per batch", nargs="+", type=int)
    data_dir: str = option("what", "", "folder of videos; default: the built-in shapes")
    repeats: int = option("what", 5, "measurements, after an uncounted first one")


def h264(stream):
    """A raw stream -> frames uint8 [8, 256, 256, 3], decoded as in a data loader."""
    with av.open(io.BytesIO(stream), format="h264") as file:
        file.streams.video[0].codec_context.thread_count = 1
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


@torch.no_grad()
def main():
    config = utils.parse_options(Config, __doc__)
    utils.check_positive(config, "repeats")
    device, count = utils.pick_device(), math.lcm(*config.videos)
    dataset = data.open_dataset(data.Config("folder" if config.data_dir else "shapes", config.data_dir, 256, 8), "train")
    frames = np.stack([dataset[i][0] for i in range(count)])  # uint8 [count, 8, 256, 256, 3]
    streams = [rivals.encode("x264", clip, 25, crf=40) for clip in frames]
    model = codec.Codec(codec.CodecConfig(), codec.ENCODERS["fastnerv"]).to(device).eval()
    clips = (video.to_clip(clip)[None].to(device) for clip in frames)
    numbers = torch.cat([codec.encode_clips(model, clip, codec.BITS, keep=1.0) for clip in clips]).to(torch.int8)

    def of_weights(chosen, bf16):
        codes = model.decoder.dequantize(numbers[chosen].float(), codec.BITS)
        with utils.autocast(device, bf16):
            return model.decoder(codes, torch.arange(8, device=device)).float().clamp_(-1, 1)

    def of_streams(chosen):
        return video.to_clip(np.stack(list(pool.map(h264, [streams[i] for i in chosen])))).to(device)

    def all_videos(B, batch_of):
        """Load every video once, B at a time."""
        for chosen in np.random.default_rng(0).permutation(count).reshape(-1, B):
            batch_of(chosen)

    pool, runs, rows = ThreadPoolExecutor(torch.get_num_threads()), {}, {}
    ways = {"weights": partial(of_weights, bf16="off"), "weights, bfloat16": partial(of_weights, bf16="on")}
    ways |= {"H.264": of_streams, "raw frames in memory": lambda chosen: video.to_clip(frames[chosen]).to(device)}
    for B in config.videos:
        runs |= {(way, B): partial(all_videos, B, batch_of) for way, batch_of in ways.items()}
    for (way, _), seconds in measure(runs, config.repeats, device).items():
        rows.setdefault(way, [way]).append(spread([count / each for each in seconds]))
    table(["videos / s from", *(f"{B} in a batch" for B in config.videos)], list(rows.values()))


if __name__ == "__main__":
    utils.run(main)
