"""What it costs, computed and measured: `python -m bench.costs costs | long | memory | train | …`.

costs      parameters, latent size, FLOPs and memory of the presets, from shapes alone (no weights are made)
long       FLOPs of the denoiser on long videos: chunks by themselves, with the interface of vin.py, with full attention
memory     what a training step takes of a GPU, from shapes alone, and the options that make it fit cards of 24 to 141 GB
train      both training loops as they are, steps and clips per second, memory, eager against compiled
shares     what of a step of either training goes into data, forward, backward and optimizer; all frames and a few of them
processes  two processes with one thread each against one with two, at equal global batch
latents    stage 2 with --cache-latents against encoding at every step
lpips      a step of stage 1 without LPIPS and with each of its backbones, at 64 x 64 and at 128 x 128
"""

import copy
import csv
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import data
import dit
import losses
import nerv
import vae
import vin
from common import memory, utils
from common.tables import table
from common.utils import option
from common.video import to_clip


@dataclass
class Config:
    preset: str = option("what", "nano", "of train and shares", choices=list(nerv.CONFIGS))
    batch_size: int = option("what", 0, "clips per step; 0: 16, and in train as many of 32 as fit the GPU")
    steps: int = option("what", 40, "steps of each run; the first quarter is not counted")
    workers: int = option("what", 0, "data loading processes")


def short_of_memory(error):
    """Whether an exception, or what a program wrote to stderr, says that a GPU's or the machine's memory was not enough."""
    words = ("out of memory", "can't allocate memory", "MemoryError")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


# ---------------------------------------------------------------------------------------------------------------- computed


def attention_flops(query, key, value, *args, out_shape=None, **kwargs):
    """2 products of [L, L] by d for each of B heads: what the counter does not know of the CPU's fused attention."""
    B, heads, L, d = query
    return 4 * B * heads * L * key[2] * d


def forward_costs(run):
    """FLOPs of run(), and bytes that it keeps for the backward pass beside parameters. Fake tensors will do."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes(), tensor  # held, so that ids stay apart
        return tensor

    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
    with FlopCounterMode(display=False, custom_mapping=fused) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run()
    return counter.get_total_flops(), sum(size for size, _ in kept.values())


def costs(config):
    """Every preset at 128² and 256², 16 and 128 frames: one clip, all of its frames decoded, float32."""
    rows = []
    for name in sorted(nerv.CONFIGS, key=lambda name: ["n", "S", "B", "L"].index(name[0])):
        c = nerv.CONFIGS[name]
        with FakeTensorMode():
            model = vae.VAE(c, vae.ENCODERS[name])
            denoiser = dit.DiT(dit.DiTConfig(c.num_tokens, c.token_dim, **dit.SIZES[name]))
            video, label = torch.empty(2, c.num_frames, 3, c.resolution, c.resolution), torch.zeros(1, dtype=torch.long)
            z = torch.empty(1, c.num_tokens, c.token_dim)
            encode, encode_kept = forward_costs(partial(model.encode, video))  # two clips, for the batch norm
            denoise, denoise_kept = forward_costs(partial(denoiser, z, label, label))
        with torch.device("meta"):
            z, t = torch.empty(1, c.num_tokens, c.token_dim), torch.empty(c.num_frames)
            decode, decode_kept = forward_costs(partial(nerv.NeRV(c), z, t))
        numbers = 3 * c.num_frames * c.resolution**2 / (c.num_tokens * c.token_dim)
        rows.append([
            name, f"{c.num_frames} × {c.resolution}²", f"{model.nerv.num_kernel_weights() / 1e6:.2f} M",
            f"{count(model.nerv):.2f} M", f"{count(model.encoder):.1f} M", f"{count(denoiser):.1f} M",
            f"{c.num_tokens} × {c.token_dim}", f"{numbers:.0f} : 1", f"{encode / 2e9:.1f}", f"{decode / 1e9:.1f}",
            f"{denoise / 1e9:.1f}", f"{encode_kept / 2**31:.2f}", f"{decode_kept / 2**30:.2f}", f"{denoise_kept / 2**30:.2f}",
        ])  # fmt: skip
    table(
        ["preset", "clip", "kernels", "decoder", "encoder", "denoiser", "tokens", "clip : latent", "encode", "decode",
         "denoise once", "encode keeps", "decode keeps", "denoise keeps"], rows,
    )  # fmt: skip
    print("\nkernels: entries of one video's kernels; decoder: learned parameters, heads of the multi-head affine included;")
    print("encode, decode, denoise once: GFLOP of one clip's forward pass; keeps: GiB for its backward pass, in float32")


def long_videos(config):
    """GFLOP of the denoiser, once, on one video of C chunks, by formulas that tests hold against the counter."""
    rows = []
    for name in ("nano", "S"):
        whole = nerv.CONFIGS[name].num_tokens, nerv.CONFIGS[name].token_dim
        c = dit.DiTConfig(*dit.COMPONENTS.get(name, whole), **dit.SIZES[name])
        for chunks in (1, 4, 8, 12, 16, 32, 200):
            alone, full = chunks * vin.dit_flops(c, c.num_tokens), vin.dit_flops(c, chunks * c.num_tokens)
            ours = [vin.flops(c, vin.VINConfig(neighbours=near, **vin.SIZES[name]), chunks) for near in (False, True)]
            shares = [f"{cost / 1e9:.2f} ({100 * (cost / full - 1):+.0f} %)" for cost in (alone, *ours)]
            rows.append([name, chunks, *shares, f"{full / 1e9:.2f}"])
    table(["preset", "chunks", "by themselves", "interface, --no-neighbours", "interface", "full attention"], rows)


CARDS = (24, 40, 80, 141)  # GB


def networks(preset, recompute=False, lpips="vgg"):
    """All that a step of vae.py trains or asks, with random weights."""
    autoencoder = vae.VAE(nerv.CONFIGS[preset], vae.ENCODERS[preset])
    autoencoder.encoder.recompute = recompute
    discriminator = losses.Discriminator(losses.DiscriminatorConfig())
    return autoencoder, discriminator, losses.LPIPS(lpips, pretrained=False) if lpips != "none" else None


def training_memory(preset, rows, recompute=False, bf16=True, lpips="vgg", gan=True):
    """GiB by part that an eager step of vae.py takes in one process, `rows` clips at a time and 16 frames of each decoded."""
    predict = memory.stage1(partial(networks, preset, recompute, lpips), 16, bf16, gan)
    return {part: size / 2**30 for part, size in predict(rows).items()}


def stage2_memory(preset, rows, bf16=True):
    """GiB by part that an eager step of dit.py takes in one process, `rows` clips at a time, encoded in the step."""

    def make():
        c = nerv.CONFIGS[preset]
        return dit.DiT(dit.DiTConfig(c.num_tokens, c.token_dim, **dit.SIZES[preset])), networks(preset, lpips="none")[0]

    return {part: size / 2**30 for part, size in memory.stage2(make, bf16)(rows).items()}


def memory_table(config):
    """Every preset but nano with LPIPS and discriminator, eager in bfloat16, at their 32 clips a step."""

    def options(found):
        if found is None:
            return "does not fit"
        accumulate, recompute = found
        return " ".join([f"--accumulate {accumulate}"] * (accumulate > 1) + ["--recompute on"] * recompute) or "as it is"

    def rows():
        for preset in (name for name in nerv.CONFIGS if name != "nano"):
            predicts = [memory.stage1(partial(networks, preset, recompute), 16) for recompute in (False, True)]
            takes = [f"{sum(predict(n).values()) / 2**30:.0f}" for n in (4, 32) for predict in predicts]
            stage2 = f"{sum(stage2_memory(preset, 8).values()):.0f}"
            for card in CARDS:
                most = [0, 0]
                for i, predict in enumerate(predicts):
                    most[i] = max((n for n in range(1, 33) if memory.plan([predict], n, card * 2**30, 8) == (1, 0)), default=0)
                advice = [options(memory.plan(predicts, 32 // count, card * 2**30, count)) for count in (8, 1)]
                yield [preset, *takes, stage2, f"{card} GB", *most, *advice]

    table(
        ["preset", "4 clips", "recomputed", "32 clips", "recomputed", "stage 2, 8 clips", "card", "clips fit", "recomputed",
         "8 cards, 32 clips a step", "1 card, 32 clips a step"], rows(),
    )  # fmt: skip
    print("\nGiB of a process that takes so many clips at a time, eager, in bfloat16; compiled code takes less.")
    print("recomputed: with --recompute on, for one more forward pass of the encoder. A tenth of each card is kept free.")


def count(network):
    """Parameters, in millions."""
    return sum(p.numel() for p in network.parameters()) / 1e6


# ---------------------------------------------------------------------------------------------------------------- measured


def seconds_per_step(command, directory, steps, threads=None):
    """Run a training loop and time it by its own losses.csv: (seconds a step after the first quarter, what it printed).

    MemoryError where memory was not enough, UserError where something else went wrong.
    """
    first = max(1, steps // 4)
    command = [*command, "--steps", steps, "--log-every", first, "--save-every", 10**9]
    command += ["--out", directory / "out.pt", "--run-dir", directory / "run"]
    env = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    done = subprocess.run([sys.executable, *map(str, command)], env=env, capture_output=True, text=True)
    if done.returncode:
        if short_of_memory(done.stderr):
            raise MemoryError
        raise utils.UserError(f"{' '.join(map(str, command))} failed: {done.stderr[-500:]}")
    with open(directory / "run" / "losses.csv") as f:
        rows = list(csv.DictReader(f))
    elapsed = float(rows[-1]["seconds"]) - float(rows[0]["seconds"])
    return elapsed / (int(rows[-1]["step"]) - int(rows[0]["step"])), done.stdout


def peak_in(output):
    """What a training says of its peak memory, "1.25 GiB"."""
    return next(line.removeprefix("peak memory ") for line in output.splitlines() if line.startswith("peak memory"))


def script(name):
    return Path(__file__).parent.parent / name


def matrix_peak(device, size=8192):
    """FLOP per second of a bfloat16 matrix product, the best of several."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / 1000)
    return 2 * size**3 / best


def train(config):
    """Both loops on the built-in shapes at the preset's size, without LPIPS, whose weights may not be here."""
    cuda = torch.cuda.is_available()
    peak = matrix_peak("cuda") if cuda else None
    print(f"{torch.cuda.get_device_name() if cuda else 'no CUDA device: CPU'}; bf16 matrix peak "
          f"{f'{peak / 1e12:.0f} TFLOP/s' if cuda else 'not measured'}")  # fmt: skip
    c, batch_size = nerv.CONFIGS[config.preset], config.batch_size
    frames = 2 if config.preset == "nano" else min(16, c.num_frames)
    if not batch_size and cuda:  # as many as fit in eager bfloat16
        predict = memory.stage1(partial(networks, config.preset, lpips="none"), frames, gan=False)
        parts, _ = memory.plan([predict], 32, torch.cuda.mem_get_info()[0]) or (16, 0)
        batch_size = max(2, 32 // parts)
    batch_size = batch_size or 16
    with FakeTensorMode():
        model = vae.VAE(c, vae.ENCODERS[config.preset])
        video = torch.empty(2, c.num_frames, 3, c.resolution, c.resolution)
        flops, _ = forward_costs(lambda: model.decode(model.encode(video)[0], torch.empty(frames)))
        denoiser = dit.DiT(dit.DiTConfig(c.num_tokens, c.token_dim, **dit.SIZES[config.preset]))
        z, two = torch.empty(2, c.num_tokens, c.token_dim), torch.empty(2, dtype=torch.long)
        denoise, _ = forward_costs(lambda: denoiser(z, two, two))
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        first = [script("vae.py"), "--dataset", "shapes", "--preset", config.preset, "--lpips", "none"]
        first += ["--workers", config.workers, "--batch-size"]
        seconds_per_step([*first, 2, "--compile", "off"], directory / "a", 4)  # a checkpoint for stage 2
        second = [script("dit.py"), "--ckpt", directory / "a" / "out.pt", "--num-latents", 512, "--cache-latents"]
        second += ["--batch-size"]
        # What a GPU is for comes first, and what takes the most memory last.
        modes = [("on", "on"), ("on", "off"), ("off", "on"), ("off", "off")]  # (bf16, compiled)

        def rows():
            # Forward and backward are three forwards; scheduled sampling adds a second pass in a quarter of the steps.
            for name, command, work in (("vae.py", first, 1.5 * flops), ("dit.py", second, 1.5 * 1.25 * denoise)):
                reference = None
                for bf16, compiled in modes if cuda else modes[:0:-1]:
                    mode = ("compiled" if compiled == "on" else "eager") + (", bf16" if bf16 == "on" else ", float32")
                    options = [*command, batch_size, "--compile", compiled, "--bf16", bf16]
                    row = [name, config.preset, batch_size, mode]
                    try:
                        seconds, out = seconds_per_step(options, directory / "b", config.steps)
                    except MemoryError:
                        yield [*row, "out of memory", "", "", "", ""]
                        continue
                    reference = reference or seconds
                    share = f"{100 * work * batch_size / seconds / peak:.1f} %" if cuda else "not measured"
                    yield [*row, f"{1 / seconds:.2f}", f"{batch_size / seconds:.1f}", f"{reference / seconds:.2f}",
                           peak_in(out), share]  # fmt: skip

        header = ["loop", "preset", "batch", "mode", "steps / s", "clips / s", "times the first", "memory"]
        header.append("share of the matrix peak")
        table(header, rows())


def shares(config):
    """The steps of both stages on the built-in shapes, L2 and KL alone, the device waited for between their parts."""
    device, c, rows = utils.pick_device("auto"), nerv.CONFIGS[config.preset], []
    train_set = data.Shapes(resolution=c.resolution, num_frames=c.num_frames)
    batches = data.endless(train_set, data.Stream(len(train_set), config.batch_size, 0), config.workers, device)
    autoencoder = vae.VAE(c, vae.ENCODERS[config.preset]).to(device)
    denoiser = dit.DiT(dit.DiTConfig(c.num_tokens, c.token_dim, 9, **dit.SIZES[config.preset])).to(device)
    alpha, sigma = dit.noise_schedule(device)
    noise = torch.randn(config.batch_size, c.num_tokens, c.token_dim, device=device)

    def read():
        return to_clip(next(batches)[0].to(device))

    def reconstruct(video, frames):
        mean, logvar = autoencoder.encode(video)
        decoded = autoencoder.decode(mean + torch.exp(0.5 * logvar) * noise, torch.arange(frames, device=device))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2)).mean()
        return (decoded.float() - video[:, :frames]).square().mean() + 1e-6 * kl

    def denoise(theta0):
        step = torch.randint(dit.NUM_STEPS, (config.batch_size,), device=device)
        return dit.diffusion_loss(denoiser, theta0, step % 9, None, step, torch.randn_like(noise), alpha, sigma, 5.0, False)

    few = max(2, c.num_frames // 8)
    loops = [(f"vae.py, {n} of {c.num_frames} frames", autoencoder, read, partial(reconstruct, frames=n))
             for n in (c.num_frames, few)]  # fmt: skip
    loops.append(("dit.py, latents in memory", denoiser, lambda: noise, denoise))
    for name, network, get, loss_of in loops:
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
        update, ema = utils.FiniteStep(network, optimizer, 1.0), copy.deepcopy(network).requires_grad_(False)
        parts = []
        for _ in range(config.steps):
            marks = [time.perf_counter()]

            def mark(marks=marks):
                if device.type == "cuda":
                    torch.cuda.synchronize()
                marks.append(time.perf_counter())

            batch = get()
            mark()
            with utils.autocast(device, "auto"):
                loss = loss_of(batch)
            mark()
            loss.backward()
            mark()
            update(loss, 1e-4)
            utils.update_ema(ema, network, 0.99)
            mark()
            parts.append([b - a for a, b in zip(marks, marks[1:])])
        parts = torch.tensor(parts[len(parts) // 4 :])
        total = parts.sum(1)
        percent = [f"{100 * share:.0f} %" for share in (parts / total[:, None]).median(0).values]
        spread = f"{1000 * total.median():.1f} ({1000 * total.min():.1f} to {1000 * total.max():.1f})"
        rows.append([name, spread, f"{1 / total.median():.2f}", f"{config.batch_size / total.median():.1f}", *percent])
    print(f"preset {config.preset}, batch {config.batch_size}, {device}, {torch.get_num_threads()} threads")
    table(["loop", "ms a step", "steps / s", "clips / s", "data", "forward", "backward", "optimizer and average"], rows)


def processes(config):
    """Data-parallel training on the CPU; the second run has twice the processes and half the threads in each."""
    rows, speeds = [], []
    launch = ["-m", "torch.distributed.run", "--standalone"]
    for count, threads in ((1, 2), (2, 1), (1, 2), (2, 1)):  # twice, for the spread
        with tempfile.TemporaryDirectory() as directory:
            command = [*launch, f"--nproc_per_node={count}", script("vae.py"), "--batch-size", config.batch_size]
            seconds, _ = seconds_per_step(command, Path(directory), config.steps, threads)
        speeds.append(config.batch_size / seconds)
        rows.append([count, threads, f"{speeds[-1]:.2f}"])
    table(["processes", "threads each", "clips / s"], rows)
    print(f"two processes reach {(speeds[1] + speeds[3]) / (speeds[0] + speeds[2]):.2f} of one's throughput per core")


def latents(config):
    """Stage 2 of the nano preset, with the cache and without."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        seconds_per_step([script("vae.py")], directory / "a", 4)
        shared = [script("dit.py"), "--ckpt", directory / "a" / "out.pt", "--batch-size", config.batch_size]
        for name in ("--cache-latents", "--no-cache-latents"):
            start = time.time()
            seconds, _ = seconds_per_step([*shared, name], directory / name, config.steps)
            rows.append([name, f"{1 / seconds:.2f}", f"{time.time() - start - config.steps * seconds:.0f} s"])
    table(["", "steps / s", "start and end, encoding into the cache included"], rows)


def lpips(config):
    """Stage 1 of the preset on the built-in shapes, L2 and KL alone and with LPIPS beside them, the faster of two runs each."""
    rows, backbones = [], ("none", "alex", "vgg")
    for size in (64, 128):
        runs = {backbone: [] for backbone in backbones}
        for backbone in 2 * backbones:  # in turns
            command = [script("vae.py"), "--preset", config.preset, "--resolution", size, "--batch-size", config.batch_size]
            command += ["--lpips", backbone, "--gan-weight", 0]
            with tempfile.TemporaryDirectory() as directory:
                seconds, out = seconds_per_step(command, Path(directory), config.steps)
            runs[backbone].append((seconds, peak_in(out)))
        alone, _ = min(runs["none"])
        for backbone, measured in runs.items():
            seconds, peak = min(measured)
            row = [f"{size} × {size}", backbone, f"{seconds:.2f}", f"{seconds - alone:.2f}", f"{seconds / alone:.2f}"]
            rows.append([*row, peak])
    frames = vae.preset_defaults(vae.Config(preset=config.preset)).get("decode_frames", 16)
    print(f"preset {config.preset}, {config.batch_size} clips a step, {frames} frames of each are decoded and judged")
    table(["frames", "backbone", "s a step", "of that LPIPS", "times none", "memory"], rows)


TOPICS = {"costs": costs, "long": long_videos, "memory": memory_table, "train": train, "shares": shares, "processes": processes}
TOPICS |= {"latents": latents, "lpips": lpips}


def main():
    topic, config = utils.parse_topic(Config, __doc__, TOPICS)
    if topic is not train:
        config.batch_size = config.batch_size or 16
    topic(config)


if __name__ == "__main__":
    utils.run(main)
