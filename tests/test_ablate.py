"""The table of ablations: every row for two steps, what is done is not done again, and who wins."""

import contextlib
import csv
import functools
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dit
import evaluate
from common import video
from common.utils import UserError
from studies import ablate, variants

VAE = "--preset nano --num-frames 4 --steps 2 --batch-size 2 --decode-frames 1 --bf16 off"
DIT = "--steps 2 --batch-size 2 --num-latents 4 --bf16 off"


@pytest.fixture
def in_this_process(monkeypatch, few_held_out):
    """Runs are calls of main(), which takes seconds less than a new Python; returns the list of them."""
    calls = []

    def call(self, stage, *options):
        calls.append(shlex.join(map(str, (stage, *options))))
        printed = []
        with monkeypatch.context() as patch:
            patch.setattr("common.utils.tqdm.write", lambda line, **kw: printed.append(line))
            variants.main([stage, *map(str, options)])
        return "\n".join(printed)

    monkeypatch.setattr(ablate.Study, "call", call)
    monkeypatch.setattr(dit, "generate", functools.partial(dit.generate, steps=2))  # sheets are most of the time
    asked = SimpleNamespace(stop=lambda: False)
    monkeypatch.setattr("common.utils.Interrupt", lambda: contextlib.nullcontext(asked))  # signals: main thread only
    monkeypatch.setattr(ablate.Study, "score", lambda self, vae_pt, dit_pt, seed: (50.0 + seed, 2.0, 1.0))
    return calls


def run(monkeypatch, out, *options):
    arguments = ["--vae-options", VAE, "--dit-options", DIT, "--jobs", "1", "--out-dir", str(out), *options]
    monkeypatch.setattr(sys, "argv", ["ablate.py", *arguments])
    ablate.main()


def test_every_row_trains(in_this_process, monkeypatch, tmp_path, capsys):
    run(monkeypatch, tmp_path, "--seeds", "1")
    with open(tmp_path / "runs.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    first = {row["vae"] for row in rows if row["stage"] == "1"}
    second = {(row["vae"], row["dit"]) for row in rows if row["stage"] == "2"}
    for name, (_, table_rows) in ablate.TABLES.items():
        assert table_rows[-1][2:] == ("", ""), name  # the paper's choice is the default
        for _, _, vae_options, dit_options in table_rows:
            assert vae_options in first
            assert name[0] == "2" or (vae_options, dit_options) in second
    assert len(rows) == len(first) + len(second) == len(in_this_process)  # nothing twice
    printed = capsys.readouterr().out
    assert all(f"**Table {name}" in printed for name in ablate.TABLES) and "not yet" not in printed
    assert (tmp_path / "ablate.png").is_file() and not list(tmp_path.glob("dit*.pt"))


def test_what_is_done_is_not_done_again(monkeypatch, tmp_path, capsys):
    calls = []

    def call(self, stage, *options):
        calls.append(" ".join(map(str, (stage, *options))))
        Path(options[options.index("--out") + 1]).touch()
        return "held-out PSNR 20.00 dB after 2 steps, 1 s"

    monkeypatch.setattr(ablate.Study, "call", call)
    monkeypatch.setattr(ablate.Study, "score", lambda self, vae_pt, dit_pt, seed: (50.0 + seed, 2.0, 1.0))
    run(monkeypatch, tmp_path, "--seeds", "1", "--only", "3a")
    assert [call.split()[0] for call in calls] == ["vae", "dit", "dit", "dit"]
    assert sum("--denoiser gpt" in call for call in calls) == sum("--denoiser latte" in call for call in calls) == 1
    before = (tmp_path / "runs.csv").read_text()
    run(monkeypatch, tmp_path, "--seeds", "1", "--only", "3a")
    assert len(calls) == 4 and (tmp_path / "runs.csv").read_text() == before
    run(monkeypatch, tmp_path, "--seeds", "2", "--only", "3a")
    assert len(calls) == 8 and all("--seed 1" in call for call in calls[4:])
    assert "50.50 ± 0.71" in capsys.readouterr().out
    run(monkeypatch, tmp_path, "--report", "--seeds", "3", "--only", "3a", "3b")
    assert len(calls) == 8 and "50.50 ± 0.71" in capsys.readouterr().out
    next(tmp_path.glob("vae_seed0_*.pt")).unlink()  # stage 2 of another table builds on it again, and its row is there already
    run(monkeypatch, tmp_path, "--seeds", "1", "--only", "3b")
    assert [call.split()[0] for call in calls[8:]] == ["vae", "dit", "dit", "dit"]
    assert sum(row.startswith("1,,") for row in (tmp_path / "runs.csv").read_text().splitlines()) == 2
    calls.clear()  # other settings are other runs, and other checkpoints
    run(monkeypatch, tmp_path, "--seeds", "1", "--only", "3a", "--vae-options", "--steps 3")
    assert [call.split()[0] for call in calls] == ["vae", "dit", "dit", "dit"]
    assert len(list(tmp_path.glob("vae_seed0_*.pt"))) == 2
    calls.clear()  # clips and options of stage 2 do not change stage 1
    run(monkeypatch, tmp_path, "--seeds", "1", "--only", "3a", "--clips", "5")
    assert [call.split()[0] for call in calls] == ["dit", "dit", "dit"]


def test_by_the_true_fvd_rows_of_stage_1_have_one_too(in_this_process, monkeypatch, tmp_path, capsys):
    asked = []

    def load_detector(features, **kw):
        asked.append(features)
        return lambda frames: np.asarray(frames).reshape(len(frames), -1)[:, ::997] / 255.0

    monkeypatch.setattr("fvd.load_detector", load_detector)
    monkeypatch.setattr(evaluate, "train_classifier", lambda *a: None)
    run(monkeypatch, tmp_path, "--seeds", "1", "--only", "2e", "--clips", "4")
    assert "rFVD" not in capsys.readouterr().out and not asked
    run(monkeypatch, tmp_path, "--seeds", "1", "--only", "2e", "--clips", "4", "--features", "i3d")
    assert asked == ["i3d"] and "By rFVD: " in capsys.readouterr().out
    with open(tmp_path / "runs.csv", newline="") as f:
        distances = [row["to_real"] for row in csv.DictReader(f)]
    assert distances[:3] == [""] * 3 and all(float(d) > 0 for d in distances[3:]) and len(set(distances[3:])) == 3


def test_a_run_that_fails_names_its_command(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="python -m studies.variants vae .*--modulation repeat.* failed"):
        study = ablate.Study(ablate.Config(vae_options="--no-such-option", out_dir=str(tmp_path)))
        study.run("--modulation repeat", "", 0, False)


def test_an_interrupted_run_is_not_done(monkeypatch, tmp_path):
    printed = "interrupted after 3 steps\nheld-out PSNR 9.00 dB after 3 steps, 1 s\n"
    monkeypatch.setattr(subprocess, "run", lambda *a, **kw: SimpleNamespace(returncode=0, stdout=printed))
    with pytest.raises(UserError, match="was interrupted"):
        ablate.Study(ablate.Config(out_dir=str(tmp_path))).run("", "", 0, False)
    assert not (tmp_path / "runs.csv").exists()


@pytest.mark.parametrize(
    "visible, count, names", [("", 0, []), (None, 2, ["0", "1"]), ("3,GPU-5ab", 2, ["3", "GPU-5ab"]), ("-1", 0, [])]
)
def test_runs_are_spread_over_the_gpus_that_are_left_to_it(monkeypatch, tmp_path, visible, count, names):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES") if visible is None else monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    study, used = ablate.Study(ablate.Config(out_dir=str(tmp_path), jobs=2)), []
    result = SimpleNamespace(returncode=0, stdout="")
    monkeypatch.setattr(subprocess, "run", lambda *a, env, **kw: used.append(env.get("CUDA_VISIBLE_DEVICES")) or result)
    for _ in range(3):
        study.call("vae")
    assert used == ([names[0], names[1], names[0]] if names else [visible] * 3)


def test_runs_of_another_version(tmp_path):
    (tmp_path / "runs.csv").write_text("stage,vae\n1,\n")
    with pytest.raises(UserError, match="runs.csv is not of this version"):
        ablate.Study(ablate.Config(out_dir=str(tmp_path)))


def test_verdicts():
    def rows(*values):
        return [(f"row {i}", list(v)) for i, v in enumerate(values)]

    yes = "yes, row 2 is ahead of row 1 by 2.00, seed by seed by 1.90 to 2.10"
    assert ablate.verdict(rows([1, 1.2], [3, 3.2], [5.1, 5.1])) == yes
    no = "no, row 1 is ahead of row 2 by 1.00, seed by seed by 0.90 to 1.10"
    assert ablate.verdict(rows([1, 1.2], [6, 6.2], [5.1, 5.1])) == no
    noise = "within noise: row 2 is ahead of row 1 by 0.10, seed by seed by -0.80 to 1.00; seeds differ by 1.41"
    assert ablate.verdict(rows([1, 1.2], [4, 6], [5, 5.2])) == noise
    assert ablate.verdict(rows([1], [5], [4])) == "no, of one seed"


def test_scorer(monkeypatch):
    class Clips:
        classes = ("dark", "bright")

        def __len__(self):
            return 8

        def __getitem__(self, i):
            frames = torch.full((4, 16, 16, 3), 40 + 150 * (i % 2), dtype=torch.uint8).numpy()
            frames[0, 0, 0, 0] += i
            return frames, i % 2

        decodes = False

    monkeypatch.setattr("fvd.load_detector", lambda *a, **kw: lambda frames: frames.reshape(len(frames), -1)[:, :8] / 255.0)
    monkeypatch.setattr(evaluate, "train_classifier", lambda *a: Brightness())
    scorer = evaluate.Scorer(Clips(), 2, 8)
    assert scorer.labels.tolist() == [0, 1] * 4
    clips = torch.stack([torch.full((4, 3, 16, 16), -0.7 if label == 0 else 0.5) for label in scorer.labels])
    share, distance = scorer(clips)
    assert share == 100 and distance < 0.01
    share, further = scorer(clips.flip(0) * 0.1)
    assert share == 0 and further > 10 * distance
    real = video.to_clip(torch.as_tensor(scorer.frames))
    _, to_real, to_reconstructed = scorer(0.5 * real, scorer.reconstructed(Blur()))
    assert to_reconstructed < 1e-3 < 0.01 < to_real  # what stage 1 does to all clips counts in the first one only


class Blur:
    """An autoencoder that halves the contrast."""

    def encode(self, clips, steps=0):
        return clips, None

    def decode(self, tokens, t):
        return 0.5 * tokens[:, t]


class Brightness(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, clips):
        brightness = clips.mean((1, 2, 3, 4))
        return torch.stack([-brightness, brightness], 1)


def test_a_study_takes_the_cores_that_it_may_use(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {2, 3, 5, 7}, raising=False)
    for jobs, found in ((0, (4, 1)), (1, (1, 4)), (8, (8, 1))):
        study = ablate.Study(ablate.Config(out_dir=str(tmp_path), jobs=jobs))
        assert (study.jobs, study.threads) == found
