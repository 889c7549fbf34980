"""How fast decoding and sampling are: `python -m bench.speed conv | decode | sample | quality | growth | fit`, one table each.

conv     the modulated convolution as it is, against a loop over videos and two exact reformulations
decode   frames from weight tokens, against H.264, frames in memory and a decoder of the shape of Stable Diffusion's
sample   from noise to frames with each sampler; with --ckpt dit.pt also how far off its tokens are
quality  of what each sampler makes of --ckpt dit.pt: class agreement, and the Fréchet distance on random features
growth   cost against resolution, length, batch and width, with fitted exponents and a plot
fit      training steps of fit.py's methods, as a share of what a matrix product does

What a row is compared with is measured in turns with it. Two more rows are what the machine can do at best: a product of two
large matrices, and a copy of an array that no cache holds.
"""

import contextlib
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import dit
import evaluate
import fit
import nerv
import vae
from bench.costs import forward_costs, short_of_memory
from common import checkpoints, plot, utils, video
from common.methods import METHODS
from common.tables import table
from common.utils import option


@dataclass
class Config:
    repeats: int = option("what", 3, "measurements, in turns with those of the reference, after one that is not counted")
    frames: int = option("what", 0, "frames of a clip in decode; 0: all on a GPU, one on a CPU, where S takes seconds for each")
    ckpt: str = option("what", "", "a trained dit.pt; sample takes the nano preset with random weights where there is none")
    clips: int = option("what", 90, "generated clips in quality, for each of --repeats seeds of noise")
    plot: str = option("what", "", "where growth puts its plot, a PNG")
    device: str = option("what", "auto", "cpu, cuda, cuda:1, …; auto: CUDA where there is one")


def measure(runs, repeats, device):
    """Call each of runs {name: function} in turns -> {name: seconds of each call}; [] of those that ran out of memory."""

    def timed(run):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds, able = {name: [] for name in runs}, {}
    for name, run in runs.items():
        try:
            timed(run)
            able[name] = run
        except (RuntimeError, MemoryError) as error:
            if not short_of_memory(error):
                raise
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for _ in range(repeats):
        for name, run in able.items():
            seconds[name].append(timed(run))
    return seconds


def ratio(seconds, name, reference):
    """How many times as fast as the reference: the median over turns, and the range."""
    if not (seconds[name] and seconds[reference]):
        return ""
    ratios = [b / a for a, b in zip(seconds[name], seconds[reference])]
    return f"{statistics.median(ratios):.3g} ({min(ratios):.3g} to {max(ratios):.3g})"


def spread(values, unit=1.0):
    """Median (least to most) of values, in a unit."""
    if not values:
        return "out of memory"
    values = [value * unit for value in values]
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def machine_peak(config, device):
    """Print what the machine does at best; returns FLOP per second of a matrix product, in float32 and in bfloat16."""
    size = 8192 if device.type == "cuda" else 1536
    a, b = torch.randn(2, size, size, device=device)
    a16, b16 = a.bfloat16(), b.bfloat16()
    array = torch.zeros(2**26, device=device)
    runs = {"float32": lambda: a @ b, "bfloat16": lambda: a16 @ b16, "copy": lambda: array.clone()}
    seconds = measure(runs, 5, device)
    peaks = [2 * size**3 / min(seconds[name]) for name in ("float32", "bfloat16")]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}; GPU rows: {'as follows' if device.type == 'cuda' else 'not measured'}")
    print(f"matrix product {peaks[0] / 1e9:.0f} GFLOP/s in float32, {peaks[1] / 1e9:.0f} in bfloat16; "
          f"copy {2 * array.nbytes / min(seconds['copy']) / 1e9:.1f} GB/s\n")  # fmt: skip
    return peaks


# ------------------------------------------------------------------------------------------------------------ convolution


def loop_over_videos(layer, x, tokens):
    """The plain way: one convolution for each video."""
    return torch.cat([layer(part, one) for part, one in zip(x.chunk(len(tokens), 1), tokens.split(1))], 1)


def shared_and_block(layer, x, tokens):
    """Only the generated block differs between videos: the other entries are one kernel for all, the norm comes after."""
    (T, _, H, W), B, k = x.shape, len(tokens), layer.kernel_shape[-1]
    block_out, block_in = layer.block_shape[:2]
    block = layer.head(tokens).flatten(1)[:, : len(layer.offset)] + layer.offset
    block = block.view(B, block_out, k, k, block_in).permute(0, 1, 4, 2, 3)
    beside, below = layer.shared.split([
        block_out * (layer.in_ch - block_in) * k * k, (layer.out_ch - block_out) * layer.in_ch * k * k,
    ])  # fmt: skip
    beside = beside.view(block_out, k, k, -1).permute(0, 3, 1, 2)
    below = below.view(-1, k, k, layer.in_ch).permute(0, 3, 1, 2)
    shared = torch.cat([F.pad(beside, (0, 0, 0, 0, block_in, 0)), below])  # zeros where the block is
    squares = F.pad(block.square().sum((2, 3, 4)), (0, layer.out_ch - block_out)) + shared.square().sum((1, 2, 3))  # [B, out]
    scale = (layer.gain * torch.rsqrt(squares + 1e-8))[:, :, None, None]
    y = F.conv2d(x.reshape(T * B, -1, H, W), shared, padding=k // 2).view(T, B, -1, H, W)
    part = x.view(T, B, -1, H, W)[:, :, :block_in].flatten(1, 2)
    part = F.conv2d(part, block.flatten(0, 1), padding=k // 2, groups=B).view(T, B, -1, H, W)
    y = torch.cat([y[:, :, :block_out] + part, y[:, :, block_out:]], 2)
    return (y * scale + layer.bias[:, None, None]).flatten(1, 2)


def pixel_shuffle(layer, x, tokens):
    """A stride-2 4×4 transposed convolution is four 2×2 convolutions, one for each of the pixels that one becomes.

    Along an axis, output pixel 2i - 1 meets taps 2 and 0 of inputs i - 1 and i, output pixel 2i taps 3 and 1.
    """
    B, C = len(tokens), layer.out_ch
    weight = layer.kernel(tokens).unflatten(4, (2, 2)).unflatten(3, (2, 2))  # [B, out, in, pair, 2, pair, 2]
    weight = weight.flip(3, 5).permute(0, 1, 4, 6, 2, 3, 5).reshape(B * C * 4, layer.in_ch, 2, 2)
    y = F.conv2d(x, weight, layer.bias.repeat_interleave(4).repeat(B), padding=1, groups=B)
    return F.pixel_shuffle(y, 2)[..., 1:-1, 1:-1]


@contextlib.contextmanager
def exact_float32():
    """Without TF32, whose ten bits would look like an error of a convolution or a matrix product."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # enabled is off unless named
        yield
    torch.set_float32_matmul_precision(before)


def conv(config):
    """A 3×3 and a transposed layer of each preset, 4 videos of 2 frames at 16 × 16 (on a GPU 16 of 16 at 32 × 32)."""
    device = utils.pick_device(config.device)
    machine_peak(config, device)
    B, T, size = (16, 16, 32) if device.type == "cuda" else (4, 2, 16)

    def rows():
        for preset in ("S", "B", "L"):
            network = nerv.NeRV(nerv.CONFIGS[preset]).to(device)
            tokens = torch.randn(B, 128, 128, device=device)
            for kind, layer in (("3×3", network.blocks[0].convs[0]), ("transposed", network.blocks[0].up)):
                x = torch.randn(T, B * layer.in_ch, size, size, device=device)
                channels_last = x.contiguous(memory_format=torch.channels_last)
                other = pixel_shuffle if layer.upsample else shared_and_block
                ways = {
                    "group convolution": (layer, x),
                    "… channels last": (layer, channels_last),
                    "loop over videos": (lambda x, tokens, layer=layer: loop_over_videos(layer, x, tokens), x),
                    other.__name__.replace("_", " "): (lambda x, tokens, layer=layer, f=other: f(layer, x, tokens), x),
                    "group convolution, bf16": (layer, x.bfloat16()),
                }
                with torch.no_grad(), exact_float32():
                    true = layer(x, tokens)
                    error = {name: (way(x, tokens) - true).abs().max() / true.abs().max() for name, (way, x) in ways.items()}
                for name in ways:
                    if "bf16" not in name and error[name] > 1e-5:
                        raise utils.UserError(f"{name} differs by {error[name]:.1e}")

                def both(way, x, tokens=tokens):
                    x = x.detach().requires_grad_()
                    y = way(x, tokens)
                    y.backward(y.detach())

                with torch.no_grad():
                    forward = measure({n: lambda w=w, z=tokens: w[0](w[1], z) for n, w in ways.items()}, config.repeats, device)
                there = measure({n: lambda w=w: both(*w) for n, w in ways.items()}, config.repeats, device)
                for name in ways:
                    yield [
                        preset, kind, name, spread(forward[name], 1000), ratio(forward, name, "group convolution"),
                        spread(there[name], 1000), ratio(there, name, "group convolution"), f"{error[name]:.0e}",
                    ]  # fmt: skip

    header = ["preset", "layer", "way", "forward, ms", "times as fast", "and backward, ms", "times as fast"]
    header.append("difference, of the largest")
    table(header, rows())


# ----------------------------------------------------------------------------------------------------------------- decode


class ResBlock(nn.Module):
    def __init__(self, in_ch, out_ch):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, in_ch), nn.Conv2d(in_ch, out_ch, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(32, out_ch), nn.Conv2d(out_ch, out_ch, 3, padding=1)
        self.side = nn.Conv2d(in_ch, out_ch, 1) if in_ch != out_ch else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.side(x) + self.conv2(F.silu(self.norm2(h)))


class SpatialAttention(nn.Module):
    def __init__(self, ch):
        super().__init__()
        self.norm, self.qkv, self.out = nn.GroupNorm(32, ch), nn.Conv2d(ch, 3 * ch, 1), nn.Conv2d(ch, ch, 1)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, -1)  # each [B, H * W, ch]
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).view_as(x))


def image_decoder():
    """The decoder of Stable Diffusion's image VAE (Rombach et al. 2022), [B, 4, h, w] -> [B, 3, 8h, 8w], 49 M parameters."""
    layers = [nn.Conv2d(4, 512, 3, padding=1), ResBlock(512, 512), SpatialAttention(512), ResBlock(512, 512)]
    channels = 512
    for i, out in enumerate((512, 512, 256, 128)):
        layers += [ResBlock(channels if j == 0 else out, out) for j in range(3)]
        if i < 3:
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(out, out, 3, padding=1)]
        channels = out
    return nn.Sequential(*layers, nn.GroupNorm(32, 128), nn.SiLU(), nn.Conv2d(128, 3, 3, padding=1))


def decode(config):
    """Frames per second, of clips from tokens and of the same clips by other means."""
    device = utils.pick_device(config.device)
    gpu = device.type == "cuda"
    peak, peak16 = machine_peak(config, device)

    def rows_of(runs, reference):
        """runs: {name: (function, frames, FLOPs or None)}; out of memory is a row too."""
        with torch.no_grad():
            seconds = measure({name: run for name, (run, _, _) in runs.items()}, config.repeats, device)
        per_frame = {name: [s / runs[name][1] for s in seconds[name]] for name in runs}
        for name, (_, frames, flops) in runs.items():
            rate = [1 / s for s in per_frame[name]]
            best = peak16 if "bf16" in name else peak
            share = f"{100 * flops / statistics.median(seconds[name]) / best:.0f} %" if flops and rate else ""
            work = f"{flops / frames / 1e9:.3g}" if flops else ""
            yield [name, frames, work, spread(rate), share, ratio(per_frame, name, reference), reference]

    def from_tokens(preset, B, T, loop=False, half=False, t=None):
        c = nerv.CONFIGS[preset]
        network = nerv.NeRV(c).to(device)
        tokens = torch.randn(B, c.num_tokens, c.token_dim, device=device)
        network, tokens = (network.bfloat16(), tokens.bfloat16()) if half else (network, tokens)
        t = torch.arange(T, device=device) if t is None else t
        with torch.device("meta"):
            flops, _ = forward_costs(lambda: nerv.NeRV(c)(torch.empty(B, *tokens.shape[1:]), torch.empty(len(t))))
        if loop:
            return lambda: [network(one, t) for one in tokens.split(1)], B * T, flops
        return lambda: network(tokens, t), B * len(t), flops

    def rows():
        # Many videos at once against one after another, and one frame, and many frames of few.
        runs = {f"nano, {B} videos in a call": from_tokens("nano", B, 16) for B in (1, 4, 16, 64)}
        runs["nano, 16 videos in a loop"] = from_tokens("nano", 16, 16, loop=True)
        runs["nano, one frame at random"] = from_tokens("nano", 1, 1, t=torch.tensor([7.3], device=device))
        runs["nano, 128 frames of 16"] = from_tokens("nano", 1, 128, t=torch.linspace(0, 15, 128, device=device))
        yield from rows_of(runs, "nano, 16 videos in a loop")
        # The paper's sizes. On a CPU a frame of L takes seconds.
        frames = config.frames or (16 if gpu else 1)
        runs = {f"S, {B} videos": from_tokens("S", B, frames) for B in ((1, 4, 16, 64) if gpu else (1, 4))}
        few = 16 if gpu else 4
        runs[f"S, {few} videos in a loop"] = from_tokens("S", few, frames, loop=True)
        if gpu:  # CPUs without matrix units for bfloat16 take minutes
            runs[f"S, {few} videos, bf16"] = from_tokens("S", few, frames, half=True)
        for preset in ("S-256", "B", *(("B-256", "L", "L-256") if gpu else ("L",))):
            runs[f"{preset}, {few if gpu else 1} videos"] = from_tokens(preset, few if gpu else 1, frames)
        runs["S, 1 video of 16 frames"] = from_tokens("S", 1, 16)
        sd = image_decoder().to(device)
        z = torch.randn(16, 4, 16, 16, device=device)
        flops, _ = forward_costs(lambda: image_decoder().to("meta")(z.to("meta")))
        parameters = sum(p.numel() for p in sd.parameters())
        name = f"image decoder of Stable Diffusion's shape, {parameters / 1e6:.1f} M"
        runs[name] = lambda: sd(z), len(z), flops
        yield from rows_of(runs, name)
        # The same clips as files and as frames in memory; frames end as float clips.
        for size, preset in ((32, "nano"), (128, "S")):
            clips = np.random.default_rng(0).integers(0, 256, (8, 16, 4, 4, 3), dtype=np.uint8)
            clips = clips.repeat(size // 4, 2).repeat(size // 4, 3)
            with tempfile.TemporaryDirectory() as directory:
                for i, clip in enumerate((*clips, clips.reshape(-1, *clips.shape[2:]))):
                    video.write_video(Path(directory) / f"{i}", video.to_clip(clip))
                files = [Path(directory) / f"{i}.mp4" for i in range(len(clips) + 1)]
                runs = {f"{size}² frames from memory": (lambda x=clips: [video.to_clip(clip.copy()) for clip in x], 128, None)}
                runs[f"{size}² H.264, one file of 8 clips"] = lambda f=files[-1], s=size: video.read_frames(f, s), 128, None
                runs[f"{size}² H.264, a file for each"] = (
                    lambda f=files[:-1], s=size: [video.read_frames(file, s) for file in f], 128, None,
                )  # fmt: skip
                runs[f"{preset} again, 4 videos"] = from_tokens(preset, 4, 16 if preset == "nano" or gpu else 1)
                yield from rows_of(runs, f"{size}² H.264, a file for each")

    header = [
        "what" + " " * 40,
        "frames",
        "GFLOP a frame",
        "frames / s" + " " * 14,
        "of the peak",
        "times as fast" + " " * 9,
        "as",
    ]
    table(header, rows())


# ----------------------------------------------------------------------------------------------------------------- sample


def sample(config):
    """Two videos of each of nine classes, guidance 2; distances are to DDIM with 1000 steps from the same noise."""
    device = utils.pick_device(config.device)
    machine_peak(config, device)
    if config.ckpt:
        model, autoencoder, scale = dit.load_dit(checkpoints.load(config.ckpt, "dit", "python demo.py"))
    else:
        c = nerv.CONFIGS["nano"]
        model, scale = dit.DiT(dit.DiTConfig(c.num_tokens, c.token_dim, 9, **dit.SIZES["nano"])).eval(), 1.0
        autoencoder = vae.VAE(c, vae.ENCODERS["nano"]).eval()
    model, autoencoder = model.to(device), autoencoder.to(device)
    labels = torch.arange(min(9, model.config.num_classes), device=device).repeat_interleave(2)
    t = torch.arange(autoencoder.nerv_config.num_frames, device=device)
    ways = [("ddpm", 250), ("ddim", 20), ("ddim", 50), ("ddim", 100), ("dpm", 10), ("dpm", 15), ("dpm", 20)]
    tokens = {}

    def denoise(sampler, steps):
        tokens[sampler, steps] = dit.generate(model, labels, steps=steps, sampler=sampler, seed=0)

    with torch.no_grad():
        repeats = min(config.repeats, 3)
        denoising = measure({way: lambda way=way: denoise(*way) for way in ways}, repeats, device)
        decoding = measure({way: lambda way=way: autoencoder.decode(tokens[way] / scale, t) for way in ways}, repeats, device)
        if config.ckpt:
            denoise("ddim", 1000)
    both = {way: [a + b for a, b in zip(denoising[way], decoding[way])] for way in ways}
    rows = []
    for way in ways:
        distance = "not measured"
        if config.ckpt and way[0] != "ddpm":  # whose noise is another
            distance = f"{(tokens[way] - tokens['ddim', 1000]).square().mean().sqrt():.4f}"
        rows.append([
            *way, spread(denoising[way]), spread(decoding[way]), spread(both[way]), ratio(both, way, ("ddim", 100)), distance,
        ])  # fmt: skip
    header = ["sampler", "steps", "denoiser, s", "decoder, s", "both, s", "times as fast as ddim 100", "distance of tokens"]
    table(header, rows)


def quality(config):
    """Samplers with the same noise, against as many training clips; a random I3D's distance is not the published FVD."""
    device = utils.pick_device(config.device)
    utils.check_positive(config, "clips", "repeats")
    ckpt = checkpoints.load(config.ckpt, "dit", "python demo.py")
    model, autoencoder, scale = dit.load_dit(ckpt)
    model, autoencoder, classes = model.to(device), autoencoder.to(device), ckpt["classes"]
    train_set = data.open_dataset(vae.clips_of(ckpt["vae"]), "train", classes)
    scorer = evaluate.Scorer(train_set, len(classes), config.clips, device=device)
    ways, found = [("ddim", 20), ("ddim", 100), ("dpm", 10), ("dpm", 20)], {}
    for seed in range(config.repeats):
        for sampler, steps in ways:
            clips, tokens = scorer.generate(model, autoencoder, scale, seed, sampler=sampler, steps=steps)
            found.setdefault((sampler, steps), []).append((*scorer(clips), tokens))
    rows = []
    for way in ways:
        shares, distances, tokens = zip(*found[way])
        near = found["ddim", 100]
        off = [(a - b[2]).square().mean().sqrt().item() for a, b in zip(tokens, near)]
        more = [a - b[1] for a, b in zip(distances, near)]
        rows.append([*way, spread(shares), spread(distances), spread(more), spread(off)])
    print(f"{len(scorer.labels)} clips for each of {config.repeats} seeds of noise; latents have unit deviation")
    header = [
        "sampler",
        "steps",
        "class agreement, %",
        "FVD on random features",
        "… more than ddim 100",
        "tokens off those of ddim 100",
    ]
    table(header, rows)


# ----------------------------------------------------------------------------------------------------------------- growth


def growth(config):
    """A decoder of nano's width. One quantity grows at a time; exponents are slopes of the logarithms, least squares."""
    device = utils.pick_device(config.device)
    machine_peak(config, device)
    base = replace(nerv.CONFIGS["nano"], resolution=64)
    series = {
        "pixels of a frame": [(n * n, replace(base, resolution=n), 1, 4) for n in (32, 64, 128, 256)],
        "frames": [(n, replace(base, num_frames=n), 1, n) for n in (16, 32, 64, 128)],
        "videos": [(n, base, n, 4) for n in (1, 2, 4, 8, 16)],
        "width": [(n, replace(base, width=n, block=min(n, 64)), 1, 4) for n in (16, 32, 64, 128)],
    }
    rows, exponents, panels = [], [], {}
    for what, points in series.items():
        columns = {"kernel entries": [], "latent": [], "FLOPs": [], "seconds": []}
        runs = {}
        for value, c, B, T in points:
            network = nerv.NeRV(c).to(device)
            tokens, t = torch.randn(B, c.num_tokens, c.token_dim, device=device), torch.arange(T, device=device)
            with torch.device("meta"):
                flops, _ = forward_costs(lambda c=c, B=B, T=T: nerv.NeRV(c)(torch.empty(B, 32, 16), torch.empty(T)))
            columns["kernel entries"].append(network.num_kernel_weights())
            columns["latent"].append(B * c.num_tokens * c.token_dim)
            columns["FLOPs"].append(flops)
            runs[value] = lambda n=network, z=tokens, t=t: n(z, t)
        with torch.no_grad():
            seconds = measure(runs, config.repeats, device)
        columns["seconds"] = [statistics.median(s) for s in seconds.values()]
        x = np.log([value for value, *_ in points])
        exponents.append([what, *(f"{np.polyfit(x, np.log(y), 1)[0]:.2f}" for y in columns.values())])
        for i, value in enumerate(seconds):
            first = [f"{columns[name][i]:.3g}" for name in ("kernel entries", "latent", "FLOPs")]
            times = [columns["seconds"][i] / columns["seconds"][0], value / points[0][0]]
            rows.append([what, value, *first, spread(seconds[value]), f"{times[0]:.2f}", f"{times[1]:.0f}"])
        panels[what] = {
            value: (columns["kernel entries"][i], columns["latent"][i], s) for i, (value, s) in enumerate(seconds.items())
        }
    table(["", "", "kernel entries", "latent", "FLOPs", "seconds", "times the first", "of so many times"], rows)
    print()
    table(["exponents, against", "kernel entries", "latent", "FLOPs", "seconds"], exponents)
    if config.plot:
        utils.make_parent(config.plot)
        draw(config.plot, panels)


def draw(path, panels):
    """A panel for each of {what grows: {value: (kernel entries, latent, seconds of each call)}}, in multiples of the first's.

    Axes are logarithmic: what grows in proportion goes along the dashed line of slope 1, what has two widths along slope 2.
    """
    fig, axes = plot.figure(len(panels), 2, 4, 3)
    for ax, (what, points) in zip(axes, panels.items()):
        x, (entries, latent, seconds) = list(points), zip(*points.values())
        middle, least, most = (np.array([f(s) for s in seconds]) for f in (statistics.median, min, max))
        ranges = np.stack([middle - least, most - middle]) / middle[0]
        for name, y, look, colour in (("kernel entries", entries, "s-", plot.RED), ("latent", latent, "^-", plot.GREEN)):
            ax.plot(x, np.array(y) / y[0], look, color=colour, markersize=4, label=name)
        ax.errorbar(
            x, middle / middle[0], ranges, fmt="o-", color=plot.BLUE, markersize=4, capsize=2, label="seconds, and range"
        )
        for slope in (1, 2) if what == "width" else (1,):
            end = (x[-1], (x[-1] / x[0]) ** slope)
            ax.plot([x[0], end[0]], [1, end[1]], "--", color=plot.INK, linewidth=0.8, zorder=3)
            ax.annotate(f"slope {slope}", end, (7, -3), textcoords="offset points", color=plot.INK, size=8)
        plot.logarithmic(ax.xaxis, x)
        plot.logarithmic(ax.yaxis)
        ax.set(xlabel=what, ylabel="times the first")
    axes[0].legend(fontsize=8, labelcolor=plot.INK, frameon=False)
    fig.savefig(path)


# ---------------------------------------------------------------------------------------------- one network for one video


class Noise(fit.Video):
    """132 frames of 160 × 320, as Bunny has in docs/fit.md."""

    def __init__(self):
        self.frames = np.random.default_rng(0).integers(0, 256, (132, 160, 320, 3), np.uint8)
        _, self.height, self.width, _ = self.frames.shape
        self.rate, self.known = 25.0, np.ones((self.height, self.width), bool)


def fitting(config):
    """A step of each method of fit.py at 1.5 M parameters: reading, forward, backward and Adam."""
    device = utils.pick_device(config.device)
    peak, _ = machine_peak(config, device)
    noise = Noise()
    fits = {name: fit.Fit(name, noise, fit.Config(), device) for name in METHODS}
    flops = {name: forward_costs(one.step)[0] for name, one in fits.items()}
    seconds = measure({name: one.step for name, one in fits.items()}, config.repeats, device)
    rows = []
    for name, found in seconds.items():
        rate = flops[name] / statistics.median(found)
        rows.append([name, f"{flops[name] / 1e9:.1f}", spread(found, 1e3), f"{rate / 1e9:.0f}", f"{100 * rate / peak:.0f} %"])
    table(["method", "GFLOP a step", "ms a step", "GFLOP/s", "of a matrix product"], rows)


TOPICS = {"conv": conv, "decode": decode, "sample": sample, "quality": quality, "growth": growth, "fit": fitting}


def main():
    topic, config = utils.parse_topic(Config, __doc__, TOPICS)
    topic(config)


if __name__ == "__main__":
    utils.run(main)
