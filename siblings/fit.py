"""One network per video: the NeRV family and RNeRV, fitted side by side in equal time, and compressed.

video --one network per method, Adam on its frames--> weights --quantize, entropy code--> video.nerv --decode--> frames

python -m siblings.fit video.mp4 --method rnerv --size 1.5M --minutes 10     writes video.nerv, a report and curves
python -m siblings.fit video.mp4 --method nerv,enerv,hnerv,plain,ffnerv,hinerv,diffnerv,rnerv --resize 160x320
python -m siblings.fit --decode video.nerv --out again.mp4 --fps 60
python -m siblings.fit --explain video.nerv                                  XINC contribution maps; of dit.pt too
python -m siblings.fit --explain clips.nerv --ckpt codec.pt                  … of codec.py's files, between chunks

The methods are the rows of a table in methods.py, compared as in "How to Design and Train Your Implicit Neural Representation
for Video Compression" (below: HTD). docs/codec.md describes the file format ("The file").
"""

import copy
import csv
import functools
import itertools
import math
import re
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.flop_counter import FlopCounterMode

import data
import dit
import extras
from common import checkpoints, utils
from common.utils import UserError, option
from common.video import printable, to_clip, to_frames, write_frames
from siblings import codec, container, methods, rd, xinc
from siblings.components import Flow
from siblings.fitted import MOST, FittedVideo, decoded, packed, unpack
from siblings.frames import check_target, frame_range, join, read_video
from siblings.methods import ALL, METHODS, Network
from siblings.results import families, table
from siblings.videofile import VideoFile


@dataclass
class Config:
    method: str = option("network", "rnerv", f"one, or several separated by commas: {', '.join(METHODS)}")
    size: str = option("network", "1.5M", "parameters, without codes of frames: 300k, 1.5M, 3M, …; sets the widths")
    bits: int = option("network", 8, "bits per stored parameter, 4 to 8")
    minutes: float = option("training", 10.0, "training time per method, in turns; on a CPU, minutes of CPU time")
    steps: int = option("training", 0, "steps per method, instead of --minutes: makes the file reproducible")
    lr: float = option("training", 0.0, "peak learning rate of Adam; 0: each method's own")
    seed: int = option("training", 0, "of weights and of the order of frames")
    frames: str = option("video", "", "range of frames, end excluded, as in 100:140; default: all")
    resize: str = option("video", "", "fit the video at this height and width, as in 160x320, cropped to that shape")
    decode: str = option("instead", "", "a .nerv file to decode into the video --out", metavar="FILE")
    fps: float = option("instead", 0.0, "frames per second of --decode; 0: those of the video")
    explain: str = option("instead", "", "a .nerv file or a dit.pt: draw what each kernel adds to each pixel", metavar="FILE")
    ckpt: str = option("instead", "codec.pt", "the model, to --explain a file of `siblings.codec`")
    device: str = option("machine", "auto", "cpu, cuda, cuda:1, …; auto: CUDA if available")
    out: str = option("output", "", "output file; default: the video's name with .nerv, or .METHOD.nerv for several")
    resume: bool = option("output", False, "continue from the state in --run-dir if it exists, as if never stopped")
    run_dir: str = option("output", "runs/fit", "directory of report.csv, curves.csv, curves.png and the training state")


class Video:
    """The video to fit: frames uint8 [T, H, W, 3] and their rate."""

    def __init__(self, path, config):
        frames, self.rate = read_video(path)
        first, last = frame_range(config.frames, len(frames))
        self.frames = resized(frames[first:last], config.resize) if config.resize else frames[first:last]
        _, self.height, self.width, _ = self.frames.shape

    def __len__(self):
        return len(self.frames)

    def clip(self, number, padded):
        """Encoder input for a frame: [1, 3, 3, H, W] in [0, 1], the previous frame, itself and the next."""
        clip = to_clip(self.frames[np.arange(number - 1, number + 2).clip(0, len(self) - 1)]) / 2 + 0.5
        return F.pad(clip, (0, padded[1] - self.width, 0, padded[0] - self.height), "replicate")[None]


def resized(frames, text):
    """Frames uint8 [T, H, W, 3], centre-cropped to the aspect ratio of "160x320" and scaled to it, bicubic."""
    if not (found := re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", text)):
        raise UserError(f"--resize {text}: give height and width in pixels, as in 160x320")
    size = int(found[2]), int(found[1])
    return np.stack([ImageOps.fit(Image.fromarray(frame), size, Image.Resampling.BICUBIC) for frame in frames])


def parameters(text):
    """ "1.5M" -> 1500000.0."""
    found = re.fullmatch(r"(\d*\.?\d+)([kM]?)", text)
    number = float(found[1]) * {"": 1, "k": 1e3, "M": 1e6}[found[2]] if found else 0
    if not 100 <= number <= MOST:
        raise UserError(f"--size {text}: a number of parameters from 100 to {MOST / 1e6:.0f}M, such as 300k or 1.5M")
    return number


def squared_error(frame, real):
    """Mean over a frame, both uint8 [H, W, 3]."""
    return np.square(frame.astype(np.float64) - real).mean()


def decode(config):
    """Write a .nerv file as a video."""
    if not config.out or config.fps < 0:
        raise UserError("--decode needs --out, the video to write (.mp4 or .mkv), and an --fps of at least 0")
    check_target(config.out, config.decode)
    file = FittedVideo(config.decode, utils.pick_device(config.device))
    first, last = frame_range(config.frames, file.frames)
    ratio = (config.fps or file.rate) / file.rate
    places = np.arange(math.ceil(first * ratio - 1e-6), math.ceil(last * ratio - 1e-6)) / ratio
    places = np.minimum(places, file.frames - 1)  # nothing to interpolate after the last frame
    bar = utils.bar(decoded(file.network, places), "decoding", total=len(places), unit="frame")
    count = write_frames(config.out, (frame[None] for frame in bar), config.fps or file.rate)
    print(f"wrote {config.out}: {count} frames of {file.width} x {file.height}")


# ---------------------------------------------------------------------------------------------------------------- fitting


class Fit:
    """One method's network in training: its steps, the seconds they took, and points of its curve."""

    def __init__(self, name, video, config, device):
        self.name, self.video, self.config, self.device, self.method = name, video, config, device, ALL[name]
        try:
            self.plan = methods.plan(self.method, parameters(config.size), len(video), video.height, video.width)
        except ValueError as error:
            raise UserError(f"--size {config.size} is too small for {name}: {error}") from None
        torch.manual_seed(config.seed)
        self.network = Network(self.method, self.plan).to(device)
        self.update = utils.FiniteStep(self.network, torch.optim.Adam(self.network.parameters(), fused=True))
        self.stream = data.Stream(len(video), 1, config.seed)
        self.steps, self.seconds, self.curve, self.recent = 0, 0.0, [], None
        self.encoder = hasattr(self.network.encoding, "encode")  # whether codes are computed from the frames
        if self.method.flow:  # FFNeRV's buffer of the network's own frames, as last decoded; grey at first
            self.own = np.full((len(video), *self.plan.padded, 3), 128, np.uint8)

    @property
    def progress(self):
        """Fraction of the training done, 0 … 1: by steps, or by the seconds they took."""
        done = self.steps / self.config.steps if self.config.steps else self.seconds / (60 * self.config.minutes)
        return min(1.0, done)

    def forward(self, number):
        """All outputs of the network for a frame, each [1, 3, H, W], and the squared error of each."""
        clip = self.video.clip(number, self.plan.padded).to(self.device) if self.encoder else None
        neighbours = self.neighbours(number) if self.method.flow else None
        parts = self.network.views(torch.tensor([number], device=self.device), clip, neighbours)
        real = to_clip(self.video.frames[number]).to(self.device)
        return parts, [(part[0, :, : self.plan.height, : self.plan.width] - real).square().mean() for part in parts]

    def flops(self):
        """Floating-point operations of a training step, forward and backward: its cost on any machine."""
        with FlopCounterMode(display=False) as counter:
            sum(self.forward(0)[1]).backward()
        self.update.optimizer.zero_grad(set_to_none=True)
        return counter.get_total_flops()

    def step(self):
        """One step of Adam on the squared error of a frame; each frame occurs once per epoch."""
        clock = time.thread_time if self.device.type == "cpu" else time.perf_counter  # exclude other load on the machine
        start = clock()
        number = self.stream.batch(self.steps)[0] % len(self.video)
        parts, errors = self.forward(number)
        # HTD does not state the loss; papers use L2 (HNeRV) or L1 and SSIM. FFNeRV weights own and warped frames by 0.1.
        (errors[0] + 0.1 * sum(errors[1:])).backward()
        if self.method.flow:
            self.own[number] = to_frames(parts[1])[0]
        # "Cosine annealing learning rate and single epoch warmup" (HTD §4). With a time budget, the schedule follows the clock.
        warmup = min(1.0, (self.steps + 1) / len(self.video))
        self.update(errors[0], (self.config.lr or self.method.lr) * warmup * 0.5 * (1 + math.cos(math.pi * self.progress)))
        error = errors[0].item()  # waits for a GPU
        self.steps += 1
        self.seconds += clock() - start
        if math.isfinite(error):
            self.recent = error if self.recent is None else 0.95 * self.recent + 0.05 * error
        else:
            raise UserError(f"{self.name}: the loss is not finite: use a smaller --lr")

    def neighbours(self, number):
        """Own frames around that of a step, [1, 4, 3, H, W]; black beyond the ends."""
        around = number + np.array(Flow.NEIGHBOURS)
        frames = to_clip(self.own[around.clip(0, len(self.video) - 1)])
        frames[(around < 0) | (around >= len(self.video))] = -1
        return frames[None].to(self.device)

    @torch.no_grad()
    def settle(self):
        """Let encoders compute the codes of all frames, for the file to store."""
        for i in range(len(self.video) if self.encoder else 0):
            clip = self.video.clip(i, self.plan.padded).to(self.device)
            for name, code in zip(self.network.encoding.stored, self.network.encoding.encode(clip)):
                getattr(self.network.encoding, name)[i] = code[0]

    def measure(self, most=16):
        """A point of the curve: PSNR after quantization, over at most `most` frames, not counted in the training's seconds."""
        self.settle()
        network = copy.deepcopy(self.network)
        unpack(network, packed(network, self.config.bits), self.config.bits)
        numbers = np.linspace(0, len(self.video) - 1, min(most, len(self.video))).round().astype(int)
        found = [rd.psnr(squared_error(*pair)) for pair in zip(decoded(network, numbers), self.video.frames[numbers])]
        self.curve.append([self.steps, round(self.seconds, 2), float(np.mean(found))])

    def store(self, path, bits):
        """Write the file with `bits` bits per parameter; return its size in bytes."""
        self.settle()
        header = {"kind": "fit", "method": self.name, "size": [self.plan.width, self.plan.height]}
        header |= {"frames": len(self.video), "rate": round(self.video.rate, 4), "bits": bits}
        header |= {"strides": self.plan.strides, "channels": self.plan.channels}
        return container.write(path, header, packed(self.network, bits))

    def write(self, path):
        """Write the file, read it, and measure the decoded video; return the row of the report."""
        v, size, file = self.video, self.store(path, self.config.bits), FittedVideo(path, self.device)
        errors = [squared_error(*pair) for pair in zip(decoded(file.network, range(len(v))), v.frames)]
        row = {"method": self.name, "parameters": file.parameters, "bytes": size}
        row |= {"bits per pixel": f"{8 * size / (len(v) * v.height * v.width):.4f}"}
        row |= {"PSNR, dB": f"{np.mean([rd.psnr(error) for error in errors]):.2f}"}
        row |= {"of all frames": f"{rd.psnr(np.mean(errors)):.2f}", "GFLOP a step": f"{self.flops() / 1e9:.1f}"}
        return row | {"steps": self.steps, "seconds": f"{self.seconds:.1f}", "file": str(path)}

    def state_dict(self):
        own = {"own": torch.from_numpy(self.own)} if self.method.flow else {}
        counts = {"steps": self.steps, "seconds": self.seconds, "curve": self.curve, "recent": self.recent}
        return {"network": self.network, "update": self.update, **counts, **own}  # made plain when it is saved

    def load_state_dict(self, state):
        self.network.load_state_dict(state["network"])
        self.update.load_state_dict(state["update"])
        self.steps, self.seconds, self.curve, self.recent = (state[k] for k in ("steps", "seconds", "curve", "recent"))
        if self.method.flow:
            self.own[:] = state["own"].numpy()


SAME = ("method", "size", "lr", "seed", "frames", "resize")  # must be equal to resume a training
MARKS = [2.0**-k for k in range(7, 0, -1)] + [0.75]  # fractions of the training at which a curve has points; the end is another


def fit(source, config):
    """Fit one network per method to the video `source`, in turns, and write one file each."""
    names = config.method.split(",")
    if wrong := [name for name in names if name not in ALL or names.count(name) > 1]:
        raise UserError(f"--method {wrong[0]}: choose from {', '.join(ALL)}, each at most once")
    if not 4 <= config.bits <= 8:
        raise UserError(f"--bits {config.bits}: must be from 4 to 8")
    utils.check_positive(config, "minutes")
    stem, run = Path(config.out or Path(source).name).with_suffix(""), Path(config.run_dir)
    outs = [Path(config.out or f"{stem}.nerv")] if len(names) == 1 else [Path(f"{stem}.{name}.nerv") for name in names]
    for path in (*outs, *(run / name for name in ("state.pt", "report.csv", "curves.csv", "curves.png"))):
        check_target(path, source)
    device, v = utils.pick_device(config.device), Video(source, config)
    fits = [Fit(name, v, config, device) for name in names]
    about = {name: getattr(config, name) for name in SAME}
    about["video"] = [*v.frames.shape, zlib.crc32(v.frames[:: max(1, len(v) // 8)].tobytes())]
    if config.resume and (run / "state.pt").is_file():
        state = checkpoints.load(run / "state.pt", "fit", "python -m siblings.fit")
        if differ := [name for name in about if state["about"].get(name) != about[name]]:
            raise UserError(f"{run / 'state.pt'} has another --{differ[0]}: use the same value, or another --run-dir")
        for one in fits:
            one.load_state_dict(state["fits"][one.name])
    for one in fits:
        size, going = methods.count(one.method, one.plan), f"; resuming after step {one.steps}" if one.steps else ""
        print(f"{one.name}: {size:,} parameters, strides {one.plan.strides}, channels {one.plan.channels}{going}")

    def save():
        checkpoints.save(run / "state.pt", stage="fit", about=about, fits={one.name: one for one in fits})

    saved = time.monotonic()
    with utils.Interrupt() as interrupt, utils.bar(desc="fitting", total=100, unit="%") as bar:
        while (left := [one for one in fits if one.progress < 1]) and not interrupt.stop():
            one = min(left, key=lambda one: one.progress)  # the one least trained: all share the noise of the machine
            before = one.progress
            one.step()
            if any(before < mark <= one.progress for mark in MARKS):
                one.measure()
            bar.update(int(100 * np.mean([one.progress for one in fits])) - bar.n)
            if one.recent:
                bar.set_postfix_str(f"{one.name} {10 * math.log10(4 / max(one.recent, 1e-10)):.2f} dB before quantization")
            if time.monotonic() - saved > 60:
                save()
                saved = time.monotonic()
        for one in fits:
            if not one.curve or one.curve[-1][0] < one.steps:
                one.measure()
        save()
        rows = [one.write(path) for one, path in zip(fits, outs)]
    if left:
        print("interrupted: --resume continues")
    print(f"\n{len(v)} frames of {v.width} x {v.height}, {config.bits} bits, seed {config.seed}; PSNR of the decoded files\n")
    table(list(rows[0]), [list(row.values()) for row in rows])
    points = [{"method": one.name, **dict(zip(("steps", "seconds", "PSNR"), point))} for one in fits for point in one.curve]
    for name, lines in (("report", rows), ("curves", points)):
        with open(run / f"{name}.csv", "w", newline="") as f:
            writer = csv.DictWriter(f, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
    panels = []
    for k, what in ((1, "seconds of training"), (0, "steps of training")):
        panels.append((what, "PSNR after quantization, dB", {one.name: [(p[k], p[2]) for p in one.curve] for one in fits}))
    families(run / "curves.png", panels)
    print(f"\ncurves: {run}")


# ------------------------------------------------------------------------------------------------------------- explaining


def last_layer(path, seed, device):
    """Input of XINC: (title, the head, its kernel [3, in, k, k], edges, frames, t [1] -> [1, 1, 3, H, W])."""
    if path.is_file() and path.open("rb").read(2) == b"PK":  # the first bytes of torch's files
        ckpt = checkpoints.load(path, "dit", "python dit.py")
        model, vae, latent_map = (part.to(device) for part in dit.load_dit(ckpt))
        labels = torch.tensor([seed % len(ckpt["classes"])], device=device)
        tokens = latent_map.inverse(dit.generate(model, labels, seed=seed))
        chosen = extras.parse(ckpt["vae"]["config"]["extras"], extras.VAE)
        head = vae.nerv.nerv.to_rgb if "basis" in chosen else vae.nerv.to_rgb
        title = f"a video generated by {path.name}" + (", without its shared basis" if "basis" in chosen else "")
        edges = "replicate" if {"edges", "filter"} & chosen.keys() else "constant"
        return title, head, head.kernel(tokens)[0], edges, vae.nerv_config.num_frames, functools.partial(vae.nerv, tokens)
    file = FittedVideo(path, device)
    head = file.network.head
    return f"{path.name}, {file.method}", head, head.weight, "constant", file.frames, lambda t: file.network(t)[None]


def chunks_of(path, ckpt, device):
    """The intact chunks of a file of codec.py, for xinc.explain_cuts."""
    model, _ = codec.open_codec(ckpt, device)
    file, head, seen, T = VideoFile(path, model, ckpt), model.decoder.layers[-1], [], model.config.num_frames
    head.register_forward_pre_hook(lambda module, given: seen.append(given))

    def look(number, chunk):
        seen.clear()
        t, codes = torch.tensor([float(number)], device=device), file.codes(file.numbers(chunk))
        tiles = torch.cat([model.decoder(code, t) for code in codes.split(1)])  # [tiles, 1, 3, R, R]
        maps = torch.cat([xinc.painted(x, head.kernel(code)[0], head.stride) for x, code in seen])[:, None, None]
        frame, total = (join(x, file.height, file.width)[0] for x in (tiles, maps))
        return to_frames(frame[None])[0], total[0].cpu().numpy()

    return [(T, functools.partial(look, chunk=k)) for k in range(file.frames // T)]


@torch.no_grad()
def explain(config):
    """Draw the contribution maps of the last layer of a .nerv file, or of a video that a dit.pt generates."""
    path, device, seen = Path(config.explain), utils.pick_device(config.device), []
    out = config.out or f"{path.stem}.xinc.png"
    check_target(out, path)
    if path.suffix == ".nerv" and container.Reader(path).header.get("kind") == "codec":
        chunks = chunks_of(path, config.ckpt, device)[:9]
        if len(chunks) < 2:
            raise UserError(f"{printable(path)} has one chunk, but maps are compared between chunks")
        figures = xinc.explain_cuts(chunks, out, path.name)
        print(f"wrote {out}: {len(chunks) - 1} cuts between chunks\n")
        rows = [[name, *(f"{value:.3f}" for value in found.values())] for name, found in figures.items()]
        return table(["frames", "share that changes", "correlation with the picture", "in still pixels"], rows)
    title, head, kernel, edges, count, run = last_layer(path, config.seed, device)
    head.register_forward_pre_hook(lambda module, given: seen.append(given[0]))

    def look(place):
        """(frame, input of the head, the head's kernel) at one time."""
        frame = to_frames(run(torch.tensor([float(place)], device=device)).float())[0, 0]
        return frame, seen[-1].float(), kernel.float()

    if count < 2:
        raise UserError(f"{printable(path)} has one frame, but maps are compared between neighbours")
    places = np.unique(np.linspace(0, count - 2, min(8, count - 1)).round())
    figures = xinc.explain(([look(t), look(t + 1)] for t in places), out, title, edges)
    print(
        f"wrote {out}: {figures['neurons']} kernels of the head layer over {len(places)} pairs of frames; "
        f"{100 * figures['near_dead']:.1f} % near-dead (below {100 * xinc.DEAD:g} % of the mean), {100 * figures['half']:.1f} "
        f"% do half of the work; their changes follow the picture's with correlation {figures['motion']:.2f}"
    )


def main():
    files = list(itertools.takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    config = utils.parse_options(Config, __doc__, argv=sys.argv[1 + len(files) :])
    if len(files) + bool(config.decode) + bool(config.explain) != 1:
        raise UserError("give one video to fit as the first argument, or one file to --decode or --explain")
    if files:
        fit(files[0], config)
    else:
        decode(config) if config.decode else explain(config)


if __name__ == "__main__":
    utils.run(main)
