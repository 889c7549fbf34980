"""What a machine with a GPU should show, in half an hour and in order of worth: `python -m bench.gpu`.

suite    the tests, with those that ask for a GPU
steps    steps of both trainings, compiled and eager, with discriminator, R1 and LPIPS; going on, and two processes, against one
memory   what steps take, against what common/memory.py predicts
tables   bench.speed conv, decode and sample, and bench.costs train
train    stage 1 on --data-dir or the built-in shapes, then stage 2, samples and an evaluation

Every result is a row, what failed or no time was left for too. table.md and the programs' logs in --out-dir are complete at any
moment. It runs without a GPU as well: python -m bench.gpu --preset nano --steps 2 --only steps
"""

import csv
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import nerv
from bench import costs
from common import memory, utils
from common.utils import UserError, option

ROOT = Path(__file__).parent.parent
MINUTES = {"suite": 8, "steps": 6, "memory": 4, "tables": 6, "train": 13}  # at most


@dataclass
class Config:
    only: list = option("what", list(MINUTES), "parts to run", nargs="+", choices=list(MINUTES), metavar="PART")
    preset: str = option("what", "S", "sizes of the networks", choices=list(nerv.CONFIGS))
    data_dir: str = option("what", "", "folder of videos to train on; default: the built-in shapes")
    steps: int = option("what", 12, "steps of each short run, 2 or more")
    batch_size: int = option("what", 0, "clips per step, even; 0: as many of 8 as fit the GPU")
    train_steps: int = option("what", 1_000_000, "steps of the long trainings, which time will end before")
    minutes: float = option("what", 30.0, "for everything")
    device: str = option("what", "auto", "cpu, cuda, cuda:1, …; auto: CUDA where there is one")
    out_dir: str = option("output", "out/gpu", "where table, logs and checkpoints go")


class Report:
    """The table so far, and how much time there is."""

    def __init__(self, config, device):
        self.config, self.device, self.gpu, self.out = config, device, device.type == "cuda", Path(config.out_dir).absolute()
        utils.make_parent(self.out / "table.md")
        self.end, self.part, self.part_end, self.logs, self.failed = time.time() + 60 * config.minutes, "", 0.0, 0, 0
        name = torch.cuda.get_device_name(device) if self.gpu else f"CPU, {torch.get_num_threads()} threads: no GPU row counts"
        title = f"{name}; torch {torch.__version__}; commit {utils.git_revision() or 'unknown'}; `{' '.join(sys.argv[1:])}`"
        columns = "| part | what | result | s | log |\n| --- | --- | --- | --- | --- |"
        (self.out / "table.md").write_text(f"{title}\n\n{columns}\n")

    def row(self, what, result, seconds=0.0, log=""):
        line = f"| {self.part} | {what} | {result.replace('|', '/')} | {seconds:.0f} | {log} |"
        with open(self.out / "table.md", "a") as f:
            f.write(line + "\n")
        print(line, flush=True)
        self.failed += result.startswith("failed")

    def left(self):
        return min(self.part_end, self.end) - time.time()

    def run(self, what, command, read, seconds=None, **env):
        """A row with read(output) of a program; it is asked to stop after `seconds`, and ended where its part's time is over.

        Returns whether there is such a result.
        """
        if self.left() < 3:
            self.row(what, "left out: no time")
            return False
        self.logs += 1
        log, start, late = self.out / f"{self.logs:02d}.log", time.time(), False
        env = os.environ | {"PYTHONPATH": utils.python_path(ROOT)} | ({} if self.gpu else {"CUDA_VISIBLE_DEVICES": ""}) | env
        with open(log, "w") as f:
            print("$ python", command, file=f, flush=True)
            kw = dict(stdout=f, stderr=subprocess.STDOUT, env=env, start_new_session=True)
            process = subprocess.Popen([sys.executable, *shlex.split(command)], **kw)
            try:
                process.wait(min(seconds or math.inf, self.left()))
            except subprocess.TimeoutExpired:
                late = seconds is None or self.left() < 0
                os.killpg(process.pid, signal.SIGINT)
                try:
                    process.wait(max(self.left(), 30))
                except subprocess.TimeoutExpired:
                    late = True
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        output = log.read_text(errors="replace").replace("\r", "\n")
        try:
            if late:
                raise UserError(f"no end within {time.time() - start:.0f} s")
            if process.returncode:
                raise UserError("out of memory" if costs.short_of_memory(output) else output.strip().splitlines()[-1][:150])
            result = read(output)
        except Exception as error:  # whatever it is, it is a row, and the next program starts
            result = f"failed: {' '.join(str(error).split()) or type(error).__name__}"
        self.row(what, result, time.time() - start, log.name)
        return not result.startswith("failed")


def script(name):
    return shlex.quote(str(ROOT / name))


def train(report, what, program, name, options, ranks=1, seconds=None, read=None):
    """Train into out_dir/name.pt. The row: the loss, steps per second, memory, or what read makes of the output."""
    run_dir = report.out / name

    def losses(output):
        with open(run_dir / "losses.csv") as f:
            rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(f)]
        first, last = rows[0], rows[-1]
        if not all(map(math.isfinite, last.values())) or "skipped so far" in output:
            raise UserError("not finite, or steps were skipped")
        found, seconds = [f"loss {last['loss']:.4g} in step {last['step']:.0f}"], last["seconds"] - first["seconds"]
        if seconds >= 1:  # the clock has tenths
            found.append(f"{(last['step'] - first['step']) / seconds:.2f} steps / s")
        return ", ".join(found + re.findall(r"held-out PSNR [\d.-]+ dB|peak memory [\d.]+ GiB", output))

    launch = f"-m torch.distributed.run --standalone --nproc_per_node={ranks} " if ranks > 1 else ""
    device = report.device if ranks == 1 or torch.cuda.device_count() < ranks else report.device.type
    to = f"--device {device} --out {shlex.quote(f'{run_dir}.pt')} --run-dir {shlex.quote(str(run_dir))} --save-every 1000000"
    return report.run(what, f"{launch}{script(program)} {to} --log-every 1 {options}", read or losses, seconds)


def stage1(report, options):
    """Options of vae.py: preset and data, discriminator and R1 from the second step on."""
    c = report.config
    where = f"--dataset folder --data-dir {shlex.quote(c.data_dir)}" if c.data_dir else "--dataset shapes"
    gan = "--gan-weight 1 --gan-start 1 --gan-warmup 0 --gan-every 1 --r1-every 2"
    return f"{where} --preset {c.preset} --lpips none --warmup 1000 --batch-size {c.batch_size} {gan} {options}"


def stage2(report, name, options):
    return f"--ckpt {shlex.quote(str(report.out / name))} --batch-size {report.config.batch_size} --warmup 1000 {options}"


def suite(config, report):
    def last(output):
        return output.strip().splitlines()[-1]

    tests = "-m pytest -q -p no:cacheprovider"
    report.run("tests that want a GPU", f"{tests} {script('tests/test_cuda.py')}", last, NERV_TEST_GPU="1")
    report.run("all others, which see none", f"{tests} -m 'not weights' {script('tests')}", last)


def steps(config, report):
    # Compiling S takes minutes, and eager rows are not to wait for it.
    modes = [("eager, bf16", "off", "on"), ("compiled, bf16", "on", "on"), ("eager, float32", "off", "off")]
    for what, compiled, bf16 in modes if report.gpu else modes[2:]:
        mode = f"--steps {config.steps} --compile {compiled} --bf16 {bf16}"
        train(report, f"vae.py, {what}", "vae.py", "vae", stage1(report, mode))
        latents = "--cache-latents --num-latents 64"
        train(report, f"dit.py, {what}", "dit.py", "dit", stage2(report, "vae.pt", f"{mode} {latents}"))

    def against(name):
        """How far the checkpoint is from that of one process that was never stopped."""
        networks = [torch.load(report.out / f"{n}.pt", map_location="cpu", weights_only=True)["ema"] for n in ("vae", name)]
        pairs = [(p.double(), networks[1][key].double()) for key, p in networks[0].items() if p.numel()]
        off = max((a - b).abs().max() / a.abs().max().clamp_min(1e-9) for a, b in pairs).item()
        return "equal to the bit" if off == 0 else f"weights differ by {off:.1e} of the largest"

    # What ran last, eager in float32, is repeated in two runs, and in two processes. The warm-up is longer than both.
    half, whole = (stage1(report, f"--compile off --bf16 off --steps {n}") for n in (config.steps // 2, config.steps))
    if train(report, "vae.py, half of the steps", "vae.py", "resumed", half + " --log-every 1000", read=lambda _: "done"):
        train(
            report,
            "… the rest with --resume, against one run",
            "vae.py",
            "resumed",
            whole + " --resume",
            read=lambda _: against("resumed"),
        )
    cards = min(2, torch.cuda.device_count()) if report.gpu else 0
    what = f"vae.py, 2 processes, {cards or 'no'} GPU{'s' * (cards != 1)}, against one"
    train(report, what, "vae.py", "ranks", whole, ranks=2, read=lambda _: against("ranks"))
    if report.gpu:
        train(report, "vae.py, LPIPS", "vae.py", "lpips", stage1(report, f"--steps {config.steps} --lpips vgg"))


def memory_rows(config, report):
    rows, mode = config.batch_size, f"--steps 2 --compile off --bf16 {'on' if report.gpu else 'off'}"

    def compare(predicted, output):
        taken, predicted = float(re.findall(r"peak memory ([\d.]+) GiB", output)[-1]), sum(predicted.values())
        return f"{taken:.2f} GiB, predicted {predicted:.2f}, ratio {taken / predicted:.2f}"

    for recompute in ("off", "on"):
        read = partial(compare, costs.training_memory(config.preset, rows, recompute == "on", report.gpu, "none"))
        options = stage1(report, f"{mode} --gan-width 64 --decode-frames 16 --r1-every 1 --recompute {recompute}")
        train(report, f"vae.py, {rows} clips, eager, --recompute {recompute}", "vae.py", "memory", options, read=read)
    read = partial(compare, costs.stage2_memory(config.preset, rows, report.gpu))
    options = stage2(report, "memory.pt", f"{mode} --no-cache-latents --scheduled-sampling 1")
    train(report, f"dit.py, {rows} clips, eager", "dit.py", "memory2", options, read=read)


def tables(config, report):
    train_table = f"costs train --preset {config.preset} --steps {config.steps}"
    for command in ("speed decode", "speed sample", train_table, "speed conv"):
        report.run(command, f"-m bench.{command}", lambda output: f"{output.count('| ')} cells, in the log")


def long_training(config, report):
    def scores(output):
        return "; ".join(" ".join(line.split()[:-2]) for line in output.splitlines() if re.search(r" to .* clips$", line))

    def evaluate(number):
        to = f"--ckpt {shlex.quote(str(report.out / f'long{number}.pt'))} --device {report.device} --out-dir "
        judge = f"{script('evaluate.py')} --features random --lpips none --videos 64 {to}"
        report.run(f"evaluate.py of stage {number}", judge + shlex.quote(f"{report.out}/evaluation{number}"), scores)
        return f"{script('sample.py')} {to}" + shlex.quote(f"{report.out}/samples")

    long = f"--steps {config.train_steps} --warmup 200 --log-every 20"
    if train(report, "vae.py", "vae.py", "long1", stage1(report, f"{long} --gan-weight 0"), seconds=0.5 * report.left()):
        evaluate(1)
        options = stage2(report, "long1.pt", f"{long} --cache-latents --num-latents 512")
        if train(report, "dit.py", "dit.py", "long2", options, seconds=0.5 * report.left()):
            report.run("sample.py", evaluate(2), lambda output: "wrote out_dir/samples")


PARTS = {"suite": suite, "steps": steps, "memory": memory_rows, "tables": tables, "train": long_training}


def main():
    config = utils.parse_options(Config, __doc__)
    utils.check_positive(config, "minutes", "train_steps")
    if config.steps < 2 or config.batch_size % 2 or config.batch_size < 0:
        raise UserError("--steps has to be 2 or more, and --batch-size even")
    device = utils.pick_device(config.device)
    if not config.batch_size:
        predict = memory.stage1(partial(costs.networks, config.preset, lpips="none"), 16, bf16=False)
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 16 * 2**30
        config.batch_size = max(2, 8 // (memory.plan([predict], 8, free) or (8, 0))[0])
    report = Report(config, device)
    for name in (name for name in PARTS if name in config.only):
        report.part, report.part_end = name, time.time() + 60 * MINUTES[name]
        try:
            PARTS[name](config, report)
        except Exception as error:  # this program's own
            report.row("", f"failed: {' '.join(str(error).split())[:150] or type(error).__name__}")
    print(f"{report.failed} failed; wrote {config.out_dir}/table.md")


if __name__ == "__main__":
    utils.run(main)
