"""The tables of ablations: every row is a training, what is done is not done again; and the study of the distance."""

import dataclasses

import numpy as np
import pytest
from conftest import SMALL

import dit
import evaluate
import nerv
import vae
from common import utils
from common.utils import UserError
from studies import ablate, variants

TRAINING = ["--clips", "9", "--vae-options", f"{SMALL} --steps 2 --batch-size 2 --decode-frames 1 --bf16 off"]
TRAINING += ["--dit-options", "--steps 2 --batch-size 2 --num-latents 4 --width 12 --depth 2 --bf16 off --extras"]


@pytest.fixture
def quick(monkeypatch, few_held_out):
    """Features and a classifier that take no time; the list of trainings that are started."""
    started, main, generate = [], variants.main, dit.generate
    monkeypatch.setattr("fvd.load_detector", lambda *args, **kw: lambda x: x.reshape(len(x), -1)[:, ::997] / 255.0)
    monkeypatch.setattr(evaluate, "train_classifier", lambda *args: None)
    monkeypatch.setattr(evaluate, "accuracy", lambda classifier, clips, labels: clips.abs().mean().item())
    monkeypatch.setattr(dit, "generate", lambda *args, **kw: generate(*args, **kw | {"steps": 1}))
    monkeypatch.setattr(variants, "main", lambda argv: started.append(" ".join(argv)) or main(argv))
    return started


def test_every_row_is_a_training(monkeypatch):
    """Its options are those of the scripts, and its decoder can be built."""
    built = []

    def train(argv, decoder):
        config = utils.parse_options(vae.Config, "", vae.preset_defaults, argv)
        sizes = {name: getattr(config, name) for name in vae.SIZES}
        built.append(decoder(dataclasses.replace(nerv.CONFIGS[config.preset], **sizes)))

    monkeypatch.setattr(vae, "main", train)
    monkeypatch.setattr(dit, "main", lambda argv, *_: built.append(utils.parse_options(dit.Config, "", None, argv)))
    for name, (_, rows) in ablate.TABLES.items():
        assert name == "2-cumulative" or list(rows.values())[-1][1] == ""  # the paper's choice is the base
        for _, own in rows.values():
            vae_options, dit_options = ablate.options_of(name, own)
            variants.main(["vae", *vae_options.split()])
            variants.main(["dit", *dit_options.split()])
    assert {network.config.pos_size for network in built[::2]} == {1, 4, 8, 16}


def test_the_cumulative_table_has_the_papers_figures_and_changes_one_thing_at_a_time():
    _, rows = ablate.TABLES["2-cumulative"]
    assert [paper for paper, _ in rows.values()] == [570, 562, 283, 254, 248, 235, 219, 184]
    options = [dict(zip(own.split()[::2], own.split()[1::2])).items() for _, own in rows.values()]
    for before, after in zip(options, options[1:]):
        assert len({name for name, _ in before ^ after}) == 1


def test_what_is_done_is_not_done_again(quick, monkeypatch, tmp_path, capsys):
    def run(*options):
        quick.clear()
        ablate.main([*TRAINING, "--only", "3a", "--seeds", "1", "--out-dir", str(tmp_path), *options])
        return ["dit" if line.startswith("dit") else "vae" for line in quick]

    monkeypatch.setitem(ablate.TABLES, "3a", ("denoiser", {"latte": (342, "--denoiser latte"), "dit": (295, "")}))
    assert run() == ["vae", "dit"] * 2 and sum("--denoiser latte" in line for line in quick) == 1
    assert not list(tmp_path.glob("dit*.pt")) and not list(tmp_path.glob("runs/dit*/values.npy"))
    (checkpoint,) = tmp_path.glob("vae*.pt")
    before, trained = (tmp_path / "runs.csv").read_text(), checkpoint.stat().st_mtime_ns
    assert before.count("\n") == 4 and run() == [] and (tmp_path / "runs.csv").read_text() == before
    assert run("--report", "--seeds", "3") == [] and "| 1     |" in capsys.readouterr().out
    assert run("--clips", "5") == ["vae", "dit"] * 2  # other settings of stage 2: its rows anew, on the stage 1 that is there
    assert checkpoint.stat().st_mtime_ns == trained and len(list(tmp_path.glob("vae*.pt"))) == 1
    run("--features", "i3d", "--only", "2e")  # by the true FVD rows of stage 1 have one too
    assert "| PSNR, dB | rFVD " in capsys.readouterr().out


def test_a_run_that_is_stopped_is_not_done(tmp_path, monkeypatch, few_held_out):
    monkeypatch.setattr(utils.Interrupt, "stop", lambda self: True)
    with pytest.raises(UserError, match="stopped"):
        ablate.main([*TRAINING, "--only", "2e", "--out-dir", str(tmp_path)])
    assert not (tmp_path / "runs.csv").exists()


def test_studies_of_the_distance(call, monkeypatch, capsys):
    """Features: colours and changes, which all corruptions but few move."""

    def detector(clips):
        x = clips.astype(np.float64).reshape(*clips.shape[:2], -1) / 255
        return np.concatenate([x[:, :, ::97].std(2), abs(np.diff(x, axis=1)).mean(2)], 1)

    detector.meta = {"features": "random I3D"}
    monkeypatch.setattr("fvd.load_detector", lambda *args, **kw: detector)
    assert call("studies.fvd", "bias --clips 32") == call("studies.fvd", "sensitivity --clips 32") == 0
    rows = [[cell.strip() for cell in line.split("|")[1:]] for line in capsys.readouterr().out.splitlines() if "|" in line]
    distances = {row[0]: float(row[1]) for row in rows if row[0].isdecimal()}
    assert distances["2"] > 2 * distances["16"] > 0  # the bias of few clips
    assert [float(row[2]) for row in rows if row[0].startswith(("Gaussian", "last"))] == [1.0] * 3
