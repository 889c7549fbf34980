"""How fast training, sampling and decoding are: `python -m bench.speed train | sample | decode | growth`, a table each.

train    steps of both stages, and what of them goes into data, forward, backward and optimizer; --lpips adds a backbone
sample   from noise to frames with each sampler of a trained model, and how far off its latents are
decode   frames from weight tokens, many videos in a call and one after another, and where diffusers is installed
         (studies/requirements.txt), by the decoder of Stable Diffusion
growth   decoding against resolution, length, number of videos and width, with fitted exponents

What a row is compared with is measured in turns with it. Printed first is what the machine does at best: a product of two large
matrices, and a copy of an array that no cache holds.
"""

import contextlib
import copy
import statistics
import time
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch

import data
import dit
import losses
import nerv
import vae
from bench.costs import denoiser, forward_costs
from common import checkpoints, utils, video
from common.utils import option
from extras.muon import make_optimizer
from siblings.results import table


@dataclass
class Config:
    preset: str = option("what", "nano", "of train", choices=list(nerv.CONFIGS))
    batch_size: int = option("what", 16, "clips per step of train")
    steps: int = option("what", 40, "of each row of train; the first quarter is not counted")
    lpips: str = option("what", "none", "backbone of the perceptual loss in train", choices=["vgg", "alex", "none"])
    compile: str = option("what", "auto", "torch.compile in train; auto: with CUDA", choices=["auto", "on", "off"])
    repeats: int = option("what", 3, "measurements, in turns with those of the reference, after one that is not counted")
    ckpt: str = option("what", "dit.pt", "checkpoint of dit.py, of sample")
    device: str = option("what", "auto", "cpu, cuda, cuda:1, …; auto: CUDA where there is one")


def clock(device):
    """Seconds, once the device has done all it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(runs, repeats, device):
    """Call each of runs {name: function} in turns, after a round that does not count -> {name: seconds of each call}."""
    seconds = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = clock(device)
            run()
            seconds[name].append(clock(device) - start)
    return {name: values[1:] for name, values in seconds.items()}


def spread(values):
    """Median (least to most) of values."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def ratio(seconds, name, reference):
    """How many times as fast as the reference, turn by turn."""
    return spread([b / a for a, b in zip(seconds[name], seconds[reference])])


def machine(config):
    """Print what the machine does at best -> device, FLOP per second of a matrix product in float32."""
    device = utils.pick_device(config.device)
    size = 8192 if device.type == "cuda" else 1536
    (a, b), array = torch.randn(2, size, size, device=device), torch.zeros(2**26, device=device)
    runs = {"float32": lambda: a @ b, "copy": lambda: array.clone()}
    if device.type == "cuda":  # CPUs without matrix units for bfloat16 take minutes
        runs["bfloat16"] = partial(torch.matmul, a.bfloat16(), b.bfloat16())
    seconds = {name: min(values) for name, values in measure(runs, 5, device).items()}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    peaks = [f"{2 * size**3 / seconds[kind] / 1e9:.0f} GFLOP/s in {kind}" for kind in seconds if kind != "copy"]
    print(f"{name}: matrix product {', '.join(peaks)}; copy {2 * array.nbytes / seconds['copy'] / 1e9:.1f} GB/s\n")
    return device, 2 * size**3 / seconds["float32"]


def train(config):
    """Steps of both loops on the built-in shapes without a discriminator, the device waited for between their parts."""
    device, _ = machine(config)
    c, B = nerv.CONFIGS[config.preset], config.batch_size
    autoencoder, model = vae.VAE(c, vae.ENCODERS[config.preset]).to(device), denoiser(config.preset).to(device)
    perceptual = losses.LPIPS(config.lpips).to(device) if config.lpips != "none" else None
    train_set = data.open_dataset(data.Config(resolution=c.resolution, num_frames=c.num_frames), "train")
    batches = data.endless(train_set, data.Stream(len(train_set), B), device)
    noise = torch.randn(B, c.num_tokens, c.token_dim, device=device)
    latents = torch.randn(B, model.config.num_tokens, model.config.token_dim, device=device)
    if utils.wants_compile(device, config.compile):
        for network in (autoencoder.encoder, autoencoder.nerv, model):
            network.compile()

    def reconstruct(video, frames):
        mean, logvar = autoencoder.encode(video)
        decoded, real = autoencoder.decode(mean + torch.exp(0.5 * logvar) * noise, frames), video[:, frames]
        loss = (decoded.float() - real).square().mean() + 1e-6 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return loss + perceptual(losses.at_least_64(decoded), losses.at_least_64(real)) if perceptual else loss

    def denoise(theta0):
        timestep = torch.randint(1, dit.NUM_STEPS + 1, (B,), device=device)
        return dit.diffusion_loss(model, theta0, timestep % 9, None, timestep, torch.randn_like(theta0), 5.0, False)

    loops, T = {}, c.num_frames
    for n in (T, T // 8):
        few = partial(reconstruct, frames=torch.arange(n, device=device))
        loops[f"vae.py, {n} of {T} frames"] = autoencoder, lambda: video.to_clip(next(batches)[0].to(device)), few
    loops["dit.py"] = model, lambda: latents, denoise
    rows = []
    for name, (network, get, loss_of) in loops.items():
        update, ema, parts = utils.FiniteStep(network, make_optimizer(network)), copy.deepcopy(network), []
        for _ in range(config.steps):
            marks = [clock(device)]
            batch = get()
            marks.append(clock(device))
            with utils.autocast(device):
                loss = loss_of(batch)
            marks.append(clock(device))
            loss.backward()
            marks.append(clock(device))
            update(loss, 1e-4)
            utils.update_ema(ema, network, 0.99, 1)
            marks.append(clock(device))
            parts.append([b - a for a, b in zip(marks, marks[1:])])
        parts = torch.tensor(parts[len(parts) // 4 :])
        total = parts.sum(1)
        percent = [f"{100 * share:.0f} %" for share in (parts / total[:, None]).median(0).values]
        rates = [f"{1 / total.median():.2f}", f"{B / total.median():.1f}", f"{utils.peak_memory(device):.2f} GiB"]
        rows.append([name, spread((1000 * total).tolist()), *rates, *percent])
    print(f"preset {config.preset}, {B} clips, LPIPS {config.lpips}")
    header = ["loop", "ms a step", "steps / s", "clips / s", "memory so far"]
    table([*header, "data", "forward", "backward", "optimizer and average"], rows)


def sample(config):
    """Two videos of each of nine classes, guidance 2; distances are to DDIM with 1000 steps, of the same noise but for DDPM."""
    device, _ = machine(config)
    ckpt = checkpoints.load(config.ckpt, "dit", "python dit.py")
    model, autoencoder, latent_map = (part.to(device) for part in dit.load_dit(ckpt))
    labels = torch.arange(min(9, model.config.num_classes), device=device).repeat_interleave(2)
    ways = [("ddpm", 250), ("ddim", 20), ("ddim", 50), ("ddim", 100), ("dpm", 10), ("dpm", 15), ("dpm", 20)]
    latents = {}

    def denoise(sampler, steps):
        latents[sampler, steps] = dit.generate(model, labels, steps=steps, sampler=sampler, seed=0)

    denoising = measure({way: partial(denoise, *way) for way in ways}, config.repeats, device)
    t = torch.arange(autoencoder.nerv_config.num_frames)
    decoding = {way: partial(vae.decode, autoencoder, latent_map.inverse(latents[way]), t) for way in ways}
    decoding = measure(decoding, config.repeats, device)
    denoise("ddim", 1000)
    both, rows = {way: [a + b for a, b in zip(denoising[way], decoding[way])] for way in ways}, []
    for way in ways:
        distance = f"{(latents[way] - latents['ddim', 1000]).square().mean().sqrt():.4f}"
        seconds = [spread(each[way]) for each in (denoising, decoding, both)]
        rows.append([*way, *seconds, ratio(both, way, ("ddim", 100)), distance])
    header = ["sampler", "steps", "denoiser, s", "decoder, s", "both, s", "times as fast as ddim 100", "distance of latents"]
    table(header, rows)


def image_decoder():
    """The decoder of Stable Diffusion's image VAE (Rombach et al. 2022), [B, 4, h, w] -> [B, 3, 8h, 8w], 49 M parameters."""
    from diffusers.models.autoencoders.vae import Decoder

    return Decoder(4, 3, ("UpDecoderBlock2D",) * 4, (128, 256, 512, 512), layers_per_block=2)


def decode(config):
    """Frames per second, of clips from tokens and of Stable Diffusion's decoder."""
    device, peak = machine(config)
    frames, few = (16, 16) if device.type == "cuda" else (1, 4)  # a frame of L takes a CPU seconds

    def from_tokens(preset, B, T, loop=False):
        """(function, frames, FLOPs)"""
        c = nerv.CONFIGS[preset]
        network, t = nerv.NeRV(c).to(device), torch.linspace(0, c.num_frames - 1, T, device=device)
        tokens = torch.randn(B, c.num_tokens, c.token_dim, device=device)
        with torch.device("meta"):
            flops, _ = forward_costs(lambda: nerv.NeRV(c)(tokens.to("meta"), t.to("meta")))
        run = partial(vae.VAE.decode, SimpleNamespace(nerv_config=c, nerv=network), t=t)
        return lambda: [run(part) for part in tokens.split(1 if loop else B)], B * T, flops

    nano = {f"nano, {B} videos in a call": from_tokens("nano", B, 16) for B in (1, 4, 16)}
    nano |= {"nano, one frame": from_tokens("nano", 1, 1), "nano, 128 frames of 16": from_tokens("nano", 1, 128)}
    nano |= {"nano, 16 videos in a loop": from_tokens("nano", 16, 16, loop=True)}
    large = {f"S, {B} videos": from_tokens("S", B, frames) for B in (1, few)}
    large |= {f"S, {few} videos in a loop": from_tokens("S", few, frames, loop=True)}
    large |= {f"{preset}, 1 video": from_tokens(preset, 1, frames) for preset in ("S-256", "B", "L")}
    with contextlib.suppress(ImportError):
        decoder, z = image_decoder().to(device), torch.randn(16, 4, 16, 16, device=device)
        with torch.device("meta"):
            flops, _ = forward_costs(partial(image_decoder(), torch.empty(z.shape)))
        large["Stable Diffusion's decoder"] = lambda: decoder(z), len(z), flops
    rows = []
    for runs in (nano, large):  # {name: (function, frames, FLOPs)}, each against the last of its kind
        with torch.no_grad():
            seconds = measure({name: run for name, (run, _, _) in runs.items()}, config.repeats, device)
        each, reference = {name: [s / runs[name][1] for s in seconds[name]] for name in runs}, list(runs)[-1]
        for name, (_, count, flops) in runs.items():
            rate, share = spread([1 / s for s in each[name]]), f"{100 * flops / statistics.median(seconds[name]) / peak:.0f} %"
            rows.append([name, count, f"{flops / count / 1e9:.3g}", rate, share, ratio(each, name, reference), reference])
    table(["what", "frames", "GFLOP a frame", "frames / s", "of the peak", "times as fast", "as"], rows)


def growth(config):
    """A decoder of nano's width. One quantity grows at a time; exponents are slopes of the logarithms, least squares."""
    device, _ = machine(config)
    base = replace(nerv.CONFIGS["nano"], resolution=64)
    series = {
        "pixels of a frame": [(n * n, replace(base, resolution=n), 1, 4) for n in (32, 64, 128, 256)],
        "frames": [(n, replace(base, num_frames=n), 1, n) for n in (16, 32, 64, 128)],
        "videos": [(n, base, n, 4) for n in (1, 2, 4, 8, 16)],
        "width": [(n, replace(base, width=n, block=min(n, 64)), 1, 4) for n in (16, 32, 64, 128)],
    }
    rows, exponents = [], []
    for what, points in series.items():
        runs, columns = {}, []
        for value, c, B, T in points:
            network, t = nerv.NeRV(c).to(device), torch.arange(T, device=device)
            tokens = torch.randn(B, c.num_tokens, c.token_dim, device=device)
            with torch.device("meta"):
                flops, _ = forward_costs(partial(nerv.NeRV(c), tokens.to("meta"), t.to("meta")))
            columns.append([network.num_kernel_weights(), tokens.numel(), flops])
            runs[value] = partial(network, tokens, t)
        with torch.no_grad():
            seconds = measure(runs, config.repeats, device)
        columns = [[*column, statistics.median(seconds[value])] for column, value in zip(columns, seconds)]
        slopes = [np.polyfit(np.log(list(seconds)), np.log(y), 1)[0] for y in zip(*columns)]
        exponents.append([what, *(f"{slope:.2f}" for slope in slopes)])
        for value, column in zip(seconds, columns):
            times = [f"{column[3] / columns[0][3]:.2f}", f"{value / points[0][0]:.0f}"]
            rows.append([what, value, *(f"{x:.3g}" for x in column[:3]), spread(seconds[value]), *times])
    table(["", "", "kernel entries", "latent", "FLOPs", "seconds", "times the first", "of so many times"], rows)
    print()
    table(["exponents, against", "kernel entries", "latent", "FLOPs", "seconds"], exponents)


TOPICS = {"train": train, "sample": sample, "decode": decode, "growth": growth}


def main():
    topic, config = utils.parse_options(Config, __doc__, topics=TOPICS)
    utils.check_positive(config, "batch_size", "steps", "repeats")
    topic(config)


if __name__ == "__main__":
    utils.run(main)
