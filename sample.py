"""Generate, reconstruct and interpolate videos; every one is written as MP4, GIF and a PNG contact sheet.

python sample.py                                  one video of every class, from dit.pt
python sample.py --classes 3 ring_circle --count 4
python sample.py --interp                         walk between the weights of two generated videos
python sample.py --interp a.mp4 b.mp4             … or of two videos from files
python sample.py --time-scale 8 --extrapolate 4   8 × as many frames, and 4 beyond the end
python sample.py --reconstruct a.mp4 b.mp4        real videos through stage 1; --refine 20 fits their tokens further
python sample.py --predict a.mp4 b.mp4            go on from the first frames of real videos (dit.py --cond-frames 5)
python sample.py --ckpt vin.pt --chunks 12        long videos, of as many networks; --interp and --predict go too
python sample.py --export out.pt                  the checkpoint itself, as small as it goes, for others to use
"""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import dit
import vin
from common import checkpoints, progress, utils, video
from common.utils import UserError, option
from vae import fine_power, load_vae, psnr


@dataclass
class Config:
    ckpt: str = option("input", "dit.pt", "checkpoint of dit.py or vin.py; one of vae.py is enough for videos from files")
    classes: list = option(
        "what", [], "names or numbers of classes; default: all, or two for --interp", nargs="+", metavar="CLASS"
    )
    count: int = option("what", 1, "videos per class, or per FILE to predict")
    interp: list = option("what", None, "interpolate between generated videos, or between FILEs", nargs="*", metavar="FILE")
    interp_steps: int = option("what", 7, "videos from each one to the next, both ends included; 2 or more")
    reconstruct: list = option("what", [], "encode and decode FILEs", nargs="+", metavar="FILE")
    predict: list = option(
        "what", [], "go on from the first frames of FILEs; --classes may name theirs", nargs="+", metavar="FILE"
    )
    chunks: int = option("what", 0, "networks of a long video, one after the other; 0: as many as vin.py trained with")
    refine: int = option(
        "what", -1, "gradient steps on the tokens of FILEs, or on predicted ones, by the given frames; "
        "-1: as many as stage 2 learned from",
    )  # fmt: skip
    residual: bool = option("what", False, "add to predicted frames what stage 1 loses of the given ones, on average")
    time_scale: float = option("time", 1.0, "decoded frames per frame of the training clips; 8 makes 128 of 16")
    extrapolate: float = option("time", 0.0, "go on for this many frames beyond the end of the clip")
    stride: int = option("time", 1, "frames of a FILE per frame of its clip")
    read_fps: float = option("time", 0.0, "frames per second that a FILE is read at; 0 is its own")
    fps: float = option("time", 12.0, "frames per second of what is written")
    steps: int = option("sampling", 20, "evaluations of the denoiser, 1 to 1000; ddim takes about 100 for the same")
    sampler: str = option("sampling", "dpm", "DPM-Solver++, DDIM, or ancestral", choices=["dpm", "ddim", "ddpm"])
    guidance: float = option("sampling", 2.0, "scale of classifier-free guidance; 1 is none")
    seed: int = option("sampling", 0, "of the noise")
    batch_size: int = option("machine", 16, "videos decoded at once")
    device: str = option("machine", "auto", "cpu, cuda, cuda:1, …; auto: CUDA where there is one")
    bf16: str = option("machine", "auto", "bfloat16 autocast; auto: with CUDA", choices=["auto", "on", "off"])
    out_dir: str = option("output", "out/samples", "where the videos go")
    export: str = option("output", "", "write --ckpt here in half precision, without training state and paths, and end")


class Sampler:
    """The networks of one checkpoint and the frame positions that were asked for."""

    def __init__(self, config):
        ckpt = checkpoints.load(config.ckpt, ("dit", "vae", "vin"), "python dit.py")
        self.config, self.device = config, utils.pick_device(config.device)
        self.dit, self.vin, self.classes = None, None, ckpt["classes"]
        if ckpt["stage"] == "dit":
            self.dit, self.vae, self.latent_scale = dit.load_dit(ckpt)
            self.dit.to(self.device)
        elif ckpt["stage"] == "vin":
            self.vin, self.vae, self.latent_scale = vin.load_vin(ckpt)
            self.vin.to(self.device)
        else:
            self.vae = load_vae(ckpt)
        self.refine, self.refine_given = dit.refine_steps(ckpt, config.refine), dit.refine_steps(ckpt)
        self.vae.to(self.device)
        self.autocast = partial(utils.autocast, self.device, config.bf16)
        self.t = self.positions(self.vae.nerv_config.num_frames)

    def positions(self, frames):
        """The frame positions that were asked for, of a video of so many frames.

        Time is a continuous query (§4.5.1): any positions will do, 0 … T-1 is the clip that was trained on.
        """
        c = self.config
        inside = torch.linspace(0, frames - 1, max(1, round(frames * c.time_scale)))
        beyond = frames - 1 + torch.arange(1, round(c.extrapolate * c.time_scale) + 1) / c.time_scale
        return torch.cat([inside, beyond])

    def labels(self, default):
        """Class names or numbers of --classes, or the default labels -> list of labels."""
        labels = []
        for name in self.config.classes or map(str, default):
            if name in self.classes:
                labels.append(self.classes.index(name))
            elif name.isdigit() and int(name) < len(self.classes):
                labels.append(int(name))
            else:
                raise UserError(f"there is no class {name!r}; there are {', '.join(self.classes)}")
        return labels

    def labels_of_files(self):
        """A label for each of the files to predict: the one of --classes, one each, or where it names none, no class."""
        labels, files = self.labels([]) or [len(self.classes)], len(self.config.predict)
        if len(labels) not in (1, files):
            raise UserError(f"--classes names {len(labels)} classes: name one for all files, or one for each of {files}")
        return labels * (files // len(labels))

    def generate(self, labels, given=None):
        """Labels, and given frames' clips [B, T, 3, H, W] in prediction -> tokens [B, N, d] of new videos.

        Predicted tokens are fitted to the given frames in --refine steps; what the denoiser is given is as it learned it.
        """
        c = self.config
        if self.dit is None:
            raise UserError(f"{c.ckpt} has no stage 2: generating takes a checkpoint of `python dit.py`")
        if given is not None:
            cond_frames = self.dit.config.cond_frames
            if not cond_frames:
                raise UserError(f"{c.ckpt} does not predict frames: train one with `python dit.py --cond-frames 5`")
            seen = [part.to(self.device) for part in given.split(c.batch_size)]
            given = torch.cat([dit.encode_given(self.vae, part, cond_frames, self.refine_given) for part in seen])
            given = given * self.latent_scale
        labels = torch.tensor(labels, device=self.device)
        with self.autocast():
            tokens = dit.generate(self.dit, labels, c.steps, c.guidance, c.sampler, c.seed, given) / self.latent_scale
            if given is not None:
                parts = zip(tokens.split(c.batch_size), seen)
                tokens = torch.cat([self.vae.refine(part, clips[:, :cond_frames], self.refine) for part, clips in parts])
        return tokens

    def read(self, files, needed=None, start=0):
        """The clip of each file from frame `start` on, [B, T, 3, H, W], of which only `needed` frames have to be there.

        Also returns how many frames of each clip are; those that are not are black.
        """
        c, stride, clips, lengths = self.vae.nerv_config, self.config.stride, [], []
        span = ((needed or c.num_frames) - 1) * stride + 1
        for file in files:
            try:
                frames = video.read_frames(file, c.resolution, start, (c.num_frames - 1) * stride + 1, self.config.read_fps)
            except video.BadVideo:
                if not start:  # else it may be that it ends before
                    raise
                frames = []
            if len(frames) < span:
                way = "a smaller --stride" + (" or fewer --chunks" if start else "")
                raise UserError(f"{file} has {start + len(frames)} frames, and {start + span} are needed: use {way}")
            frames = frames[::stride]
            lengths.append(len(frames))
            clips.append(video.to_clip(np.pad(frames, [(0, c.num_frames - len(frames)), (0, 0), (0, 0), (0, 0)])))
        return torch.stack(clips), lengths

    @torch.no_grad()
    def encode(self, clips):
        batches = [batch.to(self.device) for batch in clips.split(self.config.batch_size)]
        with self.autocast():
            return torch.cat([self.vae.encode(b, self.refine)[0] for b in batches])

    @torch.no_grad()
    def decode(self, tokens, t=None):
        """Tokens [B, N, d] -> clips [B, len(t), 3, H, W] on the CPU; t are the positions that were asked for, if not given."""
        t = (self.t if t is None else t).to(self.device)
        with self.autocast():
            return torch.cat([self.vae.decode(b, t).float().cpu() for b in tokens.split(self.config.batch_size)])

    def write(self, name, clips, titles):
        """Each clip as a video of its own, all of them as one sheet and as one tiled video."""
        folder = f"{self.config.out_dir}/{name}"
        utils.make_parent(folder)
        names = [f"{folder}/{i:02d}_{title}" for i, title in enumerate(titles)]
        with ThreadPoolExecutor() as pool:  # each is a process of ffmpeg, which takes longer to start than to write 16 frames
            list(pool.map(lambda name, clip: video.write_video(name, clip, self.config.fps), names, clips))
        video.write_sheet(f"{folder}.png", clips, titles)
        video.write_video(folder, video.tile(clips), self.config.fps)
        print(f"wrote {folder}.png, {folder}.mp4, {folder}.gif and each video in {folder}/")


@torch.no_grad()
def predict(sampler, config):
    """Go on from the first frames of real videos; given frames have an orange edge, the real clip stands above."""
    cond_frames = sampler.dit.config.cond_frames if sampler.dit else 0
    real, lengths = sampler.read(config.predict, needed=max(1, cond_frames))
    labels = [k for k in sampler.labels_of_files() for _ in range(config.count)]
    given = real.repeat_interleave(config.count, 0)
    tokens = sampler.generate(labels, given)
    sampler.t = sampler.t[sampler.t > cond_frames - 1]
    if not len(sampler.t):
        raise UserError(f"--time-scale {config.time_scale} leaves no position after the {cond_frames} given frames")
    decoded = sampler.decode(tokens)
    if config.residual:  # what stage 1 cannot hold of the given frames, a wall's texture say, is likely to stay as it is
        lost = given[:, :cond_frames] - sampler.decode(tokens, torch.arange(cond_frames))
        decoded = (decoded + lost.mean(1, keepdim=True)).clamp(-1, 1)
    decoded = decoded.unflatten(0, (len(real), config.count))
    rows, titles, scores = [], [], []
    for clip, length, samples in zip(real, lengths, decoded):
        marked = video.mark(clip[:cond_frames])
        if length == len(clip):  # the file says how it really went on
            rows.append(torch.cat([marked, clip[sampler.t.round().long().clamp(max=length - 1)]]))
            titles.append("real")
            if config.time_scale == 1 and not config.extrapolate:
                after, before = clip[None, cond_frames:], clip[None, :cond_frames]
                still = [psnr(after, x.expand_as(after)) for x in (before[:, -1:], before.mean(1, keepdim=True))]
                predicted = [psnr(after, sample[None]) for sample in (*samples, samples.mean(0))]
                scores.append([sum(predicted[:-1]) / len(samples), predicted[-1], *still])
        rows += [torch.cat([marked, sample]) for sample in samples]
        titles += ["predicted"] * len(samples)
    sampler.write("predict", rows, titles)
    if scores:
        scores = torch.tensor(scores)
        predicted, averaged, copied, mean = scores.mean(0).tolist()
        margin = scores[:, 0] - scores[:, 2]
        spread = f" ± {margin.std():.2f} (standard deviation over {len(margin)} files)" if len(margin) > 1 else ""
        print(
            f"PSNR of the {real.shape[1] - cond_frames} predicted frames {predicted:.2f} dB, "
            f"of copies of the last given one {copied:.2f} dB, margin {margin.mean():+.2f}{spread}"
        )
        print(f"of the mean of {config.count} predictions {averaged:.2f} dB, of the mean of the given frames {mean:.2f} dB")


class Long:
    """Videos of many chunks. One after the other is generated, and each is decoded and written chunk by chunk."""

    def __init__(self, sampler, config):
        self.sampler, self.config, c = sampler, config, sampler.vin.config
        self.frames, self.overlap, self.chunks = sampler.vae.nerv_config.num_frames, c.overlap, config.chunks or c.chunks
        self.t = sampler.positions(vin.video_frames(self.chunks, self.frames, self.overlap))

    def generate(self, label, seed, first=None):
        """A label, and where it is known the first chunk's tokens [1, N, d] -> tokens [C, N, d] of a new video."""
        c, s = self.config, self.sampler
        with progress.bar(total=c.steps, desc="denoising", unit="step", leave=False) as bar, s.autocast():
            hook = s.vin.register_forward_hook(lambda *_: bar.update())
            first = None if first is None else first * s.latent_scale
            labels = torch.tensor([label], device=s.device)
            how = {"steps": c.steps, "guidance": c.guidance, "sampler": c.sampler, "seed": seed}
            tokens = vin.generate(s.vin, labels, self.chunks, first=first, **how)
            hook.remove()
        return tokens[0] / s.latent_scale

    def encode(self, file):
        """The first frames of a file, as many as a video has -> tokens [C, N, d]."""
        starts = [k * (self.frames - self.overlap) * self.config.stride for k in range(self.chunks)]
        return torch.cat([self.sampler.encode(self.sampler.read([file], start=start)[0]) for start in starts])

    def play(self, tokens):
        return vin.play(self.sampler.decode, tokens, self.t, self.frames, self.overlap)

    def write(self, name, titles, videos, columns=16):
        """Each of videos, which are generators of clips [n, 3, H, W], as an MP4; some frames of all as one sheet."""
        folder, rows = f"{self.config.out_dir}/{name}", []
        utils.make_parent(folder)
        bar = progress.bar(total=len(titles) * self.chunks, desc="writing", unit="chunk")

        def passing(clips, row):
            begin = 0
            for clip in clips:
                row += [clip[k - begin] for k in picks if begin <= k < begin + len(clip)]
                begin += len(clip)
                bar.update()
                yield clip

        picks = torch.linspace(0, len(self.t) - 1, min(columns, len(self.t))).round().long().tolist()
        for i, (title, clips) in enumerate(zip(titles, videos)):
            rows.append([])
            video.write_mp4(f"{folder}/{i:02d}_{title}", passing(clips, rows[-1]), self.config.fps)
        bar.close()
        video.write_sheet(f"{folder}.png", [torch.stack(row) for row in rows], titles, columns)
        print(f"wrote {folder}.png and {len(titles)} videos of {len(self.t)} frames, {self.chunks} chunks, in {folder}/")


@torch.no_grad()
def make_long(sampler, config):
    """What main() does, with a checkpoint of vin.py."""
    long, seeds = Long(sampler, config), itertools.count(config.seed)
    if config.residual:
        raise UserError("--residual is of single clips, and this checkpoint makes long ones: leave it out")
    if config.predict:  # chunk 0 is the beginning of the file
        labels, after = sampler.labels_of_files(), long.t > long.frames - 1

        def goes_on(file, label):
            real, _ = sampler.read([file])
            tokens = long.generate(label, next(seeds), sampler.encode(real))
            yield video.mark(real[0])
            yield from vin.play(sampler.decode, tokens, long.t[after], long.frames, long.overlap)

        videos = (goes_on(file, k) for file, k in zip(config.predict, labels) for _ in range(config.count))
        titles = ["predicted"] * len(config.predict) * config.count
        long.t = torch.cat([torch.arange(long.frames), long.t[after]])
        long.write("predict", titles, videos)
    elif config.interp is not None:
        if config.interp:
            ends = [long.encode(file) for file in config.interp]
        else:
            ends = [long.generate(k, next(seeds)) for k in sampler.labels(default=[0, len(sampler.classes) - 1])]
        walk, titles = interpolate(ends, config.interp_steps)
        long.write("interp", titles, map(long.play, walk))
    else:
        labels = [k for k in sampler.labels(range(len(sampler.classes))) for _ in range(config.count)]
        videos = (long.play(long.generate(k, next(seeds))) for k in labels)
        long.write("samples", [sampler.classes[k] for k in labels], videos)


def interpolate(ends, steps):
    """Tokens of two videos or more -> (those of all along the walk, titles).

    λθ_2 + (1-λ)θ_1 (§4.5.2). The kernels before demodulation are linear in the tokens, so this walks through weights.
    """
    if len(ends) < 2:
        raise UserError("--interp takes two videos or more: name two files, or two --classes")
    walk, titles = [ends[0]], ["0.00"]
    for i, (start, end) in enumerate(zip(ends[:-1], ends[1:])):
        for weight in torch.linspace(0, 1, steps)[1:].tolist():
            walk.append(torch.lerp(start, end, weight))
            titles.append(f"{i + weight:.2f}")
    return walk, titles


def export(source, out):
    """Write the checkpoint `source` to the new file `out` as others need it, and no more (checkpoints.exported)."""
    ckpt = checkpoints.load(source, ("dit", "vae", "vin"), "python dit.py")
    if Path(out).exists():
        raise UserError(f"--export {out}: this file is there already, and is left alone: name another")
    checkpoints.save(out, **checkpoints.exported(ckpt))
    before, after = (Path(path).stat().st_size / 1e6 for path in (source, out))
    print(f"wrote {out}, {after:.2f} MB, from {source}, {before:.2f} MB")


def main():
    config = utils.parse_options(Config, __doc__)
    if config.export:
        return export(config.ckpt, config.export)
    utils.check_positive(config, "count", "interp_steps", "time_scale", "stride", "fps", "batch_size")
    if config.chunks < 0:
        raise UserError(f"--chunks {config.chunks}: it must not be negative")
    dit.check_steps(config.steps)
    if config.extrapolate < 0:
        raise UserError(f"--extrapolate {config.extrapolate}: it must not be negative")
    sampler = Sampler(config)
    if config.chunks and not sampler.vin:
        raise UserError(
            f"--chunks {config.chunks}: {config.ckpt} makes single clips, and long videos take one of `python vin.py`"
        )
    if sampler.vin and not config.reconstruct:
        return make_long(sampler, config)
    if config.reconstruct:
        real, _ = sampler.read(config.reconstruct)
        decoded = sampler.decode(sampler.encode(real))
        if torch.equal(sampler.t.cpu(), torch.arange(real.shape[1], dtype=sampler.t.dtype)):
            fine = fine_power(decoded).mean() / fine_power(real).mean()
            print(f"PSNR {psnr(real, decoded):.2f} dB, {100 * fine:.1f} % of the power of fine detail")
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
        walk, titles = interpolate(ends, config.interp_steps)
        sampler.write("interp", sampler.decode(torch.stack(walk)), titles)
    else:
        labels = [k for k in sampler.labels(range(len(sampler.classes))) for _ in range(config.count)]
        sampler.write("samples", sampler.decode(sampler.generate(labels)), [sampler.classes[k] for k in labels])


if __name__ == "__main__":
    utils.run(main)
