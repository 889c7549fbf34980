"""Checks in half an hour that everything works on a new machine with a GPU: `python -m bench.gpu`.

tests    those that need a GPU
steps    short trainings of both stages, compiled and eager, with discriminator and LPIPS; resumed, and on two processes
tables   bench.speed growth, bench.load
train    stage 1 on --data-dir or the built-in shapes, then stage 2, each for a third of the time left; sampling, evaluation

Each program is a row, even if it failed or no time was left; table.md and the logs in --out-dir are always up to date.
On a CPU: python -m bench.gpu --preset nano --steps 2 --only steps
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import nerv
from common import utils
from common.utils import option

ROOT, PARTS = Path(__file__).parent.parent, ("tests", "steps", "tables", "train")
TRAINING = r"held-out PSNR [\d.]+ dB|wrote \w+\.pt"  # parts of a training's output for the table
AGAINST = "-m bench.gpu whole.pt "  # command that compares two checkpoints


@dataclass
class Config:
    only: list = option("what", list(PARTS), "parts to run", nargs="+", choices=PARTS, metavar="PART")
    preset: str = option("what", "S", "sizes of the networks", choices=list(nerv.CONFIGS))
    data_dir: str = option("what", "", "folder of videos to train on; default: the built-in shapes")
    steps: int = option("what", 60, "steps of each short training, 2 or more")
    batch_size: int = option("what", 8, "clips per step, even")
    minutes: float = option("what", 30.0, "time limit for everything")
    out_dir: str = option("output", "out/gpu", "where table, logs and checkpoints go")


def programs(config, gpu):
    """All programs in order: (part, description, command, pattern for the parts of its output to show)."""
    source = f"--dataset folder --data-dir {shlex.quote(os.path.abspath(config.data_dir))}" if config.data_dir else ""
    common = f"--batch-size {config.batch_size} --warmup 1000 --extras"
    first = f"vae.py {source} --preset {config.preset} --lpips none {common}"
    second = f"dit.py {common} --num-latents 64"
    yield "tests", "tests that need a GPU", f"-m pytest -q -p no:cacheprovider {ROOT}/tests/test_cuda.py", r"\d+ \w+ in .*"
    for name, mode in (
        ("compiled, bf16", "--compile on --bf16 on"), ("eager, bf16", "--compile off --bf16 on"),
        ("eager, float32", "--compile off --bf16 off"),
    )[0 if gpu else 2 :]:  # fmt: skip
        mode += f" --steps {config.steps}"
        yield "steps", f"vae.py, {name}", f"{first} {mode} --gan-weight 1 --out vae.pt", TRAINING
        yield "steps", f"dit.py, {name}", f"{second} {mode} --ckpt vae.pt --out dit.pt", TRAINING
    if gpu:
        yield "steps", "vae.py, LPIPS", f"{first} --steps {config.steps} --lpips vgg --out lpips.pt", TRAINING
    half, plain = f"--steps {config.steps // 2}", f"{first} --compile off --bf16 off --gan-weight 0 --steps {config.steps}"
    yield "steps", "vae.py, uninterrupted", f"{plain} --out whole.pt", TRAINING
    yield "steps", "vae.py, half of the steps", f"{plain} --out half.pt {half}", TRAINING
    yield "steps", "… resumed", f"{plain} --out half.pt --resume", TRAINING
    yield "steps", "… compared with uninterrupted", AGAINST + "half.pt", ".+"
    launch = "-m torch.distributed.run --standalone --nproc_per_node=2"
    yield "steps", "vae.py, 2 processes", f"{launch} {ROOT}/{plain} --out ranks.pt", TRAINING
    yield "steps", "… compared with one process", AGAINST + "ranks.pt", ".+"
    yield "tables", "bench.speed growth", "-m bench.speed growth", "matrix product .*"
    yield "tables", "bench.load", "-m bench.load", r"weights \|.*"
    long = "--steps 1000000 --warmup 200 --save-every 1000000 --out"
    yield "train", "vae.py", f"{first} --gan-weight 0 {long} long1.pt", TRAINING
    yield "train", "dit.py", f"{second} --ckpt long1.pt --num-latents 512 {long} long2.pt", TRAINING
    yield "train", "sample.py", "sample.py --ckpt long2.pt --out-dir samples", "wrote .*"
    yield "train", "bench.speed sample", "-m bench.speed sample --ckpt long2.pt", "matrix product .*"
    evaluation = "evaluate.py --ckpt long2.pt --features random --lpips none --videos 64 --out-dir evaluation"
    yield "train", "evaluate.py", evaluation, r"\wFVD on random I3D features +[\d.]+|classifier accuracy +[\d.]+ %"


def run(command, log, seconds, stop):
    """Run a program, logged -> its output. RuntimeError if it fails or exceeds `seconds`; with `stop`, it gets Ctrl-C then."""
    words = shlex.split(command)
    words[0] = f"{ROOT}/{words[0]}" if words[0].endswith(".py") else words[0]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path, "NERV_TEST_GPU": "1"}
    with open(log, "w") as f:
        kw = {"stdout": f, "stderr": subprocess.STDOUT, "cwd": log.parent, "env": env, "start_new_session": True}
        process = subprocess.Popen([sys.executable, *words], **kw)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT if stop else signal.SIGKILL)
            if not stop:
                raise RuntimeError(f"not done within {seconds:.0f} s") from None
    output = log.read_text(errors="replace").replace("\r", "\n").strip()
    if process.wait():
        raise RuntimeError(output.splitlines()[-1] if output else f"status {process.returncode}")
    return output


def compare(names):
    """Print the largest difference between the averaged weights of two checkpoints."""
    one, other = (torch.load(name, map_location="cpu", weights_only=True)["ema"] for name in names)
    off = max(((x - other[key]).abs().max() / x.abs().max().clamp_min(1e-9)).item() for key, x in one.items() if x.numel())
    print("bit-identical" if off == 0 else f"weights differ by {off:.1e} of the largest weight")


def main():
    if sys.argv[1:2] == ["whole.pt"]:
        return compare(sys.argv[1:])
    config = utils.parse_options(Config, __doc__)
    utils.check_positive(config, "minutes", "steps", "batch_size")
    out, end, device = Path(config.out_dir).absolute(), time.time() + 60 * config.minutes, utils.pick_device()
    utils.make_parent(out / "table.md")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    lines = [f"{name}; torch {torch.__version__}; commit {utils.git_revision()}", ""]
    lines += ["| part | what | result | s |", "| --- | --- | --- | --- |"]
    print("\n".join(lines))
    wanted = (row for row in programs(config, device.type == "cuda") if row[0] in config.only)
    for number, (part, what, command, pattern) in enumerate(wanted):
        start, stop = time.time(), part == "train" and "--steps" in command
        left = (end - start) / 3 if stop else min(end - start, 480)
        try:
            output = run(command, out / f"{number:02d}.log", left, stop) if left > 5 else None
            result = "no time left" if output is None else ", ".join(re.findall(pattern, output)) or "nothing to show"
        except (RuntimeError, OSError) as error:
            result = f"**failed**: {' '.join(str(error).split())[:150].replace('|', '/')}"
        lines.append(f"| {part} | {what} | {result} | {time.time() - start:.0f} |")
        print(lines[-1], flush=True)
        (out / "table.md").write_text("\n".join(lines) + "\n")
    print(f"{sum('**failed**' in line for line in lines)} failed; wrote {out / 'table.md'}")


if __name__ == "__main__":
    utils.run(main)
