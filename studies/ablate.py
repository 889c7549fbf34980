"""Switch each idea of the paper off: Tables 2 and 3, on small models, with the paper's figures beside.

python -m studies.ablate                                                    the built-in shapes, hours on two CPU cores
python -m studies.ablate --dataset folder --data-dir PATH --vae-options "--preset nano --resolution 64"
python -m studies.ablate --only 2a 3b --seeds 1                             some tables, one seed

Every row is the paper's choice in all but one thing, trained on the same data with the same seeds, steps and settings. Rows of
stage 1 are compared by the PSNR of held-out reconstructions. Rows of stage 2 are compared by Fréchet distances on random I3D
features (which are not the published FVD) and by class agreement. At this scale, how far generated clips are from real ones is
mostly what stage 1 blurs, whatever the denoiser; their distance to reconstructions of real clips is what the denoiser adds.
--features i3d takes the true FVD for these distances, and has that of reconstructions (rFVD) for rows of stage 1 as well.
A run that is done is a row of runs.csv, and is not done again.
"""

import os
import queue
import shlex
import shutil
import statistics
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

import data
import fvd
from common import checkpoints, plot, utils
from common.tables import add_row, read_rows, table
from common.utils import option
from evaluate import Scorer
from studies.variants import load_dit, load_vae
from vae import clips_of

# Table -> (what it compares, rows (name, the paper's gFVD, options of vae.py, options of dit.py), best of the paper last);
# without options a row is the base, which all tables share.
TABLES = {
    "2a": ("modulation", [
        ("repeat", 741, "--modulation repeat", ""), ("fmm", 636, "--modulation fmm", ""), ("channel", 570, "", ""),
    ]),
    "2b": ("reuse of tokens", [
        ("none", 570, "--reuse none", ""), ("direct", 562, "--reuse direct", ""), ("multihead", 283, "", ""),
    ]),
    "2c": ("size of the position code", [
        ("1 x 1", 283, "--pos-size 1 --padding zeros", ""),  # with repeated edges hardly anything tells pixels apart
        ("4 x 4", 269, "--pos-size 4", ""), ("16 x 16", 277, "--pos-size 16", ""), ("8 x 8", 254, "", ""),
    ]),
    "2c-size": ("size of the position code, at nano's 75 thousand kernel entries", [  # at one width, smaller codes have more
        ("1 x 1, width 20", 283, "--pos-size 1 --width 20 --padding zeros", ""),
        ("4 x 4, width 26", 269, "--pos-size 4 --width 26", ""),
        ("16 x 16, width 46", 277, "--pos-size 16 --width 46", ""), ("8 x 8", 254, "", ""),
    ]),
    "2d": ("upsampling", [
        ("bilinear", 287, "--upsampling bilinear", ""), ("pixelshuffle", 254, "--upsampling pixelshuffle", ""),
        ("transposed", 248, "", ""),
    ]),
    "2d-size": ("upsampling, at nano's kernel entries", [
        ("bilinear, width 36", 287, "--upsampling bilinear --width 36", ""),
        ("pixelshuffle, width 26", 254, "--upsampling pixelshuffle --width 26", ""), ("transposed", 248, "", ""),
    ]),
    "2e": ("side connection", [
        ("none", 248, "--side none", ""), ("skip", 235, "--side skip", ""), ("residual", 219, "", ""),
    ]),
    "2f": ("tokens, of nano's 32", [
        ("a quarter", 219, "--num-tokens 8", ""), ("half", 193, "--num-tokens 16", ""), ("twice", 206, "--num-tokens 64", ""),
        ("all", 184, "", ""),
    ]),
    "3a": ("denoiser", [
        ("gpt", 550, "", "--denoiser gpt"), ("latte", 342, "", "--denoiser latte"), ("dit", 295, "", ""),
    ]),
    "3b": ("training of stage 2", [
        ("plain", 295, "", "--min-snr-gamma 0 --scheduled-sampling 0"), ("scheduled sampling", 261, "", "--min-snr-gamma 0"),
        ("Min-SNR", 238, "", "--scheduled-sampling 0"), ("both", 184, "", ""),
    ]),
}  # fmt: skip
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
    dit_options: str = option(
        "training",
        "--num-latents 2048 --principal 0 0 --optimizer adamw --lr 1e-3 --batch-size 32 --steps 500 --refine 0",
        "further options of dit.py for every run, in quotes",
    )
    features: str = option("judging", "random", "of Fréchet distances; i3d: of the published FVD", choices=["random", "i3d"])
    clips: int = option("judging", 90, "generated clips of each run of stage 2, and as many real ones")
    judge_clips: int = option("judging", 4096, "clips that the judge of class agreement is trained on")
    jobs: int = option("machine", 0, "runs at the same time; 0 is one for each GPU, or for each core of a CPU")
    out_dir: str = option("output", "out/ablate", "runs.csv, the plot and checkpoints go here")


def visible_gpus():
    """The names of this machine's GPUs, or of those that CUDA_VISIBLE_DEVICES leaves."""
    names, count = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    return names.split(",")[:count] if names else [str(i) for i in range(count)]


class Study:
    """The runs that are done, and how to do one more; threads share it."""

    def __init__(self, config):
        self.config, self.out = config, Path(config.out_dir)
        self.gpus = visible_gpus()
        self.device = torch.device("cuda" if self.gpus else "cpu")
        self.jobs = config.jobs or len(self.gpus) or utils.cores()
        self.threads = max(1, utils.cores() // self.jobs)  # of a run
        self.lock, self.judging, self.places = threading.Lock(), threading.Lock(), queue.SimpleQueue()
        self.scorer, self.reconstructed = None, {}  # of a stage-1 checkpoint, features of the real clips
        self.training = {}  # stage-1 checkpoint -> lock of who trains it
        for place in range(self.jobs):
            self.places.put(place)
        first = f"{config.dataset} {config.data_dir} | {config.vae_options}"
        first += f" | {config.features}, {config.clips} clips" if config.features != "random" else ""
        second = f"{first} | {config.dit_options} | {config.clips} clips, judge {config.judge_clips}"
        self.settings = {1: first, 2: second}  # of a stage: runs with others are other runs
        self.path = self.out / "runs.csv"
        utils.make_parent(self.path)
        self.done = {self.key(row): row for row in read_rows(self.path, COLUMNS)}

    @staticmethod
    def key(row):
        return tuple(str(row[name]) for name in COLUMNS[:5])

    def get(self, stage, vae_options, dit_options, seed):
        """The row of runs.csv, or None."""
        return self.done.get((str(stage), vae_options, dit_options, str(seed), self.settings[stage]))

    def checkpoint(self, stage, options, seed):
        """Where a run's checkpoint goes; those of other settings have other names."""
        name = f"{('vae', 'dit')[stage - 1]}{options.strip()}_seed{seed}"
        return checkpoints.study_path(self.out, name, self.settings[stage])

    def keep(self, start, stage, **row):
        """Append a run to runs.csv."""
        row = {"stage": stage, **row, "settings": self.settings[stage]}
        row |= {"revision": utils.git_revision() or "unknown", "seconds": round(time.time() - start)}
        with self.lock:
            add_row(self.path, COLUMNS, row)
            self.done[self.key(row)] = {name: str(row.get(name, "")) for name in COLUMNS}
        print(f"{time.strftime('%H:%M')} {', '.join(f'{name} {value}' for name, value in row.items() if value)}", flush=True)

    def call(self, stage, *options):
        """Train "vae" or "dit" (studies/variants.py), on a GPU of its own where there are some; returns what it printed."""
        command = ["-m", "studies.variants", stage, *map(str, options)]
        env = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        env["PYTHONPATH"] = utils.python_path(Path(__file__).parent.parent)
        place = self.places.get()
        if self.gpus:
            env["CUDA_VISIBLE_DEVICES"] = self.gpus[place % len(self.gpus)]
        done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)
        self.places.put(place)
        said = f"python {shlex.join(command)}"
        if done.returncode:
            raise utils.UserError(f"{said} failed: {done.stderr[-500:]}")
        if "interrupted after" in done.stdout:
            raise utils.UserError(f"{said} was interrupted; start again to go on with the rows that are not done")
        return done.stdout

    def run(self, vae_options, dit_options, seed, both):
        """Stage 1 of a row, and stage 2 on its tokens where it is compared there; what is done is not done again."""
        stage2 = both and not self.get(2, vae_options, dit_options, seed)
        vae_pt = self.checkpoint(1, vae_options, seed)
        with self.lock:
            alone = self.training.setdefault(vae_pt, threading.Lock())
        with alone:  # rows may share their stage 1
            if not self.get(1, vae_options, "", seed) or (stage2 and not vae_pt.is_file()):
                self.stage1(vae_pt, vae_options, seed)
        if stage2:
            self.stage2(vae_pt, vae_options, dit_options, seed)

    def stage1(self, vae_pt, vae_options, seed):
        start, config = time.time(), self.config
        where = ["--dataset", config.dataset, "--data-dir", config.data_dir]
        settings = [*shlex.split(config.vae_options), *shlex.split(vae_options), "--seed", seed]
        unfinished = vae_pt.with_suffix(".part")
        printed = self.call("vae", *where, *settings, "--out", unfinished, "--run-dir", vae_pt.with_suffix(""))
        os.replace(unfinished, vae_pt)
        psnr = next(line.split()[2] for line in printed.splitlines() if line.startswith("held-out PSNR"))
        if not self.get(1, vae_options, "", seed):
            scores = {"psnr": psnr} | ({"to_real": self.rfvd(vae_pt)} if self.config.features != "random" else {})
            self.keep(start, stage=1, vae=vae_options, dit="", seed=seed, **scores)

    def stage2(self, vae_pt, vae_options, dit_options, seed):
        start, dit_pt = time.time(), self.checkpoint(2, f"{vae_options} {dit_options}", seed)
        settings = [*shlex.split(self.config.dit_options), *shlex.split(dit_options), "--seed", seed]
        self.call("dit", "--ckpt", vae_pt, *settings, "--out", dit_pt, "--run-dir", dit_pt.with_suffix(""))
        agreement, to_real, to_reconstructed = (f"{score:.4g}" for score in self.score(vae_pt, dit_pt, seed))
        scores = {"to_real": to_real, "to_reconstructed": to_reconstructed, "agreement": agreement}
        self.keep(start, stage=2, vae=vae_options, dit=dit_options, seed=seed, **scores)
        dit_pt.unlink()
        shutil.rmtree(dit_pt.with_suffix(".latents"), ignore_errors=True)

    def rfvd(self, vae_pt):
        """Distance of reconstructions to the real clips, as text; their features are kept for stage 2."""
        ckpt = checkpoints.load(vae_pt, "vae", "python vae.py")
        with self.judging:
            self.reconstructed[vae_pt] = self.judge(ckpt).reconstructed(load_vae(ckpt).to(self.device))
            return f"{fvd.frechet_distance_of(self.scorer.real, self.reconstructed[vae_pt]):.4g}"

    def score(self, vae_pt, dit_pt, seed):
        """Class agreement in %, distance to real clips, distance to their reconstructions."""
        ckpt = checkpoints.load(dit_pt, "dit", "python dit.py")
        model, vae, scale = load_dit(ckpt)
        model, vae = model.to(self.device), vae.to(self.device)
        with self.judging:
            judge = self.judge(ckpt["vae"])
            if vae_pt not in self.reconstructed:
                self.reconstructed[vae_pt] = judge.reconstructed(vae)
        return judge(judge.generate(model, vae, scale, seed)[0], self.reconstructed[vae_pt])

    def judge(self, ckpt):
        """The Scorer, of the data that a stage-1 checkpoint was trained on; made when it is asked for first."""
        if not self.scorer:
            c, train_set = self.config, data.open_dataset(clips_of(ckpt), "train", ckpt["classes"])
            self.scorer = Scorer(train_set, len(ckpt["classes"]), c.clips, c.judge_clips, self.device, c.features)
        return self.scorer


def plan(names, seeds):
    """The runs of some tables, without repetitions, all rows of one seed before the next: (vae, dit, seed, both stages?)."""
    wanted = {}
    for seed in range(seeds):
        for name in names:
            for _, _, vae_options, dit_options in TABLES[name][1]:
                key = (vae_options, dit_options, seed)
                wanted[key] = wanted.get(key, False) or name in STAGE2
    # Rows of stage 2 that share a stage 1 come last of their seed: it is there by then, and none waits for another's.
    return sorted(((*key, both) for key, both in wanted.items()), key=lambda run: (run[2], run[1] != ""))


def verdict(rows):
    """Does the paper's best, the last of rows [(name, values)], win? Higher is better; the spread is between seeds."""
    seeds, best = dict(rows), rows[-1][0]
    means = {name: statistics.mean(values) for name, values in rows}
    second = max((name for name in means if name != best), key=means.get)
    if any(len(values) < 2 for _, values in rows):
        return f"{'yes' if means[best] > means[second] else 'no'}, of one seed"
    spread = max(statistics.stdev(seeds[best]), statistics.stdev(seeds[second]))
    ahead, behind = (best, second) if means[best] > means[second] else (second, best)
    gap = means[ahead] - means[behind]
    gaps = [a - b for a, b in zip(seeds[ahead], seeds[behind])]  # rows of a seed have more in common than rows of two
    by_seed = f"{ahead} is ahead of {behind} by {gap:.2f}, seed by seed by {min(gaps):.2f} to {max(gaps):.2f}"
    if gap <= spread:
        return f"within noise: {by_seed}; seeds differ by {spread:.2f}"
    return f"{'yes' if ahead == best else 'no'}, {by_seed}"


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
        metrics = {(1, "psnr"): "PSNR, dB"} if name[0] == "2" else {}  # (stage, column of runs.csv) -> its name
        if name[0] == "2" and true:
            metrics |= {(1, "to_real"): "rFVD"}
        if name in STAGE2:
            metrics |= {(2, "to_real"): "gFVD" if true else "distance to real clips"}
            metrics |= {(2, "to_reconstructed"): "distance to reconstructions", (2, "agreement"): "class agreement, %"}
        found = {metric: [] for metric in metrics}
        printed = []
        for row, paper, vae_options, dit_options in rows:
            cells = []
            for metric in metrics:
                options = (1, vae_options, "") if metric[0] == 1 else (2, vae_options, dit_options)
                done = {seed: study.get(*options, seed) for seed in range(study.config.seeds)}
                values = {seed: float(run[metric[1]]) for seed, run in done.items() if run}
                found[metric].append((row, values))
                cells.append(spread(list(values.values())))
            printed.append([row, paper, *cells, len(values)])
        print(f"\n**Table {name}, {title}.**", end=" ")
        for metric, columns in found.items():
            if shared := sorted(set.intersection(*(set(values) for _, values in columns))):  # seeds that all rows have
                sign = -1 if metric[1].startswith("to_") else 1
                won = verdict([(row, [sign * values[seed] for seed in shared]) for row, values in columns])
                print(f"By {metrics[metric]}: {won}.", end=" ")
                panels[f"{name}: {title}", f"{metrics[metric]} {'↓' if sign < 0 else '↑'}"] = [
                    (row, list(values.values())) for row, values in columns
                ]
        print("\n")
        table([title, "gFVD in the paper", *metrics.values(), "seeds"], printed)
    if panels:
        draw(study.out / "ablate.png", panels)
        print(f"\nwrote {study.path} and {study.out / 'ablate.png'}")


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


def main():
    config = utils.parse_options(Config, __doc__)
    utils.check_positive(config, "seeds", "clips", "judge_clips")
    study, names = Study(config), config.only or list(TABLES)
    if not study.gpus:
        torch.set_num_threads(study.threads)
    pool = ThreadPoolExecutor(study.jobs)
    try:
        list(pool.map(lambda run: study.run(*run), plan(names, 0 if config.report else config.seeds)))
    finally:
        pool.shutdown(cancel_futures=True)
        report(study, names)


if __name__ == "__main__":
    utils.run(main)
