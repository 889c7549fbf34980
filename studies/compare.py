"""Is it better than what one would use instead? Three ways to generate video, after equal seconds of training in all stages.

ours      vae.py, then dit.py
frames    what people pick today: a convolutional KL autoencoder, each frame by itself, eight times smaller, in the shape of
          Stable Diffusion's (Rombach et al. 2022); then a DiT whose blocks attend within a frame and across frames in turns,
          as Latte's do (Ma et al. 2024)
pixels    no autoencoder: a DiT on space-time patches of pixels, which predicts the clean patch (Li & He 2025)

pip install -r studies/requirements.txt                                   the autoencoder's parts, of diffusers
python -m studies.compare --dataset sprites                               three learning rates, three seeds: 27 hours
python -m studies.compare --dataset sprites --minutes 10 --seeds 1 --lrs 1

All denoisers are of one size, trained by dit.py's loop, and all are measured by evaluate.py. A run that is done is a
row of runs.csv, and is not done again. The learning rates are shares of each method's own; all rows are reported.
"""

import copy
import csv
import dataclasses
import itertools
import json
import math
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import dit
import evaluate
import losses
import vae
from common import checkpoints, utils
from common.tables import add_row, read_rows, table
from common.utils import UserError, option
from common.video import to_clip, write_sheet
from extras.muon import make_optimizer
from studies.variants import Latte

METHODS = {"ours": (1.5e-3, 4e-3), "frames": (1e-3, 1e-3), "pixels": (0, 1e-3)}  # learning rates of both stages
VAE = "--num-tokens 64 --token-dim 64 --extras mixing=8 muon edges basis=512 --lpips alex --kl-weight 2e-8 --warmup 100"
DIT = "--width 192 --heads 6 --num-latents 4500"
RIVAL = f"{DIT} --extras muon --batch-size 32 --scheduled-sampling 0"
SCORES = ["rFVD", "PSNR", "LPIPS", "gFVD", "agreement", "diversity", "nearest", "seconds a clip"]
COLUMNS = ["method", "lr", "seed", "settings", "revision", "seconds", "steps", "numbers", *SCORES]


@dataclass
class Config:
    dataset: str = option("data", "sprites", "what to train on", choices=data.DATASETS)
    data_dir: str = option("data", "", "where it is")
    resolution: int = option("data", 64, "height and width in pixels")
    num_frames: int = option("data", 8, "frames of a clip")
    methods: list = option("what", list(METHODS), "methods to run", nargs="+", choices=list(METHODS))
    seeds: int = option("what", 3, "runs of each method with each learning rate")
    lrs: list = option("what", [1.0, 2.0, 4.0], "learning rates, as shares of each method's own", nargs="+", type=float)
    minutes: float = option("training", 60.0, "of all stages of a run together, with what is encoded between them")
    first: float = option("training", 0.6, "share of the time that the first stage gets, where there is one")
    bf16: str = option("training", "auto", "bfloat16 autocast; auto: with CUDA", choices=["auto", "on", "off"])
    vae_options: str = option("training", VAE, "further options of vae.py, in quotes")
    dit_options: str = option("training", DIT, "those of dit.py for ours, in quotes")
    rival_options: str = option("training", RIVAL, "… for the others, in quotes")
    frames_width: int = option("training", 16, "channels of the frames' autoencoder at full resolution, a multiple of 16")
    videos: int = option("evaluation", 256, "clips of each kind, or all held-out ones")
    features: str = option("evaluation", "i3d", "of FVD; random takes no weights", choices=["i3d", "random"])
    lpips: str = option("evaluation", "alex", "backbone of LPIPS, in the loss of frames too", choices=["vgg", "alex", "none"])
    out_dir: str = option("output", "out/compare", "runs.csv, checkpoints and sheet.png go here")


# ------------------------------------------------------------------------------------------------------------- the rivals


class Pixels(nn.Module):
    """No first stage: tokens are space-time patches of pixels, [B, T/8 * H/8 * W/8, 8 * 3 * 8 * 8]."""

    patch = (8, 8, 8)  # frames, pixels, pixels; with two frames a step takes 3.5 times as long

    def __init__(self, num_frames, resolution):
        super().__init__()
        t, h, w = self.patch
        if num_frames % t or resolution % h:
            raise UserError(f"patches are of {t} frames and {h} x {w} pixels, and clips of {num_frames} and {resolution}")
        self.grid = (num_frames // t, resolution // h, resolution // w)
        sizes = {"num_tokens": math.prod(self.grid), "token_dim": 3 * t * h * w}
        self.nerv_config = SimpleNamespace(num_frames=num_frames, **sizes)  # what dit.py asks of a first stage

    def encode(self, video):
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
    """A KL autoencoder, frame by frame; tokens are 2 × 2 pixels of its latent frames, as Latte's: [B, T * H/16 * W/16, 16]."""

    def __init__(self, num_frames, resolution, width):
        super().__init__()
        try:
            from diffusers.models import AutoencoderKL
        except ImportError:
            raise UserError("the autoencoder is of diffusers: pip install -r studies/requirements.txt") from None
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        widths = (width, 2 * width, 4 * width, 4 * width)
        self.net, self.side = AutoencoderKL(**blocks, block_out_channels=widths, norm_num_groups=16), resolution // 16
        self.nerv_config = SimpleNamespace(num_frames=num_frames, num_tokens=num_frames * self.side**2, token_dim=16)

    def encode(self, video):
        """video [B, T, 3, H, W] in [-1, 1] -> mean, logvar, each [B, T * H/16 * W/16, 16]."""
        posterior = self.net.encode(video.flatten(0, 1)).latent_dist
        parts = (F.pixel_unshuffle(x.float(), 2) for x in (posterior.mean, posterior.logvar))  # [B * T, 16, h, w]
        return tuple(x.unflatten(0, (-1, video.shape[1])).movedim(2, -1).flatten(1, 3) for x in parts)

    def decode(self, tokens, t):
        """tokens [B, T * H/16 * W/16, 16] -> frames [B, T, 3, H, W], all of them."""
        x = tokens.unflatten(1, (-1, self.side, self.side)).movedim(-1, 2)  # [B, T, 16, h, w]
        return self.net.decode(F.pixel_shuffle(x.flatten(0, 1), 2)).sample.unflatten(0, (len(tokens), -1))


class CleanDiT(dit.DiT):
    """The denoiser of pixels: it predicts the clean tokens, and the noise is what is left (Li & He 2025, "Back to Basics").

    A patch has 1,536 numbers, the transformer a width of 192: too few for the noise of a patch. Clean patches are much alike.
    """

    def __init__(self, config):
        super().__init__(config)
        for name, values in zip(("alpha", "sigma"), dit.noise_schedule()):
            self.register_buffer(name, values, persistent=False)

    def forward(self, latents, timestep, label, given=None):
        clean = super().forward(latents, timestep, label, given).float()
        alpha, sigma = (x[timestep][:, None, None] for x in (self.alpha, self.sigma))
        return (latents - alpha * clean) / sigma


def denoiser_of(method, num_frames):
    """The class of a method's denoiser; that of frames has a row of tokens for each frame."""
    return {"frames": type("Latte", (Latte,), {"rows": num_frames}), "pixels": CleanDiT}.get(method, dit.DiT)


def load_rival(ckpt):
    """The first stage of a checkpoint: a rival's, or ours."""
    clips, rival = (ckpt["config"]["num_frames"], ckpt["config"]["resolution"]), None
    if ckpt["decoder"] == "Pixels":
        rival = Pixels(*clips)
    elif ckpt["decoder"] == "Frames":
        rival = Frames(*clips, len(ckpt["ema"]["net.encoder.conv_in.weight"]))
        rival.load_state_dict(ckpt["ema"])
    return rival.eval().requires_grad_(False) if rival else vae.load_vae(ckpt)


def load_dit(ckpt):
    """dit.load_dit with the denoiser and the first stage that the checkpoint names."""
    method = {"Latte": "frames", "CleanDiT": "pixels"}.get(ckpt["denoiser"], "ours")
    return dit.load_dit(ckpt, denoiser_of(method, ckpt["vae"]["config"]["num_frames"]), load_rival)


# ----------------------------------------------------------------------------------------------------------- the trainings


def train_frames(network, train_set, config, lr, seed, seconds, batch_size=8, few=2):
    """Train a Frames for so many seconds on L2 + LPIPS + KL, as vae.py's nano has them -> (its averaged weights, steps)."""
    device = utils.pick_device()
    network.to(device)
    ema = copy.deepcopy(network).eval().requires_grad_(False)
    update = utils.FiniteStep(network, make_optimizer(network))
    batches = data.endless(train_set, data.Stream(len(train_set), batch_size, seed))
    perceptual = losses.LPIPS(config.lpips).to(device) if config.lpips != "none" else None
    began, step = time.time(), 0
    while (share := (time.time() - began) / seconds) < 1:
        t = torch.randperm(config.num_frames, generator=utils.step_generator("cpu", seed, step))[:few]
        video = to_clip(next(batches)[0].to(device))[:, t]
        with utils.autocast(device, config.bf16):
            mean, logvar = network.encode(video)
            made = network.decode(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean), t).float()
            kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2)).mean()
            loss = (made - video).square().mean() + 1e-6 * kl
            if perceptual:
                loss = loss + 0.05 * perceptual(losses.at_least_64(made), losses.at_least_64(video))
        loss.backward()
        update(loss, lr * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * share)))
        utils.update_ema(ema, network, 0.99, step)
        step += 1
    return ema, step


def train_for(seconds, main, argv, out):
    """Run a training main(argv) for as many steps as fit into so many seconds, what it prepares and trials included -> steps.

    On a GPU thirty steps are a moment, in which kernels are chosen: a trial that is over in a hundredth of the time is followed
    by one ten times as long, and the second half of a trial is what counts.
    """
    began, steps, argv = time.time(), 30, [*map(str, argv), "--out", str(out)]

    def run(steps):
        main([*argv, "--steps", str(steps)])
        if checkpoints.load(out, ("vae", "dit"), "")["step"] < steps:
            raise UserError("stopped: start again to go on with the runs that are not done")

    while True:
        run(steps)
        with open(utils.log_directory(out) / "losses.csv", newline="") as file:
            rows = [(int(row["step"]), float(row["seconds"])) for row in csv.DictReader(file)]
        (first, start), (last, end) = rows[len(rows) // 2 - 1], rows[-1]
        if end > 0.01 * seconds and end > start:  # losses.csv has tenths of a second
            break
        steps *= 10
    steps = max(1, int((seconds - (time.time() - began)) * (last - first) / (end - start)))
    run(steps)
    return steps


def train(method, lr, seed, config, out):
    """Both stages of a method in the time that there is, into out/dit.pt -> steps of both stages."""
    began, seconds, steps, lrs = time.time(), 60 * config.minutes, 0, [own * lr for own in METHODS[method]]
    torch.manual_seed(seed)
    torch.compiler.reset()  # compiled code of earlier runs counts toward a limit
    source = {name: getattr(config, name) for name in ("dataset", "data_dir", "resolution", "num_frames")} | {"preset": "nano"}
    common = ["--seed", seed, "--bf16", config.bf16]
    if method == "ours":
        argv = [word for name, value in source.items() for word in (f"--{name.replace('_', '-')}", value)]
        argv += [*common, *shlex.split(config.vae_options), "--lr", lrs[0]]
        steps = train_for(config.first * seconds, vae.main, argv, out / "vae.pt")
    else:
        train_set = data.open_dataset(vae.Config(**source), "train")
        network = Pixels(config.num_frames, config.resolution)
        if method == "frames":
            network = Frames(config.num_frames, config.resolution, config.frames_width)
            network, steps = train_frames(network, train_set, config, lrs[0], seed, config.first * seconds)
        checkpoints.save(
            out / "vae.pt", stage="vae", step=steps, config=dataclasses.asdict(vae.Config(**source)),
            classes=list(train_set.classes), decoder=type(network).__name__, ema=network.state_dict(),
        )  # fmt: skip
    options = config.dit_options if method == "ours" else f"{config.rival_options} --compile off"
    argv = ["--ckpt", out / "vae.pt", *common, *shlex.split(options), "--lr", lrs[1]]
    denoiser = denoiser_of(method, config.num_frames)
    left = seconds - (time.time() - began)
    return steps, train_for(left, lambda argv: dit.main(argv, denoiser, load_rival), argv, out / "dit.pt")


# ---------------------------------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def shown_clips(ckpt, count=8):
    """Generated clips [count, T, 3, H, W] of classes in turn, and the seconds that one takes."""
    device = utils.pick_device()
    model, first, latent_map = (part.to(device) for part in load_dit(ckpt))
    labels, began = torch.arange(count, device=device) % len(ckpt["classes"]), time.time()
    tokens = latent_map.inverse(dit.generate(model, labels, guidance=1, seed=0))
    return vae.decode(first, tokens, torch.arange(first.nerv_config.num_frames)), (time.time() - began) / count


def nearest(clips, train_set):
    """Mean over clips of the PSNR of each to the nearest training clip, in dB."""
    errors = torch.full((len(clips),), math.inf)
    for i in utils.bar(range(len(train_set)), "nearest", unit="clip"):
        errors = torch.minimum(errors, (clips - to_clip(train_set[i][0])).square().mean((1, 2, 3, 4)))
    return (10 * torch.log10(4 / errors)).mean().item()


def run(method, lr, seed, config):
    """Train a method, measure it, and return its row of runs.csv."""
    out, began = Path(config.out_dir) / f"{method}_{lr:g}_{seed}", time.time()
    out.mkdir(parents=True, exist_ok=True)
    row = {"method": method, "lr": f"{lr:g}", "seed": str(seed), "settings": settings(config, method)}
    row["steps"] = "+".join(map(str, train(method, lr, seed, config, out)))
    row |= {"revision": utils.git_revision(), "seconds": round(time.time() - began)}
    measured = {name: getattr(config, name) for name in ("videos", "features", "lpips")}
    measured |= {"ckpt": str(out / "dit.pt"), "protocol": "videogpt", "guidance": 1.0, "out_dir": str(out / "eval")}
    evaluate.main(evaluate.Config(**measured), load_dit)
    found = json.loads((out / "eval" / "results.json").read_text())["results"]
    scores = {name: found[name]["value"] for name in found}
    ckpt = checkpoints.load(out / "dit.pt", "dit", "python dit.py")
    clips, each = shown_clips(ckpt)
    torch.save(clips, out / "shown.pt")
    distances = [scores[name] for name in scores if "FVD" in name]  # of stage 1, of what is generated
    values = [f"{distances[0]:.1f}", f"{scores['PSNR']:.2f}"]
    values += [f"{scores[f'LPIPS ({config.lpips})']:.4f}" if config.lpips != "none" else "", f"{distances[1]:.1f}"]
    values += [f"{scores.get(name, math.nan):.1f}" for name in ("classifier accuracy", "diversity, of that of real clips")]
    train_set = data.open_dataset(vae.clips_of(ckpt["vae"]), "train", ckpt["classes"])
    row |= dict(zip(SCORES, [*values, f"{nearest(clips, train_set):.2f}", f"{each:.2f}"]))
    return row | {"numbers": str(ckpt["dit_config"]["num_tokens"] * ckpt["dit_config"]["token_dim"])}


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
    path, done = Path(config.out_dir) / "runs.csv", []
    utils.make_parent(path)
    rows = read_rows(path, COLUMNS)
    utils.RunLog.EVERY = 10  # steps between rows of losses.csv, by which trainings are timed
    # In turns, so that a machine that gets slower is the same to all.
    for seed, lr, method in itertools.product(range(config.seeds), config.lrs, config.methods):
        wanted = [method, f"{lr:g}", str(seed), settings(config, method)]
        row = next((row for row in rows if [row[name] for name in COLUMNS[:4]] == wanted), None)
        if row is None:
            row = run(method, lr, seed, config)
            add_row(path, COLUMNS, row)
        done.append(row)
    report(done, config)


def report(rows, config):
    """Print all rows, and write a sheet with two clips of each."""
    shown = [name for name in COLUMNS if name not in ("settings", "revision")]
    table(shown, [[row[name] for name in shown] for row in rows])
    names = [f"{row['method']}_{row['lr']}_{row['seed']}" for row in rows]
    paths = {name: Path(config.out_dir) / name / "shown.pt" for name in names}
    clips = {name: torch.load(path)[:2] for name, path in paths.items() if path.is_file()}  # not of runs made elsewhere
    if clips:
        titles = [name for name in clips for _ in range(2)]
        write_sheet(Path(config.out_dir) / "sheet.png", torch.cat([*clips.values()]), titles)


if __name__ == "__main__":
    utils.run(main)
