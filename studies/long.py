"""Long videos of the shapes, made in several ways in equal training time: seams, subject, motion, FVD, FLOPs.

python -m studies.long --seconds 1200                    all rows from scratch: stage 1, stage 2, then each row for so long
python -m studies.long --only interface "by themselves"

All rows have the same stage 1, but for "one network". Rows with an interface, and full attention, go on for --seconds from a
denoiser of as long a training; all others train for both at once. A row's steps are those that fit, by the time of a few
steps of its own. A row that is done is a line of runs.csv.
"""

import contextlib
import math
import shlex
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

import data
import dit
import fvd
import nerv
import vae
import vin
from common import checkpoints, progress, utils, video
from common.drawn import MOTIONS
from common.tables import add_row, read_rows, table
from common.utils import UserError, option
from evaluate import classify, train_classifier

# Row -> (which training, its options beside those of all).
ROWS = {
    "real": ("", ""),
    "reconstructed": ("", ""),
    "by themselves": ("dit", ""),
    "one after the other": ("dit", "--cond-frames 4"),
    "one network": ("one", ""),
    "full attention": ("full", ""),
    "interface": ("vin", "--no-neighbours"),
    "interface, overlap 2": ("vin", "--no-neighbours --overlap 2"),
    "interface, seam loss": ("vin", "--no-neighbours --seam-weight 1"),
    "interface, neighbours": ("vin", ""),
    "interface, neighbours, overlap 2": ("vin", "--overlap 2"),
    "interface, all three": ("vin", "--overlap 2 --seam-weight 1"),
}
WINDOWS = ("start", "middle", "across")
COLUMNS = ["row", "settings", "revision", "steps", "seconds", "gflop", "seam", "colour", "size", "shape", "path"]
COLUMNS += [f"fvd {window}" for window in WINDOWS]


@dataclass
class Config:
    only: list = option("what", [], "rows to run; all unless named", nargs="*", choices=list(ROWS))
    chunks: int = option("what", 8, "of the videos that are compared")
    train_chunks: int = option("training", 4, "of the videos that vin.py is trained with")
    seconds: float = option("training", 600.0, "of training of each row, beside as much of the denoiser that it starts from")
    stage1_options: str = option("training", "--steps 2000", "further options of vae.py, in quotes")
    dit_options: str = option("training", "--width 96 --heads 3", "further options of dit.py, in quotes; more steps fit")
    stage2_options: str = option("training", "", "further options of dit.py and vin.py, in quotes")
    videos: int = option("judging", 36, "videos of each row")
    judge_clips: int = option("judging", 4096, "clips that the judge of the shape is trained on")
    features: str = option("judging", "random", "of FVD; i3d takes the published weights", choices=["i3d", "random"])
    steps: int = option("judging", 20, "evaluations of the denoiser")
    seed: int = option("judging", 0, "of noise")
    out_dir: str = option("output", "out/long", "runs.csv, checkpoints and sheets go here")


class FullAttention(nn.Module):
    """The DiT on the tokens of all chunks at once, in the place of vin.VIN."""

    def __init__(self, dit_config, config):
        super().__init__()
        self.config, self.dit = config, dit.DiT(dit_config)

    def forward(self, tokens, step, label, given=None, place=None):
        B, C, N, _ = tokens.shape
        place = torch.arange(C, device=tokens.device).expand(B, C) if place is None else place
        tokens, step = tokens.flatten(0, 1), step.flatten()
        x, step_code, label = self.dit.embed_all(tokens, step, label.flatten(), None)
        x = x + nerv.sinusoid(place.float(), x.shape[-1], self.config.places).flatten(0, 1)[:, None]
        x, condition = x.unflatten(0, (B, C)).flatten(1, 2), (step_code + label).unflatten(0, (B, C))[:, 0]
        for block in self.dit.blocks:
            x = block(x, condition)
        return self.dit.read_out(x, condition).unflatten(1, (C, N))

    def matrices(self):
        return self.dit.matrices()


# --------------------------------------------------------------------------------------------------------------- measures


def track(frames):
    """The shape in frames [F, H, W, 3], uint8: its colour [F, 3] in [0, 1], side [F] and centre [F, 2] in half frame widths.

    The darkest channel of a shape is 0.5 or more, that of a background 0.4 at most (common/drawn.py). NaN where there is none.
    """
    x = frames / 255
    cover = np.clip((x.min(-1) - 0.4) / 0.1, 0, 1)  # [F, H, W]
    total = cover.sum((1, 2))
    total = np.where(total > 4, total, np.nan)
    grid = (np.arange(x.shape[1]) + 0.5) * 2 / x.shape[1] - 1
    centre = np.stack([(cover.sum(1) * grid).sum(1), (cover.sum(2) * grid).sum(1)], 1) / total[:, None]
    colour = (x * cover[..., None]).sum((1, 2)) / total[:, None]
    return colour, np.sqrt(total) * 2 / x.shape[1], centre


def path_error(centre, period):
    """Root mean square distance of centres [F, 2] from the nearest path of one turn in a period, in half frame widths."""
    angle = 2 * math.pi * np.arange(len(centre)) / period
    basis, good = np.stack([np.ones_like(angle), np.cos(angle), np.sin(angle)], 1), np.isfinite(centre).all(1)
    if good.sum() < 4:
        return math.nan
    found, *_ = np.linalg.lstsq(basis[good], centre[good], rcond=None)
    return math.sqrt(np.square(basis[good] @ found - centre[good]).sum(1).mean())


def subject(frames, chunk):
    """How far colour and size of the shape are from the first chunk's, means over the later chunks: (in [0, 1], relative)."""
    colour, side, _ = track(frames)
    parts = range(0, len(frames) - chunk + 1, chunk)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a chunk without a shape
        colours = np.array([np.nanmean(colour[k : k + chunk], 0) for k in parts])
        sides = np.array([np.nanmean(side[k : k + chunk]) for k in parts])
        apart = np.abs(colours[1:] - colours[0]).mean(), np.abs(sides[1:] / sides[0] - 1).mean()
    return tuple(map(float, apart))


def same_shape(judge, frames, chunk):
    """Share of the later chunks of videos [B, F, H, W, 3] in which the judge sees the shape of the first one."""
    clips = frames[:, : frames.shape[1] // chunk * chunk].reshape(-1, chunk, *frames.shape[2:])
    shapes = (classify(judge, video.to_clip(clips)) // len(MOTIONS)).view(len(frames), -1)
    return (shapes[:, 1:] == shapes[:, :1]).float().mean().item()


def windows(frames, chunk):
    """Clips of one chunk's length at the start, in the middle, within a chunk, and across a seam: {name: [B, T, H, W, 3]}.

    The places are those of chunks without overlap. With overlap, chunks begin earlier, and "middle" has a fade in it.
    """
    middle = frames.shape[1] // chunk // 2 * chunk
    starts = {"start": 0, "middle": middle, "across": middle - chunk // 2}
    return {name: frames[:, start : start + chunk] for name, start in starts.items()}


# --------------------------------------------------------------------------------------------------------- ways to long videos


class Study:
    def __init__(self, config):
        self.config, self.out = config, Path(config.out_dir)
        self.vae_pt, self.dit_pt = self.path("vae"), self.path("dit")
        self.dit_options = f"{config.stage2_options} {config.dit_options}"  # of every training of dit.py

    def path(self, name):
        """The checkpoint of that name; others of other trainings."""
        c = self.config
        training = f"{c.train_chunks} {c.chunks} {c.seconds} {c.stage1_options} {c.dit_options} {c.stage2_options}"
        return checkpoints.study_path(self.out, name, training)

    def train(self, main, out, options, seconds=0.0, **kw):
        """A training into out, for so many seconds where it says how many; returns (steps, seconds), or None if it is there."""
        with contextlib.suppress(UserError):  # of what is not there, or was cut short
            checkpoints.load_finished(out, ("vae", "dit", "vin"), "")
            return None
        options = [*shlex.split(options), "--run-dir", str(out.with_suffix(""))]
        if seconds:
            options += ["--steps", str(self.steps_within(seconds, main, out, options, **kw))]
        start = time.time()
        main([*options, "--out", str(out)], **kw)
        return checkpoints.load_finished(out, ("vae", "dit", "vin"), "")["step"], round(time.time() - start)

    def steps_within(self, seconds, main, out, options, **kw):
        """Ten steps say how long one takes, beside what takes long once; the first trial fills the cache of latents."""
        times = []
        for steps in (2, 2, 12):
            start = time.time()
            main([*options, "--steps", str(steps), "--out", str(out.with_suffix(".trial"))], **kw)
            times.append(time.time() - start)
        return max(2, round(seconds * 10 / max(times[2] - times[1], 1e-3)))

    def prepare(self):
        """Stage 1, and the denoiser that the rows start from."""
        c = self.config
        self.train(vae.main, self.vae_pt, f"--dataset shapes-long --preset nano {c.stage1_options}")
        self.train(dit.main, self.dit_pt, f"--ckpt {self.vae_pt} {self.dit_options}", c.seconds)
        _, self.vae, self.scale = dit.load_dit(checkpoints.load(self.dit_pt, "dit", "python dit.py"))
        self.T = self.vae.nerv_config.num_frames
        self.F = c.chunks * self.T
        stage1 = checkpoints.load(self.vae_pt, "vae", "python vae.py")
        settings = vae.clips_of(stage1)
        self.short = data.open_dataset(settings, "train")
        settings.num_frames = self.F
        long = data.open_dataset(settings, "test")
        self.real, labels = zip(*(long[i] for i in range(c.videos)))
        self.real, self.labels = np.stack(self.real), list(labels)
        self.judge = train_classifier(self.short, len(long.classes), c.judge_clips, torch.device("cpu"))
        self.detector = fvd.load_detector(c.features, device="cpu")

    def make(self, row):
        """(frames [B, F, H, W, 3], frames shared by neighbouring chunks, (steps, seconds) of training, GFLOP of a step)."""
        c, (way, options) = self.config, ROWS[row]
        if row == "real":
            return self.real, 0, (0, 0), 0
        if row == "reconstructed":
            clips = video.to_clip(self.real).unflatten(1, (c.chunks, self.T)).flatten(0, 1)
            made = vae.reconstruct(self.vae, clips, torch.device("cpu"))
            return video.to_frames(made.unflatten(0, (-1, c.chunks)).flatten(1, 2)), 0, (0, 0), 0
        out = self.path(row)
        how = {"steps": c.steps}
        if way in ("vin", "full"):
            network = FullAttention if way == "full" else vin.VIN
            options += " --known 0" if way == "full" else ""
            options += f" {c.stage2_options} --ckpt {self.dit_pt} --chunks {c.train_chunks}"
            spent = self.train(vin.main, out, options, c.seconds, denoiser=network)
            model, network, scale = vin.load_vin(checkpoints.load(out, "vin", "python vin.py"), network)
            overlap, sizes = model.config.overlap, model.dit.config
            chunks = math.ceil((self.F - overlap) / (self.T - overlap))
            flops = vin.flops(sizes, model.config, chunks) if way == "vin" else vin.dit_flops(sizes, chunks * sizes.num_tokens)
            sample = lambda k, seed: vin.generate(model, torch.tensor([k]), chunks, seed=seed, **how)[0] / scale  # noqa: E731
        elif way == "one":
            first = self.path("one_network_vae")
            self.train(vae.main, first, f"--dataset shapes-long --preset nano {c.stage1_options} --num-frames {self.F}")
            spent = self.train(dit.main, out, f"{options} {self.dit_options} --ckpt {first}", 2 * c.seconds)
            model, network, scale = dit.load_dit(checkpoints.load(out, "dit", "python dit.py"))
            overlap, flops = 0, vin.dit_flops(model.config, model.config.num_tokens)
            sample = lambda k, seed: dit.generate(model, torch.tensor([k]), seed=seed, **how) / scale  # noqa: E731
        else:
            spent = self.train(dit.main, out, f"{options} {self.dit_options} --ckpt {self.vae_pt}", 2 * c.seconds)
            model, network, scale = dit.load_dit(checkpoints.load(out, "dit", "python dit.py"))
            overlap = model.config.cond_frames
            chunks = math.ceil((self.F - overlap) / (self.T - overlap))
            flops = chunks * vin.dit_flops(model.config, model.config.num_tokens)

            def sample(k, seed):
                if not overlap:
                    return dit.generate(model, torch.full((chunks,), k), seed=seed, **how) / scale
                return one_after_the_other(model, network, scale, k, chunks, seed, how)

        frames, length = [], network.nerv_config.num_frames
        with torch.no_grad():
            for i, k in enumerate(progress.bar(self.labels, row, unit="video")):
                tokens = sample(k, c.seed + i)
                clips = vin.play(network.decode, tokens, torch.arange(float(self.F)), length, overlap)
                frames.append(video.to_frames(torch.cat(list(clips))))
        return np.stack(frames), overlap, spent or ("", ""), 2 * flops / 1e9  # with guidance, which takes two

    def run(self, row):
        """A row of runs.csv, and a sheet of its first videos: the frames on both sides of a seam, and two of one chunk."""
        frames, overlap, (steps, seconds), gflop = self.make(row)
        found = {"row": row, "settings": settings(self.config), "revision": utils.git_revision(), "steps": steps}
        apart = np.array([subject(x, self.T) for x in frames])
        found |= {"seconds": seconds, "gflop": round(gflop, 3)}
        cut = (frames.shape[1] - overlap) // (self.T - overlap) * (self.T - overlap) + overlap
        found["seam"] = round(vin.seam(video.to_clip(frames[:, :cut]), self.T, overlap), 3)
        found |= dict(zip(("colour", "size"), np.nanmean(apart, 0).round(4).tolist()))
        found["shape"] = round(same_shape(self.judge, frames, self.T), 3)
        paths = [path_error(track(x)[2], data.LONG_PERIOD) for x in frames]
        found["path"] = round(float(np.nanmean(paths)), 4)
        real = windows(self.real, self.T)
        for name, clips in windows(frames, self.T).items():
            features = (self.detector(real[name]), self.detector(clips))
            found[f"fvd {name}"] = round(fvd.frechet_distance_of(*features, 0), 2)
        seam = (frames.shape[1] // self.T // 2) * (self.T - overlap)  # the first frame of a chunk
        picks = [seam - 1, seam, seam + self.T // 2, seam + self.T // 2 + 1]
        rows = [video.to_clip(x[picks]) for x in frames[:6]]
        video.write_sheet(self.out / f"{utils.file_name(row)}.png", rows, ["seam | within"] * len(rows))
        return found


def one_after_the_other(model, network, scale, label, chunks, seed, how):
    """Tokens [C, N, d]: each chunk goes on from the last frames of the one before, which it shares (dit.py --cond-frames)."""
    K, T, tokens = model.config.cond_frames, network.nerv_config.num_frames, []
    for k in range(chunks):
        given = None
        if tokens:
            last = network.decode(tokens[-1], torch.arange(float(T - K), T))
            clip = torch.cat([last, last.new_zeros(1, T - K, *last.shape[2:])], 1)
            given = scale * dit.encode_given(network, clip, K)
        tokens.append(dit.generate(model, torch.tensor([label]), seed=1000 * seed + k, given=given, **how) / scale)
    return torch.cat(tokens)


def settings(c):
    return (
        f"{c.train_chunks} and {c.chunks} chunks, {c.seconds:g} s | {c.stage1_options} | {c.dit_options} {c.stage2_options} | "
        f"{c.videos} videos, {c.steps} steps, {c.features}, seed {c.seed}"
    )


def main():
    config = utils.parse_options(Config, __doc__)
    utils.check_positive(config, "chunks", "train_chunks", "seconds", "videos", "judge_clips")
    if config.chunks < 2:
        raise UserError("--chunks 1 has no seam: compare two or more")
    dit.check_steps(config.steps)
    path = Path(config.out_dir) / "runs.csv"
    utils.make_parent(path)
    rows = [row for row in read_rows(path, COLUMNS) if row["settings"] == settings(config)]
    todo = [row for row in config.only or ROWS if row not in {done["row"] for done in rows}]
    study = Study(config)
    if todo:
        study.prepare()
    for row in todo:
        rows.append(study.run(row))
        add_row(path, COLUMNS, rows[-1])
        print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    columns = [name for name in COLUMNS if name not in ("settings", "revision")]
    table(columns, [[row[name] for name in columns] for row in rows])


if __name__ == "__main__":
    utils.run(main)
