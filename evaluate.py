"""How good is a checkpoint on its own data set?

python evaluate.py --ckpt vae.pt
python evaluate.py --ckpt dit.pt

Stage 1: clips of the held-out set go through the autoencoder and back:    rFVD, PSNR, SSIM, LPIPS
Stage 2: as many clips are generated as are taken of the training set:     gFVD, classifier accuracy, blurred frames, diversity

Beside gFVD stand two distances of held-out clips in the place of generated ones: of their reconstructions, as a perfect stage 2
would have, and of the clips themselves, as a perfect model would; both are too high where few clips are held out. Where none
are (all of UCF-101), rFVD is of training videos, and both are left out. Several processes (torchrun) share the work.
"""

import base64
import functools
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
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from pytorch_msssim import ssim
from scipy.spatial.distance import cdist
from scipy.stats import binomtest

import data
import dit
import fvd
from common import checkpoints, plot, utils, video
from common.layouts import same_file
from common.utils import UserError, option
from losses import LPIPS
from vae import clips_of, decode, load_vae, reconstruct

BATCH = 8  # clips in the networks at once; the first batch is shown, and each has a seed of its own


@dataclass
class Config:
    ckpt: str = option("input", "dit.pt", "checkpoint of vae.py or dit.py")
    data_dir: str = option("input", "", "where its data set is, if not where it was")
    protocol: str = option("features", "stylegan-v", "of FVD: reference to follow", choices=list(fvd.PROTOCOLS))
    features: str = option("features", "i3d", "trained network, or one of random weights", choices=["i3d", "random"])
    lpips: str = option("features", "vgg", "backbone of LPIPS", choices=["vgg", "alex", "none"])
    videos: int = option("clips", 2048, "clips of each kind, one of each video")
    seed: int = option("clips", 0, "of noise, of bootstrap and of random weights")
    steps: int = option("sampling", 20, "evaluations of the denoiser, 1 to 1000")
    sampler: str = option("sampling", "dpm", "DPM-Solver++, DDIM, or ancestral", choices=["dpm", "ddim", "ddpm"])
    guidance: float = option("sampling", 2.0, "scale of classifier-free guidance; 1 is none")
    judge_clips: int = option("result", 8192, "real clips that train the classifier")
    bootstrap: int = option("result", 100, "resamples for the intervals; 0 leaves them out")
    out_dir: str = option("output", "out/eval", "where results.json and report.html go")
    device: str = option("machine", "auto", "cpu, cuda, cuda:1, …; auto: CUDA where there is one")


class Classifier(nn.Module):
    """A small 3D convolutional network: clips [B, T, 3, H, W] -> class scores [B, classes]."""

    def __init__(self, num_classes):
        super().__init__()
        layers, widths = [], (3, 24, 48, 96, 96)
        for i, (channels, out) in enumerate(zip(widths, widths[1:])):
            layers += [nn.Conv3d(channels, out, 3, 2 if i else (1, 2, 2), 1, bias=False), nn.BatchNorm3d(out), nn.GELU()]
        self.features, self.head = nn.Sequential(*layers), nn.Linear(96, num_classes)

    def forward(self, clips):
        clips = F.interpolate(clips.transpose(1, 2), size=(clips.shape[1], 32, 32), mode="trilinear")
        return self.head(self.features(clips).mean((2, 3, 4)))


def train_classifier(train_set, num_classes, clips, device, batch_size=32, seed=0):
    """A Classifier after so many real clips, and at least one step."""
    torch.manual_seed(seed)
    classifier, batch_size = Classifier(num_classes).to(device), min(batch_size, len(train_set))
    steps = max(1, clips // batch_size)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
    batches = data.endless(train_set, data.Stream(len(train_set), batch_size, seed))
    for step in utils.bar(range(steps), "classifier", unit="step"):
        optimizer.param_groups[0]["lr"] = utils.learning_rate(step, steps, 3e-3, 20)
        frames, label = (x.to(device) for x in next(batches))
        optimizer.zero_grad()
        F.cross_entropy(classifier(video.to_clip(frames)), label).backward()
        optimizer.step()
    return classifier.eval()


@torch.no_grad()
def classify(classifier, clips):
    """The class that the classifier predicts for each of clips [B, T, 3, H, W] -> [B] on the CPU."""
    return torch.cat([classifier(batch.to(classifier.head.weight.device)).argmax(1).cpu() for batch in clips.split(32)])


def accuracy(classifier, clips, labels):
    """Share of clips whose predicted class is the given one."""
    return (classify(classifier, clips) == labels.cpu()).float().mean().item()


def frame_psnr(x, y):
    """Peak signal-to-noise ratio of each frame in dB: x, y float [..., 3, H, W] in [0, 1] -> [...]; at most 100 dB."""
    return -10 * (x - y).square().mean((-3, -2, -1)).clamp_min(1e-10).log10()


def fine_power(frames):
    """Power above a quarter cycle per pixel, which blur removes: the mean of each frame, [..., 3, H, W] -> [...]."""
    power = torch.fft.fft2(frames, norm="ortho").abs().square()
    frequency = torch.fft.fftfreq(frames.shape[-1], device=frames.device)
    return power[..., torch.hypot(frequency[:, None], frequency[None, :]) > 0.25].mean((-2, -1))


def worst_frame(clips):
    """The least fine_power of a frame, as a share of its clip's median: [B, T, 3, H, W] -> [B]. It finds shapes that
    are blurred for a few frames, which does not change the class of the whole clip."""
    power = fine_power(clips)
    return power.amin(1) / power.median(1).values.clamp_min(1e-12)


def over_processes(kind, indices, measure):
    """{name: array} of all clips: measure(indices, start) -> {name: array} of each batch, every world-th in this process."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    starts, parts = range(0, len(indices), BATCH), [None] * world
    mine = utils.bar(starts[utils.rank() :: world], kind, unit="batch", disable=utils.rank() > 0)
    parts[0] = {start: measure(indices[start : start + BATCH], start) for start in mine}
    if world > 1:
        dist.all_gather_object(parts, parts[0])
    found = {start: batch for part in parts for start, batch in part.items()}
    return {name: np.concatenate([found[start][name] for start in starts]) for name in found[0]}


@torch.no_grad()
def reconstructed(vae, dataset, detector, lpips, device, indices, start):
    """Real clips and what stage 1 makes of them, measured on frames as files hold them."""
    clips, _ = data.clips(dataset, indices)
    real, made = video.to_frames(clips), video.to_frames(reconstruct(vae, clips, device))
    x, y = (torch.as_tensor(frames).movedim(-1, -3).to(device) / 255 for frames in (real, made))
    still = x.mean(1, keepdim=True).expand_as(x)  # a video that does not move: each clip's own time average
    similarity = ssim(x.flatten(0, 1).double(), y.flatten(0, 1).double(), data_range=1, size_average=False)
    found = {"psnr": frame_psnr(x, y), "still": frame_psnr(x, still), "ssim": similarity.unflatten(0, x.shape[:2])}  # [B, T]
    if lpips:
        found["lpips"] = torch.stack([lpips(2 * b[None] - 1, 2 * a[None] - 1) for a, b in zip(x, y)])
    shown = {"shown_real": real[: 0 if start else BATCH], "shown": made[: 0 if start else BATCH]}
    return shown | {name: x.cpu().numpy() for name, x in found.items()} | {"real": detector(real), "features": detector(made)}


@torch.no_grad()
def generated(model, vae, latent_map, dataset, detector, classifier, config, device, indices, start):
    """Training clips, and as many that are generated of the same classes."""
    clips, labels = data.clips(dataset, indices)
    latents = dit.generate(model, labels.to(device), config.steps, config.guidance, config.sampler, config.seed + start)
    made = video.to_frames(decode(vae, latent_map.inverse(latents), torch.arange(clips.shape[1])))
    found = {"labels": labels.numpy(), "shown_real": video.to_frames(clips)[: 0 if start else BATCH]}
    found |= {"shown": made[: 0 if start else BATCH], "real": detector(video.to_frames(clips)), "features": detector(made)}
    for name, x in (("_real", clips), ("", video.to_clip(made))):  # both as files hold them
        found["worst" + name] = worst_frame(x).numpy()
        if classifier:
            found["seen" + name] = classify(classifier, x).numpy()
    return found


def result(statistic, clips, config, unit=""):
    """statistic(numbers of the clips), with its bootstrap interval over clips."""
    rng = np.random.default_rng(config.seed % 2**64)
    draws = [statistic(rng.integers(clips, size=clips)) for _ in range(config.bootstrap)]
    ends = np.nanquantile(draws, [0.025, 0.975]).tolist() if draws else ()
    return {"value": float(statistic(np.arange(clips))), **dict(zip(("low", "high"), ends)), "clips": clips, "unit": unit}


def mean_result(values, config, unit=""):
    """The mean over clips of values [B, …]."""
    return result(lambda i: values[i].mean(), len(values), config, unit)


def share_result(hits):
    """The share of hits [B], with Wilson's interval: a bootstrap of nothing but hits has none."""
    low, high = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return {"value": 100 * float(hits.mean()), "low": 100 * low, "high": 100 * high, "clips": len(hits), "unit": "%"}


def distance_result(real, made, ddof, config, paired=False):
    """The Fréchet distance of features [B, 400], with its bootstrap interval."""
    result = {"value": fvd.frechet_distance_of(real, made, ddof), "clips": min(len(real), len(made)), "unit": ""}
    ends = fvd.bootstrap(real, made, ddof, config.bootstrap, config.seed, paired) if config.bootstrap > 0 else ()
    return result | dict(zip(("low", "high"), ends))


def diversity_result(made, config):
    """Mean distance of features of two different generated clips of a class, as a share of that of real ones."""
    labels = made["labels"]

    def mean_distance(features, weights):
        total = pairs = 0.0
        for label in np.unique(labels):
            x, w = features[labels == label], weights[labels == label]
            pair = np.outer(w, w) * (1 - np.eye(len(w)))  # a clip that is drawn twice has no distance to itself
            total, pairs = total + (pair * cdist(x, x)).sum(), pairs + pair.sum()
        return total / pairs if pairs else np.nan

    def share(drawn):
        weights = np.bincount(drawn, minlength=len(labels))
        return 100 * mean_distance(made["features"], weights) / (mean_distance(made["real"], weights) or np.nan)

    return result(share, len(labels), config, "%")


def main(config=None, load_dit=dit.load_dit, load_vae=load_vae):
    config, began = config or utils.parse_options(Config, __doc__), time.time()
    utils.check_positive(config, "videos", "judge_clips")
    dit.sampling_times(config.sampler, config.steps, *dit.noise_schedule())  # UserError for wrong --steps before the work
    ckpt, out = checkpoints.load(config.ckpt, ("vae", "dit"), "python vae.py"), Path(config.out_dir)
    utils.make_parent(out / "results.json"), utils.make_parent(out / "report.html")
    device, rank, _ = utils.start_processes(config.device)
    if ckpt["stage"] == "dit":
        model, vae, latent_map = (part.to(device) for part in load_dit(ckpt))
        if model.config.cond_frames:
            raise UserError(f"{config.ckpt} predicts frames: `python sample.py --predict` scores it, and this one generates")
    else:
        model, vae = None, load_vae(ckpt).to(device)
    settings, classes = clips_of(ckpt.get("vae", ckpt), data_dir=config.data_dir), ckpt["classes"]
    held_out, train_set = (data.open_dataset(settings, role, classes) for role in ("test", "train"))
    files = [set(map(same_file, getattr(each, "items", ()))) for each in (held_out, train_set)]
    shared, ddof = files[0] & files[1], fvd.PROTOCOLS[config.protocol].ddof
    detector = fvd.load_detector(config.features, config.protocol, config.seed, device)
    lpips = None if config.lpips == "none" else LPIPS(config.lpips).to(device)
    name, indices = fvd.label(detector.meta), data.spread(held_out, config.videos)
    if len(indices) < 2:
        raise UserError("a distance takes two held-out clips or more")
    first = over_processes("reconstructed", indices, functools.partial(reconstructed, vae, held_out, detector, lpips, device))
    results = {
        f"r{name}": distance_result(first["real"], first["features"], ddof, config, paired=True),
        "PSNR": mean_result(first["psnr"].mean(1), config, "dB"),
        "PSNR of each clip's own time average": mean_result(first["still"].mean(1), config, "dB"),
        "SSIM": mean_result(first["ssim"].mean(1), config),
    }
    if lpips:
        results[f"LPIPS ({config.lpips})"] = mean_result(first["lpips"], config)
    shown = {"real": first["shown_real"], "reconstructed": first["shown"]}
    if model:
        classifier = Classifier(len(classes)).to(device).eval() if len(classes) > 1 else None
        if classifier:
            classifier = classifier if rank else train_classifier(train_set, len(classes), config.judge_clips, device)
            utils.from_first_rank(classifier)
        indices = data.spread(train_set, config.videos)
        measure = functools.partial(generated, model, vae, latent_map, train_set, detector, classifier, config, device)
        made = over_processes("generated", indices, measure)
        results[f"g{name}"] = distance_result(made["real"], made["features"], ddof, config)
        if not shared:
            results[f"g{name} of reconstructions"] = distance_result(made["real"], first["features"], ddof, config)
            results[f"g{name} of real clips"] = distance_result(made["real"], first["real"], ddof, config)
        if classifier:
            results["classifier accuracy"] = share_result(made["seen"] == made["labels"])
            results["classifier accuracy of the real clips"] = own = share_result(made["seen_real"] == made["labels"])
            if own["low"] < 100 / len(classes):
                print("the classifier tells real clips no better than chance: its accuracy says nothing; more --judge-clips")
        results["clips with a blurred frame"] = share_result(made["worst"] < np.quantile(made["worst_real"], 0.01))
        if np.bincount(made["labels"]).max() > 1:  # there are two of a class
            results["diversity, of that of real clips"] = diversity_result(made, config)
        shown |= {"training clips": made["shown_real"], "generated, of their classes": made["shown"]}
    if rank:
        return
    about = {
        "checkpoint": f"{config.ckpt}, {ckpt['step']} steps of stage {2 if model else 1}, revision {ckpt['revision']}",
        "evaluated": f"revision {utils.git_revision()}, {time.strftime('%Y-%m-%d')}, {time.time() - began:.0f} s",
        "command": "python evaluate.py " + shlex.join(sys.argv[1:]),
        "data": f"{settings.dataset} {settings.data_dir}: {len(train_set)} videos, {0 if shared else len(held_out)} held out",
        "clips": f"{settings.num_frames} frames of {settings.resolution} x {settings.resolution}, stride {settings.stride}",
        "features": f"{detector.meta['features']}, protocol {config.protocol}",
    }
    if model:
        about["sampling"] = f"{config.sampler}, {config.steps} steps, guidance {config.guidance}, seed {config.seed}"
    skipped = getattr(held_out, "skipped", {}) | getattr(train_set, "skipped", {})
    skipped = {video.printable(path): reason for path, reason in skipped.items()}
    with utils.whole_file(out / "results.json") as file:
        file.write(json.dumps({"results": results, "about": about, "skipped": skipped}, indent=1).encode())
    with utils.whole_file(out / "report.html") as file:
        link = os.path.relpath(page, out) if (page := Path(config.ckpt).with_name("page.html")).is_file() else ""
        file.write(report(results, about, skipped, first["psnr"].mean(0), shown, link).encode(errors="replace"))
    for cells in map(cells_of, results.items()):
        print("{:<45} {:<14} {:<24} {} clips".format(*cells))
    print(f"{len(skipped)} videos skipped; wrote {out / 'results.json'} and {out / 'report.html'}")


def cells_of(item):
    """A (title, result) as the four texts of a row."""
    title, r = item
    interval = f"{r['low']:.4g} to {r['high']:.4g}" if "low" in r else ""
    return title, f"{r['value']:.4g} {r['unit']}".strip(), interval, r["clips"]


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Evaluation</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 900px; margin: 2em auto; overflow-wrap: anywhere }}
td, th {{ padding: .25em .9em .25em 0; text-align: left; vertical-align: top }} video {{ width: 100px }}</style></head><body>
<table><tr><th>metric</th><th>value</th><th>95 % interval (bootstrap over clips; Wilson for shares)</th><th>clips</th></tr>
{results}</table>
<p><img alt="PSNR of each frame" src="data:image/png;base64,{curve}"></p>
{videos}<table>{about}</table>
<p>{page}{count} videos skipped</p><table>{skipped}</table></body></html>
"""


def report(results, about, skipped, psnr, shown, page=""):
    """One HTML page with everything in it: table, curve, and videos that play, {title: uint8 frames [B, T, H, W, 3]}."""

    def table(rows):
        return "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>\n" for row in rows)

    with tempfile.TemporaryDirectory() as directory:
        plot.curves(f"{directory}/curve.png", [("frame of the clip", "PSNR, dB", list(enumerate(psnr.tolist())))])
        curve, videos = base64.b64encode(Path(directory, "curve.png").read_bytes()).decode(), ""
        for title, clips in shown.items():
            videos += f"<p>{html.escape(title)}</p>\n"
            for clip in clips:
                video.write_mp4(f"{directory}/clip", [video.to_clip(clip)], fps=8)
                content = base64.b64encode(Path(directory, "clip.mp4").read_bytes()).decode()
                videos += f'<video autoplay loop muted playsinline src="data:video/mp4;base64,{content}"></video>\n'
    rows = {"results": table(map(cells_of, results.items())), "about": table(about.items()), "skipped": table(skipped.items())}
    rows["page"] = f'<a href="{html.escape(page)}">Generate in the browser</a>. ' if page else ""
    return PAGE.format(**rows, curve=curve, videos=videos, count=len(skipped))


if __name__ == "__main__":
    utils.run(main)
