"""How well does stage 1 decode the frames between those that it is shown? (time interpolation: §4.5.1, Appendix B)

python -m studies.between --ckpt vae.pt     a checkpoint of the built-in shapes, which can be drawn at any time

Beside it stands the blend of the two shown frames around each, which needs no network.
"""

from dataclasses import dataclass

import numpy as np
import torch

import data
import vae
from common import checkpoints, utils, video
from common.utils import UserError, option
from evaluate import frame_psnr


@dataclass
class Config:
    ckpt: str = option("input", "vae.pt", "checkpoint of vae.py")
    scale: int = option("input", 8, "decoded frames per shown one, as --time-scale of sample.py")
    clips: int = option("input", 64, "held-out clips")


def main(argv=None):
    config = utils.parse_options(Config, __doc__, argv=argv)
    utils.check_positive(config, "scale", "clips")
    ckpt = checkpoints.load(config.ckpt, "vae", "python vae.py")
    network, settings, scale = vae.load_vae(ckpt), vae.data_settings(ckpt), config.scale
    if settings.dataset not in data.SHAPES:
        raise UserError(f"{config.ckpt} is of {settings.dataset}, and only {', '.join(data.SHAPES)} can be drawn at any time")
    held_out = data.open_dataset(settings, "test")
    t = np.arange((settings.num_frames - 1) * scale + 1) / scale  # in frames of the clip
    real = video.to_clip(np.stack([held_out.draw(i, t * settings.stride) for i in data.spread(held_out, config.clips)]))
    made = vae.reconstruct(network, real[:, ::scale], torch.device("cpu"), torch.as_tensor(t, dtype=torch.float32))
    before, weight = np.floor(t).astype(int) * scale, torch.as_tensor(t % 1, dtype=torch.float32)[:, None, None, None]
    blend = torch.lerp(real[:, before], real[:, np.minimum(before + scale, len(t) - 1)], weight)
    offset = np.arange(len(t)) % scale
    for title, frames in (("shown", offset == 0), ("between", offset > 0)):
        if frames.any():
            psnr = [frame_psnr(x[:, frames] / 2, real[:, frames] / 2).mean().item() for x in (made, blend)]
            print(f"{title:8} {frames.sum():4} frames of a clip   PSNR {psnr[0]:.2f} dB, of the blend {psnr[1]:.2f} dB")


if __name__ == "__main__":
    utils.run(main)
