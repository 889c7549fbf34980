"""Three ways to generate video, compared after equal training time over all stages.

ours      vae.py, then dit.py
frames    the usual baseline: a convolutional KL autoencoder of single frames that downscales by eight, shaped like Stable
          Diffusion's (Rombach et al. 2022); then a DiT whose blocks attend alternately within a frame and across frames, as
          in Latte (Ma et al. 2024)
pixels    no autoencoder: a DiT on space-time patches of pixels, which predicts the clean patch (Li & He 2025)

pip install -r studies/requirements.txt                                   diffusers, for the autoencoder's parts
python -m studies.compare --dataset sprites                               three learning rates, three seeds: 27 hours

All denoisers have one size, train in dit.py's loop and are measured by evaluate.py, whose reports are beside the
checkpoints. Each finished run is a row of runs.csv, and is not repeated. Learning rates are multiples of each method's own;
all rows are reported.
"""

import copy
import dataclasses
import functools
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
import demo
import dit
import evaluate
import losses
import vae
from common import checkpoints, utils
from common.utils import UserError, option
from common.video import to_clip
from extras.muon import make_optimizer
from siblings.results import table
from studies import runs
from studies.variants import Latte

METHODS = {"ours": (1.5e-3, 4e-3), "frames": (1e-3, 1e-3), "pixels": (0, 1e-3)}  # learning rates of both stages
VAE = (
    "--num-tokens 64 --token-dim 64 --extras mixing=8 renorm=0 muon edges basis=512 --lpips alex --kl-weight 2e-8 --warmup 100"
)
DIT = "--width 192 --heads 6 --num-latents 4500"
RIVAL = f"{DIT} --extras muon --batch-size 32 --scheduled-sampling 0"
SHOWN = ["seconds", "steps", "numbers", "rFVD", "PSNR", "LPIPS", "gFVD", "agreement", "diversity", "nearest", "seconds a clip"]
COLUMNS = ["method", "lr", "seed", "settings", "revision", *SHOWN]


@dataclass
class Config:
    dataset: str = option("data", "sprites", "what to train on", choices=data.DATASETS)
    data_dir: str = option("data", "", "its directory")
    resolution: int = option("data", 64, "height and width in pixels")
    num_frames: int = option("data", 8, "frames of a clip")
    methods: list = option("what", list(METHODS), "methods to run", nargs="+", choices=list(METHODS))
    seeds: int = option("what", 3, "runs of each method with each learning rate")
    lrs: list = option("what", [1.0, 2.0, 4.0], "learning rates, as multiples of each method's own", nargs="+", type=float)
    minutes: float = option("training", 60.0, "training time per run: all stages, and encoding between them")
    first: float = option("training", 0.6, "share of the time for the first stage, if any")
    bf16: str = option("training", "auto", "bfloat16 autocast; auto: with CUDA", choices=["auto", "on", "off"])
    vae_options: str = option("training", VAE, "more options of vae.py, in quotes")
    dit_options: str = option("training", DIT, "more options of dit.py for ours, in quotes")
    rival_options: str = option("training", RIVAL, "more options of dit.py for the others, in quotes")
    frames_width: int = option("training", 16, "channels of the frames' autoencoder at full resolution, a multiple of 16")
    videos: int = option("evaluation", 256, "clips of each kind, at most all held-out ones")
    lpips: str = option("evaluation", "alex", "backbone of LPIPS, also in the loss of frames", choices=["vgg", "alex", "none"])
    out_dir: str = option("output", "out/compare", "directory of runs.csv, checkpoints and reports")


class Rival(nn.Module):
    """A first stage in place of vae.VAE: tokens are patches of the frames, or of a KL autoencoder's latent of each frame.

    pixels    patches of 8 frames of 8 × 8 pixels; with 2 frames a step takes 3.5 times as long
    frames    patches of 2 × 2 pixels of a latent frame of 4 channels, as in Latte
    """

    def __init__(self, method, num_frames, resolution, width):
        super().__init__()
        self.length, self.size, channels, self.net = 8, 8, 24, None  # frames and pixels of a patch, channels of a map
        if method == "frames":
            self.length, self.size, channels, self.net = 1, 2, 4, autoencoder(width)
        covered = 8 * self.size if self.net else self.size  # pixels of the video per token
        if num_frames % self.length or resolution % covered:
            raise UserError(f"{method} needs multiples of {self.length} frames and {covered} pixels")
        self.side = resolution // covered
        sizes = {"num_tokens": num_frames // self.length * self.side**2, "token_dim": channels * self.size**2}
        self.nerv_config = SimpleNamespace(num_frames=num_frames, **sizes)  # read by dit.py

    def encode(self, video):
        """video [B, T, 3, H, W] in [-1, 1] -> mean, logvar, each [B, N, d]; for pixels, the deviation is almost zero."""
        maps = video.unflatten(1, (-1, self.length)).flatten(2, 3).flatten(0, 1)  # [B * T / length, 3 * length, H, W]
        posterior = self.net.encode(maps).latent_dist if self.net else None
        parts = (posterior.mean, posterior.logvar) if posterior else (maps, torch.full_like(maps, -20.0))
        parts = (F.pixel_unshuffle(x.float(), self.size).unflatten(0, (len(video), -1)) for x in parts)  # [B, t, d, h, w]
        return tuple(x.movedim(2, -1).flatten(1, 3) for x in parts)

    def decode(self, tokens, t):
        """tokens [B, N, d] -> all frames [B, T, 3, H, W]."""
        maps = tokens.unflatten(1, (-1, self.side, self.side)).movedim(-1, 2).flatten(0, 1)  # [B * t, d, h, w]
        maps = F.pixel_shuffle(maps, self.size)
        maps = self.net.decode(maps).sample if self.net else maps
        return maps.unflatten(0, (len(tokens), -1)).unflatten(2, (self.length, 3)).flatten(1, 2)


def autoencoder(width):
    """Stable Diffusion's autoencoder, with `width` channels at full resolution."""
    try:
        from diffusers.models import AutoencoderKL
    except ImportError:
        raise UserError("the autoencoder needs diffusers: pip install -r studies/requirements.txt") from None
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(**blocks, block_out_channels=(width, 2 * width, 4 * width, 4 * width), norm_num_groups=16)


class CleanDiT(dit.DiT):
    """The denoiser of pixels: it predicts the clean tokens, from which the noise follows (Li & He 2025, "Back to Basics").

    A patch has 1,536 numbers, the transformer a width of 192: too few to represent noise. Clean patches vary much less.
    """

    def forward(self, latents, timestep, label, given=None):
        clean = super().forward(latents, timestep, label, given).float()
        alpha, sigma = (x[timestep][:, None, None] for x in dit.noise_schedule(latents.device))
        return (latents - alpha * clean) / sigma


def denoiser_of(method, num_frames):
    """The class of a method's denoiser; that of frames has a row of tokens per frame."""
    return {"frames": type("Latte", (Latte,), {"rows": num_frames}), "pixels": CleanDiT}.get(method, dit.DiT)


def load_vae(ckpt):
    """The first stage of a checkpoint: a rival's, or ours."""
    if "rival" not in ckpt:
        return vae.load_vae(ckpt)
    network = Rival(*ckpt["rival"])
    network.load_state_dict(ckpt["ema"])
    return network.eval().requires_grad_(False)


def train_frames(network, train_set, config, lr, seed, seconds, batch_size=8, few=2):
    """Train the autoencoder of frames for `seconds`, with the losses of vae.py's nano -> (its averaged weights, steps).

    vae.py would encode all frames of a clip to decode a few.
    """
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
                loss = loss + 0.05 * perceptual(made, video)
        loss.backward()
        update(loss, lr * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * share)))
        utils.update_ema(ema, network, 0.99, step)
        step += 1
    return ema, step


def train_for(seconds, main, argv, out):
    """Run a training for as many steps as fit into `seconds`, including trials and preparation -> steps."""
    began = time.time()
    pace = runs.seconds_per_step(main, argv, out, seconds / 100)
    steps = max(1, int((seconds - (time.time() - began)) / pace))
    return runs.train(main, [*argv, "--steps", steps], out)["step"]


def train(method, lr, seed, config, out):
    """Train both stages of a method in the time budget, into out/dit.pt -> steps of both stages."""
    began, seconds, steps, lrs = time.time(), 60 * config.minutes, 0, [own * lr for own in METHODS[method]]
    torch.manual_seed(seed)
    torch.compiler.reset()  # the code compiled for earlier runs counts toward a limit
    source = {name: getattr(config, name) for name in ("dataset", "data_dir", "resolution", "num_frames")} | {"preset": "nano"}
    common = ["--seed", seed, "--bf16", config.bf16]
    if method == "ours":
        argv = [word for name, value in source.items() for word in (f"--{name.replace('_', '-')}", value)]
        argv += [*common, *shlex.split(config.vae_options), "--lr", lrs[0]]
        steps = train_for(config.first * seconds, vae.main, argv, out / "vae.pt")
    else:
        clips, sizes = vae.Config(**source), (method, config.num_frames, config.resolution, config.frames_width)
        train_set, network = data.open_dataset(clips, "train"), Rival(*sizes)
        if method == "frames":
            network, steps = train_frames(network, train_set, config, lrs[0], seed, config.first * seconds)
        about = {"stage": "vae", "step": steps, "config": dataclasses.asdict(clips), "classes": list(train_set.classes)}
        checkpoints.save(out / "vae.pt", **about, rival=sizes, ema=network)
    options = config.dit_options if method == "ours" else f"{config.rival_options} --compile off"
    argv = ["--ckpt", out / "vae.pt", *common, *shlex.split(options), "--lr", lrs[1]]
    main = functools.partial(dit.main, denoiser=denoiser_of(method, config.num_frames), load_vae=load_vae)
    return steps, train_for(seconds - (time.time() - began), main, argv, out / "dit.pt")


def run(method, lr, seed, config):
    """Train a method and measure it -> its row of runs.csv."""
    out = Path(config.out_dir) / f"{method}_{lr:g}_{seed}"
    row, device = {"steps": "+".join(map(str, train(method, lr, seed, config, out)))}, utils.pick_device()
    argv = ["--videos", config.videos, "--lpips", config.lpips, "--ckpt", out / "dit.pt", "--out-dir", out / "eval"]
    load_dit = functools.partial(dit.load_dit, denoiser=denoiser_of(method, config.num_frames), load_vae=load_vae)
    evaluate.main(["--protocol", "videogpt", "--guidance", "1", *map(str, argv)], load_dit)
    found = json.loads((out / "eval" / "results.json").read_text())["results"]
    scores = {name: result["value"] for name, result in found.items()}
    row["rFVD"], row["gFVD"], *_ = [scores[name] for name in scores if "FVD" in name]
    names = {"PSNR": "PSNR", "LPIPS": f"LPIPS ({config.lpips})", "agreement": "classifier accuracy"}
    names["diversity"] = "diversity, of that of real clips"
    row |= {name: scores[long] for name, long in names.items() if long in scores}
    ckpt = checkpoints.load(out / "dit.pt", "dit", "python dit.py")
    model, first, latent_map = (part.to(device) for part in load_dit(ckpt))
    labels, began = torch.arange(8, device=device) % len(ckpt["classes"]), time.time()
    tokens = latent_map.inverse(dit.generate(model, labels, guidance=1, seed=0))
    clips = vae.decode_all(first, tokens, torch.arange(config.num_frames))
    row["seconds a clip"] = (time.time() - began) / len(clips)
    train_set = data.open_dataset(vae.data_settings(ckpt["vae"]), "train", ckpt["classes"])
    row["nearest"] = vae.psnr(clips, demo.nearest_clips(clips, train_set))
    return row | {"numbers": math.prod(latent_map.shape)}


def settings(config, method):
    """All that a run of a method depends on, as recorded in runs.csv."""
    own = f"{config.vae_options} | {config.dit_options}" if method == "ours" else f"{config.rival_options} | {config.lpips}"
    own += f" | width {config.frames_width}" if method == "frames" else ""
    clips = f"{config.dataset} {config.data_dir} {config.num_frames} x {config.resolution}"
    return f"{clips} | {config.minutes:g} min, {config.first:g}, bf16 {config.bf16} | {own} | {config.videos}"


def main(argv=None):
    config = utils.parse_options(Config, __doc__, argv=argv)
    utils.check_positive(config, "seeds", "minutes", "videos")
    if not 0 < config.first < 1:
        raise UserError(f"--first {config.first}: must be a share of the time, between 0 and 1")
    rows = []
    # Interleaved, so that a slower machine affects all methods alike.
    for seed, lr, method in itertools.product(range(config.seeds), config.lrs, config.methods):
        key = [method, f"{lr:g}", seed, settings(config, method)]
        one = functools.partial(run, method, lr, seed, config)
        rows.append(runs.once(f"{config.out_dir}/runs.csv", COLUMNS, key, one))
    shown = [*COLUMNS[:3], *SHOWN]
    table(shown, [[row[name] for name in shown] for row in rows])


if __name__ == "__main__":
    utils.run(main)
