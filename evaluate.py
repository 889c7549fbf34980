"""Evaluates a checkpoint on its own data set.

python evaluate.py --ckpt vae.pt       reconstructions of held-out clips: rFVD, PSNR, SSIM, LPIPS
python evaluate.py --ckpt dit.pt       also as many generated clips as real ones: gFVD, classifier accuracy, diversity
python evaluate.py --ckpt predict.pt   or held-out clips predicted from their first frames (dit.py --cond-frames 5): gFVD, PSNR

gFVD of reconstructions shows what stage 1 costs, that of real held-out clips what no generator needs to beat; both are too high
if few are held out. If none are (all of UCF-101), rFVD is of training videos. Several processes (torchrun) share the work.
"""

import base64
import html
import json
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
from common import checkpoints, utils, video
from common.utils import UserError, option
from losses import LPIPS
from vae import data_settings, decode_all, load_vae, reconstruct

BATCH = 8  # clips per forward pass; the report shows the first batch; each batch has its own seed


@dataclass
class Config:
    ckpt: str = option("input", "dit.pt", "checkpoint of vae.py or dit.py")
    data_dir: str = option("input", "", "directory of its data set, if it has moved")
    protocol: str = option("features", "stylegan-v", "of FVD: reference implementation", choices=list(fvd.PROTOCOLS))
    features: str = option("features", "i3d", "trained I3D, or one with random weights", choices=["i3d", "random"])
    lpips: str = option("features", "vgg", "backbone of LPIPS", choices=["vgg", "alex", "none"])
    videos: int = option("clips", 2048, "clips of each kind, one per video")
    seed: int = option("clips", 0, "seed for noise, bootstrap and random weights")
    steps: int = option("sampling", 20, "evaluations of the denoiser, 1 to 1000")
    sampler: str = option("sampling", "dpm", "DPM-Solver++, DDIM, or ancestral", choices=["dpm", "ddim", "ddpm"])
    guidance: float = option("sampling", 2.0, "scale of classifier-free guidance; 1 is none")
    classifier_clips: int = option("result", 8192, "real clips that train the classifier")
    bootstrap: int = option("result", 100, "resamples for the intervals; 0: no intervals")
    out_dir: str = option("output", "out/eval", "directory for results.json and report.html")
    device: str = option("machine", "auto", "cpu, cuda, cuda:1, …; auto: CUDA if available")


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
    """A Classifier trained on `clips` real clips, for at least one step."""
    torch.manual_seed(seed)
    classifier, batch_size = Classifier(num_classes).to(device), min(batch_size, len(train_set))
    steps = max(1, clips // batch_size)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
    batches = data.endless(train_set, data.Stream(len(train_set), batch_size, seed))
    for step in utils.bar(range(steps), "classifier", unit="step", disable=utils.rank() > 0):
        optimizer.param_groups[0]["lr"] = utils.learning_rate(step, steps, 3e-3, 20)
        frames, label = (x.to(device) for x in next(batches))
        optimizer.zero_grad()
        F.cross_entropy(classifier(video.to_clip(frames)), label).backward()
        optimizer.step()
    return classifier.eval()


@torch.no_grad()
def classify(classifier, clips):
    """Predicted classes of clips [B, T, 3, H, W] -> [B] on the CPU."""
    return torch.cat([classifier(batch.to(classifier.head.weight.device)).argmax(1).cpu() for batch in clips.split(32)])


def accuracy(classifier, clips, labels):
    """Share of clips whose predicted class is their label."""
    return (classify(classifier, clips) == labels.cpu()).float().mean().item()


def frame_psnr(x, y):
    """Peak signal-to-noise ratio of each frame in dB: x, y float [..., 3, H, W] in [0, 1] -> [...]; at most 100 dB."""
    return -10 * (x - y).square().mean((-3, -2, -1)).clamp_min(1e-10).log10()


def worst_frame(clips):
    """Power above a quarter cycle per pixel, which blur removes: the minimum over frames divided by the median over frames,
    [B, T, 3, H, W] -> [B]. It finds clips with a few blurred frames, whose class a classifier still recognizes."""
    power = torch.fft.fft2(clips, norm="ortho").abs().square()
    frequency = torch.fft.fftfreq(clips.shape[-1], device=clips.device)
    power = power[..., torch.hypot(frequency[:, None], frequency[None, :]) > 0.25].mean((-2, -1))  # [B, T]
    return power.amin(1) / power.median(1).values.clamp_min(1e-12)


def over_processes(dataset, indices, measure, detector):
    """Call measure(clips, labels, start) -> ({name: values}, {title: uint8 frames}) on all clips, shared by the processes.

    Returns {name: values, title: features of frames} of all clips, and {title: frames} of the first batch, for the report.
    """
    world, mine, shown = dist.get_world_size() if dist.is_initialized() else 1, {}, {}
    starts = range(0, len(indices), BATCH)
    for start in utils.bar(starts[utils.rank() :: world], measure.__name__, unit="batch", disable=utils.rank() > 0):
        values, frames = measure(*data.clips(dataset, indices[start : start + BATCH]), start)
        mine[start], shown = values | {title: detector(clips) for title, clips in frames.items()}, shown or frames
    parts = [mine] * world
    if world > 1:
        dist.all_gather_object(parts, mine)
    found = {start: batch for part in parts for start, batch in part.items()}
    return {name: np.concatenate([found[start][name] for start in starts]) for name in found[0]}, shown


class Networks:
    """The networks of a checkpoint, and functions for over_processes, which measure frames rounded to uint8."""

    def __init__(self, config, ckpt, device, load_dit, load_vae):
        self.config, self.device, self.model, self.classifier = config, device, None, None
        if ckpt["stage"] == "dit":
            self.model, self.vae, self.latent_map = (part.to(device) for part in load_dit(ckpt))
        else:
            self.vae = load_vae(ckpt).to(device)
        self.cond_frames = self.model.config.cond_frames if self.model else 0
        self.lpips = None if config.lpips == "none" else LPIPS(config.lpips).to(device)

    def sample(self, labels, frames, start, given=None):
        """Generated clips, which continue given frames if their latents are `given`: uint8 [B, frames, H, W, 3]."""
        c = self.config
        latents = dit.generate(self.model, labels.to(self.device), c.steps, c.guidance, c.sampler, c.seed + start, given)
        return video.to_frames(decode_all(self.vae, self.latent_map.inverse(latents), torch.arange(frames)))

    @torch.no_grad()
    def reconstructed(self, clips, labels, start):
        """Measure reconstructions of real clips and, for frame prediction, predictions from their first frames."""
        real, made = video.to_frames(clips), video.to_frames(reconstruct(self.vae, clips, self.device))
        x, y = (torch.as_tensor(frames).movedim(-1, -3).to(self.device) / 255 for frames in (real, made))
        still = x.mean(1, keepdim=True).expand_as(x)  # a baseline without motion: each clip's own time average
        similarity = ssim(x.flatten(0, 1).double(), y.flatten(0, 1).double(), data_range=1, size_average=False)
        values = {"PSNR": frame_psnr(x, y), "PSNR of each clip's own time average": frame_psnr(x, still)}  # [B, T]
        values["SSIM"] = similarity.unflatten(0, x.shape[:2])
        if self.classifier:
            values["recognized"] = classify(self.classifier, clips) == labels
        if self.lpips:
            lpips = torch.stack([self.lpips(2 * b[None] - 1, 2 * a[None] - 1) for a, b in zip(x, y)])
            values[f"LPIPS ({self.config.lpips})"] = lpips
        frames = {"real": real, "reconstructed": made}
        if K := self.cond_frames:
            given = self.latent_map(dit.encode_given(self.vae, clips.to(self.device), K))
            no_class = torch.full_like(labels, self.model.config.num_classes)
            frames["predictions, given frames decoded"] = decoded = self.sample(no_class, clips.shape[1], start, given)
            frames["predictions"] = np.concatenate([real[:, :K], decoded[:, K:]], 1)
            y = torch.as_tensor(decoded).movedim(-1, -3).to(self.device) / 255
            values["PSNR of predicted frames"] = frame_psnr(x, y)[:, K:]
            values["PSNR of copies of the last given frame"] = frame_psnr(x[:, K:], x[:, K - 1 : K])
        return {name: x.cpu().numpy() for name, x in values.items()}, frames

    @torch.no_grad()
    def generated(self, clips, labels, start):
        """Measure training clips, and as many generated ones of the same classes."""
        frames = {"training clips": video.to_frames(clips), "generated": self.sample(labels, clips.shape[1], start)}
        values = {"labels": labels.numpy()}
        for title, made in frames.items():
            values[f"{title}, worst"] = worst_frame(video.to_clip(made)).numpy()
        if self.classifier:
            values["recognized"] = (classify(self.classifier, video.to_clip(frames["generated"])) == labels).numpy()
        return values, frames


def result(statistic, clips, config, unit=""):
    """statistic(indices of clips), with its bootstrap interval over clips."""
    rng = np.random.default_rng(config.seed % 2**64)
    draws = [statistic(rng.integers(clips, size=clips)) for _ in range(config.bootstrap)]
    ends = np.nanquantile(draws, [0.025, 0.975]).tolist() if draws else ()
    return {"value": float(statistic(np.arange(clips))), **dict(zip(("low", "high"), ends)), "clips": clips, "unit": unit}


def mean_result(values, config, unit=""):
    """The mean over clips of values [B, …], averaged within each clip first."""
    values = values.reshape(len(values), -1).mean(1)
    return result(lambda i: values[i].mean(), len(values), config, unit)


def share_result(hits):
    """The share of hits [B] with Wilson's interval, since a bootstrap interval of hits alone has no width."""
    low, high = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return {"value": 100 * float(hits.mean()), "low": 100 * low, "high": 100 * high, "clips": len(hits), "unit": "%"}


def distance_result(real, made, config, paired=False):
    """The Fréchet distance of features [B, 400], with its bootstrap interval."""
    ddof = fvd.PROTOCOLS[config.protocol].ddof
    result = {"value": fvd.frechet_distance_of(real, made, ddof), "clips": min(len(real), len(made)), "unit": ""}
    ends = fvd.bootstrap(real, made, ddof, config.bootstrap, config.seed, paired) if config.bootstrap > 0 else ()
    return result | dict(zip(("low", "high"), ends))


def diversity_result(real, made, labels, config):
    """Mean distance between features of two generated clips of a class, relative to that of real clips."""

    def share(drawn):
        weights, totals, pairs = np.bincount(drawn, minlength=len(labels)), np.zeros(2), 0.0
        for label in np.unique(labels):
            of_class = labels == label
            pair = np.outer(weights[of_class], weights[of_class])
            pair = pair * (1 - np.eye(len(pair)))  # a clip drawn twice is not compared with itself
            totals += [(pair * cdist(x[of_class], x[of_class])).sum() for x in (made, real)]
            pairs += pair.sum()
        of_made, of_real = totals / (pairs or np.nan)
        return 100 * of_made / (of_real or np.nan)

    return result(share, len(labels), config, "%")


def main(argv=None, load_dit=dit.load_dit, load_vae=load_vae):
    config, began = utils.parse_options(Config, __doc__, argv=argv), time.time()
    utils.check_positive(config, "videos", "classifier_clips")
    dit.sampling_times(config.sampler, config.steps, *dit.noise_schedule())  # UserError for bad --steps, before the work
    ckpt, out = checkpoints.load(config.ckpt, ("vae", "dit"), "python vae.py"), Path(config.out_dir)
    utils.make_parent(out / "results.json"), utils.make_parent(out / "report.html")
    device, rank, _ = utils.start_processes(config.device)
    settings, classes = data_settings(ckpt.get("vae", ckpt), data_dir=config.data_dir), ckpt["classes"]
    held_out, train_set = (data.open_dataset(settings, role, classes) for role in ("test", "train"))
    files = [{Path(path).resolve() for path, _ in getattr(each, "items", ())} for each in (held_out, train_set)]
    shared, indices = files[0] & files[1], data.spread(held_out, config.videos)
    if len(indices) < 2:
        raise UserError("a distance needs two held-out clips or more")
    networks = Networks(config, ckpt, device, load_dit, load_vae)
    detector = fvd.load_detector(config.features, config.protocol, config.seed, device)
    name = fvd.label(detector.meta)
    if networks.model and not networks.cond_frames and len(classes) > 1:  # others train one step, then get the first one's
        networks.classifier = train_classifier(train_set, len(classes), 1 if rank else config.classifier_clips, device)
        utils.from_first_rank(networks.classifier)
    first, shown = over_processes(held_out, indices, networks.reconstructed, detector)
    results = {f"r{name}": distance_result(first["real"], first["reconstructed"], config, paired=True)}
    for title in first:
        if title.startswith(("PSNR", "SSIM", "LPIPS")):
            results[title] = mean_result(first[title], config, "dB" if "PSNR" in title else "")
    if networks.cond_frames:
        for title in ("predictions", "predictions, given frames decoded"):
            results[f"g{name} of {title}"] = distance_result(first["real"], first[title], config, paired=True)
    elif networks.model:
        second, more = over_processes(train_set, data.spread(train_set, config.videos), networks.generated, detector)
        real, made, labels = second["training clips"], second["generated"], second["labels"]
        results[f"g{name}"] = distance_result(real, made, config)
        if not shared:
            results[f"g{name} of reconstructions"] = distance_result(real, first["reconstructed"], config)
            results[f"g{name} of real clips"] = distance_result(real, first["real"], config)
        if networks.classifier:
            results["classifier accuracy"] = share_result(second["recognized"])
            results["classifier accuracy of the real clips"] = own = share_result(first["recognized"])
            if own["low"] < 100 / len(classes):
                print("the classifier is no better than chance on real clips, so ignore it: use more --classifier-clips")
        blurred = second["generated, worst"] < np.quantile(second["training clips, worst"], 0.01)
        results["clips with a blurred frame"] = share_result(blurred)
        if np.bincount(labels).max() > 1:  # a class has two clips
            results["diversity, of that of real clips"] = diversity_result(real, made, labels, config)
        shown |= more
    if rank:
        return
    about = {
        "checkpoint": f"{config.ckpt}, {ckpt['step']} steps of stage {2 if networks.model else 1}, revision {ckpt['revision']}",
        "evaluated": f"revision {utils.git_revision()}, {time.strftime('%Y-%m-%d')}, {time.time() - began:.0f} s",
        "command": "python evaluate.py " + shlex.join(sys.argv[1:] if argv is None else argv),
        "data": f"{settings.dataset} {settings.data_dir}: {len(train_set)} videos, {0 if shared else len(held_out)} held out",
        "clips": f"{settings.num_frames} frames of {settings.resolution} x {settings.resolution}, stride {settings.stride}",
        "features": f"{detector.meta['features']}, protocol {config.protocol}",
    }
    if networks.model:
        about["sampling"] = f"{config.sampler}, {config.steps} steps, guidance {config.guidance}, seed {config.seed}"
    skipped = getattr(held_out, "skipped", {}) | getattr(train_set, "skipped", {})
    skipped = {video.printable(path): reason for path, reason in skipped.items()}
    rows = []
    for title, r in results.items():
        interval = f"{r['low']:.4g} to {r['high']:.4g}" if "low" in r else ""
        rows.append((title, f"{r['value']:.4g} {r['unit']}".strip(), interval, r["clips"]))
        print("{:<45} {:<14} {:<24} {} clips".format(*rows[-1]))
    with utils.whole(out / "results.json") as part:
        part.write_text(json.dumps({"results": results, "about": about, "skipped": skipped}, indent=1))
    about |= {"videos skipped": len(skipped)} | skipped
    with utils.whole(out / "report.html") as part:
        part.write_bytes(report(rows, about, shown).encode(errors="replace"))
    print(f"{len(skipped)} videos skipped; wrote {out / 'results.json'} and {out / 'report.html'}")


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Evaluation</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 900px; margin: 2em auto; overflow-wrap: anywhere }}
td, th {{ padding: .25em .9em .25em 0; text-align: left; vertical-align: top }}
video {{ width: 400px; image-rendering: pixelated }}</style></head><body>
<table><tr><th>metric</th><th>value</th><th>95 % interval (bootstrap over clips; Wilson for shares)</th><th>clips</th></tr>
{results}</table>
{videos}<table>{about}</table></body></html>
"""


def report(rows, about, shown):
    """A self-contained HTML page: tables of rows and about, and videos {title: uint8 frames [B, T, H, W, 3]}."""

    def table(rows):
        return "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>\n" for row in rows)

    videos = ""
    with tempfile.TemporaryDirectory() as directory:
        for title, clips in shown.items():
            video.write_mp4(f"{directory}/clips", [video.tile(video.to_clip(clips))], fps=8)
            content = base64.b64encode(Path(directory, "clips.mp4").read_bytes()).decode()
            videos += f'<p>{html.escape(title)}</p><video autoplay loop muted src="data:video/mp4;base64,{content}"></video>\n'
    return PAGE.format(results=table(rows), about=table(about.items()), videos=videos)


if __name__ == "__main__":
    utils.run(main)
