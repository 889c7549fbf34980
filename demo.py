"""Train both stages on the built-in shapes, sample, interpolate, and measure the result; `make demo` calls this.

A small video classifier, trained on real clips, measures what PSNR cannot: whether a generated clip shows its class.
    python demo.py                     six to ten minutes on two CPU cores; writes to out/demo/
    python demo.py --skip-training     only measure existing checkpoints
"""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import data
import dit
from common import checkpoints, utils
from common.utils import UserError, option
from common.video import to_clip, write_sheet
from common.weights import weights
from evaluate import accuracy, train_classifier
from vae import data_settings, decode_all, psnr, reconstruct

TRAIN_CLIPS, PER_CLASS = 8192, 20  # real clips to train the classifier, generated clips per class to test


@dataclass
class Config:
    skip_training: bool = option("demo", False, "only measure existing checkpoints, trained on any data set")
    out_dir: str = option("demo", "out/demo", "directory for everything")


def call(script, *args):
    """Run a script of this repository as a user would. Ctrl-C or SIGTERM also ends the script."""
    command, start = [script, *map(str, args)], time.time()
    print("$ python", *command, flush=True)
    with utils.Interrupt() as interrupt:  # raises nothing, so no signal is lost between start and loop
        process = subprocess.Popen([sys.executable, Path(__file__).with_name(script), *command[1:]])
        while process.poll() is None:
            if interrupt.asked:
                process.terminate()
            time.sleep(0.1)
    if interrupt.asked or process.returncode:
        raise KeyboardInterrupt if interrupt.asked else UserError(f"{script} failed")
    print(f"{script}: {time.time() - start:.0f} s\n", flush=True)


def train(out):
    """Train both stages and write samples of all kinds."""
    try:
        weights("lpips-alex")
        perceptual = ["--lpips", "alex", "--lpips-weight", 0.3]  # sharpens edges
    except UserError as error:
        perceptual = ["--lpips", "none"]
        print(f"training without the perceptual loss, so frames will be less sharp: {error}", flush=True)
    call("vae.py", *perceptual, "--out", out / "vae.pt")
    call("dit.py", "--ckpt", out / "vae.pt", "--out", out / "dit.pt")
    sample = ["sample.py", "--ckpt", out / "dit.pt", "--guidance", 1, "--out-dir"]
    call(*sample, out)
    call(*sample, out, "--interp")
    call(*sample, out / "long", "--classes", 0, 1, 2, "--time-scale", 8, "--extrapolate", 4)
    call(*sample, out, "--page", out / "page.html")


def nearest_clips(clips, train_set):
    """For each clip, the training clip with the smallest mean squared pixel difference."""
    best, found = torch.full((len(clips),), torch.inf), torch.zeros_like(clips)
    for i in utils.bar(range(len(train_set)), "nearest", unit="clip"):
        candidate = to_clip(train_set[i][0])
        distance = (clips - candidate).square().mean((1, 2, 3, 4))
        closer = distance < best
        best[closer], found[closer] = distance[closer], candidate
    return found


def main():
    config = utils.parse_options(Config, __doc__)
    start, rows, out, device = time.time(), {}, Path(config.out_dir), torch.device("cpu")
    if not config.skip_training:
        train(out)
        rows["trainings and sampling"] = f"{time.time() - start:.0f} s"
    ckpt = checkpoints.load(out / "dit.pt", "dit", "python demo.py")
    (model, vae, latent_map), classes = dit.load_dit(ckpt), ckpt["classes"]
    t, source = torch.arange(vae.nerv_config.num_frames), data_settings(ckpt["vae"])
    train_set, test_set = (data.open_dataset(source, role, classes) for role in ("train", "test"))
    clips, labels = data.fixed_clips(test_set, 20 * len(classes))
    decoded = reconstruct(vae, clips, device)
    rows["PSNR of held-out reconstructions"] = f"{psnr(clips, decoded):.2f} dB"
    rows["PSNR of each clip's own time average"] = f"{psnr(clips, clips.mean(1, keepdim=True).expand_as(clips)):.2f} dB"
    if source.dataset == "shapes":  # can be drawn at any time: ground truth between and after frames
        for name, times in (("between the frames", t[:-1] + 0.5), ("2 frames beyond the end", len(t) + torch.arange(2.0))):
            truth = torch.stack([to_clip(test_set.draw(i, times)) for i in data.spread(test_set, len(clips))])
            rows[f"PSNR {name}, never trained on"] = f"{psnr(truth, reconstruct(vae, clips, device, times)):.2f} dB"
    classifier = train_classifier(train_set, len(classes), TRAIN_CLIPS, device)
    wanted = torch.arange(len(classes)).repeat_interleave(PER_CLASS)
    generated = decode_all(vae, latent_map.inverse(dit.generate(model, wanted, guidance=1.0, seed=0)), t)
    rows[f"classifier accuracy, {len(clips)} held-out real clips"] = f"{100 * accuracy(classifier, clips, labels):.1f} %"
    rows[f"classifier accuracy, {len(clips)} reconstructions"] = f"{100 * accuracy(classifier, decoded, labels):.1f} %"
    rows[f"classifier accuracy, {len(generated)} generated clips"] = f"{100 * accuracy(classifier, generated, wanted):.1f} %"
    shown = generated[::PER_CLASS][:10]
    nearest = nearest_clips(shown, train_set)
    write_sheet(out / "nearest.png", torch.stack([shown, nearest], 1).flatten(0, 1), ["generated", "nearest real"] * len(shown))
    rows["generated to nearest training clip"] = f"{psnr(shown, nearest):.2f} dB, see {out}/nearest.png"
    print("\n".join(f"{name:<52} {value}" for name, value in rows.items()))
    print(f"Generate in a browser: {out / 'page.html'}; a report with FVD: python evaluate.py --ckpt {out / 'dit.pt'}")


if __name__ == "__main__":
    utils.run(main)
