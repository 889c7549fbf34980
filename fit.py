"""One network for one video: the NeRV family and RNeRV, fitted side by side in equal time, stored as small as they go.

video --one network per method, Adam on its frames--> weights --quantize, entropy code--> video.nerv --decode--> frames

python fit.py video.mp4 --method rnerv --size 1.5M --minutes 10        writes video.nerv, a report and curves
python fit.py video.mp4 --method nerv,enerv,hnerv,plain,ffnerv,hinerv,diffnerv,rnerv --resize 160x320
python fit.py --decode video.nerv --out again.mp4 --fps 60
python fit.py --explain video.nerv                                     XINC contribution maps; of dit.pt too

The methods are the rows of a table in common/methods.py, compared as in "How to Design and Train Your Implicit Neural
Representation for Video Compression" (below: HTD). docs/fit.md has the format of the file.
"""

import copy
import csv
import dataclasses
import functools
import hashlib
import itertools
import math
import struct
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import codec
import data
import dit
from common import checkpoints, container, entropy, methods, plot, progress, rd, utils, video, videofile, xinc
from common.components import Flow, Plan
from common.methods import METHODS, Network
from common.tables import table
from common.utils import UserError, option
from common.video import printable, to_clip, to_frames


@dataclass
class Config:
    method: str = option("network", "rnerv", f"one, or several by commas: {', '.join(METHODS)}")
    size: str = option("network", "1.5M", "parameters, embeddings included: 300k, 1.5M, 3M, …; widths follow")
    bits: int = option("network", 8, "of a stored parameter, 4 to 8")
    minutes: float = option("training", 10.0, "of training, for each method; they take turns, step by step")
    steps: int = option("training", 0, "of each method, instead of --minutes: then the same command makes the same file")
    batch_size: int = option("training", 1, "frames per step")
    lr: float = option("training", 0.0, "peak learning rate, of Adam; 0: each method's own")
    seed: int = option("training", 0, "of weights and of the order of frames")
    mask: str = option("video", "", "inpainting: a picture of the frames' size, white where the video is not to be looked at")
    frames: str = option("video", "", "first and last of the frames, the last one left out, 100:140; default: all")
    resize: str = option("video", "", "fit the video at this height and width, 160x320, cut to that shape")
    decode: str = option("instead", "", "a .nerv file, which is written to --out as a video", metavar="FILE")
    fps: float = option("instead", 0.0, "frames per second that --decode makes; 0: those of the video")
    explain: str = option("instead", "", "a .nerv file or a dit.pt: who paints which pixel, as a picture", metavar="FILE")
    ckpt: str = option("instead", "codec.pt", "the model of a file of codec.py that is to be explained")
    device: str = option("machine", "auto", "cpu, cuda, cuda:1, …; auto: CUDA where there is one")
    out: str = option("output", "", "what is written; default: by the name of the video, .nerv, or .METHOD.nerv of several")
    resume: bool = option("output", False, "go on from the state in --run-dir where it exists, as if never stopped")
    run_dir: str = option("output", "runs/fit", "report.csv, curves.csv, curves.png and the state of the training go here")


# ------------------------------------------------------------------------------------------------------------------ video


class Video:
    """The video to fit: frames uint8 [T, H, W, 3], on the disk where a decoder made them; rate; known, bool [H, W]."""

    def __init__(self, path, config):
        frames = video.whole_video(path)
        first, last = video.frame_range(config.frames, len(frames))
        self.frames, self.rate = frames[first:last], video.probe(path).fps or 25.0
        if config.resize:
            self.frames = resized(self.frames, *sizes(config.resize))
        _, self.height, self.width, _ = self.frames.shape
        if self.width * self.height > FittedVideo.LARGEST:
            raise UserError(f"{printable(path)} has frames of {self.width} x {self.height}: use a smaller --resize")
        self.known = np.ones((self.height, self.width), bool)
        if config.mask:
            self.known = video.read_image(config.mask, None).mean(-1) < 128
            if self.known.shape != (self.height, self.width):
                height, width = self.known.shape
                raise UserError(f"--mask {config.mask} is {width} x {height}, and frames are {self.width} x {self.height}")
            if not self.known.any():
                raise UserError(f"--mask {config.mask} is white all over: nothing is left to fit")

    def __len__(self):
        return len(self.frames)

    def clips(self, numbers, padded):
        """What an encoder sees of frames [B]: [B, 3, 3, H, W], the frame before, itself and the one after, grey in the mask."""
        around = (numbers[:, None] + np.arange(-1, 2)).clip(0, len(self) - 1)
        clips = to_clip(self.frames[around]) * torch.from_numpy(self.known)
        bottom, right = padded[0] - self.height, padded[1] - self.width
        return torch.nn.functional.pad(clips.flatten(0, 1), (0, right, 0, bottom), "replicate").unflatten(0, around.shape)

    def fingerprint(self):
        """A hash of some of it: a training goes on with the video it began with."""
        few = np.linspace(0, len(self) - 1, min(8, len(self))).round().astype(int)
        parts = str(self.frames.shape).encode(), self.known.tobytes(), *(self.frames[i].tobytes() for i in few)
        return hashlib.sha256(b"".join(parts)).hexdigest()


def sizes(text):
    """ "160x320" -> (160, 320)."""
    numbers = text.lower().split("x")
    if len(numbers) != 2 or not all(n.isdigit() and 0 < int(n) < 2**15 for n in numbers):
        raise UserError(f"--resize {text}: name height and width in pixels, as in 160x320")
    return int(numbers[0]), int(numbers[1])


def resized(frames, height, width):
    """Frames uint8 [T, H, W, 3] cut to a shape in their middle and scaled to it, bicubic, as [T, height, width, 3] on disk."""
    _, h, w, _ = frames.shape
    scale = min(h / height, w / width)
    top, left = (h - scale * height) / 2, (w - scale * width) / 2
    out = np.memmap(tempfile.TemporaryFile(), np.uint8, "w+", shape=(len(frames), height, width, 3))
    for i, frame in enumerate(frames):
        box = (left, top, left + scale * width, top + scale * height)
        out[i] = Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC, box)
    return out


def parameters(text):
    """ "1.5M" -> 1500000.0."""
    unit = {"k": 1e3, "m": 1e6}.get(text[-1:].lower(), 1)
    try:
        number = float(text if unit == 1 else text[:-1]) * unit
    except ValueError:
        number = 0
    if not 100 <= number <= FittedVideo.MOST:
        raise UserError(
            f"--size {text}: a number of parameters from 100 to {FittedVideo.MOST / 1e6:.0f}M, such as 300k or 1.5M"
        )
    return number


def frame_psnr(decoded, real, where=None):
    """PSNR in dB of each frame, uint8 [T, H, W, 3] both -> [T]; where: bool [H, W], the pixels that count."""
    error = np.square(decoded.astype(np.float32) - real).mean(-1)
    error = error[:, where].mean(1) if where is not None else error.mean((1, 2))
    return 10 * np.log10(255**2 / np.maximum(error, 1e-5))


# --------------------------------------------------------------------------------------------------------------- one file


def width(x, bits):
    """Of the numbers of a tensor, in bits: vectors, which are few and go everywhere, always have 8."""
    return 8 if x.ndim == 1 else bits


def quantize(x, bits):
    """A tensor -> (whole numbers int16 [n], their step): one scale for all of it, about 0.

    HTD quantizes as HiNeRV does, per tensor, and does not say where the scale comes from. Here it has the least squared error
    of a few that let up to 70 % of the range go.
    """
    flat, half = x.detach().float().cpu().flatten(), 2 ** (width(x, bits) - 1)
    best, largest = None, flat.abs().max().item()
    for share in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3):
        step = struct.unpack("<f", struct.pack("<f", max(share * largest / (half - 1), 1e-12)))[0]
        numbers = (flat / step).round().clamp(-half, half - 1)
        error = (numbers * step - flat).square().sum().item()
        if best is None or error < best[0]:
            best = (error, numbers, step)
    return best[1].numpy().astype(np.int16), best[2]


def order(x, k, bits):
    """How entropy.pack takes the numbers of a tensor: a distribution of scale 2^(k / 4), one column."""
    return entropy.coding_order([k / 4], [width(x, bits)], [True])


def packed(network, bits):
    """The chunks of a network: the first has step and scale of each tensor, the others the tensors, in their order."""
    sides, chunks = [], []
    for x in network.stored().values():
        numbers, step = quantize(x, bits)
        k = entropy.best_scale(numbers, width(x, bits))
        sides.append(struct.pack("<fb", step, k))
        chunks.append(entropy.pack(numbers[:, None], order(x, k, bits)))
    return [b"".join(sides), *chunks]


@torch.no_grad()
def unpack(network, chunks, bits):
    """Put the tensors of packed chunks into a network. ValueError where they are not what `packed` makes."""
    stored = network.stored()
    if len(chunks) != 1 + len(stored) or any(chunk is None for chunk in chunks) or len(chunks[0]) != 5 * len(stored):
        raise ValueError("a part is damaged or missing")
    for x, (step, k), chunk in zip(stored.values(), struct.iter_unpack("<fb", chunks[0]), chunks[1:]):
        numbers = entropy.unpack(chunk, order(x, k, bits), (x.numel(), 1))
        x.copy_(torch.from_numpy(numbers).view(x.shape) * torch.tensor(step))


class FittedVideo:
    """A .nerv file of fit.py, ready to decode. Raises BadFile for what is none, or damaged.

    A network is small, and one bad number spoils all frames: nothing of a damaged file is decoded.
    """

    LARGEST, MOST = 2**25, 10**8  # pixels of a frame, parameters

    def __init__(self, path, device="cpu"):
        reader = container.Reader(path)
        header = reader.header
        try:
            (self.width, self.height), self.frames, self.rate = header["size"], header["frames"], header["rate"]
            self.method, self.bits, steps, channels = header["method"], header["bits"], header["strides"], header["channels"]
            whole = [self.width, self.height, self.frames, *steps, *channels]
            good = header["kind"] == "fit" and all(type(n) is int and n > 0 for n in whole) and self.method in METHODS
            good = good and type(self.bits) is int and 4 <= self.bits <= 8 and 0 < self.rate < 1e6 and max(steps) <= 8
            good = good and 1 <= len(steps) <= 16 and len(channels) == len(steps) + 1 and max(channels) <= 2**16
            self.plan = Plan(self.frames, self.height, self.width, steps, channels)
            good = good and self.frames <= 10**7 and self.width * self.height <= self.LARGEST
            good = good and math.prod(self.plan.padded) <= 16 * self.LARGEST
            # Counted before anything of that size is allocated; a parameter takes at least this much of a file.
            self.parameters = methods.count(METHODS[self.method], self.plan) if good else 0
        except (KeyError, TypeError, ValueError, RuntimeError):
            good = False
        if not good or self.parameters > self.MOST or self.parameters > 2**14 * reader.length:
            raise container.BadFile(path, "its header is not that of a video by this program")
        self.path, self.length = path, reader.length
        self.network = Network(METHODS[self.method], self.plan).to(device).eval().requires_grad_(False)
        try:
            unpack(self.network, [reader[i] for i in range(len(reader))], self.bits)
        except ValueError:
            raise container.BadFile(path, "it is damaged, and a network is whole or nothing") from None
        if reader.tail > 0:
            raise container.BadFile(path, f"{reader.tail} bytes follow its end")

    def __call__(self, places):
        return decoded(self.network, places)


@torch.no_grad()
def decoded(network, places):
    """Frames at places in time, real-valued, one by one: uint8 [H, W, 3] each.

    One at a time, on any machine: so a frame is to the bit the same in any company.
    """
    device = next(network.parameters()).device
    for place in places:
        yield to_frames(network(torch.tensor([float(place)], device=device)))[0]


def decode(config):
    """Write a .nerv file of fit.py as a video."""
    if not config.out:
        raise UserError("--decode takes --out, the video to write, .mp4 or .mkv")
    if config.fps < 0:
        raise UserError(f"--fps {config.fps}: it must not be negative")
    file = FittedVideo(config.decode, utils.pick_device(config.device))
    first, last = video.frame_range(config.frames, file.frames)
    ratio = (config.fps or file.rate) / file.rate
    places = np.arange(math.ceil(first * ratio - 1e-6), math.ceil(last * ratio - 1e-6)) / ratio
    places = np.minimum(places, file.frames - 1)  # after the last frame there is nothing to go by
    bar = progress.bar(file(places), "decoding", total=len(places), unit="frame")
    count = video.write_frames(config.out, (frame[None] for frame in bar), config.fps or file.rate)
    print(f"wrote {config.out}: {count} frames of {file.width} x {file.height}")


# ---------------------------------------------------------------------------------------------------------------- fitting


class Fit:
    """One method's network in training: its steps, the seconds they took, and what came of it at some of them."""

    def __init__(self, name, video, config, device):
        self.name, self.video, self.config, self.device, self.method = name, video, config, device, METHODS[name]
        try:
            self.plan = methods.plan(self.method, parameters(config.size), len(video), video.height, video.width)
        except ValueError as error:
            raise UserError(f"--size {config.size} is too small for {name}: {error}") from None
        torch.manual_seed(config.seed)
        self.network = Network(self.method, self.plan).to(device)
        self.known = torch.from_numpy(video.known).to(device)
        optimizer = torch.optim.Adam(self.network.parameters(), fused=True)
        self.update = utils.FiniteStep(self.network, optimizer, 1.0)
        self.stream = data.Stream(len(video), config.batch_size, config.seed)
        self.steps, self.seconds, self.curve, self.recent, self.rest = 0, 0.0, [], None, 0.0
        if self.method.flow:  # FFNeRV's buffer: the network's own frames, as they were when it last made them; grey at first
            shape = (len(video), *self.plan.padded, 3)
            self.own = np.memmap(tempfile.TemporaryFile(), np.uint8, "w+", shape=shape)
            self.own[:] = 128

    @property
    def encoder(self):
        """Whether codes come from the frames themselves (HNeRV, Diff-NeRV)."""
        return hasattr(self.network.encoding, "encode")

    @property
    def progress(self):
        """How much of the training is done, 0 … 1: by steps, or by the seconds that they took."""
        done = self.steps / self.config.steps if self.config.steps else self.seconds / (60 * self.config.minutes)
        return min(1.0, done)

    def step(self):
        """One step of Adam on the squared error of a few frames, each of which comes once in a pass."""
        start = time.perf_counter()
        numbers = np.array(self.stream.batch(self.steps)) % len(self.video)
        clips = self.video.clips(numbers, self.plan.padded).to(self.device) if self.encoder else None
        neighbours = self.neighbours(numbers) if self.method.flow else None
        parts = self.network.views(torch.from_numpy(numbers).to(self.device), clips, neighbours)
        real = to_clip(self.video.frames[numbers]).to(self.device)
        # HTD says nothing of the loss; papers have L2 (HNeRV) or L1 and SSIM. FFNeRV weighs own and warped frames by 0.1.
        errors = [
            (part[..., : self.plan.height, : self.plan.width] - real).square().mean(1)[:, self.known].mean() for part in parts
        ]
        (errors[0] + 0.1 * sum(errors[1:])).backward()
        if self.method.flow:
            self.own[numbers] = to_frames(parts[1])
        # "Cosine annealing learning rate and single epoch warmup" (HTD §4). Where time is what is given, it is by the clock.
        warmup = min(1.0, (self.steps + 1) * self.config.batch_size / len(self.video))
        lr = (self.config.lr or self.method.lr) * warmup * 0.5 * (1 + math.cos(math.pi * self.progress))
        self.update(errors[0], lr)
        error = errors[0].item()  # waits for a GPU
        self.steps += 1
        self.seconds += time.perf_counter() - start
        if math.isfinite(error):
            self.recent = error if self.recent is None else 0.95 * self.recent + 0.05 * error
        elif int(self.update.in_a_row) >= self.update.LIMIT:
            raise UserError(f"{self.name}: the loss is not finite, {self.update.LIMIT} steps in a row: use a smaller --lr")

    def neighbours(self, numbers):
        """Own frames around those of a step, [B, 4, 3, H, W]; black beyond the ends."""
        around = numbers[:, None] + np.array(Flow.NEIGHBOURS)
        inside = torch.from_numpy((around >= 0) & (around < len(self.video)))[:, :, None, None, None]
        frames = to_clip(self.own[around.clip(0, len(self.video) - 1)])
        return torch.where(inside, frames, torch.tensor(-1.0)).to(self.device)

    @torch.no_grad()
    def settle(self):
        """Let encoders make the codes of all frames, which is what a file has of them."""
        if self.encoder:
            for i in range(len(self.video)):
                clips = self.video.clips(np.array([i]), self.plan.padded).to(self.device)
                for codes, code in zip(self.network.encoding.stored, self.network.encoding.encode(clips)):
                    codes[i] = code[0]

    def measure(self, most=16):
        """A point of the curve: PSNR after quantization, over up to so many frames, outside the training's seconds."""
        start = time.perf_counter()
        self.settle()
        network = copy.deepcopy(self.network)
        unpack(network, packed(network, self.config.bits), self.config.bits)
        numbers = np.linspace(0, len(self.video) - 1, min(most, len(self.video))).round().astype(int)
        found = [frame_psnr(frame[None], self.video.frames[i : i + 1], self.video.known) for i, frame in
                 zip(numbers, decoded(network, numbers))]  # fmt: skip
        self.curve.append([self.steps, round(self.seconds, 2), float(np.mean(found))])
        self.rest = self.seconds + time.perf_counter() - start  # no other point before: measuring is not the longer part

    def store(self, path, bits):
        """Write the file with so many bits a parameter; returns its bytes."""
        self.settle()
        header = {"kind": "fit", "method": self.name, "size": [self.plan.width, self.plan.height]}
        header |= {"frames": len(self.video), "rate": round(self.video.rate, 4), "bits": bits}
        header |= {"strides": self.plan.strides, "channels": self.plan.channels}
        return container.write(path, header, packed(self.network, bits))

    def write(self, path):
        """Write the file, read it, and measure what it decodes to; returns the row of the report."""
        v, size, file = self.video, self.store(path, self.config.bits), FittedVideo(path, self.device)
        decibels, error, hidden = [], 0.0, []
        for i, frame in enumerate(file(range(len(v)))):
            pair = frame[None], v.frames[i : i + 1]
            decibels.append(frame_psnr(*pair, v.known)[0])
            error += np.square(frame.astype(np.float64) - v.frames[i])[v.known].mean() / len(v)
            if not v.known.all():
                hidden.append(frame_psnr(*pair, ~v.known)[0])
        row = {"method": self.name, "parameters": file.parameters, "bytes": size}
        row |= {"bits per pixel": f"{8 * size / (len(v) * v.height * v.width):.4f}", "PSNR, dB": f"{np.mean(decibels):.2f}"}
        row |= {"of all frames": f"{rd.psnr(error):.2f}", "steps": self.steps, "seconds": f"{self.seconds:.1f}"}
        return row | ({"hidden": f"{np.mean(hidden):.2f}"} if hidden else {}) | {"file": str(path)}

    def state_dict(self):
        own = {"own": torch.from_numpy(np.array(self.own))} if self.method.flow else {}
        counts = {"steps": self.steps, "seconds": self.seconds, "curve": self.curve, "recent": self.recent}
        return {"network": self.network.state_dict(), "update": self.update.state_dict(), **counts, **own}

    def load_state_dict(self, state):
        self.network.load_state_dict(state["network"])
        self.update.load_state_dict(state["update"])
        for name in ("steps", "seconds", "curve", "recent"):
            setattr(self, name, state[name])
        if self.method.flow:
            self.own[:] = state["own"].numpy()


FREE = {"minutes", "steps", "bits", "device", "out", "resume", "run_dir", "decode", "fps", "explain", "ckpt"}
MARKS = [2.0**-k for k in range(7, 0, -1)] + [0.75]  # of the training, at which a curve has points; the last one is its end


def fit(source, config):
    """Fit one network per method to the video `source`, in turns, and write one file each."""
    names = config.method.split(",")
    if wrong := [name for name in names if name not in METHODS]:
        raise UserError(f"--method {wrong[0]}: there are {', '.join(METHODS)}")
    if len(set(names)) < len(names):
        raise UserError(f"--method {config.method}: name each one once")
    if not 4 <= config.bits <= 8:
        raise UserError(f"--bits {config.bits}: it is from 4 to 8")
    if config.steps < 0 or config.lr < 0:
        raise UserError("--steps and --lr must not be negative")
    utils.check_positive(config, "batch_size", "minutes")
    parameters(config.size)
    stem = Path(config.out or Path(source).name).with_suffix("")
    outs = [Path(config.out or f"{stem}.nerv")] if len(names) == 1 else [Path(f"{stem}.{name}.nerv") for name in names]
    device, run = utils.pick_device(config.device), Path(config.run_dir)
    for path in (*outs, run / "state.pt"):
        utils.make_parent(path)
    v = Video(source, config)
    fits = [Fit(name, v, config, device) for name in names]
    about = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE}
    about |= {"video": v.fingerprint()}
    if config.resume and (run / "state.pt").is_file():
        state = checkpoints.load(run / "state.pt", "fit", "python fit.py")
        if differ := [name for name in about if state["about"].get(name) != about[name]]:
            raise UserError(
                f"{run / 'state.pt'} has another --{differ[0].replace('_', '-')}: give the same ones, or another --run-dir"
            )
        for one in fits:
            one.load_state_dict(state["fits"][one.name])
    for one in fits:
        total = sum(x.numel() for x in one.network.stored().values())
        print(f"{one.name}: {total:,} parameters, strides {one.plan.strides}, channels {one.plan.channels}"
              + (f"; going on after step {one.steps}" if one.steps else ""))  # fmt: skip

    def save():
        checkpoints.save(run / "state.pt", False, stage="fit", about=about, fits={one.name: one.state_dict() for one in fits})

    unit, each = ("step", config.steps) if config.steps else ("s", round(60 * config.minutes))
    done = [round(one.progress * each) for one in fits]
    bar = progress.bar(desc="fitting", total=each * len(fits), unit=unit, initial=sum(done))
    saved = time.monotonic()
    with utils.Interrupt() as interrupt:
        while left := [one for one in fits if one.progress < 1]:
            one = min(left, key=lambda one: one.progress)  # who has had least: so all go through the same good and bad minutes
            before = one.progress
            one.step()
            if any(before < mark <= one.progress for mark in MARKS) and one.seconds >= one.rest:
                one.measure()
            i = fits.index(one)
            bar.update(round(one.progress * each) - done[i])
            done[i] = round(one.progress * each)
            if one.recent:
                bar.set_postfix_str(f"{one.name} {10 * math.log10(4 / max(one.recent, 1e-10)):.2f} dB before quantization")
            if time.monotonic() - saved > 60:
                save()
                saved = time.monotonic()
            if interrupt.stop():
                break
        bar.close()
        for one in fits:
            if not one.curve or one.curve[-1][0] < one.steps:
                one.measure()
        save()
        if left:
            print("interrupted: --resume goes on")
        rows = [one.write(path) for one, path in zip(fits, outs)]
    report(rows, fits, v, config, run)


def report(rows, fits, v, config, run):
    """Print the table; write it to report.csv, the curves to curves.csv and curves.png."""
    print(f"\n{len(v)} frames of {v.width} x {v.height}, {config.bits} bits, seed {config.seed}; PSNR is of the files\n")
    table(list(rows[0]), [list(row.values()) for row in rows])
    points = [{"method": one.name, **dict(zip(("steps", "seconds", "PSNR"), point))} for one in fits for point in one.curve]
    for name, lines in (("report", rows), ("curves", points)):
        with open(run / f"{name}.csv", "w", newline="") as f:
            writer = csv.DictWriter(f, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
    lines = {one.name: [point[1:] for point in one.curve] for one in fits}
    plot.families(run / "curves.png", [("seconds of training", "PSNR after quantization, dB", lines)])
    print(f"\ncurves are in {run}")


# ------------------------------------------------------------------------------------------------------------- explaining


@torch.no_grad()
def explain(config):
    """Draw the contribution maps of the head layer of a network: of a file of fit.py or codec.py, or of a video by dit.pt."""
    path, device = Path(config.explain), utils.pick_device(config.device)
    edges, stride = "constant", 1
    if path.is_file() and path.open("rb").read(2) == b"PK":  # as torch's files begin
        title = f"a video generated by {path.name}"
        ckpt = checkpoints.load(path, "dit", "python dit.py")
        model, vae, scale = dit.load_dit(ckpt)
        tokens = dit.generate(
            model.to(device), torch.tensor([config.seed % len(ckpt["classes"])], device=device), seed=config.seed
        )
        tokens = vae.to(device).weight_tokens(tokens / scale)
        head, count = vae.nerv.to_rgb, vae.nerv_config.num_frames
        kernel, edges = head.kernel(tokens)[0], "replicate" if head.repeats else "constant"
        run = functools.partial(vae.nerv, tokens)
        title += " (its shared pictures are no kernels, and not in the maps)" if vae.nerv.pictures else ""
    elif container.Reader(path).header.get("kind") == "codec":
        title = f"the first tile of {path.name}, a file of codec.py"
        _, model, _ = codec.open_codec(config)
        file = videofile.VideoFile(path).fit(model, config.ckpt)
        if (numbers := file.numbers(0)) is None:
            raise container.BadFile(path, "its first chunk is damaged")
        codes, head, count = file.codes(numbers)[:1], model.decoder.layers[-1], min(model.config.num_frames, file.frames)
        kernel = head.kernel(codes.split(model.config.codes, 1)[-1])[0] if head.tokens else head.shared
        stride, run = head.stride, functools.partial(model.decoder, codes)
    else:
        file = FittedVideo(path, device)
        title, head, count = f"{path.name}, {file.method}", file.network.head, file.frames
        kernel, run = head.weight, lambda t: file.network(t)[None]

    seen = []
    head.register_forward_pre_hook(lambda module, given: seen.append(given[0]))

    def look(place):
        """(frame, what the head sees when it makes it, the head) at one place in time."""
        seen.clear()
        frame = to_frames(run(torch.tensor([float(place)], device=device)).float())[0, 0]
        return frame, seen[-1].float(), kernel.float()

    if count < 2:
        raise UserError(f"{printable(path)} has one frame, and maps are compared between neighbours")
    places = np.unique(np.linspace(0, count - 2, min(8, count - 1)).round())
    out = config.out or f"{path.stem}.xinc.png"
    utils.make_parent(out)
    figures = xinc.explain(([look(t), look(t + 1)] for t in places), out, title, edges, stride)
    print(
        f"wrote {out}: {figures['neurons']} kernels of the head layer over {len(places)} pairs of frames; "
        f"{100 * figures['near_dead']:.1f} % near-dead (below {100 * xinc.DEAD:g} % of the mean), {100 * figures['half']:.1f} "
        f"% do half of the work; their changes follow the picture's with correlation {figures['motion']:.2f}"
    )


def main():
    files = list(itertools.takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    config = utils.parse_options(Config, __doc__, argv=sys.argv[1 + len(files) :])
    if len(files) + bool(config.decode) + bool(config.explain) != 1:
        raise UserError("name one video to fit, first of all, or one file to --decode or to --explain")
    if config.decode:
        decode(config)
    elif config.explain:
        explain(config)
    else:
        fit(files[0], config)


if __name__ == "__main__":
    utils.run(main)
