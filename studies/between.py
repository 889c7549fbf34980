"""What weights make of the space between: frames between frames, and videos between videos.

python -m studies.between --ckpt vae.pt          one of vae.py or of dit.py, ours or a rival's of studies/compare.py

*Frames.* Where stage 1 was trained with --stride 2 or more, held-out files have frames that no network was ever shown. The
network of a clip is asked for them, as t is a real number; beside it are blends of the two frames next to each.

*Videos.* Held-out clips go in pairs of one class. The video whose tokens lie halfway between theirs, (θ_1 + θ_2) / 2 (§4.5.2),
is beside the mean of their pixels, a cross-fade: by the FVD of all these to all the held-out clips, and by the power of fine
detail.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

import data
import fvd
import vae
from common import checkpoints, utils
from common.tables import table
from common.utils import UserError, option
from common.video import to_clip, to_frames, write_sheet
from data import spread_over
from evaluate import read
from studies.compare import load_rival
from vae import fine_power, psnr


@dataclass
class Config:
    ckpt: str = option("input", "dit.pt", "checkpoint of vae.py or dit.py")
    data_dir: str = option("input", "", "where the data set is; default: where it was in training")
    cache_dir: str = option("input", "data/cache", "directory of the caches of decoded frames")
    clips: int = option("judging", 256, "held-out clips, or all there are")
    features: str = option("judging", "i3d", "of FVD; random takes no weights", choices=["i3d", "random"])
    device: str = option("machine", "auto", "cpu, cuda, cuda:1, …; auto: CUDA where there is one")
    out: str = option("output", "out/between.png", "a sheet of the first pairs")


def blended(frames, parts):
    """Frames [B, T, …] with parts - 1 blends of both neighbours between each two of them: [B, (T - 1) * parts + 1, …]."""
    t = torch.arange((frames.shape[1] - 1) * parts + 1) / parts
    before = t.long().clamp(max=frames.shape[1] - 2)
    return torch.lerp(frames[:, before], frames[:, before + 1], (t - before).view(-1, *[1] * (frames.ndim - 2)))


def between_frames(network, fine, stride, device):
    """Clips [B, (T - 1) * stride + 1, 3, H, W], of which stage 1 sees every stride-th frame -> rows (what, PSNR in dB)."""
    t = torch.arange(fine.shape[1])
    shown = t % stride == 0
    made = vae.reconstruct(network, fine[:, shown], device, t / stride).clamp(-1, 1)
    blend, real = blended(made[:, shown], stride), blended(fine[:, shown], stride)
    return [
        ("frames that were shown", psnr(fine[:, shown], made[:, shown])),
        ("frames between, by the network", psnr(fine[:, ~shown], made[:, ~shown])),
        ("frames between, blended from its neighbouring frames", psnr(fine[:, ~shown], blend[:, ~shown])),
        ("frames between, blended from the real neighbours", psnr(fine[:, ~shown], real[:, ~shown])),
    ]


def partners(labels):
    """For each of labels [B] the next clip of its class, from the last one the first: indices [B]."""
    found = np.empty(len(labels), dtype=int)
    for label in set(labels.tolist()):
        (own,) = np.nonzero(labels == label)
        found[own] = np.roll(own, -1)
    return found


@torch.no_grad()
def between_videos(network, clips, labels, detector, device):
    """Rows (what, FVD to the clips, fine detail in %), and the clips [B, T, 3, H, W] of all three kinds."""
    tokens = torch.cat([network.encode(part.to(device))[0] for part in clips.split(16)])
    t, partner, real = torch.arange(clips.shape[1]), torch.from_numpy(partners(labels)), detector(to_frames(clips))
    kinds = {
        "reconstructions": vae.decode(network, tokens, t),
        "halfway between tokens": vae.decode(network, (tokens + tokens[partner]) / 2, t),
        "halfway between pixels": (clips + clips[partner]) / 2,
    }
    detail = fine_power(clips).mean()
    rows = [
        (name, fvd.frechet_distance_of(real, detector(to_frames(made))), (100 * fine_power(made).mean() / detail).item())
        for name, made in kinds.items()
    ]
    return rows, {"one": clips, "other": clips[partner]} | {name: kinds[name] for name in list(kinds)[1:]}


def main(argv=None):
    config = utils.parse_options(Config, __doc__, argv=argv)
    utils.check_positive(config, "clips")
    device, ckpt = utils.pick_device(config.device), checkpoints.load(config.ckpt, ("vae", "dit"), "python vae.py")
    stage1 = ckpt if ckpt["stage"] == "vae" else ckpt["vae"]
    network = load_rival(stage1).to(device)
    source = vae.clips_of(stage1, data_dir=config.data_dir, cache_dir=config.cache_dir)
    held_out = data.open_dataset(source, "test", ckpt["classes"])
    frames, labels = read(held_out, spread_over(held_out, config.clips))
    if min(np.bincount(labels)[np.unique(labels)]) < 2:
        raise UserError(f"--clips {config.clips}: pairs take two clips of each class")
    if source.stride > 1:
        long = dataclasses.replace(source, stride=1, num_frames=(source.num_frames - 1) * source.stride + 1)
        long = data.open_dataset(long, "test", ckpt["classes"])
        fine = to_clip(read(long, spread_over(long, config.clips))[0])
        print(f"{len(fine)} held-out clips, of which every {source.stride}. frame is shown\n")
        rows = between_frames(network, fine, source.stride, device)
        table(["", "PSNR, dB"], [[name, f"{value:.2f}"] for name, value in rows])
        print()
    detector = fvd.load_detector(config.features, "videogpt", device=device)
    rows, shown = between_videos(network, to_clip(frames), labels, detector, device)
    print(f"{len(labels)} held-out clips, each with the next one of its class\n")
    name = fvd.label(detector.meta)
    table(["", f"{name} to the real clips", "fine detail"], [[k, f"{value:.1f}", f"{share:.0f} %"] for k, value, share in rows])
    write_sheet(config.out, [made[k] for k in range(min(4, len(labels))) for made in shown.values()], list(shown) * 4)
    print(f"\nwrote {config.out}")


if __name__ == "__main__":
    utils.run(main)
