"""Generate, reconstruct, predict and interpolate videos; each is an MP4, all together are one more, and a contact sheet.

python sample.py                                  one video of every class, from dit.pt
python sample.py --classes 3 ring_circle --count 4
python sample.py --interp                         walk between the weights of two generated videos
python sample.py --interp a.mp4 b.mp4             … or of two videos from files
python sample.py --time-scale 8 --extrapolate 4   8 × as many frames, then the time of 4 more training frames
python sample.py --reconstruct a.mp4 b.mp4        real videos through stage 1 and back
python sample.py --predict a.mp4 b.mp4            go on from the first frames of real videos (dit.py --cond-frames 5)
python sample.py --page page.html                 one file that generates in a browser
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import dit
import page
import vae as stage1
from common import checkpoints, utils, video
from common.utils import UserError, option
from extras.refine import refine


@dataclass
class Config:
    ckpt: str = option("input", "dit.pt", "checkpoint of dit.py; one of vae.py is enough for videos from files")
    classes: list = option("what", [], "names or numbers; default: all, or two for --interp", nargs="+", metavar="CLASS")
    count: int = option("what", 1, "videos per class, or per FILE to predict")
    interp: list = option("what", None, "interpolate between generated videos, or between FILEs", nargs="*", metavar="FILE")
    reconstruct: list = option("what", [], "encode and decode FILEs", nargs="+", metavar="FILE")
    predict: list = option(
        "what", [], "go on from the first frames of FILEs; --classes may name theirs", nargs="+", metavar="FILE"
    )
    refine: int = option("what", 0, "gradient steps that fit the tokens to the FILEs, or predicted tokens to the given frames")
    time_scale: float = option("time", 1.0, "decoded frames per frame of the training clips: 8 decodes 128 in the time of 16")
    extrapolate: float = option("time", 0.0, "continue for the time of this many training frames beyond the end of the clip")
    fps: float = option("time", 12.0, "frames per second of the written videos")
    steps: int = option("sampling", 20, "evaluations of the denoiser, 1 to 1000; ddim needs about 100 for the same quality")
    sampler: str = option("sampling", "dpm", "DPM-Solver++, DDIM, or ancestral", choices=["dpm", "ddim", "ddpm"])
    guidance: float = option("sampling", 2.0, "scale of classifier-free guidance; 1 is none")
    seed: int = option("sampling", 0, "seed for the noise")
    out_dir: str = option("output", "out/samples", "directory for the videos")
    page: str = option("output", "", "only write a page that generates in the browser", metavar="FILE.html")


INTERP_STEPS = 7  # videos from each one to the next, both ends included


class Sampler:
    """The networks of one checkpoint, and the frame positions t that were asked for."""

    def __init__(self, config, load_dit, load_vae):
        ckpt = checkpoints.load(config.ckpt, ("dit", "vae"), "python dit.py")
        self.config, self.device, self.classes, self.dit = config, utils.pick_device(), ckpt["classes"], None
        if ckpt["stage"] == "dit":
            self.dit, self.vae, self.latent_map = (part.to(self.device) for part in load_dit(ckpt))
        else:
            self.vae = load_vae(ckpt).to(self.device)
        self.stride = (ckpt["vae"] if self.dit else ckpt)["config"]["stride"]
        # Time is a continuous query (§4.5.1): any positions will do, 0 … T-1 is the clip that was trained on.
        T = self.vae.nerv_config.num_frames
        inside = max(1, round(T * config.time_scale))
        step = (T - 1) / max(1, inside - 1)
        self.t = torch.arange(inside + (round(config.extrapolate / step) if step else 0)) * step

    def labels(self, default):
        """Class names or numbers of --classes, or the default labels -> list of labels."""
        labels = []
        for name in self.config.classes or map(str, default):
            if name in self.classes:
                labels.append(self.classes.index(name))
            elif name.isascii() and name.isdigit() and int(name) < len(self.classes):
                labels.append(int(name))
            else:
                raise UserError(f"there is no class {name!r}; there are {', '.join(map(video.printable, self.classes))}")
        return labels

    def labels_of_files(self):
        """A label for each file to predict: the one of --classes, one each, or where it names none, no class."""
        labels, files = self.labels([]) or [len(self.classes)], len(self.config.predict)
        if len(labels) not in (1, files):
            raise UserError(f"--classes names {len(labels)} classes: name one for all files, or one for each of {files}")
        return labels * (files // len(labels))

    @torch.no_grad()
    def generate(self, labels, given=None):
        """Labels, and given frames' clips [B, T, 3, H, W] in prediction -> tokens [B, N, d] of new videos."""
        c = self.config
        if self.dit is None:
            raise UserError(f"{c.ckpt} has no stage 2: generating takes a checkpoint of `python dit.py`")
        cond_frames = self.dit.config.cond_frames
        if given is not None:
            if not cond_frames:
                raise UserError(f"{c.ckpt} does not predict frames: train one with `python dit.py --cond-frames 5`")
            clips = given.to(self.device)
            given = self.latent_map(dit.encode_given(self.vae, clips, cond_frames))
        labels = torch.tensor(labels, device=self.device)
        with utils.autocast(self.device):
            tokens = self.latent_map.inverse(dit.generate(self.dit, labels, c.steps, c.guidance, c.sampler, c.seed, given))
        return tokens if given is None else refine(self.vae.decode, tokens, clips[:, :cond_frames], c.refine)

    def read(self, files, needed=None):
        """The first clip of each file, [B, T, 3, H, W], and how many of its frames were read: at least `needed`.

        Missing frames are black.
        """
        c, clips, lengths = self.vae.nerv_config, [], []
        span = ((needed or c.num_frames) - 1) * self.stride + 1
        for file in files:
            frames = video.read_frames(file, c.resolution, 0, (c.num_frames - 1) * self.stride + 1)
            if len(frames) < span:
                raise UserError(f"{video.printable(file)} has {len(frames)} frames, and {span} are needed")
            frames = frames[:: self.stride]
            lengths.append(len(frames))
            clips.append(video.to_clip(np.pad(frames, [(0, c.num_frames - len(frames)), (0, 0), (0, 0), (0, 0)])))
        return torch.stack(clips), lengths

    @torch.no_grad()
    def encode(self, clips):
        """Clips [B, T, 3, H, W] -> tokens [B, N, d], refined where --refine asks for it."""
        clips = clips.to(self.device)
        return refine(self.vae.decode, self.vae.encode(clips)[0], clips, self.config.refine)

    def decode(self, tokens):
        """Tokens [B, N, d] -> clips [B, len(t), 3, H, W] on the CPU, at the positions that were asked for."""
        return stage1.decode_all(self.vae, tokens, self.t)

    def write(self, name, clips, titles, given=0):
        """Each clip as a video of its own, all of them as one tiled video and one sheet with given frames underlined."""
        folder = Path(self.config.out_dir) / name
        for i, (clip, title) in enumerate(zip(clips, titles)):
            video.write_mp4(folder / f"{i:02d}_{utils.file_name(title)}", [clip], self.config.fps)
        shown = [clip.clone() for clip in clips]
        for clip in shown:
            clip[:given, :, -max(1, clip.shape[-2] // 32) :] = torch.tensor([1.0, 0.2, -1.0])[:, None, None]  # orange
        video.write_sheet(f"{folder}.png", shown, titles)
        video.write_mp4(folder, [video.tile(clips)], self.config.fps)
        print(f"wrote {folder}.png, {folder}.mp4 and each video in {folder}/")


def predict(sampler, config):
    """Continue the first frames of real videos; the sheet shows each real clip above its predictions."""
    cond_frames = sampler.dit.config.cond_frames if sampler.dit else 1  # below, generate() refuses a checkpoint without any
    real, lengths = sampler.read(config.predict, needed=max(1, cond_frames))
    labels = [k for k in sampler.labels_of_files() for _ in range(config.count)]
    tokens = sampler.generate(labels, real.repeat_interleave(config.count, 0))
    sampler.t = sampler.t[sampler.t > cond_frames - 1]
    if not len(sampler.t):
        raise UserError(f"--time-scale {config.time_scale} has no position after the {cond_frames} given frames")
    decoded = sampler.decode(tokens).unflatten(0, (len(real), config.count))
    rows, titles, scores = [], [], []
    for clip, length, samples in zip(real, lengths, decoded):
        if length == len(clip):  # the file has the frames that are predicted, too
            rows.append(torch.cat([clip[:cond_frames], clip[sampler.t.round().long().clamp(max=length - 1)]]))
            titles.append("real")
            if config.time_scale == 1 and not config.extrapolate:
                after, still = clip[None, cond_frames:], clip[None, cond_frames - 1 : cond_frames]
                predicted = [stage1.psnr(after, sample[None]) for sample in samples]
                scores.append([sum(predicted) / len(samples), stage1.psnr(after, still.expand_as(after))])
        rows += [torch.cat([clip[:cond_frames], sample]) for sample in samples]
        titles += ["predicted"] * len(samples)
    sampler.write("predict", rows, titles, given=cond_frames)
    if scores:
        predicted, copied = torch.tensor(scores).mean(0).tolist()
        print(f"PSNR of the predicted frames {predicted:.2f} dB, of copies of the last given frame {copied:.2f} dB")


def interpolate(ends):
    """Tokens of two videos or more -> (those of all along the walk, titles).

    λθ_2 + (1-λ)θ_1 (§4.5.2). The kernels before demodulation are affine in the tokens, so this walks through weights.
    """
    if len(ends) < 2:
        raise UserError("--interp takes two videos or more: name two files, or two --classes")
    walk, titles = [ends[0]], ["0.00"]
    for i, (start, end) in enumerate(zip(ends[:-1], ends[1:])):
        for weight in torch.linspace(0, 1, INTERP_STEPS)[1:].tolist():
            walk.append(torch.lerp(start, end, weight))
            titles.append(f"{i + weight:.2f}")
    return torch.stack(walk), titles


def main(argv=None, load_dit=dit.load_dit, load_vae=stage1.load_vae):
    config = utils.parse_options(Config, __doc__, argv=argv)
    utils.check_positive(config, "count", "time_scale", "fps")
    if config.extrapolate < 0 or config.refine < 0:
        raise UserError("--extrapolate and --refine must not be negative")
    if config.page:
        ckpt = checkpoints.load(config.ckpt, "dit", "python dit.py")
        return page.write(config.page, ckpt, load_dit(ckpt), config.guidance, config.steps, config.seed)
    utils.make_parent(Path(config.out_dir) / "samples.png")
    sampler = Sampler(config, load_dit, load_vae)
    if config.reconstruct:
        real, _ = sampler.read(config.reconstruct)
        decoded = sampler.decode(sampler.encode(real))
        if config.time_scale == 1 and not config.extrapolate:
            print(f"PSNR {stage1.psnr(real, decoded):.2f} dB")
        real = real[:, sampler.t.round().long().clamp(max=real.shape[1] - 1)]  # the nearest real frame to each position
        rows = [clip for pair in zip(real, decoded) for clip in pair]
        sampler.write("reconstruct", rows, ["real", "reconstructed"] * len(real))
    elif config.predict:
        predict(sampler, config)
    elif config.interp is not None:
        if config.interp:
            ends = sampler.encode(sampler.read(config.interp)[0])
        else:
            ends = sampler.generate(sampler.labels(default=[0, len(sampler.classes) - 1]))
        walk, titles = interpolate(ends)
        sampler.write("interp", sampler.decode(walk), titles)
    else:
        labels = [k for k in sampler.labels(range(len(sampler.classes))) for _ in range(config.count)]
        sampler.write("samples", sampler.decode(sampler.generate(labels)), [sampler.classes[k] for k in labels])


if __name__ == "__main__":
    utils.run(main)
