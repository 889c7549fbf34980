"""How far does size go? FVD against the FLOPs of training, for decoders and denoisers of three sizes, and for larger ones.

python -m studies.scaling                     the built-in shapes: two hours of a core
python -m studies.scaling --larger            trains what the laws are asked about as well: for a GPU
python -m studies.scaling --report            prints and draws what is done

Stage 1 is trained at each of WIDTHS, and judged by the FVD of reconstructions. Stage 2 is trained at each of DENOISERS, on the
tokens of nano's longest stage 1, and judged by that of generated clips. Every size is trained for each number of steps, by a
schedule of its own: equal numbers of steps are equal data, the same clips in the same order. To all runs of a stage a law is
fitted (after Kaplan et al. 2020),

    FVD = c · (FLOPs of training per clip)^-a · (clips)^-b

which says what a larger network or a longer training should reach. It knows no floor, and says less the farther it is from
what was measured. A run that is done is a row of runs.csv, and is not done again.
"""

import dataclasses
import math
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch._subclasses.fake_tensor import FakeTensorMode

import data
import dit
import fvd
import vae
import vin
from bench.costs import forward_costs
from common import checkpoints, plot, utils
from common.tables import add_row, read_rows, table
from common.utils import UserError, option
from common.video import to_clip, to_frames
from evaluate import read, reconstruct
from nerv import NeRVConfig

WIDTHS = {"width 16": 16, "width 32": 32, "width 48": 48}  # channels of the decoder; nano has 32
DENOISERS = {"1 M": (96, 6, 3), "4 M": (192, 6, 6), "16 M": (384, 6, 12)}  # width, depth, heads; nano has 4 M
LARGER = {1: {"width 128": 128}, 2: {"458 M, DiT-L": (1024, 24, 16)}}  # what the laws are asked about; preset S has 128
COLUMNS = ["stage", "size", "steps", "settings", "revision", "seconds", "flops", "clips", "fvd", "psnr"]


@dataclass
class Config:
    dataset: str = option("data", "shapes", "what to train on", choices=data.DATASETS)
    data_dir: str = option("data", "", "where it is")
    cache_dir: str = option("data", "data/cache", "directory of the caches of decoded frames")
    report: bool = option("what", False, "run nothing, print and draw what is done")
    larger: bool = option("what", False, "train what the laws are asked about as well, as long as they are asked about it")
    stages: list = option("what", [1, 2], "stages to run", nargs="+", type=int, choices=[1, 2])
    vae_steps: list = option("training", [250, 500, 1000], "steps of stage 1, one training each", nargs="+", type=int)
    dit_steps: list = option("training", [100, 200, 400], "steps of stage 2, one training each", nargs="+", type=int)
    vae_options: str = option(
        "training", "--preset nano --lpips alex --lpips-weight 0.3", "further options of vae.py for every run, in quotes"
    )
    dit_options: str = option("training", "", "further options of dit.py for every run, in quotes")
    clips: int = option("judging", 256, "held-out clips, and as many generated ones of the same classes")
    features: str = option("judging", "i3d", "of FVD; random takes no weights", choices=["i3d", "random"])
    seed: int = option("training", 0, "of all trainings")
    out_dir: str = option("output", "out/scaling", "runs.csv, scaling.png and checkpoints go here")


def stage1_flops(network, decode_frames):
    """FLOPs of one clip in a step of vae.py, of which so many frames are decoded: the backward pass is two forward ones. LPIPS,
    which costs all sizes the same, is left out."""
    c = network.nerv_config
    with FakeTensorMode(allow_non_fake_inputs=True):
        twice = forward_costs(lambda: network.encode(torch.empty(2, c.num_frames, 3, c.resolution, c.resolution)))[0]
    decoder = type(network.nerv)(c).to("meta")
    z, t = torch.empty(1, c.num_tokens, c.token_dim, device="meta"), torch.empty(decode_frames, device="meta")
    return 3 * (twice / 2 + forward_costs(lambda: decoder(z, t))[0])


def stage2_flops(config, scheduled_sampling=0.25):
    """FLOPs of one clip in a step of dit.py with a DiT of sizes config; scheduled sampling evaluates it a second time."""
    return 3 * (1 + scheduled_sampling) * vin.dit_flops(config, config.num_tokens)


class Law:
    """FVD = c · flops^-a · clips^-b by least squares of logarithms; points [(FLOPs per clip, clips, FVD)], four or more."""

    def __init__(self, points):
        flops, clips, values = np.log(np.array(points, dtype=float)).T
        self.x = np.stack([np.ones_like(flops), -flops, -clips], 1)
        self.found, *_ = np.linalg.lstsq(self.x, values, rcond=None)
        self.freedom = len(points) - 3
        self.variance = np.square(self.x @ self.found - values).sum() / self.freedom
        self.inverse = np.linalg.pinv(self.x.T @ self.x)
        self.errors = np.sqrt(self.variance * np.diag(self.inverse))  # standard errors of log c, a and b

    def __call__(self, flops, clips):
        """(FVD, least, most): the value, and an interval that a new training is in with 95 %, if the law holds."""
        x = np.array([1, -math.log(flops), -math.log(clips)])
        middle = x @ self.found
        around = stats.t.ppf(0.975, self.freedom) * math.sqrt(self.variance * (1 + x @ self.inverse @ x))
        return tuple(np.exp([middle, middle - around, middle + around]).tolist())


class Study:
    """The trainings and their judge, whose real clips are the same for all."""

    def __init__(self, config):
        self.config, self.out, self.device = config, Path(config.out_dir), utils.pick_device("auto")
        self.detector = None

    def judge(self, clips):
        """FVD of clips [B, T, 3, H, W] to the held-out ones."""
        return float(fvd.frechet_distance_of(self.real_features, self.detector(to_frames(clips))))

    def open(self, source, classes):
        """Read the held-out clips, once, as training on `source` has them."""
        if self.detector is None:
            held_out = data.open_dataset(source, "test", classes)
            frames, labels = read(held_out, data.spread_over(held_out, self.config.clips))
            self.detector = fvd.load_detector(self.config.features, "videogpt", device=self.device)
            self.real, self.labels, self.real_features = to_clip(frames), torch.from_numpy(labels), self.detector(frames)

    def train1(self, size, steps):
        """Stage 1 of a width -> its row of runs.csv."""
        width = (WIDTHS | LARGER[1])[size]
        c, path, began = self.config, stage1_path(self.config, width, steps), time.time()
        where = ["--dataset", c.dataset, "--data-dir", c.data_dir, "--cache-dir", c.cache_dir]
        argv = [*where, *shlex.split(c.vae_options), "--width", width, "--steps", steps, "--seed", c.seed]
        vae.main([*map(str, argv), "--out", str(path), "--run-dir", str(path.with_suffix(""))])
        seconds = round(time.time() - began)
        ckpt = checkpoints.load_finished(path, "vae", "python vae.py")
        network, settings = vae.load_vae(ckpt).to(self.device), vae.clips_of(ckpt)
        self.open(settings, ckpt["classes"])
        made = reconstruct(network, self.real, self.device)
        return {
            "seconds": seconds,
            "flops": stage1_flops(network.cpu(), settings.decode_frames),
            "clips": steps * settings.batch_size,
            "fvd": self.judge(made),
            "psnr": round(vae.psnr(self.real, made), 2),
        }

    def train2(self, size, steps):
        """Stage 2 of a denoiser -> its row of runs.csv. All have one cache of latents, which --out names."""
        c, path, began = self.config, self.out / "dit.pt", time.time()
        names = zip(("--width", "--depth", "--heads"), map(str, (DENOISERS | LARGER[2])[size]))
        argv = ["--ckpt", base(c), "--cache-dir", c.cache_dir, *shlex.split(c.dit_options), "--steps", steps, "--seed", c.seed]
        argv += [word for pair in names for word in pair]
        dit.main([*map(str, argv), "--out", str(path), "--run-dir", str(self.out / f"dit_{size.split()[0]}M_{steps}")])
        seconds = round(time.time() - began)
        ckpt = checkpoints.load_finished(path, "dit", "python dit.py")
        model, network, scale = dit.load_dit(ckpt)
        model, network = model.to(self.device), network.to(self.device)
        self.open(vae.clips_of(ckpt["vae"]), ckpt["classes"])
        labels = self.labels.to(self.device).split(64)
        parts = [dit.generate(model, y, guidance=1, seed=c.seed + k) for k, y in enumerate(labels)]
        made = vae.decode(network, torch.cat(parts) / scale, torch.arange(network.nerv_config.num_frames))
        settings = ckpt["config"]
        return {
            "seconds": seconds,
            "flops": stage2_flops(model.config, settings["scheduled_sampling"]),
            "clips": steps * settings["batch_size"],
            "fvd": self.judge(made),
            "psnr": "",
        }


def settings(c, stage):
    """All that a run of a stage depends on but its size and steps, as runs.csv has it."""
    first = f"{c.dataset} {c.data_dir} | {c.vae_options} | {c.clips} clips, {c.features}, seed {c.seed}"
    return first if stage == 1 else f"{first} | stage 1 of {max(c.vae_steps)} steps | {c.dit_options}"


def base(c):
    """The checkpoint of stage 1 that all denoisers have: nano's, trained the longest."""
    return stage1_path(c, WIDTHS["width 32"], max(c.vae_steps))


def stage1_path(c, width, steps):
    """A checkpoint of stage 1: others of another seed or other options."""
    return checkpoints.study_path(c.out_dir, f"vae_{width}_{steps}", settings(c, 1))


def asked(c, stage):
    """For how many steps the law of a stage is asked about the larger network: as long as the longest run, and ten times."""
    longest = max(c.vae_steps if stage == 1 else c.dit_steps)
    return longest, 10 * longest


def larger_flops(stage, ckpt):
    """FLOPs per clip of the network that the law of a stage is asked about; ckpt: of any run of the stage."""
    (size,) = LARGER[stage].values()
    if stage == 1:
        sizes = NeRVConfig(**ckpt["nerv_config"] | {"width": size})
        return stage1_flops(vae.VAE(sizes, vae.EncoderConfig(**ckpt["encoder_config"])), ckpt["config"]["decode_frames"])
    width, depth, heads = size
    sizes = dataclasses.replace(dit.DiTConfig(**ckpt["dit_config"]), width=width, depth=depth, heads=heads)
    return stage2_flops(sizes, ckpt["config"]["scheduled_sampling"])


def report(config, rows):
    """Print the runs and the law of each stage, and draw them."""
    out, panels = Path(config.out_dir), []
    for stage in config.stages:
        done = [row for row in rows if int(row["stage"]) == stage and row["settings"] == settings(config, stage)]
        if not done:
            continue
        name = ("FVD of reconstructions", "FVD of generated clips")[stage - 1]
        print(f"\nStage {stage}, {name}, {config.clips} clips\n")
        lines = [[r["size"], r["steps"], f"{float(r['flops']) / 1e9:.3g}", f"{float(r['flops']) * int(r['clips']):.2e}",
                  f"{float(r['fvd']):.1f}", r["psnr"], r["seconds"]] for r in done]  # fmt: skip
        table(["size", "steps", "GFLOP per clip", "FLOP in all", name, "PSNR, dB", "seconds"], lines)
        points = [(float(r["flops"]), int(r["clips"]), float(r["fvd"])) for r in done if r["size"] not in LARGER[stage]]
        law = Law(points) if len({p[0] for p in points}) > 1 and len({p[1] for p in points}) > 1 and len(points) > 3 else None
        if law:
            (_, a, b), (_, da, db) = law.found, law.errors
            print(f"\nFVD falls as (FLOPs per clip)^-{a:.2f} (± {da:.2f}) and as clips^-{b:.2f} (± {db:.2f}), standard errors;")
            print(f"single runs are {100 * (math.exp(math.sqrt(law.variance)) - 1):.0f} % from the law")
            path, (larger,) = base(config) if stage == 1 else out / "dit.pt", LARGER[stage]
            if path.is_file():
                flops = larger_flops(stage, checkpoints.load(path, ("vae", "dit")[stage - 1], "this study"))
                for steps in asked(config, stage):
                    clips = steps * (int(done[0]["clips"]) // int(done[0]["steps"]))
                    value, least, most = law(flops, clips)
                    found = [f"{float(r['fvd']):.1f}" for r in done if (r["size"], int(r["steps"])) == (larger, steps)]
                    print(f"{larger}, {flops / 1e9:.3g} GFLOP per clip, {clips:,} clips: predicted {value:.1f} "
                          f"({least:.1f} to {most:.1f}), measured {', '.join(found) or 'not yet'}")  # fmt: skip
        panels.append((stage, name, done, law))
    if panels:
        draw(out / "scaling.png", panels)
        print(f"\nwrote {out / 'scaling.png'}")


def draw(path, panels):
    """FVD against FLOPs of training, both logarithmic; a line for each size, dashed by the law."""
    fig, axes = plot.figure(len(panels), 2, 4.6, 3.6)
    for ax, (stage, name, done, law) in zip(axes, panels):
        for k, size in enumerate(dict.fromkeys(row["size"] for row in done)):
            runs = sorted((int(r["clips"]), float(r["flops"]), float(r["fvd"])) for r in done if r["size"] == size)
            total, colour = [clips * flops for clips, flops, _ in runs], (plot.BLUE, plot.RED, plot.GREEN, plot.INK)[k % 4]
            ax.plot(total, [value for *_, value in runs], "os^D"[k % 4], color=colour, label=size, markersize=5)
            if law and size not in LARGER[stage]:
                ax.plot(total, [law(flops, clips)[0] for clips, flops, _ in runs], "--", color=colour, linewidth=1)
        ax.set(xlabel=f"FLOPs of training, stage {stage}", ylabel=name)
        plot.logarithmic(ax.xaxis), plot.logarithmic(ax.yaxis)
        ax.legend(fontsize=7, labelcolor=plot.INK, facecolor=plot.PAPER, edgecolor=plot.FAINT)
    fig.savefig(path)


def main(argv=None):
    config = utils.parse_options(Config, __doc__, argv=argv)
    utils.check_positive(config, "clips")
    if min(*config.vae_steps, *config.dit_steps) < 1:
        raise UserError("--vae-steps and --dit-steps: numbers of steps are positive")
    path, study = Path(config.out_dir) / "runs.csv", Study(config)
    utils.make_parent(path)
    rows = read_rows(path, COLUMNS)
    plan = [(1, size, steps) for steps in config.vae_steps for size in WIDTHS]
    plan += [(2, size, steps) for steps in config.dit_steps for size in DENOISERS]
    if config.larger:
        plan += [(stage, size, steps) for stage in (2, 1) for size in LARGER[stage] for steps in asked(config, stage)]
    done = {(row["stage"], row["size"], row["steps"], row["settings"]) for row in rows}
    for stage, size, steps in plan:
        key = (str(stage), size, str(steps), settings(config, stage))
        if stage in config.stages and not config.report and key not in done:
            found = (study.train1, study.train2)[stage - 1](size, steps)
            about = dict(zip(("stage", "size", "steps", "settings"), key)) | {"revision": utils.git_revision()}
            rows.append({name: str(value) for name, value in (about | found).items()})
            add_row(path, COLUMNS, rows[-1])
    report(config, rows)


if __name__ == "__main__":
    utils.run(main)
