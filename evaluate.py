"""How good is a checkpoint on its own data set?

python evaluate.py --ckpt vae.pt
python evaluate.py --ckpt dit.pt

Stage 1: clips of the held-out set go through the autoencoder and back:    rFVD, PSNR, SSIM, LPIPS
Stage 2: as many clips are generated as are taken of the training set:     gFVD, class agreement, diversity

Beside gFVD stand two more, of held-out clips in the place of generated ones. That of their reconstructions is what a perfect
stage 2 would have, that of the clips themselves what a perfect model would: with few clips it is far from zero. Where fewer
are held out than generated, both are too high, and their count tells. Where none are (all of UCF-101, as in the paper), rFVD is
of the middles of training videos, and the two are left out.

A clip is what training sees, at the training size. The work is cut into batches. Each is a file in --out-dir once it is done,
so that an evaluation that was stopped goes on where it was, several processes (torchrun, one for each GPU) share it, and memory
does not grow with --videos. results.json and report.html, which needs no other file, are written last.
"""

import base64
import functools
import hashlib
import html
import json
import os
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.stats import binomtest

import data
import dit
import fvd
from common import checkpoints, plot, progress, utils, video, weights
from common.utils import UserError, option
from losses import LPIPS
from vae import clips_of, decode, fine_power, load_vae, reconstruct

PSNRS = {
    "PSNR": "psnr",
    "PSNR of each clip's own time average": "still",
    "PSNR in the square": "square",
    "PSNR of the time average in the square": "still_square",
}
SHOWN = 8  # clips of each kind that are kept to be looked at


@dataclass
class Config:
    ckpt: str = option("input", "dit.pt", "checkpoint of vae.py or dit.py")
    data_dir: str = option("input", "", "where its data set is, if not where it was")
    cache_dir: str = option("input", "", "directory of caches, of features of real clips too, if not where they were")
    protocol: str = option(
        "features", "stylegan-v", "of FVD: reference to follow in resizing and statistics", choices=list(fvd.PROTOCOLS)
    )
    features: str = option("features", "i3d", "trained network, or one of random weights", choices=["i3d", "random"])
    i3d: str = option("features", "", "file with the weights; default: those that fvd.py --get-weights fetches")
    allow_other_weights: bool = option("features", False, "take a state dict that is none of the known ones")
    lpips: str = option("features", "vgg", "backbone of LPIPS", choices=["vgg", "alex", "none"])
    videos: int = option("clips", 2048, "clips of each kind, one of each video")
    refine: int = option("clips", -1, "gradient steps on the tokens of reconstructions; -1: as many as stage 2 learned from")
    square: list = option(
        "clips",
        [],
        "a mouth, say: PSNR within it too; pixels, right and bottom excluded",
        nargs=4,
        type=int,
        metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"),
    )
    seed: int = option("clips", 0, "of the choice of clips, of noise, of bootstrap and of random weights")
    steps: int = option("sampling", 20, "evaluations of the denoiser, 1 to 1000")
    sampler: str = option("sampling", "dpm", "DPM-Solver++, DDIM, or ancestral", choices=["dpm", "ddim", "ddpm"])
    guidance: float = option("sampling", 2.0, "scale of classifier-free guidance; 1 is none")
    judge_clips: int = option("result", 8192, "real clips that the judge of class agreement is trained on")
    bootstrap: int = option("result", 100, "resamples for the intervals; 0 leaves them out")
    infinity: bool = option("result", False, "extrapolate FVD to infinitely many videos")
    out_dir: str = option("output", "out/eval", "where results.json, report.html and what is done so far go")
    batch_size: int = option("machine", 8, "clips in the network at once")
    device: str = option("machine", "auto", "cpu, cuda, cuda:1, …; auto: CUDA where there is one")


# -------------------------------------------------------------------------------------------------------------- the judge


class Classifier(nn.Module):
    """A small 3D convolutional network: clips [B, T, 3, H, W] -> class scores [B, classes]."""

    def __init__(self, num_classes, width=24):
        super().__init__()
        layers, channels = [], 3
        for i, out in enumerate((width, 2 * width, 4 * width, 4 * width)):
            stride = (1, 2, 2) if i == 0 else 2
            layers += [nn.Conv3d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm3d(out), nn.GELU()]
            channels = out
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, clips):
        clips = F.interpolate(clips.transpose(1, 2), size=(clips.shape[1], 32, 32), mode="trilinear")
        return self.head(self.features(clips).mean((2, 3, 4)))


def train_classifier(train_set, num_classes, clips, device, batch_size=32, seed=0):
    """The judge of class agreement, after the given number of real clips."""
    torch.manual_seed(seed)
    judge = Classifier(num_classes).to(device)
    batch_size, steps = min(batch_size, len(train_set)), clips // batch_size
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.05)
    batches = data.endless(train_set, data.Stream(len(train_set), batch_size, seed))
    for step in progress.bar(range(steps), "judge", unit="step"):
        for group in optimizer.param_groups:
            group["lr"] = utils.learning_rate(step, steps, 3e-3, 20)
        frames, label = (x.to(device) for x in next(batches))
        loss = F.cross_entropy(judge(video.to_clip(frames)), label)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return judge.eval()


@torch.no_grad()
def classify(judge, clips):
    """The class that the judge sees in each of clips [B, T, 3, H, W] -> [B] on the CPU."""
    device = next(judge.parameters()).device
    return torch.cat([judge(batch.to(device)).argmax(1).cpu() for batch in clips.split(32)])


def agreement(judge, clips, labels):
    """Share of clips in which the judge sees the given class."""
    return (classify(judge, clips) == labels.cpu()).float().mean().item()


def load_judge(path, train_set, num_classes, config, device):
    """The judge of this evaluation, trained by the first process at the first call."""
    if utils.rank() == 0 and not path.is_file():
        judge = train_classifier(train_set, num_classes, config.judge_clips, device)
        with utils.whole_file(path) as f:
            torch.save(judge.state_dict(), f)
    utils.wait_for_all()
    judge = Classifier(num_classes)
    judge.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return judge.to(device).eval()


class Scorer:
    """Generated clips against up to `count` training clips: what studies of many small models compare them by.

    labels [count] are the classes to generate, as many of each as there are real clips. Called with clips [B, T, 3, H, W] of
    these classes, it returns (class agreement in %, Fréchet distance), and given the `reconstructed` features of the real
    clips, the distance to these as third. What stage 1 blurs is blurred in both, so that this one is about stage 2 alone: a
    perfect denoiser would be as far as two sets of real clips are apart. The features are of a random I3D, which is not the
    published FVD, or with "i3d" of the true one.
    """

    def __init__(self, train_set, num_classes, count, judge_clips=4096, device="cpu", features="random"):
        self.train_judge = functools.partial(train_classifier, train_set, num_classes, judge_clips, device)
        self.detector = fvd.load_detector(features, device=device)
        self.frames, labels = read(train_set, data.spread_over(train_set, count))
        self.real, self.labels = self.detector(self.frames), torch.as_tensor(labels, device=device)

    @functools.cached_property
    def judge(self):
        """Trained when it is asked for first: tables of stage 1 alone go without."""
        return self.train_judge()

    def __call__(self, clips, reconstructed=None):
        features = self.detector(video.to_frames(clips))
        references = [self.real] if reconstructed is None else [self.real, reconstructed]
        distances = (fvd.frechet_distance_of(reference, features) for reference in references)
        return 100 * agreement(self.judge, clips, self.labels), *distances

    def reconstructed(self, vae):
        """Features [count, 400] of the real clips after the autoencoder."""
        return self.detector(video.to_frames(reconstruct(vae, video.to_clip(self.frames), self.labels.device)))

    @torch.no_grad()
    def generate(self, model, vae, scale, seed, **sampling):
        """(clips [B, T, 3, H, W] of the labels, their tokens [B, N, d]), on the CPU."""
        tokens = dit.generate(model, self.labels, seed=seed, **sampling)
        return decode(vae, tokens / scale, torch.arange(vae.nerv_config.num_frames)), tokens.cpu()


# ----------------------------------------------------------------------------------------------------------------- frames


def frame_psnr(x, y):
    """Peak signal-to-noise ratio of each frame in dB: x, y float [..., 3, H, W] in [0, 1] -> [...]; at most 100 dB."""
    return -10 * (x - y).square().mean((-3, -2, -1)).clamp_min(1e-10).log10()


def ssim(x, y):
    """Structural similarity of each frame (Wang et al. 2004): x, y float [..., 3, H, W] in [0, 1] -> [...], float64.

    11 × 11 Gaussian window of σ = 1.5, K₁ = 0.01, K₂ = 0.03, population moments; the mean over channels and over all windows
    within the frame, as in scikit-image with gaussian_weights=True, sigma=1.5, use_sample_covariance=False. ValueError for
    frames smaller than the window.
    """
    if min(x.shape[-2:]) < 11:
        raise ValueError(f"frames of {x.shape[-2]} x {x.shape[-1]} are smaller than the window of SSIM, 11 x 11")
    x, y = x.double(), y.double()
    mean_x, mean_y = gaussian_mean(x), gaussian_mean(y)
    var_x, var_y = gaussian_mean(x * x) - mean_x**2, gaussian_mean(y * y) - mean_y**2
    cov = gaussian_mean(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * (2 * cov + c2) / (var_x + var_y + c2)).mean((-3, -2, -1))


def gaussian_mean(x):
    """Means under the window of SSIM at all of its places: [..., H, W] -> [..., H - 10, W - 10]."""
    window = torch.exp(-(torch.arange(-5.0, 6.0, dtype=torch.float64) ** 2) / (2 * 1.5**2))
    window = (window / window.sum()).tolist()
    for dim in (-2, -1):
        x = functools.reduce(torch.add, (w * x.narrow(dim, k, x.shape[dim] - 10) for k, w in enumerate(window)))
    return x


def worst_frame(clips):
    """The least fine detail (fine_power) of a frame, as a share of its clip's median: [B, T, 3, H, W] -> [B].

    A shape that dissolves for a few frames leaves next to none there. The judge, which sees the whole clip, passes it.
    """
    power = fine_power(clips)
    return power.amin(1) / power.median(1).values.clamp_min(1e-12)


# ---------------------------------------------------------------------------------------------------------------- batches


def batches(directory, kind, indices, batch_size, measure, rank, world):
    """{name: array} of all batches one behind the other; measure(indices, start) -> {name: array} of one of them.

    Batches whose file is in the directory are read from it. Each process measures every world-th one, then reads all.
    """
    parts = [indices[k : k + batch_size] for k in range(0, len(indices), batch_size)]
    paths = [directory / f"{kind}-{k:05d}.npz" for k in range(len(parts))]
    bar = progress.bar(total=len(indices), desc=kind, unit="clip", disable=rank > 0)
    with bar:
        for k, (path, part) in enumerate(zip(paths, parts)):
            if k % world == rank and not path.is_file():
                found = measure(part, k * batch_size)
                with utils.whole_file(path) as f:
                    np.savez(f, **found)
            bar.update(len(part))
    utils.wait_for_all()
    loaded = [dict(np.load(path, allow_pickle=False)) for path in paths]
    return {name: np.concatenate([arrays[name] for arrays in loaded]) for name in loaded[0]}


def read(dataset, indices):
    """uint8 frames [B, T, H, W, 3] and labels [B] of clips of a data set."""
    frames, labels = zip(*(dataset[i] for i in indices))
    return np.stack(frames), np.array(labels)


def remembered(detector, directory):
    """A detector of real clips, whose features are kept in a directory, each batch under the name of what is in it.

    They take half of an evaluation, and are the same for every checkpoint of a data set.
    """

    def features(frames, names=None):
        said = hashlib.sha256(json.dumps([detector.meta, frames.shape], sort_keys=True).encode())
        said.update(np.ascontiguousarray(frames))
        path = directory / f"{said.hexdigest()[:32]}.npy"
        if not path.is_file():
            found = detector(frames, names)
            directory.mkdir(parents=True, exist_ok=True)
            with open(path.with_suffix(f".{os.getpid()}"), "wb") as f:  # another evaluation may be at the same batch
                np.save(f, found)
            os.replace(f.name, path)
        return np.load(path, allow_pickle=False)

    return features


def reconstruct_batch(vae, dataset, detector, known, lpips, device, refine=0, square=()):
    @torch.no_grad()
    def measure(indices, start):
        real, labels = read(dataset, indices)
        clips = video.to_clip(real).to(device)
        decoded = reconstruct(vae, clips, device, batch_size=len(clips), refine=refine)
        made = video.to_frames(decoded)  # everything is measured on frames as files hold them
        x, y = (torch.as_tensor(frames).movedim(-1, -3).to(device) / 255 for frames in (real, made))
        names = [dataset.name(i) for i in indices]
        still = x.mean(1, keepdim=True).expand_as(x)  # a video that does not move: each clip's own time average
        found = {"psnr": frame_psnr(x, y), "ssim": ssim(x, y), "still": frame_psnr(x, still)}  # [B, T]
        if square:
            left, top, right, bottom = square
            cut, *others = (clip[..., top:bottom, left:right] for clip in (x, y, still))
            found |= {name: frame_psnr(cut, other) for name, other in zip(("square", "still_square"), others)}
        if lpips:
            found["lpips"] = torch.stack([lpips(2 * b[None] - 1, 2 * a[None] - 1) for a, b in zip(x, y)])
        found = {name: value.cpu().numpy() for name, value in found.items()}
        found |= {"labels": labels, "real": known(real, names), "features": detector(made, names)}
        left = max(0, SHOWN - start)
        return found | {"shown_real": real[:left], "shown": made[:left]}

    return measure


def generate_batch(model, vae, scale, dataset, detector, known, judge, config, device):
    @torch.no_grad()
    def measure(indices, start):
        real, labels = read(dataset, indices)
        wanted = torch.as_tensor(labels, device=device)
        tokens = dit.generate(model, wanted, config.steps, config.guidance, config.sampler, config.seed + start)
        decoded = vae.decode(tokens / scale, torch.arange(real.shape[1], device=device))
        made = video.to_frames(decoded)
        real_clips, clips = video.to_clip(real), video.to_clip(made)  # both as files hold them
        found = {"labels": labels, "real": known(real, [dataset.name(i) for i in indices]), "features": detector(made)}
        found |= {"worst_real": worst_frame(real_clips).numpy(), "worst": worst_frame(clips).numpy()}
        if judge:
            found |= {"seen_real": classify(judge, real_clips), "seen": classify(judge, clips)}
        left = max(0, SHOWN - start)
        return found | {"shown_real": real[:left], "shown": made[:left]}

    return measure


# ---------------------------------------------------------------------------------------------------------------- results


def mean_result(values, config, unit=""):
    """The mean over clips of values [B], with its bootstrap interval over clips."""
    rng = np.random.default_rng(config.seed)
    draws = values[rng.integers(len(values), size=(config.bootstrap, len(values)))].mean(1)
    return {"value": float(values.mean()), **quantiles(draws), "clips": len(values), "unit": unit}


def quantiles(draws):
    """The 95 % interval of bootstrap draws; none where --bootstrap 0 asks for none."""
    return dict(zip(("low", "high"), np.nanquantile(draws, [0.025, 0.975]).tolist())) if len(draws) else {}


def share_result(hits):
    """The share of hits [B], with Wilson's interval: a bootstrap of nothing but hits has none."""
    interval = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    ends = {"low": 100 * interval.low, "high": 100 * interval.high}
    return {"value": 100 * float(hits.mean()), **ends, "clips": len(hits), "unit": "%"}


def distance_result(real, made, protocol, config, paired):
    """The Fréchet distance of features [B, 400], with its bootstrap interval."""
    result = {"value": fvd.frechet_distance_of(real, made, protocol.ddof), "clips": min(len(real), len(made)), "unit": ""}
    if config.bootstrap:
        ends = fvd.bootstrap(real, made, protocol.ddof, config.bootstrap, seed=config.seed, paired=paired)
        result |= dict(zip(("low", "high"), ends))
    if config.infinity:
        result["extrapolated"] = fvd.fvd_infinity(real, made, protocol.ddof, seed=config.seed)[0]
    return result


def diversity(features, labels, weights):
    """Mean distance between features [B, d] of two different clips of the same class; clip i counts weights[i] times."""
    total = pairs = 0.0
    for label in np.unique(labels):
        x, w = features[labels == label].astype(np.float64), weights[labels == label]
        squares = np.square(x).sum(1)
        distance = np.sqrt(np.maximum(squares[:, None] + squares - 2 * x @ x.T, 0))
        pair = w[:, None] * w * (1 - np.eye(len(x)))
        total, pairs = total + (pair * distance).sum(), pairs + pair.sum()
    return total / pairs if pairs else float("nan")


def diversity_result(real, made, labels, config):
    """diversity() of generated clips as a share of that of real ones of the same classes, with its bootstrap interval."""
    rng, draws = np.random.default_rng(config.seed), []
    for k in range(config.bootstrap + 1):
        weights = np.bincount(rng.integers(len(labels), size=len(labels)), minlength=len(labels)) if k else np.ones(len(labels))
        reference = diversity(real, labels, weights)
        draws.append(100 * diversity(made, labels, weights) / reference if reference else float("nan"))
    return {"value": float(draws[0]), **quantiles(draws[1:]), "clips": len(labels), "unit": "%"}


def main(config=None, load_dit=dit.load_dit):
    config = config or utils.parse_options(Config, __doc__)
    utils.check_positive(config, "videos", "batch_size", "judge_clips")
    dit.check_steps(config.steps)
    began = time.time()
    ckpt = checkpoints.load(config.ckpt, ("vae", "dit"), "python vae.py")
    device, rank, world = utils.start_processes(config.device)
    model, stage1 = None, ckpt
    if ckpt["stage"] == "dit":
        model, vae, scale = load_dit(ckpt)
        model, stage1 = model.to(device), ckpt["vae"]
        if model.config.cond_frames:
            raise UserError(f"{config.ckpt} predicts frames: `python sample.py --predict` scores it, and this one generates")
    else:
        vae = load_vae(ckpt)
    vae.to(device).requires_grad_(False)
    settings, classes = clips_of(stage1, data_dir=config.data_dir, cache_dir=config.cache_dir), ckpt["classes"]
    if config.square:
        left, top, right, bottom = config.square
        if not (0 <= left < right <= settings.resolution and 0 <= top < bottom <= settings.resolution):
            raise UserError(f"--square {left} {top} {right} {bottom}: frames are {settings.resolution} x {settings.resolution}")
    refine = dit.refine_steps(ckpt, config.refine)
    held_out, train_set = (data.open_dataset(settings, role, classes) for role in ("test", "train"))
    shared = {path for path, _ in getattr(held_out, "items", ())} & {path for path, _ in getattr(train_set, "items", ())}
    protocol = fvd.PROTOCOLS[config.protocol]
    detector = fvd.load_detector(config.features, config.protocol, config.i3d, config.allow_other_weights, config.seed, device)
    known = remembered(detector, Path(settings.cache_dir) / "features") if settings.cache != "off" else detector
    lpips = None if config.lpips == "none" else LPIPS(config.lpips).to(device)

    # All that the batches depend on names their directory: what was measured of another checkpoint is not taken for this one's.
    key = {name: getattr(config, name) for name in ("videos", "batch_size", "seed", "lpips", "guidance", "steps", "sampler")}
    key |= detector.meta | {"networks": utils.fingerprint(nn.ModuleList([vae, *([model] if model else [])]))}
    key |= {"data": str(settings.data_dir), "refine": refine, "square": config.square, "judge_clips": config.judge_clips}
    key |= {"clips": [[each.name(i) for i in range(len(each))] for each in (held_out, train_set)], "code": utils.git_revision()}
    out = Path(config.out_dir)
    work = out / f"work-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]}"
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from None

    name, results = fvd.label(detector.meta), {}
    indices = data.spread_over(held_out, config.videos)
    if len(indices) < 2:
        raise UserError("a distance takes two held-out clips or more")
    measure = reconstruct_batch(vae, held_out, detector, known, lpips, device, refine, config.square)
    decoded = batches(work, "reconstructed", indices, config.batch_size, measure, rank, world)
    results[f"r{name}"] = distance_result(decoded["real"], decoded["features"], protocol, config, paired=True)
    for title, kind in PSNRS.items():
        if kind in decoded:
            results[title] = mean_result(decoded[kind].mean(1), config, "dB")
    results["SSIM"] = mean_result(decoded["ssim"].mean(1), config)
    if lpips:
        results[f"LPIPS ({config.lpips})"] = mean_result(decoded["lpips"], config)
    curves = [("frame of the clip", "PSNR, dB", list(enumerate(decoded["psnr"].mean(0).tolist())))]
    if model:
        judge = load_judge(work / "judge.pt", train_set, len(classes), config, device) if len(classes) > 1 else None
        indices = data.spread_over(train_set, config.videos)
        measure = generate_batch(model, vae, scale, train_set, detector, known, judge, config, device)
        made = batches(work, "generated", indices, config.batch_size, measure, rank, world)
        results[f"g{name}"] = distance_result(made["real"], made["features"], protocol, config, paired=False)
        # What no generator need be below: clips that none was trained on, real and as stage 1 has them, in the place of
        # generated ones.
        for title, kind in (("reconstructions", "features"), ("real clips", "real")) if not shared else ():
            results[f"g{name} of {title}"] = distance_result(made["real"], decoded[kind], protocol, config, paired=False)
        if judge:
            results["class agreement"] = share_result(made["seen"] == made["labels"])
            results["class agreement of the real clips"] = share_result(made["seen_real"] == made["labels"])
        limit = np.quantile(made["worst_real"], 0.01)
        results["clips with a dissolved frame"] = share_result(made["worst"] < limit)
        if np.bincount(made["labels"]).max() > 1:  # there are two of a class
            result = diversity_result(made["real"], made["features"], made["labels"], config)
            results["diversity, of that of real clips"] = result
        if len(indices) >= 16:
            points = fvd.fvd_infinity(made["real"], made["features"], protocol.ddof, seed=config.seed)[2]
            curves.append(("10,000 / n, of n clips", f"g{name}", [(1e4 / n, value) for n, value in points]))
    if rank:
        return

    about = {
        "checkpoint": config.ckpt,
        "trained": f"{ckpt['step']} steps of stage {2 if model else 1}, revision {ckpt['revision'] or 'unknown'}",
        "evaluated": f"revision {utils.git_revision() or 'unknown'}, {time.strftime('%Y-%m-%d')}, {time.time() - began:.0f} s",
        "command": "python evaluate.py " + shlex.join(sys.argv[1:]),
        "data": f"{settings.dataset} {settings.data_dir}: {len(train_set)} training videos, "
        + (f"and {len(held_out)} of them in the place of held-out ones" if shared else f"{len(held_out)} held out"),
        "clips": f"{settings.num_frames} frames of {settings.resolution} x {settings.resolution}, stride {settings.stride}, "
        "one of each video: the middle where held out, anywhere in training",
        "tokens": f"of reconstructions: refined in {refine} steps" if refine else "of reconstructions: as encoded",
        "features": f"{detector.meta['features']}, protocol {config.protocol}{fvd.loops(settings.num_frames)}",
    }
    if lpips:
        about["LPIPS"] = weights.title(f"lpips-{config.lpips}")
    if model:
        about["sampling"] = f"{config.sampler}, {config.steps} steps, guidance {config.guidance}, seed {config.seed}"
    skipped = getattr(held_out, "skipped", {}) | getattr(train_set, "skipped", {})
    with open(out / "results.json", "w") as f:
        json.dump({"results": results, "about": about, "skipped": skipped}, f, indent=1)
    shown = {"real": decoded["shown_real"], "reconstructed": decoded["shown"]}
    if model:
        shown |= {"a training clip": made["shown_real"], "generated, of its class": made["shown"]}
    write_report(out / "report.html", results, about, skipped, curves, shown)
    print(f"\n{about['features']}")
    for title, r in results.items():
        print(f"{title:<45} {shown_value(r):<14} {interval(r):<24} {r['clips']} clips")
    print(f"{len(skipped)} videos skipped; wrote {out / 'results.json'} and {out / 'report.html'}")


# ----------------------------------------------------------------------------------------------------------------- report


def shown_value(r):
    text = f"{r['value']:.4g} {r['unit']}".strip()
    return text + (f" (at infinitely many clips: {r['extrapolated']:.4g})" if "extrapolated" in r else "")


def interval(r):
    return f"{r['low']:.4g} to {r['high']:.4g}" if "low" in r else ""


STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 900px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .25em .9em .25em 0; text-align: left; vertical-align: top }
th { border-bottom: 1px solid #999 } figure { display: inline-block; margin: 0 .6em .6em 0; text-align: center; color: #666 }
video { display: block; width: 200px; image-rendering: pixelated } code { overflow-wrap: anywhere }"""


def write_report(path, results, about, skipped, curves, shown):
    """One page with everything in it: table, plots, and videos that play side by side."""

    def encoded(file):
        return base64.b64encode(Path(file).read_bytes()).decode()

    rows = "".join(
        f"<tr><td>{html.escape(title)}</td><td>{html.escape(shown_value(r))}</td><td>{interval(r)}</td>"
        f"<td>{r['clips']}</td></tr>\n"
        for title, r in results.items()
    )
    with tempfile.TemporaryDirectory() as directory:
        plot.curves(f"{directory}/plot.png", curves)
        picture, rails = encoded(f"{directory}/plot.png"), []
        for i in range(max(len(frames) for frames in shown.values())):
            for title, frames in shown.items():
                if i < len(frames):
                    video.write_video(f"{directory}/clip", video.to_clip(frames[i]), fps=8)
                    source = f"data:video/mp4;base64,{encoded(f'{directory}/clip.mp4')}"
                    rails.append(
                        f'<figure><video autoplay loop muted playsinline src="{source}"></video>{html.escape(title)}</figure>'
                    )
            rails.append("<br>\n")
    facts = "".join(
        f"<tr><td>{html.escape(name)}</td><td><code>{html.escape(str(value))}</code></td></tr>\n"
        for name, value in about.items()
    )
    left_out = "".join(f"<li>{html.escape(f'{name}: {reason}')}</li>\n" for name, reason in skipped.items())
    alt = "; ".join(f"{y} against {x}" for x, y, _ in curves)
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(about["checkpoint"])}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(about["checkpoint"])}</h1>
<table><tr><th>metric</th><th>value</th><th>95 % interval (bootstrap over clips; Wilson for shares)</th><th>clips</th></tr>
{rows}</table>
<p><img alt="{html.escape(alt)}" src="data:image/png;base64,{picture}"></p>
{"".join(rails)}
<table>{facts}</table>
<p>{len(skipped)} videos skipped</p><ul>{left_out}</ul></body></html>
"""
    Path(path).write_text(page)


if __name__ == "__main__":
    utils.run(main)
