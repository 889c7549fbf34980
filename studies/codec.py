"""A sheet of videos by ours (--refine 100) and by x264 at the same size, or its smallest: `python -m studies.codec`."""

import tempfile
from dataclasses import dataclass

import numpy as np

from common import utils, video
from common.utils import UserError, option
from siblings import codec, rd, rivals
from siblings.frames import read_video


@dataclass
class Config:
    ckpt: str = option("what", "codec.pt", "checkpoint of `siblings.codec train`")
    data_dir: str = option("what", "", "folder of videos; three are shown")
    size: int = option("what", 64, "height and width of the scaled videos")
    out_dir: str = option("output", "out/study", "directory of frames.png")


def main():
    config = utils.parse_options(Config, __doc__)
    (model, ckpt), out = codec.open_codec(config.ckpt), f"{config.out_dir}/frames.png"
    paths, rows, titles = video.list_videos(config.data_dir)[0] if config.data_dir else [], [], []
    if not paths:
        raise UserError("give a folder of videos with --data-dir")
    utils.make_parent(out)
    for k in np.linspace(0, len(paths) - 1, 3).round().astype(int):
        real, fps = read_video(paths[k], config.size)
        with tempfile.TemporaryDirectory() as directory:
            size, _, ours = codec.write_video(real, fps, f"{directory}/a.nerv", model, ckpt, codec.BITS, 1.0, 100)
        rows.append(video.to_clip(real))
        titles.append("real")
        for name, (clip, taken) in {"ours": (ours, size), "x264": rivals.within("x264", real, fps, size)}.items():
            rows.append(video.to_clip(clip.copy()))
            titles.append(f"{name}, {taken} B, {rd.psnr(np.square(clip.astype(np.float32) - real).mean()):.1f} dB")
    video.write_sheet(out, rows, titles, columns=6)
    print(f"wrote {out}")


if __name__ == "__main__":
    utils.run(main)
