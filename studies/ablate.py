"""Ablations: Tables 2 and 3 of the paper on small models, beside the paper's figures.

python -m studies.ablate                                                    the built-in shapes, hours on two CPU cores
python -m studies.ablate --dataset folder --data-dir PATH --vae-options "--preset nano --resolution 64"
python -m studies.ablate --only 2a 3b --seeds 1                             some tables, one seed
python -m studies.ablate --only 2-cumulative                                Table 2 as in the paper, one idea added per row

Each row differs from the paper's choice in one thing, and all train on the same data, seeds, steps and settings. Rows of
stage 1 are compared by the PSNR of held-out reconstructions, those of stage 2 by classifier accuracy and by Fréchet distances
on random I3D features, which are not the published FVD; --features i3d computes that, and rFVD too. At this scale, the distance
of generated clips from real ones mostly measures the blur of stage 1, for any denoiser; their distance from reconstructions of
real clips measures what the denoiser adds. Each finished run is a row of runs.csv, and is not repeated.
"""

import functools
import hashlib
import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

import data
import dit
import evaluate
import fvd
import vae
from common import utils
from common.utils import option
from common.video import to_frames
from siblings.results import read_rows, table
from studies import runs, variants

FEW = "--token-dim 64 --num-tokens 8"
# Table -> (what it compares, {row: (the paper's gFVD, options of vae.py, or in table 3 of dit.py)}), the paper's best last;
# a row without options is the base, shared by all tables. At one width, smaller codes have more kernel entries (2c-size).
TABLES = {
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
    # Each row adds an idea to those above. The paper has a quarter of the tokens until 2f; here they are wide, since without
    # reuse the layers split their numbers.
    "2-cumulative": ("ideas added one after another", {
        "channel-wise kernels": (570, f"{FEW} --side none --upsampling pixelshuffle --pos-size 1 --reuse none"),
        "direct reuse": (562, f"{FEW} --side none --upsampling pixelshuffle --pos-size 1 --reuse direct"),
        "multi-head affines": (283, f"{FEW} --side none --upsampling pixelshuffle --pos-size 1"),
        "position code of 8 x 8": (254, f"{FEW} --side none --upsampling pixelshuffle"),
        "transposed convolutions": (248, f"{FEW} --side none"), "skips": (235, f"{FEW} --side skip"),
        "residuals for skips": (219, FEW), "all tokens": (184, "--token-dim 64"),
    }),
}  # fmt: skip
STAGE2 = ("2f", "3a", "3b", "2-cumulative")  # tables that need stage 2, where the cost of more tokens shows
DIT = "--width 192 --heads 6 --num-latents 2048 --extras --lr 1e-3 --batch-size 32 --steps 500"
COLUMNS = ["stage", "vae", "dit", "seed", "settings", "revision", "seconds", "psnr", "to_real", "to_reconstructed", "agreement"]


@dataclass
class Config:
    dataset: str = option("data", "shapes", "what to train on", choices=data.DATASETS)
    data_dir: str = option("data", "", "directory of videos; classes are its sub-folders")
    only: list = option("what", [], "tables to run and print; default: all", nargs="*", choices=list(TABLES))
    seeds: int = option("what", 3, "runs of each row")
    report: bool = option("what", False, "only print the results so far")
    vae_options: str = option("training", "--steps 600", "further options of vae.py for every run, in quotes")
    dit_options: str = option("training", DIT, "further options of dit.py for every run, in quotes")
    features: str = option("evaluation", "random", "of Fréchet distances; i3d: as published", choices=["random", "i3d"])
    clips: int = option("evaluation", 90, "generated clips per run of stage 2, and as many real ones")
    out_dir: str = option("output", "out/ablate", "directory of runs.csv and checkpoints")


class Study:
    """The runs of all rows, kept in runs.csv, and the networks and clips that rows are compared by."""

    def __init__(self, config):
        self.config, self.path, self.device = config, Path(config.out_dir) / "runs.csv", utils.pick_device()
        self.true = config.features != "random"
        self.source = ["--dataset", config.dataset, "--data-dir", config.data_dir, *shlex.split(config.vae_options)]
        first = f"{config.dataset} {config.data_dir} | {config.vae_options}"
        first += f" | {config.features}, {config.clips} clips" if self.true else ""
        self.settings = {"1": first, "2": f"{first} | {config.dit_options} | {config.clips} clips, judge 4096"}

    def train(self, stage, name, options, seed):
        """Train "vae" or "dit", or resume it -> (its checkpoint, the file); the file's name depends on the settings."""
        settings = hashlib.sha256(self.settings["1" if stage == "vae" else "2"].encode()).hexdigest()
        out = self.path.parent / f"{utils.file_name(f'{stage}{name}_{seed}')}_{settings[:8]}.pt"
        torch.compiler.reset()  # the code compiled for earlier rows counts toward a limit
        return runs.train(variants.main, [stage, *options, "--seed", seed, "--resume"], out), out

    def run(self, vae_options, dit_options, seed, both):
        """Stage 1 of a row, and stage 2 if it is compared there, unless already done."""

        @functools.cache
        def stage1():
            return self.train("vae", vae_options, [*self.source, *shlex.split(vae_options)], seed)

        def first():
            network = variants.load_vae(stage1()[0]).to(self.device)
            held_out, _ = data.fixed_clips(self.open("test"), 64)
            rfvd = fvd.frechet_distance_of(self.real[2], self.reconstructed(network)) if self.true else ""
            return {"psnr": vae.psnr(held_out, vae.reconstruct(network, held_out, self.device)), "to_real": rfvd}

        def second():
            options = ["--ckpt", stage1()[1], *shlex.split(f"{self.config.dit_options} {dit_options}")]
            ckpt, out = self.train("dit", f"{vae_options}{dit_options}", options, seed)
            model, network, latent_map = (part.to(self.device) for part in variants.load_dit(ckpt))
            _, labels, real = self.real
            tokens = latent_map.inverse(dit.generate(model, labels.to(self.device), seed=seed))
            clips = vae.decode_all(network, tokens, torch.arange(network.nerv_config.num_frames))
            for file in (out, utils.log_directory(out) / "values.npy"):
                file.unlink()
            references = {"to_real": real, "to_reconstructed": self.reconstructed(network)}
            features = self.detector(to_frames(clips))
            found = {name: fvd.frechet_distance_of(reference, features) for name, reference in references.items()}
            return found | {"agreement": 100 * evaluate.accuracy(self.classifier, clips, labels)}

        runs.once(self.path, COLUMNS, ("1", vae_options, "", seed, self.settings["1"]), first)
        if both:
            runs.once(self.path, COLUMNS, ("2", vae_options, dit_options, seed, self.settings["2"]), second)

    def open(self, role):
        return data.open_dataset(utils.parse_options(vae.Config, "", vae.preset_defaults, self.source), role)

    @functools.cached_property
    def detector(self):
        return fvd.load_detector(self.config.features, device=self.device)

    @functools.cached_property
    def classifier(self):
        return evaluate.train_classifier(self.open("train"), len(self.open("train").classes), 4096, self.device)

    @functools.cached_property
    def real(self):
        """Up to config.clips training clips [count, T, 3, H, W], their labels, which are also generated, and their features."""
        clips, labels = data.clips(self.open("train"), data.spread(self.open("train"), self.config.clips))
        return clips, labels, self.detector(to_frames(clips))

    def reconstructed(self, network):
        """Features of the real clips as reconstructed by a VAE."""
        return self.detector(to_frames(vae.reconstruct(network, self.real[0], self.device)))

    def values(self, stage, column, vae_options, dit_options):
        """Values in a column of runs.csv, of the finished runs of a row."""
        dit_options = dit_options if stage == "2" else ""
        wanted = {"stage": stage, "vae": vae_options, "dit": dit_options, "settings": self.settings[stage]}
        rows = (row for row in read_rows(self.path, COLUMNS) if wanted.items() <= row.items())
        return [float(row[column]) for row in rows if int(row["seed"]) < self.config.seeds]


def options_of(name, own):
    """(options of vae.py, options of dit.py) for a row of the named table."""
    return ("", own) if name[0] == "3" else (own, "")


def spread(values):
    """Mean, and standard deviation if there are several values."""
    if len(values) > 1:
        return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
    return f"{values[0]:.2f}" if values else "not yet"


def report(study, names):
    """Print the tables of the finished runs."""
    for name in names:
        title, rows = TABLES[name]
        metrics = {("1", "psnr"): "PSNR, dB"} if name[0] == "2" else {}  # (stage, column of runs.csv) -> its name
        metrics |= {("1", "to_real"): "rFVD"} if name[0] == "2" and study.true else {}
        if name in STAGE2:
            metrics |= {("2", "to_real"): "gFVD" if study.true else "distance to real clips"}
            metrics |= {("2", "to_reconstructed"): "distance to reconstructions", ("2", "agreement"): "classifier accuracy, %"}
        printed = []
        for row, (paper, own) in rows.items():
            found = [study.values(*metric, *options_of(name, own)) for metric in metrics]
            printed.append([row, paper, *map(spread, found), max(map(len, found))])
        print(f"\n**Table {name}, {title}.** Mean ± standard deviation over seeds; the paper's choice is last.\n")
        table([title, "gFVD in the paper", *metrics.values(), "seeds"], printed)


def main(argv=None):
    config = utils.parse_options(Config, __doc__, argv=argv)
    utils.check_positive(config, "seeds", "clips")
    study, names = Study(config), config.only or list(TABLES)
    try:
        for seed in range(0 if config.report else config.seeds):  # finish one seed for all rows before the next
            for name in names:
                for _, own in TABLES[name][1].values():
                    study.run(*options_of(name, own), seed, name in STAGE2)
    finally:
        report(study, names)


if __name__ == "__main__":
    utils.run(main)
