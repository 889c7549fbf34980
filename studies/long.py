"""Long videos of the shapes, generated in several ways in equal training time: seams, subject, motion, FVD, FLOPs.

python -m studies.long --seconds 1200                    all rows from scratch: stage 1, stage 2, then each row for 1200 s
python -m studies.long --only interface "by themselves"
python -m studies.long --between vae.pt                  frames between those that stage 1 of the shapes encodes (§4.5.1)

Rows with an interface, and full attention, train for --seconds from a denoiser trained as long; others train for both at
once. The number of steps is what fits, by timing a few steps of the row. A finished row is a line of runs.csv.
"""

import functools
import math
import shlex
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import dit
import fvd
import nerv
import vae
from common import checkpoints, utils, video
from common.drawn import MOTIONS
from common.utils import UserError, option
from evaluate import classify, frame_psnr, train_classifier
from siblings import vin
from siblings.results import table
from studies import runs

# Row -> (the denoiser of siblings.vin, or the first stage of dit.py's; options besides the common ones).
ROWS = {
    "real": ("", ""),
    "reconstructed": ("", ""),
    "by themselves": ("vae", ""),
    "one after the other": ("vae", "--cond-frames 4"),
    "one network": ("one", ""),
    "full attention": ("full", ""),
    "interface": ("vin", "--no-neighbours"),
    "interface, overlap 2": ("vin", "--no-neighbours --overlap 2"),
    "interface, neighbours": ("vin", ""),
    "interface, neighbours, overlap 2": ("vin", "--overlap 2"),
}
COLUMNS = "row settings revision steps seconds gflop seam colour size shape path fvd_start fvd_middle fvd_across".split()


@dataclass
class Config:
    only: list = option("what", [], "rows to run; default: all", nargs="*", choices=list(ROWS))
    between: str = option("what", "", "only evaluate frames between those encoded by this stage 1", metavar="VAE.pt")
    scale: int = option("what", 8, "of --between: decoded frames per encoded one, as --time-scale of sample.py")
    chunks: int = option("what", 8, "per compared video, 2 or more; vin.py trains with 4")
    seconds: float = option("training", 600.0, "training time per row, after as much for the denoiser it starts from")
    vae_options: str = option("training", "--steps 2000", "further options of vae.py, in quotes")
    dit_options: str = option("training", "", "further options of dit.py, in quotes")
    vin_options: str = option("training", "--num-latents 4096", "further options of siblings.vin, in quotes")
    videos: int = option("judging", 36, "videos per row, or clips of --between")
    features: str = option("judging", "random", "of FVD; i3d: the published weights", choices=["i3d", "random"])
    out_dir: str = option("output", "out/long", "directory of runs.csv, checkpoints and their sheets")


class FullAttention(nn.Module):
    """The DiT on the latents of all chunks at once, in place of vin.VIN."""

    def __init__(self, dit_config, config):
        super().__init__()
        self.config, self.dit = config, dit.DiT(dit_config)

    def forward(self, latents, timestep, label, given=None, chunks=1, place=None, neighbours=False):
        place = torch.arange(chunks, device=latents.device).repeat(len(latents) // chunks) if place is None else place
        x, code, label = self.dit.embed_all(latents, timestep, label, None)
        x = x + nerv.sinusoid(place.flatten().float(), x.shape[-1], self.config.places)[:, None]
        x, condition = x.unflatten(0, (-1, chunks)).flatten(1, 2), (code + label)[::chunks]  # [B, C * N, width], [B, width]
        for block in self.dit.blocks:
            x = block(x, condition)
        return self.dit.read_out(x, condition).unflatten(1, (chunks, -1)).flatten(0, 1)


def seam(clips, frames, overlap):
    """The jump between chunks over the mean step within, as root mean squares over pixels; 1: no larger than other steps.

    clips [B, F, 3, H, W] of chunks of `frames` frames. If chunks share frames, the jump is the largest step of the fade.
    """
    steps = clips.diff(dim=1).square().mean((2, 3, 4)).sqrt()  # [B, F - 1]
    first = torch.arange(frames - overlap, clips.shape[1] - overlap, frames - overlap) - 1  # the step into each next chunk
    across = first[:, None] + torch.arange(overlap + 1)  # [C - 1, overlap + 1]
    within = torch.ones(steps.shape[1], dtype=torch.bool).index_fill(0, across.flatten(), False)
    return (steps[:, across].amax(2).mean() / steps[:, within].mean()).item()


def track(frames):
    """The shape in uint8 frames [F, H, W, 3]: colour [F, 3] in [0, 1], side [F], centre [F, 2] in half frame widths, or NaN."""
    x = frames / 255
    cover = np.clip((x.min(-1) - 0.4) / 0.1, 0, 1)  # [F, H, W]; the darkest channel of a shape is 0.5 or more, of others 0.4
    total = np.where(cover.sum((1, 2)) > 4, cover.sum((1, 2)), np.nan)
    grid = (np.arange(x.shape[1]) + 0.5) * 2 / x.shape[1] - 1
    centre = np.stack([(cover.sum(1) * grid).sum(1), (cover.sum(2) * grid).sum(1)], 1) / total[:, None]
    return (x * cover[..., None]).sum((1, 2)) / total[:, None], np.sqrt(total) * 2 / x.shape[1], centre


def path_error(centre, period):
    """Root mean square distance of centres [F, 2] from the best-fitting path of this period, in half frame widths."""
    angle, good = 2 * math.pi * np.arange(len(centre)) / period, np.isfinite(centre).all(1)
    basis = np.stack([np.ones_like(angle), np.cos(angle), np.sin(angle)], 1)[good]
    found, *_ = np.linalg.lstsq(basis, centre[good], rcond=None)
    return math.sqrt(np.square(basis @ found - centre[good]).sum(1).mean())


def subject(frames, chunk):
    """Deviation of the shape's colour and size from the first chunk's, means over later chunks: (in [0, 1], relative)."""
    colours, sides = (np.nanmean(x.reshape(len(frames) // chunk, chunk, -1), 1) for x in track(frames)[:2])
    return float(np.abs(colours[1:] - colours[0]).mean()), float(np.abs(sides[1:] / sides[0] - 1).mean())


class Study:
    """Stage 1, the denoiser that rows start from, real videos, and a classifier."""

    def __init__(self, config):
        self.config, self.out = config, Path(config.out_dir)
        ckpt = self.train(vae.main, "vae", f"--dataset shapes-long --preset nano {config.vae_options}")
        self.train(dit.main, "dit", f"--ckpt {self.out}/vae.pt {config.dit_options}", config.seconds)
        T = ckpt["config"]["num_frames"]
        self.vae, self.T, self.F = vae.load_vae(ckpt), T, config.chunks * T
        real = data.open_dataset(vae.data_settings(ckpt, num_frames=self.F), "test")
        frames, self.labels = zip(*(real[i] for i in range(config.videos)))
        self.real, self.detector = np.stack(frames), fvd.load_detector(config.features)
        short = data.open_dataset(vae.data_settings(ckpt), "train")
        self.classifier = train_classifier(short, len(short.classes), 4096, torch.device("cpu"))

    def train(self, main, name, options, seconds=0.0, **kw):
        """Train, or resume, for as many steps as fit into `seconds` (0: as the options say) -> the checkpoint."""
        out, options, main = self.out / f"{utils.file_name(name)}.pt", shlex.split(options), functools.partial(main, **kw)
        if out.is_file():
            options += ["--steps", checkpoints.load(out, ("vae", "dit", "vin"), "this study")["config"]["steps"]]
        elif seconds:
            pace = runs.seconds_per_step(main, options, out, seconds / 100)
            out.unlink()
            options += ["--steps", 1 + round(seconds / pace)]
        return runs.train(main, [*options, "--resume"], out)

    def model(self, way, row, options):
        """The model of a row for sampling: (denoiser, VAE, map of latents), its steps, and the frames that chunks share."""
        c, denoiser = self.config, {"vin": vin.VIN, "full": FullAttention}.get(way)
        if denoiser:
            options = f"{options} {c.vin_options} --ckpt {self.out}/dit.pt"
            ckpt = self.train(vin.train, row, options, c.seconds, denoiser=denoiser)
            return vin.load_vin(ckpt, denoiser), ckpt["step"], ckpt["vin_config"]["overlap"]
        if way == "one":
            self.train(vae.main, way, f"--dataset shapes-long --preset nano {c.vae_options} --num-frames {self.F}")
        ckpt = self.train(dit.main, row, f"{options} {c.dit_options} --ckpt {self.out}/{way}.pt", 2 * c.seconds)
        return dit.load_dit(ckpt), ckpt["step"], ckpt["dit_config"]["cond_frames"]

    def run(self, row):
        """Train, sample and measure a row -> its values in runs.csv."""
        c, T, (way, options), overlap, found = self.config, self.T, ROWS[row], 0, {"steps": 0, "gflop": 0.0}
        if way:
            (model, *parts), found["steps"], overlap = self.model(way, row, options)
            chunks, t = 1 if way == "one" else math.ceil((self.F - overlap) / (T - overlap)), torch.arange(float(self.F))
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                sample(model, *parts, 0, chunks, 0)
            found["gflop"] = sum(counter.get_flop_counts()[type(model).__name__].values()) / 20 / 1e9  # one of 20 steps
            tokens = [sample(model, *parts, label, chunks, seed) for seed, label in enumerate(self.labels)]
            clips = torch.stack([torch.cat(list(vin.play(parts[0], one, t, overlap))) for one in tokens])
        else:
            clips = video.to_clip(self.real).unflatten(1, (c.chunks, T)).flatten(0, 1)
            made = clips if row == "real" else vae.reconstruct(self.vae, clips, torch.device("cpu"))
            clips = made.unflatten(0, (-1, c.chunks)).flatten(1, 2)  # [B, F, 3, H, W]
        frames, first = video.to_frames(clips), self.F // T // 2  # first chunk of the second half
        found["seam"] = seam(clips, T, overlap)
        found["colour"], found["size"] = map(float, np.nanmean([subject(x, T) for x in frames], 0))
        shapes = classify(self.classifier, clips.unflatten(1, (-1, T)).flatten(0, 1)).view(len(clips), -1) // len(MOTIONS)
        found["shape"] = (shapes[:, 1:] == shapes[:, :1]).float().mean().item()
        found["path"] = float(np.nanmean([path_error(track(x)[2], data.LONG_PERIOD) for x in frames]))
        # Clips of one chunk's length, where chunks lie without overlap: with overlap, "middle" contains a fade.
        for name, start in {"start": 0, "middle": first * T, "across": max(0, first * T - T // 2)}.items():
            features = (self.detector(x[:, start : start + T]) for x in (self.real, frames))
            found[f"fvd_{name}"] = float(fvd.frechet_distance_of(*features))
        return found


def sample(model, network, latent_map, label, chunks, seed):
    """Tokens [C, N, d] of a video. With --cond-frames, each chunk continues the last frames of the one before."""
    labels, tokens, given, T = torch.tensor([label]), [], None, network.nerv_config.num_frames
    if not isinstance(model, dit.DiT):
        return latent_map.inverse(vin.generate(model, labels, chunks, seed=seed))[0]
    if not (K := model.config.cond_frames):
        return latent_map.inverse(dit.generate(model, labels.repeat(chunks), seed=seed))
    for k in range(chunks):
        tokens.append(latent_map.inverse(dit.generate(model, labels, seed=1000 * seed + k, given=given)))
        end = network.decode(tokens[-1], torch.arange(float(T - K), 2 * T - K))  # K frames, and others that encode_given drops
        given = latent_map(dit.encode_given(network, end, K))
    return torch.cat(tokens)


def between(config):
    """PSNR of decoded frames at and between the times that stage 1 encodes; next to it, of blends of two encoded frames."""
    ckpt = checkpoints.load(config.between, "vae", "python vae.py")
    network, settings, scale = vae.load_vae(ckpt), vae.data_settings(ckpt), config.scale
    if settings.dataset not in data.SHAPES:
        raise UserError(f"{config.between} is of {settings.dataset}: only {', '.join(data.SHAPES)} can be drawn at any time")
    held_out = data.open_dataset(settings, "test")
    t = np.arange((settings.num_frames - 1) * scale + 1) / scale  # in frames of the clip
    real = video.to_clip(np.stack([held_out.draw(i, t * settings.stride) for i in data.spread(held_out, config.videos)]))
    made = vae.reconstruct(network, real[:, ::scale], torch.device("cpu"), torch.as_tensor(t, dtype=torch.float32))
    before, weight = np.floor(t).astype(int) * scale, torch.as_tensor(t % 1, dtype=torch.float32)[:, None, None, None]
    blend = torch.lerp(real[:, before], real[:, np.minimum(before + scale, len(t) - 1)], weight)
    shown = np.arange(len(t)) % scale == 0
    for title, frames in {"shown": shown, "between": ~shown}.items():
        if frames.any():
            psnr = [frame_psnr(x[:, frames] / 2, real[:, frames] / 2).mean().item() for x in (made, blend)]
            print(f"{title:8} {frames.sum():4} frames of a clip   PSNR {psnr[0]:.2f} dB, of the blend {psnr[1]:.2f} dB")


def main(argv=None):
    config = utils.parse_options(Config, __doc__, argv=argv)
    utils.check_positive(config, "chunks", "seconds", "videos", "scale")
    if config.between:
        return between(config)
    settings = " | ".join(map(str, astuple(config)[3:-1]))  # all but only, between, scale and out_dir
    study, once = functools.cache(lambda: Study(config)), functools.partial(runs.once, f"{config.out_dir}/runs.csv", COLUMNS)
    rows = [once((row, settings), lambda row=row: study().run(row)) for row in config.only or ROWS]
    shown = [name for name in COLUMNS if name not in ("settings", "revision")]
    table(shown, [[row[name] for name in shown] for row in rows])


if __name__ == "__main__":
    utils.run(main)
