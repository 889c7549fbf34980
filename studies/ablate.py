"""Switch each idea of the paper off: Tables 2 and 3, on small models, with the paper's figures beside.

python -m studies.ablate                                                    the built-in shapes, hours on two CPU cores
python -m studies.ablate --dataset folder --data-dir PATH --vae-options "--preset nano --resolution 64"
python -m studies.ablate --only 2a 3b --seeds 1                             some tables, one seed

Every row is the paper's choice in all but one thing, trained on the same data with the same seeds, steps and settings. Rows of
stage 1 are compared by the PSNR of held-out reconstructions. Rows of stage 2 are compared by classifier accuracy and by Fréchet
distances on random I3D features, which are not the published FVD. At this scale, how far generated clips are from real ones is
mostly what stage 1 blurs, whatever the denoiser; their distance to reconstructions of real clips is what the denoiser adds.
--features i3d takes the published FVD for these distances, and has that of reconstructions (rFVD) for rows of stage 1 as well.
A run that is done is a row of runs.csv, and is not done again.
"""

import hashlib
import shlex
import statistics
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import data
import dit
import evaluate
import fvd
import vae
from common import checkpoints, plot, utils
from common.tables import add_row, read_rows, table
from common.utils import UserError, option
from common.video import to_frames
from studies import variants

# Table -> (what it compares, {row: (the paper's gFVD, options of vae.py, or in table 3 of dit.py)}), best of the paper last;
# without options a row is the base, which all tables share. At one width, smaller codes have more kernel entries (2c-size).
PAPER = {
    "2a": ("modulation", {"repeat": (741, "--modulation repeat"), "fmm": (636, "--modulation fmm"), "channel": (570, "")}),
    "2b": ("reuse of tokens", {"none": (570, "--reuse none"), "direct": (562, "--reuse direct"), "multihead": (283, "")}),
    "2c": ("size of the position code", {
        "1 x 1": (283, "--pos-size 1"), "4 x 4": (269, "--pos-size 4"), "16 x 16": (277, "--pos-size 16"), "8 x 8": (254, ""),
    }),
    "2c-size": ("size of the position code, at nano's 75 thousand kernel entries", {
        "1 x 1, width 20": (283, "--pos-size 1 --width 20"), "4 x 4, width 26": (269, "--pos-size 4 --width 26"),
        "16 x 16, width 46": (277, "--pos-size 16 --width 46"), "8 x 8": (254, ""),
    }),
    "2d": ("upsampling", {
        "bilinear": (287, "--upsampling bilinear"), "pixelshuffle": (254, "--upsampling pixelshuffle"),
        "transposed": (248, ""),
    }),
    "2d-size": ("upsampling, at nano's kernel entries", {
        "bilinear, width 36": (287, "--upsampling bilinear --width 36"),
        "pixelshuffle, width 26": (254, "--upsampling pixelshuffle --width 26"), "transposed": (248, ""),
    }),
    "2e": ("side connection", {"none": (248, "--side none"), "skip": (235, "--side skip"), "residual": (219, "")}),
    "2f": ("tokens, of nano's 32", {
        "a quarter": (219, "--num-tokens 8"), "half": (193, "--num-tokens 16"), "twice": (206, "--num-tokens 64"),
        "all": (184, ""),
    }),
    "3a": ("denoiser", {"gpt": (550, "--denoiser gpt"), "latte": (342, "--denoiser latte"), "dit": (295, "")}),
    "3b": ("training of stage 2", {
        "plain": (295, "--min-snr-gamma 0 --scheduled-sampling 0"), "scheduled sampling": (261, "--min-snr-gamma 0"),
        "Min-SNR": (238, "--scheduled-sampling 0"), "both": (184, ""),
    }),
}  # fmt: skip
TABLES = {  # rows as (name, gFVD, options of vae.py, options of dit.py)
    table: (title, [(row, fvd, *((own, "") if table[0] == "2" else ("", own))) for row, (fvd, own) in rows.items()])
    for table, (title, rows) in PAPER.items()
}
DIT = "--width 192 --heads 6 --num-latents 2048 --extras --lr 1e-3 --batch-size 32 --steps 500"
STAGE2 = ("2f", "3a", "3b")  # tables that need it; more tokens (2f) reconstruct better, and what they cost is seen there
COLUMNS = ["stage", "vae", "dit", "seed", "settings", "revision", "seconds", "psnr", "to_real", "to_reconstructed", "agreement"]


@dataclass
class Config:
    dataset: str = option("data", "shapes", "what to train on", choices=data.DATASETS)
    data_dir: str = option("data", "", "directory of videos, classes from its sub-folders")
    only: list = option("what", [], "tables to run and to print; all unless named", nargs="*", choices=list(TABLES))
    seeds: int = option("what", 3, "runs of each row")
    report: bool = option("what", False, "run nothing, print and draw what is done")
    vae_options: str = option("training", "--steps 600", "further options of vae.py for every run, in quotes")
    dit_options: str = option("training", DIT, "further options of dit.py for every run, in quotes")
    features: str = option("evaluation", "random", "of Fréchet distances; i3d: of the published FVD", choices=["random", "i3d"])
    clips: int = option("evaluation", 90, "generated clips of each run of stage 2, and as many real ones")
    out_dir: str = option("output", "out/ablate", "runs.csv, the plot and checkpoints go here")


class Metrics:
    """What rows are compared by: up to `count` training clips of the data that a stage-1 checkpoint is of.

    labels [count] are the classes to generate, as many of each as there are real clips.
    """

    def __init__(self, ckpt, count, features):
        device, self.classifier = utils.pick_device(), None
        self.train_set = data.open_dataset(vae.clips_of(ckpt), "train", ckpt["classes"])
        self.clips, labels = data.clips(self.train_set, data.spread(self.train_set, count))
        self.labels, self.detector = labels.to(device), fvd.load_detector(features, device=device)
        self.real = self.detector(to_frames(self.clips))

    def reconstructed(self, network):
        """Features [count, 400] of the real clips after a VAE."""
        return self.detector(to_frames(vae.reconstruct(network, self.clips, self.labels.device)))

    def __call__(self, clips, network):
        """Clips [count, T, 3, H, W] of the labels -> classifier accuracy in %, distances to real and to reconstructed clips."""
        if self.classifier is None:
            classes = len(self.train_set.classes)
            self.classifier = evaluate.train_classifier(self.train_set, classes, 4096, self.labels.device)
        features = self.detector(to_frames(clips))
        distances = [fvd.frechet_distance_of(reference, features) for reference in (self.real, self.reconstructed(network))]
        return 100 * evaluate.accuracy(self.classifier, clips, self.labels), *distances


class Study:
    """The runs that are done, and how to do one more."""

    def __init__(self, config):
        self.config, self.metrics, self.path = config, None, Path(config.out_dir) / "runs.csv"
        first = f"{config.dataset} {config.data_dir} | {config.vae_options}"
        first += f" | {config.features}, {config.clips} clips" if config.features != "random" else ""
        self.settings = {"1": first, "2": f"{first} | {config.dit_options} | {config.clips} clips, judge 4096"}
        utils.make_parent(self.path)
        self.rows = read_rows(self.path, COLUMNS)

    def get(self, *run):
        """The row of runs.csv of a run (stage, options of vae.py, options of dit.py, seed), or None."""
        wanted = [*map(str, run), self.settings[run[0]]]
        return next((row for row in self.rows if [row[name] for name in COLUMNS[:5]] == wanted), None)

    def keep(self, start, *run, **scores):
        """Append a run to runs.csv, unless it is there."""
        if not self.get(*run):
            row = dict(zip(COLUMNS, map(str, run))) | {"settings": self.settings[run[0]], "revision": utils.git_revision()}
            row |= {"seconds": str(round(time.time() - start))} | {name: f"{score:.4g}" for name, score in scores.items()}
            add_row(self.path, COLUMNS, row)
            self.rows.append({name: "" for name in COLUMNS} | row)

    def train(self, stage, name, *options):
        """Train "vae" or "dit", or go on with it -> its checkpoint, and where that is; other settings have other names."""
        settings = hashlib.sha256(self.settings["1" if stage == "vae" else "2"].encode()).hexdigest()
        out = self.path.parent / f"{utils.file_name(name)}_{settings[:8]}.pt"
        torch.compiler.reset()  # compiled code of earlier rows counts toward a limit
        variants.main([stage, *map(str, options), "--out", str(out), "--resume"])
        ckpt = checkpoints.load(out, stage, f"python {stage}.py")
        if ckpt["step"] < ckpt["config"]["steps"]:
            raise UserError("stopped: start again to go on")
        self.metrics = self.metrics or Metrics(ckpt.get("vae", ckpt), self.config.clips, self.config.features)
        return ckpt, out

    def run(self, vae_options, dit_options, seed, both):
        """Stage 1 of a row, and stage 2 where it is compared there, unless they are done."""
        c, start = self.config, time.time()
        first, second = ("1", vae_options, "", seed), ("2", vae_options, dit_options, seed)
        both = both and not self.get(*second)
        if self.get(*first) and not both:
            return
        options = ["--dataset", c.dataset, "--data-dir", c.data_dir, *shlex.split(f"{c.vae_options} {vae_options}")]
        ckpt, vae_pt = self.train("vae", f"vae{vae_options}_{seed}", *options, "--seed", seed)
        network = variants.load_vae(ckpt).to(self.metrics.labels.device)
        held_out, _ = data.fixed_clips(data.open_dataset(vae.clips_of(ckpt), "test", ckpt["classes"]), 64)
        scores = {"psnr": vae.psnr(held_out, vae.reconstruct(network, held_out, self.metrics.labels.device))}
        if c.features != "random":
            scores["to_real"] = fvd.frechet_distance_of(self.metrics.real, self.metrics.reconstructed(network))
        self.keep(start, *first, **scores)
        if both:
            start, options = time.time(), ["--ckpt", vae_pt, *shlex.split(f"{c.dit_options} {dit_options}"), "--seed", seed]
            ckpt, dit_pt = self.train("dit", f"dit{vae_options}{dit_options}_{seed}", *options)
            model, _, latent_map = (part.to(self.metrics.labels.device) for part in variants.load_dit(ckpt))
            tokens = latent_map.inverse(dit.generate(model, self.metrics.labels, seed=seed))
            clips = vae.decode(network, tokens, torch.arange(network.nerv_config.num_frames))
            names = ("agreement", "to_real", "to_reconstructed")
            self.keep(start, *second, **dict(zip(names, self.metrics(clips, network))))
            for file in (dit_pt, utils.log_directory(dit_pt) / "values.npy"):
                file.unlink()


def plan(names, seeds):
    """The runs of some tables without repetitions, all rows of one seed before the next: [(vae, dit, seed, both stages?)]."""
    wanted = {}
    for seed in range(seeds):
        for name in names:
            for _, _, *options in TABLES[name][1]:
                wanted[*options, seed] = wanted.get((*options, seed), False) or name in STAGE2
    return [(*run, both) for run, both in wanted.items()]


def verdict(rows):
    """Does the paper's best, the last of rows [(name, values of all seeds)], win? Higher is better."""
    seeds, best = dict(rows), rows[-1][0]
    means = {name: statistics.mean(values) for name, values in rows}
    second = max((name for name in means if name != best), key=means.get)
    ahead, behind = sorted((best, second), key=means.get, reverse=True)
    answer, gap = "yes" if ahead == best else "no", means[ahead] - means[behind]
    if len(seeds[best]) < 2:
        return f"{answer}, of one seed"
    noise = max(statistics.stdev(seeds[name]) for name in (best, second))
    gaps = [a - b for a, b in zip(seeds[ahead], seeds[behind])]  # rows of a seed have more in common than rows of two
    by_seed = f"{ahead} is ahead of {behind} by {gap:.2f}, seed by seed by {min(gaps):.2f} to {max(gaps):.2f}"
    return f"{answer}, {by_seed}" if gap > noise else f"within noise: {by_seed}; seeds differ by {noise:.2f}"


def spread(values):
    """Mean, and standard deviation where there are several."""
    if len(values) > 1:
        return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
    return f"{values[0]:.2f}" if values else "not yet"


def report(study, names):
    """Print the tables of what is done, and draw them."""
    panels, true = {}, study.config.features != "random"
    for name in names:
        title, rows = TABLES[name]
        metrics = {("1", "psnr"): "PSNR, dB"} if name[0] == "2" else {}  # (stage, column of runs.csv) -> its name
        metrics |= {("1", "to_real"): "rFVD"} if name[0] == "2" and true else {}
        if name in STAGE2:
            metrics |= {("2", "to_real"): "gFVD" if true else "distance to real clips"}
            metrics |= {("2", "to_reconstructed"): "distance to reconstructions", ("2", "agreement"): "classifier accuracy, %"}
        found, printed = {metric: {} for metric in metrics}, []
        for row, paper, vae_options, dit_options in rows:
            for stage, column in metrics:
                run = (stage, vae_options, dit_options if stage == "2" else "")
                done = {seed: study.get(*run, seed) for seed in range(study.config.seeds)}
                found[stage, column][row] = {seed: float(one[column]) for seed, one in done.items() if one}
            cells = [spread(list(values[row].values())) for values in found.values()]
            printed.append([row, paper, *cells, max(len(values[row]) for values in found.values())])
        print(f"\n**Table {name}, {title}.**", end=" ")
        for (stage, column), values in found.items():
            if shared := sorted(set.intersection(*map(set, values.values()))):  # seeds that all rows have
                metric, sign = metrics[stage, column], -1 if column.startswith("to_") else 1
                won = verdict([(row, [sign * one[seed] for seed in shared]) for row, one in values.items()])
                print(f"By {metric}: {won}.", end=" ")
                panel = f"{name}: {title}", f"{metric} {'↓' if sign < 0 else '↑'}"
                panels[panel] = [(row, list(one.values())) for row, one in values.items()]
        print("\n")
        table([title, "gFVD in the paper", *metrics.values(), "seeds"], printed)
    if panels:
        draw(study.path.with_name("ablate.png"), panels)
        print(f"\nwrote {study.path} and {study.path.with_name('ablate.png')}")


def draw(path, panels):
    """A panel for each of {(title, metric): [(row, values)]}: a dot for every seed, a line over their range, and their mean.

    The paper's choice, the last row, is red and has a diamond for its mean.
    """
    fig, axes = plot.figure(len(panels), 2, 4.2, 1.7)
    for ax, ((title, metric), rows) in zip(axes, panels.items()):
        for y, (_, seeds) in enumerate(rows):
            colour, marker = (plot.RED, "D") if y == len(rows) - 1 else (plot.BLUE, "|")
            ax.plot([min(seeds), max(seeds)], [y, y], color=colour, linewidth=1.2)
            ax.plot(statistics.mean(seeds), y, marker, color=colour, markersize=6, markeredgewidth=2)
            ax.plot(seeds, [y] * len(seeds), "o", markersize=4, markerfacecolor="none", markeredgecolor=plot.INK)
        ax.set_yticks(range(len(rows)), [row for row, _ in rows])
        ax.get_yticklabels()[-1].set(color=plot.RED, weight="bold")
        ax.set(xlabel=metric, ylim=(len(rows) - 0.5, -0.5))
        ax.set_title(textwrap.fill(title, 50), size=9)
        ax.locator_params("x", nbins=6)
    fig.savefig(path)


def main(argv=None):
    config = utils.parse_options(Config, __doc__, argv=argv)
    utils.check_positive(config, "seeds", "clips")
    study, names = Study(config), config.only or list(TABLES)
    try:
        for run in plan(names, 0 if config.report else config.seeds):
            study.run(*run)
    finally:
        report(study, names)


if __name__ == "__main__":
    utils.run(main)
