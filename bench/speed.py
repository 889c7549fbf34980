"""Speed of sampling and decoding, in a table each: `python -m bench.speed sample | growth`.

sample   from noise to frames, by each sampler of a trained model, with the error of its latents
growth   decoding time against resolution, length, number of videos and width, with fitted exponents

Measurements of a row and of its reference alternate. First, the peak speed is measured with a product of two large matrices.
"""

import statistics
import time
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

import dit
import nerv
import vae
from bench.costs import forward_costs
from common import checkpoints, utils
from common.utils import option
from siblings.results import table


@dataclass
class Config:
    repeats: int = option("what", 3, "measurements, alternating with the reference's, after an uncounted first one")
    ckpt: str = option("what", "dit.pt", "checkpoint of dit.py, for sample")
    device: str = option("what", "auto", "cpu, cuda, cuda:1, …; auto: CUDA if available")


def clock(device):
    """The time in seconds, after synchronizing with the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(runs, repeats, device):
    """Call runs {name: function} alternately, after an uncounted first round -> {name: seconds of each call}."""
    seconds = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = clock(device)
            run()
            seconds[name].append(clock(device) - start)
    return {name: values[1:] for name, values in seconds.items()}


def spread(values):
    """Median (minimum to maximum) of values."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def ratio(seconds, name, reference):
    """Speedup over the reference, paired by round."""
    return spread([b / a for a, b in zip(seconds[name], seconds[reference])])


def machine(config):
    """Print the speed of a matrix product in float32 -> device."""
    device = utils.pick_device(config.device)
    size = 8192 if device.type == "cuda" else 1536
    a, b = torch.randn(2, size, size, device=device)
    peak = 2 * size**3 / min(measure({"": lambda: a @ b}, 5, device)[""])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}: matrix product {peak / 1e9:.0f} GFLOP/s in float32\n")
    return device


def sample(config):
    """Two videos per class, nine classes, guidance 2; distances to DDIM with 1000 steps, from the same noise except DDPM."""
    device = machine(config)
    ckpt = checkpoints.load(config.ckpt, "dit", "python dit.py")
    model, autoencoder, latent_map = (part.to(device) for part in dit.load_dit(ckpt))
    labels = torch.arange(min(9, model.config.num_classes), device=device).repeat_interleave(2)
    ways = [("ddpm", 250), ("ddim", 20), ("ddim", 100), ("dpm", 10), ("dpm", 20)]
    latents, t = {}, torch.arange(autoencoder.nerv_config.num_frames)

    def draw(sampler, steps):
        latents[sampler, steps] = dit.generate(model, labels, steps=steps, sampler=sampler, seed=0)
        vae.decode_all(autoencoder, latent_map.inverse(latents[sampler, steps]), t)

    seconds, rows = measure({way: partial(draw, *way) for way in ways}, config.repeats, device), []
    draw("ddim", 1000)
    for way in ways:
        distance = f"{(latents[way] - latents['ddim', 1000]).square().mean().sqrt():.4f}"
        rows.append([*way, spread(seconds[way]), ratio(seconds, way, ("ddim", 100)), distance])
    table(["sampler", "steps", "denoiser and decoder, s", "times as fast as ddim 100", "distance of latents"], rows)


def growth(config):
    """A decoder of nano's width. One quantity grows at a time; exponents are least-squares slopes on logarithmic axes."""
    device = machine(config)
    base = replace(nerv.CONFIGS["nano"], resolution=64)
    series = {
        "pixels of a frame": [(n * n, replace(base, resolution=n), 1, 4) for n in (32, 64, 128, 256)],
        "frames": [(n, replace(base, num_frames=n), 1, n) for n in (16, 32, 64, 128)],
        "videos": [(n, base, n, 4) for n in (1, 2, 4, 8, 16)],
        "width": [(n, replace(base, width=n, block=min(n, 64)), 1, 4) for n in (16, 32, 64, 128)],
    }
    rows = []
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
        for value, column in zip(seconds, columns):
            rows.append([what, value, *(f"{x:.3g}" for x in column[:3]), spread(seconds[value])])
        rows.append([what, "exponent", *(f"{slope:.2f}" for slope in slopes)])
    table(["", "", "kernel entries", "latent", "FLOPs", "seconds"], rows)


def main():
    topic, config = utils.parse_options(Config, __doc__, topics={"sample": sample, "growth": growth})
    utils.check_positive(config, "repeats")
    topic(config)


if __name__ == "__main__":
    utils.run(main)
