"""The table of ablations: every row for two steps, what is done is not done again, who wins; and the study of the distance."""

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
from studies import fvd as study

TRAINING = ["--clips", "9", "--vae-options", f"{SMALL} --steps 2 --batch-size 2 --decode-frames 1 --bf16 off"]
TRAINING += ["--dit-options", "--steps 2 --batch-size 2 --num-latents 4 --width 12 --depth 2 --bf16 off --extras"]


@pytest.fixture
def quick(monkeypatch, few_held_out):
    """Features and a judge that take no time; the list of trainings that are started."""
    started, main, generate = [], variants.main, dit.generate
    monkeypatch.setattr("fvd.load_detector", lambda *args, **kw: lambda x: x.reshape(len(x), -1)[:, ::997] / 255.0)
    monkeypatch.setattr(evaluate, "train_classifier", lambda *args: None)
    monkeypatch.setattr(evaluate, "accuracy", lambda judge, clips, labels: clips.abs().mean().item())
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
    plan = ablate.plan(ablate.TABLES, 1)
    for vae_options, dit_options, *_ in plan:
        variants.main(["vae", *vae_options.split()])
        variants.main(["dit", *dit_options.split()])
    assert len(set(plan)) == len(plan) and all(rows[-1][2:] == ("", "") for _, rows in ablate.TABLES.values())  # the paper's
    assert {network.config.pos_size for network in built[::2]} == {1, 4, 8, 16}


def test_what_is_done_is_not_done_again(quick, monkeypatch, tmp_path, capsys):
    def run(*options):
        quick.clear()
        ablate.main([*TRAINING, "--only", "3a", "--seeds", "1", "--out-dir", str(tmp_path), *options])
        return ["dit" if line.startswith("dit") else "vae" for line in quick]

    monkeypatch.setitem(ablate.TABLES, "3a", ("denoiser", ablate.TABLES["3a"][1][1:]))  # Latte and the paper's
    assert run() == ["vae", "dit"] * 2 and sum("--denoiser latte" in line for line in quick) == 1
    assert (tmp_path / "ablate.png").is_file()
    assert not list(tmp_path.glob("dit*.pt")) and not list(tmp_path.glob("runs/dit*/values.npy"))
    (checkpoint,) = tmp_path.glob("vae*.pt")
    before, trained = (tmp_path / "runs.csv").read_text(), checkpoint.stat().st_mtime_ns
    assert before.count("\n") == 4 and run() == [] and (tmp_path / "runs.csv").read_text() == before
    assert run("--report", "--seeds", "3") == [] and "| 1     |" in capsys.readouterr().out
    assert run("--clips", "5") == ["vae", "dit"] * 2  # other settings of stage 2: its rows anew, on the stage 1 that is there
    assert checkpoint.stat().st_mtime_ns == trained and len(list(tmp_path.glob("vae*.pt"))) == 1
    run("--features", "i3d", "--only", "2e")  # by the true FVD rows of stage 1 have one too
    assert "By rFVD: " in capsys.readouterr().out


def test_a_run_that_is_stopped_is_not_done(tmp_path, monkeypatch, few_held_out):
    monkeypatch.setattr(utils.Interrupt, "stop", lambda self: True)
    with pytest.raises(UserError, match="stopped"):
        ablate.main([*TRAINING, "--only", "2e", "--out-dir", str(tmp_path)])
    assert not (tmp_path / "runs.csv").exists()


def test_runs_of_another_version(tmp_path):
    (tmp_path / "runs.csv").write_text("stage,vae\n1,\n")
    with pytest.raises(UserError, match="runs.csv is not of this version"):
        ablate.main(["--out-dir", str(tmp_path)])


@pytest.mark.parametrize(
    "values, expected",
    [
        ([[1, 1.2], [3, 3.2], [5.1, 5.1]], "yes, row 2 is ahead of row 1 by 2.00, seed by seed by 1.90 to 2.10"),
        ([[1, 1.2], [6, 6.2], [5.1, 5.1]], "no, row 1 is ahead of row 2 by 1.00, seed by seed by 0.90 to 1.10"),
        ([[1, 1.2], [4, 6], [5, 5.2]], "within noise: row 2 is ahead of row 1 by 0.10, seed by seed by -0.80 to 1.00; "
         "seeds differ by 1.41"),
        ([[1], [5], [4]], "no, of one seed"),
    ],
)  # fmt: skip
def test_verdicts(values, expected):
    assert ablate.verdict([(f"row {i}", v) for i, v in enumerate(values)]) == expected


@pytest.mark.parametrize("topic", ["bias", "sensitivity"])
def test_studies_of_the_distance(tmp_path, monkeypatch, capsys, topic):
    """Features: colours and changes, which all corruptions but few move."""

    def detector(clips):
        x = clips.astype(np.float64).reshape(*clips.shape[:2], -1) / 255
        return np.concatenate([x[:, :, ::97].std(2), abs(np.diff(x, axis=1)).mean(2)], 1)

    detector.meta = {"features": "random I3D"}
    monkeypatch.setattr("fvd.load_detector", lambda *args, **kw: detector)
    monkeypatch.setattr("sys.argv", ["x", topic, "--clips", "32", "--resolution", "16", "--out-dir", str(tmp_path / "new")])
    study.main()
    printed = capsys.readouterr().out
    assert (tmp_path / "new" / f"{topic}.png").is_file()
    if topic == "bias":
        distances = [float(line.split("|")[2]) for line in printed.splitlines() if line.startswith(("| 2 ", "| 16"))]
        assert distances[0] > 2 * distances[1] > 0  # the bias of few clips
    else:
        correlations = [float(line.split("|")[3]) for line in printed.splitlines() if line.startswith(("| Gaussian", "| last"))]
        assert correlations == [1.0] * 3
