"""Is it better than what one would use instead? Three ways to generate video, after equal seconds of training in all stages.

ours      vae.py, then dit.py
frames    what people pick today: a convolutional KL autoencoder, each frame by itself, eight times smaller, in the shape of
          Stable Diffusion's (Rombach et al. 2022); then a DiT whose blocks look within a frame and across frames in turns, as
          Latte's do (Ma et al. 2024)
pixels    no autoencoder: a DiT on space-time patches of pixels, which says the clean patch (Li & He 2025)

pip install -r studies/requirements.txt                                   the autoencoder's parts, of diffusers
python -m studies.compare --dataset sprites                               three learning rates, three seeds: 27 hours
python -m studies.compare --dataset sprites --minutes 10 --seeds 1 --lrs 1

All denoisers are of one size, trained by dit.py's loop, and all are sampled and judged by evaluate.py. A run that is done is a
row of runs.csv, and is not done again. The learning rates are shares of each method's own; all rows are reported.
"""

import copy
import csv
import dataclasses
import json
import math
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import dit
import evaluate
import losses
import vae
from common import checkpoints, progress, utils
from common.optim import adamw
from common.tables import add_row, read_rows, table
from common.utils import UserError, option
from common.video import to_clip, write_sheet
from demo import nearest_clips
from studies.variants import LatteBlock

METHODS = {"ours": (1.5e-3, 4e-3), "frames": (1e-3, 1e-3), "pixels": (0, 1e-3)}  # learning rates of both stages
COLUMNS = ["method", "lr", "seed", "settings", "revision", "seconds", "steps", "numbers", "rFVD", "PSNR", "LPIPS", "gFVD"]
COLUMNS += ["agreement", "diversity", "nearest", "seconds a clip"]


@dataclass
class Config:
    dataset: str = option("data", "sprites", "what to train on", choices=data.DATASETS)
    data_dir: str = option("data", "", "where it is")
    cache_dir: str = option("data", "data/cache", "directory of the caches of decoded frames")
    methods: list = option("what", list(METHODS), "methods to run", nargs="+", choices=list(METHODS))
    seeds: int = option("what", 3, "runs of each method with each learning rate")
    lrs: list = option("what", [1.0, 2.0, 4.0], "learning rates, as shares of each method's own", nargs="+", type=float)
    minutes: float = option("training", 60.0, "of all stages of a run together, with what is encoded between them")
    first: float = option("training", 0.6, "share of the time that the first stage gets, where there is one")
    resolution: int = option("training", 64, "height and width in pixels")
    num_frames: int = option("training", 8, "frames of a clip")
    bf16: str = option("training", "auto", "bfloat16 autocast; auto: with CUDA", choices=["auto", "on", "off"])
    vae_options: str = option(
        "training",
        "--num-tokens 64 --token-dim 64 --pictures 512 --lpips alex --kl-weight 2e-8 --renorm 0 --warmup 100",
        "further options of vae.py, in quotes",
    )
    dit_options: str = option(
        "training",
        "--num-latents 4500 --refine 0",
        "further options of dit.py for ours, in quotes",
    )
    rival_options: str = option(
        "training",
        "--num-latents 4500 --principal 0 0 --batch-size 32 --scheduled-sampling 0",
        "those of dit.py for the others, in quotes",
    )
    frames_width: int = option("training", 16, "channels of the frames' autoencoder at full resolution, a multiple of 16")
    videos: int = option("judging", 256, "clips of each kind, or all held-out ones")
    features: str = option("judging", "i3d", "of FVD; random takes no weights", choices=["i3d", "random"])
    lpips: str = option("judging", "alex", "backbone of LPIPS, in the loss of frames too", choices=["vgg", "alex", "none"])
    judge_clips: int = option("judging", 8192, "clips that the judge of class agreement is trained on")
    out_dir: str = option("output", "out/compare", "runs.csv, checkpoints and sheet.png go here")


# ------------------------------------------------------------------------------------------------------------- the rivals


@dataclass
class Shape:
    """Of clips, as dit.py asks a first stage for it."""

    num_frames: int
    resolution: int


class Pixels(nn.Module):
    """No first stage: tokens are space-time patches of pixels, [B, T/8 * H/8 * W/8, 8 * 3 * 8 * 8]."""

    patch = (8, 8, 8)  # frames, pixels, pixels; with two frames a step takes 3.5 times as long

    def __init__(self, num_frames, resolution):
        super().__init__()
        t, h, w = self.patch
        if num_frames % t or resolution % h:
            raise UserError(f"patches are of {t} frames and {h} x {w} pixels, and clips of {num_frames} and {resolution}")
        self.grid = (num_frames // t, resolution // h, resolution // w)
        self.nerv_config = Shape(num_frames, resolution)
        self.token_shape = (math.prod(self.grid), 3 * t * h * w)

    def encode(self, video, steps=0):
        """video [B, T, 3, H, W] in [-1, 1] -> mean, logvar, each [B, N, d]; of next to no deviation."""
        t, h, w = self.patch
        x = video.unflatten(4, (-1, w)).unflatten(3, (-1, h)).unflatten(1, (-1, t))  # [B, T/t, t, 3, H/h, h, W/w, w]
        mean = x.permute(0, 1, 4, 6, 2, 3, 5, 7).flatten(4).flatten(1, 3)
        return mean, torch.full_like(mean, -20.0)

    def decode(self, tokens, t):
        """tokens [B, N, d] -> frames [B, T, 3, H, W], all of them."""
        x = tokens.unflatten(2, (self.patch[0], 3, *self.patch[1:])).unflatten(1, self.grid)  # [B, T/t, H/h, W/w, t, 3, h, w]
        return x.permute(0, 1, 4, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(1, 2)


class Frames(nn.Module):
    """A convolutional KL autoencoder, frame by frame: tokens are 2 × 2 pixels of its latent frames, as Latte's are:
    [B, T * H/16 * W/16, 16].
    """

    def __init__(self, num_frames, resolution, width):
        super().__init__()
        try:
            from diffusers.models import AutoencoderKL
        except ImportError:
            raise UserError("the autoencoder is of diffusers: pip install -r studies/requirements.txt") from None
        self.net = AutoencoderKL(
            block_out_channels=(width, 2 * width, 4 * width, 4 * width),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=16,
        )
        self.side = resolution // 16
        self.nerv_config, self.token_shape = Shape(num_frames, resolution), (num_frames * self.side**2, 16)

    def encode(self, video, steps=0):
        """video [B, T, 3, H, W] in [-1, 1] -> mean, logvar, each [B, T * H/16 * W/16, 16]."""
        posterior = self.net.encode(video.flatten(0, 1)).latent_dist
        parts = (F.pixel_unshuffle(x.float(), 2) for x in (posterior.mean, posterior.logvar))  # [B * T, 16, h, w]
        return tuple(x.unflatten(0, (-1, video.shape[1])).movedim(2, -1).flatten(1, 3) for x in parts)

    def decode(self, tokens, t):
        """tokens [B, T * H/16 * W/16, 16] -> frames [B, T, 3, H, W], all of them."""
        x = tokens.unflatten(1, (-1, self.side, self.side)).movedim(-1, 2)  # [B, T, 16, h, w]
        return self.net.decode(F.pixel_shuffle(x.flatten(0, 1), 2)).sample.unflatten(0, (len(tokens), -1))


def latte(num_frames):
    """The denoiser of frames: blocks within a frame and blocks across frames take turns (Ma et al. 2024, variant 1)."""

    class Latte(dit.DiT):
        def __init__(self, config):
            super().__init__(config)
            self.blocks = nn.ModuleList(LatteBlock(config, columns=i % 2 == 1, rows=num_frames) for i in range(config.depth))

    return Latte


class CleanDiT(dit.DiT):
    """The denoiser of pixels: it says the clean tokens, and the noise is what is left (Li & He 2025, "Back to Basics").

    A patch has 1,536 numbers, the transformer a width of 192: the noise of a patch does not go through it, and clean patches,
    which are much alike, do.
    """

    def __init__(self, config):
        super().__init__(config)
        for name, values in zip(("alpha", "sigma"), dit.noise_schedule()):
            self.register_buffer(name, values, persistent=False)

    def forward(self, tokens, step, label, given=None):
        clean = super().forward(tokens, step, label, given).float()
        alpha, sigma = (x[step][:, None, None] for x in (self.alpha, self.sigma))
        return (tokens - alpha * clean) / sigma


def load_rival(ckpt):
    """The first stage of a checkpoint: a rival's, or ours."""
    if ckpt["decoder"] not in ("Pixels", "Frames"):
        return vae.load_vae(ckpt)
    clips = ckpt["config"]["num_frames"], ckpt["config"]["resolution"]
    frames = ckpt["decoder"] == "Frames"
    rival = Frames(*clips, len(ckpt["ema"]["net.encoder.conv_in.weight"])) if frames else Pixels(*clips)
    rival.load_state_dict(ckpt["ema"])
    return rival.eval().requires_grad_(False)


def denoiser_of(method, num_frames):
    return {"frames": latte(num_frames), "pixels": CleanDiT}.get(method, dit.DiT)


def load_dit(ckpt):
    """dit.load_dit with the denoiser and the first stage that the checkpoint names."""
    method = {"Latte": "frames", "CleanDiT": "pixels"}.get(ckpt["denoiser"], "ours")
    return dit.load_dit(ckpt, denoiser_of(method, ckpt["vae"]["config"]["num_frames"]), load_rival)


# ----------------------------------------------------------------------------------------------------------- the trainings


def train_frames(network, train_set, config, lr, seed, seconds, batch_size=8, few=2):
    """Train a Frames for so many seconds on L2 + LPIPS + KL, as vae.py's nano has them -> (its averaged weights, steps)."""
    device = utils.pick_device("auto")
    network.to(device)
    ema = copy.deepcopy(network).eval().requires_grad_(False)
    optimizer = adamw(network.parameters(), weight_decay=0.01)
    batches = data.endless(train_set, data.Stream(len(train_set), batch_size, seed))
    perceptual = losses.LPIPS(config.lpips).to(device) if config.lpips != "none" else None
    began, step = time.time(), 0
    with progress.bar(total=round(seconds), desc="frames", unit="s") as bar:
        while (share := (time.time() - began) / seconds) < 1:
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * share))
            t = torch.randperm(config.num_frames, generator=utils.step_generator("cpu", seed, step))[:few]
            video = to_clip(next(batches)[0].to(device))[:, t]
            with utils.autocast(device, config.bf16):
                mean, logvar = network.encode(video)
                made = network.decode(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean), t).float()
                kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2)).mean()
                loss = (made - video).square().mean() + 1e-6 * kl
                if perceptual:
                    loss = loss + 0.05 * perceptual(losses.at_least_64(made), losses.at_least_64(video))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            step += 1
            utils.update_ema(ema, network, min(0.99, step / (9 + step)))
            bar.update(round(time.time() - began) - bar.n)
    return ema, step


def steps_within(seconds, main, argv, run_dir):
    """How many steps of a training main(argv) fit into so many seconds, what it prepares and the trials with them.

    On a GPU thirty steps are a moment, in which clips are drawn for the first time and kernels are chosen: a trial that is
    over in a hundredth of the time is followed by one ten times as long, and the second half of a trial is what counts.
    """
    began, steps = time.time(), 30
    while True:
        main([*argv, "--steps", str(steps), "--log-every", "10", "--run-dir", str(run_dir)])
        with open(run_dir / "losses.csv", newline="") as file:
            rows = [(int(row["step"]), float(row["seconds"])) for row in csv.DictReader(file)]
        (first, start), (last, end) = rows[len(rows) // 2 - 1], rows[-1]
        if end > 0.01 * seconds and end > start:  # losses.csv has tenths of a second
            return max(1, int((seconds - (time.time() - began)) * (last - first) / (end - start)))
        steps *= 10


def train(method, lr, seed, config, out):
    """Both stages of a method in the time that there is, into out/dit.pt -> steps of both stages."""
    began, seconds, steps = time.time(), 60 * config.minutes, [0, 0]
    torch.manual_seed(seed)
    vae_pt, dit_pt = out / "vae.pt", out / "dit.pt"
    common = ["--cache-dir", config.cache_dir, "--seed", seed, "--bf16", config.bf16]
    if method == "ours":
        argv = ["--dataset", config.dataset, "--data-dir", config.data_dir, "--preset", "nano"]
        argv += ["--resolution", config.resolution, "--num-frames", config.num_frames, *common]
        argv += [*shlex.split(config.vae_options), "--lr", METHODS[method][0] * lr, "--out", vae_pt]
        argv = list(map(str, argv))

        def stage1(argv):
            vae.main(argv)
            checkpoints.load_finished(vae_pt, "vae", "this study")

        steps[0] = steps_within(config.first * seconds, stage1, argv, out / "trial")
        stage1([*argv, "--steps", str(steps[0]), "--run-dir", str(out / "vae")])
    else:
        settings = {"dataset": config.dataset, "data_dir": config.data_dir, "cache_dir": config.cache_dir, "preset": "nano"}
        settings |= {"resolution": config.resolution, "num_frames": config.num_frames}
        source = vae.Config(**settings)
        train_set = data.open_dataset(source, "train")
        if method == "pixels":
            network = Pixels(config.num_frames, config.resolution)
        else:
            network = Frames(config.num_frames, config.resolution, config.frames_width)
            network, steps[0] = train_frames(network, train_set, config, METHODS[method][0] * lr, seed, config.first * seconds)
        checkpoints.save(
            vae_pt, True, stage="vae", step=steps[0], config=dataclasses.asdict(source), classes=list(train_set.classes),
            decoder=type(network).__name__, ema=network.state_dict(), training={},
        )  # fmt: skip
    options = config.dit_options if method == "ours" else config.rival_options
    argv = ["--ckpt", vae_pt, *common, *shlex.split(options), "--lr", METHODS[method][1] * lr, "--out", dit_pt]
    argv += [] if method == "ours" else ["--refine", 0, "--compile", "off"]
    argv += ["--no-cache-latents"] if method == "pixels" else []  # latents would be larger than the videos
    argv = list(map(str, argv))

    def stage2(argv):
        dit.main(argv, denoiser_of(method, config.num_frames), load_rival)
        checkpoints.load_finished(dit_pt, "dit", "this study")

    steps[1] = steps_within(seconds - (time.time() - began), stage2, argv, out / "trial")
    stage2([*argv, "--steps", str(steps[1]), "--run-dir", str(out / "dit")])
    return steps


# ---------------------------------------------------------------------------------------------------------------- judging


@torch.no_grad()
def shown_clips(ckpt, count=8):
    """Generated clips [count, T, 3, H, W] of classes in turn, and the seconds that one takes."""
    device, (model, first, scale) = utils.pick_device("auto"), load_dit(ckpt)
    model, first = model.to(device), first.to(device)
    labels, began = torch.arange(count, device=device) % len(ckpt["classes"]), time.time()
    tokens = dit.generate(model, labels, guidance=1, seed=0) / scale
    clips = first.decode(tokens, torch.arange(ckpt["vae"]["config"]["num_frames"], device=device)).cpu()
    return clips, (time.time() - began) / count


def trained_once(method, lr, seed, config, out):
    """Train a method, unless it has been: who stops a study while a run is judged need not train it again."""
    path, wanted = out / "trained.json", settings(config, method)
    if path.is_file() and (found := json.loads(path.read_text()))["settings"] == wanted:
        return found
    path.unlink(missing_ok=True)
    began = time.time()
    steps = train(method, lr, seed, config, out)
    found = {"settings": wanted, "revision": utils.git_revision(), "seconds": round(time.time() - began), "steps": steps}
    path.write_text(json.dumps(found))
    return found


def run(method, lr, seed, config):
    """Train a method, judge it, and return its row of runs.csv."""
    out = Path(config.out_dir) / f"{method}_{lr:g}_{seed}"
    out.mkdir(parents=True, exist_ok=True)
    trained = trained_once(method, lr, seed, config, out)
    path = out / "dit.pt"
    judging = {"ckpt": str(path), "protocol": "videogpt", "features": config.features, "lpips": config.lpips}
    judging |= {"videos": config.videos, "judge_clips": config.judge_clips, "guidance": 1.0, "out_dir": str(out / "eval")}
    evaluate.main(evaluate.Config(**judging), load_dit)
    with open(out / "eval" / "results.json") as file:
        results = {name: result["value"] for name, result in json.load(file)["results"].items()}
    ckpt = checkpoints.load(path, "dit", "python dit.py")
    clips, each = shown_clips(ckpt)
    torch.save(clips, out / "shown.pt")
    train_set = data.open_dataset(vae.clips_of(ckpt["vae"]), "train", ckpt["classes"])
    nearest, _ = nearest_clips(clips, train_set)
    distances = [results[name] for name in results if "FVD" in name]  # of stage 1, of what is generated
    c = ckpt["dit_config"]
    found = {
        "rFVD": f"{distances[0]:.1f}",
        "gFVD": f"{distances[1]:.1f}",
        "PSNR": f"{results['PSNR']:.2f}",
        "LPIPS": f"{results[f'LPIPS ({config.lpips})']:.4f}" if config.lpips != "none" else "",
        "agreement": f"{results.get('class agreement', float('nan')):.1f}",
        "diversity": f"{results.get('diversity, of that of real clips', float('nan')):.1f}",
        "nearest": f"{vae.psnr(clips, nearest):.2f}",
        "seconds a clip": f"{each:.2f}",
    }
    about = trained | {"steps": "+".join(map(str, trained["steps"])), "numbers": c["num_tokens"] * c["token_dim"]}
    return {"method": method, "lr": f"{lr:g}", "seed": str(seed)} | about | found


def settings(config, method):
    """All that a run of a method depends on, as runs.csv has it."""
    own = f"{config.vae_options} | {config.dit_options}" if method == "ours" else f"{config.rival_options} | {config.lpips}"
    own += f" | width {config.frames_width}" if method == "frames" else ""
    clips = f"{config.dataset} {config.data_dir} {config.num_frames} x {config.resolution}"
    return f"{clips} | {config.minutes:g} min, {config.first:g}, bf16 {config.bf16} | {own} | {config.videos}"


def main(argv=None):
    config = utils.parse_options(Config, __doc__, argv=argv)
    utils.check_positive(config, "seeds", "minutes", "videos")
    if not 0 < config.first < 1:
        raise UserError(f"--first {config.first}: it is a share of the time, between 0 and 1")
    path = Path(config.out_dir) / "runs.csv"
    utils.make_parent(path)
    rows = read_rows(path, COLUMNS)
    # In turns, so that a machine that gets slower is the same to all.
    wanted = [(method, f"{lr:g}", str(seed)) for seed in range(config.seeds) for lr in config.lrs for method in config.methods]

    def done():
        return {
            (row["method"], row["lr"], row["seed"]): row for row in rows if row["settings"] == settings(config, row["method"])
        }

    for method, lr, seed in wanted:
        if (method, lr, seed) not in done():
            rows.append(run(method, float(lr), int(seed), config))
            add_row(path, COLUMNS, rows[-1])
    report([done()[key] for key in wanted], config)


def report(rows, config):
    """Print all rows, then each method at its best learning rate by its mean gFVD, and write the sheet."""
    shown = [name for name in COLUMNS if name not in ("settings", "revision")]
    table(shown, [[row[name] for name in shown] for row in rows])
    best = []
    for method in config.methods:
        by_lr = {}
        for row in rows:
            if row["method"] == method:
                by_lr.setdefault(row["lr"], []).append(row)
        best.append(min(by_lr.values(), key=lambda runs: sum(float(row["gFVD"]) for row in runs) / len(runs)))

    def spread(runs, name):
        values = [float(row[name]) for row in runs if row[name]]
        ends = f" ({min(values):.4g} to {max(values):.4g})" if len(values) > 1 else ""
        return f"{sum(values) / len(values):.4g}{ends}" if values else ""

    print("\nEach at the best of its learning rates, mean over seeds (least to most)\n")
    columns = ["rFVD", "PSNR", "LPIPS", "gFVD", "agreement", "diversity", "nearest", "seconds a clip"]
    lines = [[runs[0]["method"], runs[0]["lr"], runs[0]["numbers"], *(spread(runs, name) for name in columns)] for runs in best]
    table(["method", "lr", "numbers", *columns], lines)
    out = Path(config.out_dir)
    paths = {row["method"]: out / f"{row['method']}_{row['lr']}_{row['seed']}" / "shown.pt" for row, *_ in best}
    shown = {method: torch.load(path) for method, path in paths.items() if path.is_file()}  # not of runs made elsewhere
    if shown:
        write_sheet(out / "sheet.png", [clips[k] for k in range(2) for clips in shown.values()], [*shown] * 2)


if __name__ == "__main__":
    utils.run(main)
