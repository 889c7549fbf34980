"""The studies: ablations, the comparison with what one would use instead, of the distance, and the tables of the pages."""

import csv
import dataclasses
from statistics import mean

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL

import dit
import evaluate
import nerv
import vae
from common import utils
from common.utils import UserError
from studies import ablate, compare, tables, variants

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
    """Its options are those of the scripts, its decoder can be built; the cumulative table changes one thing at a time."""
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
    _, rows = ablate.TABLES["2-cumulative"]
    options = [dict(zip(own.split()[::2], own.split()[1::2])).items() for _, own in rows.values()]
    assert all(len({name for name, _ in before ^ after}) == 1 for before, after in zip(options, options[1:]))


def test_what_is_done_is_not_done_again_but_what_is_stopped_is(quick, monkeypatch, tmp_path, capsys):
    def run(*options):
        quick.clear()
        ablate.main([*TRAINING, "--only", "3a", "--seeds", "1", "--out-dir", str(tmp_path), *options])
        return ["dit" if line.startswith("dit") else "vae" for line in quick]

    monkeypatch.setitem(ablate.TABLES, "3a", ("denoiser", {"latte": (342, "--denoiser latte"), "dit": (295, "")}))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="stopped"):
        patch.setattr(utils.Interrupt, "stop", lambda self: True)
        run()
    assert not (tmp_path / "runs.csv").exists()
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


def test_pixels_lead_back_and_are_patches_in_order_of_time_and_place():
    rival = compare.Rival("pixels", 16, 16, 16)
    assert (rival.nerv_config.num_tokens, rival.nerv_config.token_dim) == (2 * 2 * 2, 8 * 3 * 8 * 8)
    video = torch.rand(3, 16, 3, 16, 16) * 2 - 1
    tokens, logvar = rival.encode(video)
    assert logvar.exp().max() < 1e-6 and torch.equal(rival.decode(tokens, torch.arange(16)), video)
    video[:, 9, 1, 2, 11] += 1  # the second eight frames, upper right
    changed = (rival.encode(video)[0] != tokens).any(2).any(0)
    assert changed.tolist() == [False] * 5 + [True] + [False] * 2


def test_the_denoiser_of_pixels_predicts_the_clean_patch():
    torch.manual_seed(0)
    model = compare.CleanDiT(dit.DiTConfig(num_tokens=3, token_dim=5, num_classes=2, width=24, depth=1, heads=2))
    alpha, sigma = dit.noise_schedule()
    clean, noise, timestep = torch.randn(5), torch.randn(2, 3, 5), torch.tensor([10, 900])
    torch.nn.init.zeros_(model.out.weight)
    model.out.bias.data = clean
    noised = alpha[timestep][:, None, None] * clean + sigma[timestep][:, None, None] * noise
    torch.testing.assert_close(model(noised, timestep, torch.tensor([0, 1])), noise, rtol=1e-4, atol=1e-4)


def test_frames_go_through_the_autoencoder_one_by_one():
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    rival = compare.Rival("frames", 3, 32, 16).eval()
    assert (rival.nerv_config.num_tokens, rival.nerv_config.token_dim) == (3 * 2 * 2, 16)
    video = torch.rand(2, 3, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        tokens, logvar = rival.encode(video)
        made = rival.decode(tokens, torch.arange(3))
        direct = rival.net.decode(rival.net.encode(video[:, 1]).latent_dist.mean).sample
    assert tokens.shape == logvar.shape == (2, 12, 16) and made.shape == video.shape
    torch.testing.assert_close(made[:, 1], direct, rtol=1e-4, atol=1e-5)  # tokens are folded back as they were cut


@pytest.mark.parametrize("seconds, trials, fit", [(60, [30], 120), (2000, [30, 300], 40_000)])
def test_a_trial_finds_how_many_steps_fit_if_it_is_long_enough(seconds, trials, fit, tmp_path, monkeypatch):
    """Seventy steps of half a second, in which clips are drawn for the first time, then twenty a second."""
    done, directory = [], utils.log_directory(tmp_path / "x.pt")
    directory.mkdir(parents=True)
    monkeypatch.setattr("common.checkpoints.load", lambda *args: {"step": done[-1], "config": {"steps": done[-1]}})

    def training(argv):
        done.append(int(argv[argv.index("--steps") + 1]))
        rows = [f"{step},{0.5 * min(step, 70) + 0.05 * max(0, step - 70)}\n" for step in range(10, done[-1] + 1, 10)]
        (directory / "losses.csv").write_text("".join(["step,seconds\n", *rows]))

    assert compare.train_for(seconds, training, [], tmp_path / "x.pt") == done[-1] == pytest.approx(fit, rel=0.01)
    assert done[:-1] == trials


def coarse(frames):
    """Frames [B, T, H, W, 3] as features [B, 12]: a frame of 2 × 2."""
    return np.asarray(frames, np.float32).reshape(len(frames), -1, 2, 16, 2, 16, 3).mean((1, 3, 5)).reshape(len(frames), 12)


coarse.meta = {"features": "random frames"}


@pytest.mark.parametrize("method", compare.METHODS)
def test_a_method_is_trained_judged_and_not_trained_again(method, tmp_path, monkeypatch, few_held_out):
    if method == "frames":
        pytest.importorskip("diffusers")
    small = "--batch-size 4 --num-latents 16 --width 48 --depth 2"
    argv = f"--dataset shapes --resolution 32 --num-frames 8 --minutes 0.02 --seeds 1 --lrs 1 --bf16 off --methods {method}"
    argv = [*argv.split(), *"--lpips none --videos 4".split(), "--out-dir", str(tmp_path)]
    argv += ["--vae-options", "--num-tokens 8 --token-dim 4 --width 8 --batch-size 4 --lpips none --extras basis=4"]
    argv += ["--dit-options", small + " --extras components=2x8", "--rival-options", small + " --extras muon"]
    monkeypatch.setattr(utils.RunLog, "EVERY", 10)  # the study sets it, and it is put back here
    monkeypatch.setattr("demo.nearest_clips", lambda clips, train_set: clips)
    monkeypatch.setattr("evaluate.train_classifier", lambda *args: dit.nn.Module())
    monkeypatch.setattr("evaluate.classify", lambda classifier, clips: torch.zeros(len(clips)))
    monkeypatch.setattr("fvd.load_detector", lambda *args: coarse)  # I3D would take most of the time
    compare.main(argv)
    with open(tmp_path / "runs.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["method"] == method and float(row["gFVD"]) > 0
    assert row["numbers"] == {"ours": "16", "frames": "512", "pixels": "24576"}[method]
    monkeypatch.setattr(compare, "train", lambda *args: pytest.fail("trained again"))
    compare.main(argv)


TABLES = tables.tables(ROOT / "docs")


def cells(lines):
    return [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in lines.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("pages, title", TABLES, ids=[title for _, title in TABLES])
def test_pages_have_the_tables(pages, title, monkeypatch, capsys):
    monkeypatch.setattr(tables, "tables", lambda docs: {(pages, title): TABLES[pages, title]})
    monkeypatch.setattr("sys.argv", ["tables"])
    tables.main()
    header, _, *rows = cells(capsys.readouterr().out)
    for page in pages.split(", "):
        found = cells((ROOT / page).read_text())
        start = found.index(header)
        assert found[start + 2 : start + 2 + len(rows)] == rows


# What the method, learning rate and settings of a row's runs contain.
ROWS = {
    "NeRV-Diffusion, the paper's decoder (replicate padding)": ("ours 2 sprites", "--token-dim 64 --lpips"),
    "… with a shared basis (not the paper's)": ("ours 1 sprites", "--pictures"),  # as the option was called
    "frame-wise latent diffusion, Latte's shape": ("frames 4 sprites",),
    "diffusion of space-time patches of pixels": ("pixels 4 sprites",),
}
COLUMNS = {  # column -> (column of compare.csv, digits, minutes)
    "latent size": ("numbers", 0, 12),
    "12 minutes, three seeds": ("gFVD", 0, 12),
    "an hour, one seed": ("gFVD", 0, 60),
    "seconds to sample a clip": ("seconds a clip", 2, 12),
}


@pytest.mark.parametrize("column", COLUMNS)
def test_the_comparison_is_of_its_runs(column):
    """Each cell is the mean of the runs with all words, with the least and most gFVD of several; the best is bold."""
    (name, digits, minutes), means = COLUMNS[column], {}
    cells = {row: cell[column] for row, cell in TABLES["README.md, docs/compare.md", "gFVD after equal time"].items()}
    runs = list(csv.DictReader((ROOT / "docs/compare.csv").read_text().splitlines()))
    for row, words in ROWS.items():
        words = [*words, f"| {minutes} min, 0.6, bf16 on"]
        found = [run for run in runs if all(w in f"{run['method']} {run['lr']} {run['settings']}" for w in words)]
        values = [float(run[name]) for run in found]
        text = f"{mean(values):,.{digits}f}" if values else "not run"
        means[row] = float(text) if values and name != "numbers" else np.inf
        if name == "gFVD" and len(values) > 1:
            text += f" ({min(values):,.0f} to {max(values):,.0f})"
        assert cells[row].replace("**", "") == text
    best = [row for row in means if means[row] == min(means.values()) < np.inf]
    assert cells.keys() == ROWS.keys() and [row for row in cells if cells[row].startswith("**")] == best
