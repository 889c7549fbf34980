"""Train both stages on the built-in shapes, sample, interpolate, and judge the result; `make demo` calls this.

    python demo.py                                 ten minutes on two fast CPU cores; everything lands in out/demo/
    python demo.py --skip-training                 judge what is there
    python demo.py --dataset folder --data-dir PATH/train --vae-options "--resolution 64 --steps 6000" …

The judge is a small video classifier trained on real clips. It reads the class of reconstructed and of generated clips:
PSNR alone cannot tell a moving square from a moving smudge.
"""

import resource
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import data
import dit
from common import checkpoints, progress, utils
from common.utils import UserError, option
from common.video import to_clip, write_sheet
from common.weights import weights
from evaluate import agreement, train_classifier
from vae import clips_of, fine_power, psnr, reconstruct


@dataclass
class Config:
    dataset: str = option("data", "shapes", "what to train on", choices=data.DATASETS)
    data_dir: str = option("data", "", "directory of videos, classes from its sub-folders")
    vae_options: str = option("training", "", "further options of vae.py, in quotes")
    dit_options: str = option("training", "", "further options of dit.py, in quotes")
    skip_training: bool = option("training", False, "judge the checkpoints that are there")
    judge_clips: int = option("judging", 8192, "clips the classifier is trained on")
    per_class: int = option("judging", 20, "generated clips of each class that are judged")
    guidance: float = option("judging", 1.0, "scale of classifier-free guidance; 1 is none")
    out_dir: str = option("output", "out/demo", "where everything goes")


def nearest_clips(clips, train_set, count=None):
    """For each clip the training clip with the smallest mean squared pixel difference: (clips, differences)."""
    best, found = torch.full((len(clips),), float("inf")), torch.zeros_like(clips)
    for i in progress.bar(range(count or len(train_set)), "nearest", unit="clip"):
        candidate = to_clip(train_set[i][0])
        distance = (clips - candidate).square().mean((1, 2, 3, 4))
        closer = distance < best
        best[closer], found[closer] = distance[closer], candidate
    return found, best


def main():
    config = utils.parse_options(Config, __doc__)
    out = Path(config.out_dir)
    vae_pt, dit_pt = out / "vae.pt", out / "dit.pt"
    rows = []

    def call(title, script, *args):
        """Run a script of this repository as a user would, and time it."""
        command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, args)]
        print(
            "$ python " + " ".join(shlex.quote(str(a)) for a in command[1:]).replace(str(Path(__file__).parent) + "/", ""),
            flush=True,
        )
        start = time.time()
        if subprocess.run(command).returncode:
            raise UserError(f"{script} failed")
        rows.append((title, f"{time.time() - start:.0f} s"))
        return time.time() - start

    if not config.skip_training:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the script that runs ends with this one
        where = ["--dataset", config.dataset] + (["--data-dir", config.data_dir] if config.data_dir else [])
        perceptual = ["--lpips", "alex"]  # what makes edges crisp
        perceptual += ["--lpips-weight", 0.3] if config.dataset == "shapes" else []  # docs/sharp.md; not tried elsewhere
        # A quarter of nano's denoiser, on what the encoder says: as good on shapes in a fifth of the time (docs/results.md).
        denoiser = ["--width", 96, "--heads", 3, "--refine", 0] if config.dataset == "shapes" else []
        try:
            weights("lpips-alex")
        except UserError as error:
            perceptual = ["--lpips", "none"]
            print(f"without the perceptual loss, and less sharp: {error}", flush=True)
        seconds = call(
            "stage 1, training", "vae.py", *where, *perceptual, "--out", vae_pt, "--run-dir", out / "vae",
            *shlex.split(config.vae_options),
        )  # fmt: skip
        seconds += call(
            "stage 2, training", "dit.py", *denoiser, "--ckpt", vae_pt, "--out", dit_pt, "--run-dir", out / "dit",
            *shlex.split(config.dit_options),
        )  # fmt: skip
        sampling = ["--ckpt", dit_pt, "--out-dir", out, "--guidance", config.guidance]
        seconds += call("samples of every class", "sample.py", *sampling)
        seconds += call("interpolation between videos", "sample.py", *sampling, "--interp")
        long = ["--classes", 0, 1, 2, "--time-scale", 8, "--extrapolate", 4, "--out-dir", out / "long"]
        seconds += call("8 x the frames, 4 beyond the end", "sample.py", *sampling, *long)
        rows.append(("trainings and sampling together", f"{seconds:.0f} s"))
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        rows.append(("peak memory of a process", f"{peak:.2f} GiB"))

    ckpt = checkpoints.load(dit_pt, "dit", "python demo.py")
    model, vae, scale = dit.load_dit(ckpt)
    device, c, classes = torch.device("cpu"), vae.nerv_config, ckpt["classes"]
    source = clips_of(ckpt["vae"], data_dir=config.data_dir)
    train_set, test_set = (data.open_dataset(source, role, classes) for role in ("train", "test"))
    clips, labels = data.fixed_clips(test_set, 20 * len(classes))
    guess, refine = reconstruct(vae, clips, device), dit.refine_steps(ckpt)
    decoded = reconstruct(vae, clips, device, refine=refine) if refine else guess  # from tokens as stage 2 learns them
    still = clips.mean(1, keepdim=True).expand_as(clips)
    rows.append(("PSNR of held-out reconstructions", f"{psnr(clips, guess):.2f} dB"))
    if refine:
        rows.append((f"... with tokens refined in {refine} steps", f"{psnr(clips, decoded):.2f} dB"))
    rows.append(("power of fine detail kept", f"{100 * fine_power(decoded).mean() / fine_power(clips).mean():.1f} %"))
    rows.append(("PSNR of each clip's own time average", f"{psnr(clips, still):.2f} dB"))

    if source.dataset == "shapes":  # drawn at any time, so that what happens between and after the frames is known
        few, length = range(64), c.num_frames
        encoded = torch.stack([to_clip(test_set[i][0]) for i in few])
        for name, t in (
            ("between the frames", torch.arange(length - 1) + 0.5),
            ("2 frames beyond the end", length + torch.arange(2.0)),
        ):
            truth = torch.stack([to_clip(test_set.draw(i, t)) for i in few])
            rows.append((f"PSNR {name}, never trained on", f"{psnr(truth, reconstruct(vae, encoded, device, t)):.2f} dB"))

    judge = train_classifier(train_set, len(classes), config.judge_clips, device)
    wanted = torch.arange(len(classes)).repeat_interleave(config.per_class)
    tokens = [dit.generate(model, part, guidance=config.guidance, seed=i) for i, part in enumerate(wanted.split(60))]
    with torch.no_grad():
        generated = torch.cat([vae.decode(part / scale, torch.arange(c.num_frames)) for part in torch.cat(tokens).split(20)])
    rows.append((f"judge on {len(clips)} held-out real clips", f"{100 * agreement(judge, clips, labels):.1f} %"))
    rows.append((f"class agreement, {len(clips)} reconstructions", f"{100 * agreement(judge, decoded, labels):.1f} %"))
    rows.append((f"class agreement, {len(generated)} generated clips", f"{100 * agreement(judge, generated, wanted):.1f} %"))

    shown = generated[:: config.per_class][:10]
    nearest, difference = nearest_clips(shown, train_set)
    pairs = [clip for pair in zip(shown, nearest) for clip in pair]
    write_sheet(out / "nearest.png", pairs, ["generated", "nearest real"] * len(shown))
    rows.append(("generated to nearest training clip", f"{psnr(shown, nearest):.2f} dB, see {out}/nearest.png"))
    print()
    for name, value in rows:
        print(f"{name:<45} {value}")
    command = f"python evaluate.py --ckpt {dit_pt} --videos 256 --protocol videogpt --lpips alex --guidance {config.guidance:g}"
    print(f"\nFVD and LPIPS, ten minutes more, and 111 MB of weights once:\n{command}")


if __name__ == "__main__":
    utils.run(main)
