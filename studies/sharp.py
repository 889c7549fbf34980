"""What makes stage 1 sharp: preset nano with one thing changed at a time, and what gradient steps on the tokens still find.

python -m studies.sharp                                       shapes, 600 steps, seed 0: about half an hour on two CPU cores
python -m studies.sharp --only nano adamw --seeds 3
python -m studies.sharp --dataset sprites --options "--steps 600 --num-tokens 64 --token-dim 32"

Refined tokens (VAE.refine) show what the decoder can hold, the encoder's own show what it is given: the gap between the columns
is the encoder's. Every run has a thread of its own, as many at a time as there are cores. A run that is done is a row of
runs.csv, and is not done again.
"""

import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

import data
from common import checkpoints, utils
from common.tables import add_row, read_rows, table
from common.utils import option
from common.video import to_clip
from losses import LPIPS, at_least_64
from vae import Config as Stage1
from vae import fine_power, load_vae, psnr, reconstruct

# Name -> options of vae.py. "before" is nano as it was; each of the others is nano with one thing as it was, or one thing more.
ROWS = {
    "before": "--optimizer adamw --lr 1e-3 --renorm 1 --padding zeros --no-antialias --mixing 0",
    "nano": "",
    "adamw": "--optimizer adamw --lr 1e-3",
    "muon at 1e-3": "--lr 1e-3",
    "muon at 3e-3": "--lr 3e-3",
    "batch norm throughout": "--renorm 1",
    "renorm from the middle on": "--renorm 0.5",
    "renorm from the start": "--renorm 0",
    "zero edges": "--padding zeros",
    "no filter": "--no-antialias",
    "filter": "--antialias",  # the shapes have it
    "LPIPS": "--lpips alex",
    "LPIPS, twice the weight": "--lpips alex --lpips-weight 0.1",
    "LPIPS, the paper's weight": "--lpips alex --lpips-weight 1",
    "4 frames a step": "--decode-frames 4",
    "batch of 32, one frame": "--batch-size 32 --decode-frames 1",
    "no mixing": "--mixing 0",
    "pictures": "--pictures 64 --renorm 0",  # as many as 32 x 16 numbers take
    "256 pictures": "--pictures 256 --num-tokens 64 --token-dim 32 --renorm 0 --warmup 100",
    "512 pictures": "--pictures 512 --num-tokens 64 --token-dim 64 --renorm 0 --warmup 100",
}
STEPS = (0, 3, 10, 80)  # of refinement
EVERY = 2  # of the frames, those that `linear` makes
COLUMNS = ["row", "seed", "settings", "revision", "seconds", *(f"psnr{k}" for k in STEPS)]
COLUMNS += ["pictures alone", "linear", "linear motion", "motion", "fine", "mesh", "lpips"]


@dataclass
class Config:
    dataset: str = option("data", "shapes", "what to train on", choices=data.DATASETS)
    data_dir: str = option("data", "", "where it is")
    only: list = option("what", [], "rows to run; all unless named", nargs="*", choices=list(ROWS))
    seeds: int = option("what", 1, "runs of each row")
    options: str = option("training", "--steps 600", "further options of vae.py for every run, in quotes")
    clips: int = option("judging", 32, "held-out clips that PSNR, LPIPS and mesh are of")
    jobs: int = option("machine", 0, "runs at the same time; 0 is one for each core")
    out_dir: str = option("output", "out/sharp", "runs.csv and checkpoints go here")


def mesh(real, made):
    """Root mean square of what alternates from pixel to pixel where the real clips [B, T, 3, H, W] are flat, in grey levels.

    (2 x[i] - x[i - 1] - x[i + 1]) / 4 is the whole of a pattern of period two pixels and nothing of a ramp. Flat is where that
    of the real frames is below a hundredth in all channels.
    """

    def alternating(x):
        return (2 * x[..., 1:-1] - x[..., :-2] - x[..., 2:]) / 4

    power = []
    for a, b in ((real, made), (real.transpose(-1, -2), made.transpose(-1, -2))):
        flat = (alternating(a).abs().amax(2, keepdim=True) < 0.01).expand(-1, -1, 3, -1, -1)
        power.append(alternating(b)[flat].square().mean())
    return (sum(power) / 2).sqrt().item() * 127.5


def motion(real, made):
    """How much of what moves is there, in percent: what differs from each clip's time average, [B, T, 3, H, W] both.

    100 is all of it, 0 is as wrong as a still picture, and less is worse than that.
    """
    moves, error = (x - x.mean(1, keepdim=True) for x in (real, real - made))
    return 100 * (1 - error.square().mean() / moves.square().mean()).item()


@torch.no_grad()
def linear(network, train_set, clips, count=1024):
    """Held-out clips [B, T, 3, H, W], every EVERY-th frame, as the best linear map from tokens to pixels makes them.

    It is fitted on so many training clips (ridge regression on standardized tokens), and tells what the tokens know: a decoder
    below it has learned too little of them, and what it does not find, the encoder has not told.
    """

    def tokens(clips):
        return torch.cat([network.encode(batch)[0].flatten(1) for batch in clips.split(16)])

    known = torch.cat([to_clip(train_set[i][0])[None] for i in range(count)])
    x, y, pixels = tokens(known), tokens(clips), known[:, ::EVERY].flatten(1)
    mean, deviation, average = x.mean(0), x.std(0) + 1e-6, pixels.mean(0)
    x, y = (x - mean) / deviation, (y - mean) / deviation
    inverse = torch.linalg.inv(x @ x.T + 10 * torch.eye(count))  # of the training clips
    return (average + y @ x.T @ inverse @ (pixels - average)).view_as(clips[:, ::EVERY])


@torch.no_grad()
def pictures_alone(network, clips):
    """PSNR of clips that go through the pictures alone, or "" where there are none: the rest is what the transformer and the
    convolutions bring."""
    pictures, T = network.nerv.pictures, clips.shape[1]
    return "" if pictures is None else round(psnr(clips, pictures(pictures.read(clips), torch.arange(T), T)), 2)


def run(config, row, seed):
    """Train a row, measure it, and return its line of runs.csv."""
    out, start = Path(config.out_dir), time.time()
    name = utils.file_name(row)
    where = ["--dataset", config.dataset, "--data-dir", config.data_dir, "--preset", "nano"]
    files = ["--out", out / f"{name}{seed}.pt", "--run-dir", out / f"{name}{seed}"]
    command = [sys.executable, "vae.py", *where, *shlex.split(config.options), *shlex.split(ROWS[row]), "--seed", seed, *files]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), cwd=Path(__file__).parent.parent, env=env, capture_output=True, text=True)
    if done.returncode:
        raise utils.UserError(f"{row}: {done.stderr.strip().splitlines()[-1]}")
    seconds = round(time.time() - start)
    ckpt = checkpoints.load_finished(files[1], "vae", "python vae.py")
    network, source = load_vae(ckpt), Stage1(**ckpt["config"])
    train_set, test_set = (data.open_dataset(source, role, ckpt["classes"]) for role in ("train", "test"))
    clips, _ = data.fixed_clips(test_set, config.clips)
    made = {k: reconstruct(network, clips, torch.device("cpu"), refine=k) for k in STEPS}
    found = {f"psnr{k}": round(psnr(clips, made[k]), 2) for k in STEPS}
    regressed = linear(network, train_set, clips)
    found |= {
        "pictures alone": pictures_alone(network, clips),
        "linear": round(psnr(clips[:, ::EVERY], regressed), 2),
        "linear motion": round(motion(clips[:, ::EVERY], regressed), 1),
        "motion": round(motion(clips, made[0]), 1),
        "fine": round(100 * (fine_power(made[0]).mean() / fine_power(clips).mean()).item(), 1),
        "mesh": round(mesh(clips, made[0]), 2),
    }
    with torch.no_grad():
        found["lpips"] = round(LPIPS("alex")(at_least_64(made[0]), at_least_64(clips)).item(), 4)
    return {
        "row": row,
        "seed": seed,
        "settings": settings(config),
        "revision": utils.git_revision(),
        "seconds": seconds,
    } | found


def settings(config):
    return f"{config.dataset} {config.data_dir} {config.options} | {config.clips} clips"


def main():
    config = utils.parse_options(Config, __doc__)
    utils.check_positive(config, "seeds", "clips")
    path = Path(config.out_dir) / "runs.csv"
    utils.make_parent(path)
    rows = [row for row in read_rows(path, COLUMNS) if row["settings"] == settings(config)]
    done = {(row["row"], int(row["seed"])) for row in rows}
    wanted = [(row, seed) for seed in range(config.seeds) for row in config.only or ROWS]
    with ThreadPoolExecutor(config.jobs or utils.cores()) as pool:
        for row in pool.map(lambda key: run(config, *key), [key for key in wanted if key not in done]):
            add_row(path, COLUMNS, row)
            rows.append(row)
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    rows = [row for row in rows if (row["row"], int(row["seed"])) in wanted]
    table(COLUMNS[:2] + COLUMNS[4:], [[row[name] for name in COLUMNS[:2] + COLUMNS[4:]] for row in rows])


if __name__ == "__main__":
    utils.run(main)
