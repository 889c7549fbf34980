"""Frame prediction and the cache of latents."""

import re

import numpy as np
import pytest
import torch
from conftest import SMALL_DIT, script, write_mp4

import data
import dit
import sample
from common import checkpoints, utils, video
from dit import DiT, DiTConfig, cached_latents, encode_batch, encode_given, generate
from vae import load_vae


@pytest.fixture(scope="module")
def stage1(trained):
    return load_vae(checkpoints.load(trained / "vae.pt", "vae", ""))


@pytest.fixture(scope="module")
def predictor(trained, tmp_path_factory):
    """A directory with a dit.pt of a few steps that goes on from 5 frames."""
    cwd = tmp_path_factory.mktemp("predictor")
    options = ("--ckpt", trained / "vae.pt", "--cond-frames", 5, "--steps", 4, "--batch-size", 8, "--num-latents", 16)
    done = script("dit.py", *options, *SMALL_DIT, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd


# -------------------------------------------------------------------------------------------------------------------- the model


@torch.no_grad()
def test_only_the_given_frames_reach_the_condition(stage1):
    clip = video.to_clip(data.Shapes()[0][0])[None]
    given = encode_given(stage1, clip, 5)
    other = clip.clone()
    other[:, 5:] = torch.rand_like(other[:, 5:])
    assert torch.equal(encode_given(stage1, other, 5), given)
    other[:, 4] = 0.3
    assert not torch.equal(encode_given(stage1, other, 5), given)
    zeros = torch.cat([clip[:, :5], torch.zeros_like(clip[:, 5:])], 1)
    assert torch.equal(stage1.encode(zeros)[0], given)  # 5 given frames and 11 zero frames


def tiny(cond_frames):
    torch.manual_seed(0)
    model = DiT(DiTConfig(6, 5, 3, cond_frames, width=24, depth=2, heads=2)).eval()
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model


@torch.no_grad()
def test_given_tokens_go_in_beside_the_noised_ones():
    model, x, step, label = tiny(5), torch.randn(2, 6, 5), torch.tensor([3, 700]), torch.tensor([0, 1])
    assert model.embed.in_features == 10 and tiny(0).embed.in_features == 5
    given = torch.randn(2, 6, 5)
    seen = []
    model.embed.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    with_given, without = model(x, step, label, given), model(x, step, label)
    assert torch.equal(seen[0], torch.cat([x, given], -1)) and torch.equal(seen[1], torch.cat([x, torch.zeros_like(x)], -1))
    assert with_given.shape == x.shape and (with_given - without).abs().max() > 1e-3


def test_guidance_is_on_class_and_given_frames_together():
    asked, model = [], tiny(5)

    def record(x, step, label, given):
        asked.append((label, given))
        return DiT.forward(model, x, step, label, given)

    record.config = model.config
    given = torch.randn(2, 6, 5)
    generate(record, torch.tensor([0, 2]), steps=1, guidance=2.0, seed=0, given=given)
    ((label, both),) = asked
    assert label.tolist() == [0, 2, 3, 3] and torch.equal(both[:2], given) and not both[2:].any()


def test_training_drops_the_class_alone_and_both_together(trained, tmp_path, monkeypatch):
    seen, loss = [], dit.diffusion_loss

    def keep(model, theta0, labels, given, *args):
        seen.append((labels, given.flatten(1).any(1)))
        return loss(model, theta0, labels, given, *args)

    monkeypatch.setattr(dit, "diffusion_loss", keep)
    monkeypatch.chdir(tmp_path)
    options = "--cond-frames 5 --steps 1 --batch-size 512 --num-latents 64 --refine 0 --drop-condition 0.25"
    monkeypatch.setattr("sys.argv", ["dit.py", "--ckpt", f"{trained}/vae.pt", *options.split(), *SMALL_DIT])
    monkeypatch.setattr(dit, "generate", lambda model, labels, **_: torch.zeros(len(labels), 32, 16))
    dit.main()
    ((labels, given),) = seen
    assert set(labels[~given].tolist()) == {9}  # no frames: no class either
    assert (~given).float().mean() == pytest.approx(0.25, abs=0.08)
    assert (labels == 9).float().mean() == pytest.approx(0.5, abs=0.08)


# ------------------------------------------------------------------------------------------------------------------- the cache


def test_cache_holds_the_posteriors_and_is_read_again(stage1, tmp_path, monkeypatch):
    shapes = data.Shapes()
    args = (stage1, shapes, 11, 5, torch.device("cpu"))
    latents, labels = cached_latents(tmp_path / "c", {"a": 1}, *args, batch_size=4)
    clips = torch.stack([video.to_clip(shapes[i][0]) for i in range(11)])
    assert latents.shape == (11, 3, 32, 16) and labels.tolist() == [i % 9 for i in range(11)]
    torch.testing.assert_close(latents.float(), encode_batch(stage1, clips, 5), rtol=2e-3, atol=2e-3)

    def no_more(*args):
        raise AssertionError("encoded again")

    monkeypatch.setattr(dit, "encode_batch", no_more)
    again = cached_latents(tmp_path / "c", {"a": 1}, *args)
    assert torch.equal(again[0], latents) and torch.equal(again[1], labels)
    with pytest.raises(AssertionError, match="encoded again"):
        cached_latents(tmp_path / "c", {"a": 2}, *args)
    assert not (tmp_path / "c" / "key.json").exists()  # half written, and known to be


def test_fingerprint_tells_networks_apart(stage1):
    before = utils.fingerprint(stage1)
    bias = stage1.encoder.to_latent.bias
    bias.data[0] += 1e-3
    assert utils.fingerprint(stage1) != before
    bias.data[0] -= 1e-3


# ------------------------------------------------------------------------------------------------------------------- sample.py


def test_predict_real_videos(predictor, tmp_path):
    long, short = video.to_clip(data.Shapes()[0][0]), video.to_clip(data.Shapes()[5][0])[:7]
    files = [write_mp4(tmp_path / "long", long), write_mp4(tmp_path / "short", short)]
    done = script(
        "sample.py",
        "--ckpt",
        predictor / "dit.pt",
        "--predict",
        *files,
        "--count",
        2,
        "--steps",
        3,
        "--guidance",
        1.5,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out" / "samples"
    names = sorted(p.name for p in (out / "predict").glob("*.mp4"))
    # The long one says how it went on; the short one has the given frames only.
    assert names == [f"{i:02d}_{n}.mp4" for i, n in enumerate(["real", *["predicted"] * 4])]
    assert re.search(r"PSNR of the 11 predicted frames \d+\.\d+ dB, of copies of the last given one \d+\.\d+ dB", done.stdout)
    real, predicted = (video.read_frames(out / "predict" / names[i], 32) for i in (0, 1))
    assert real.shape == predicted.shape == (16, 32, 32, 3)
    edge = np.concatenate([predicted[:, 0], predicted[:, -1], predicted[:, :, 0], predicted[:, :, -1]], 1).astype(int)
    orange = abs(edge - [255, 153, 0]).mean((1, 2))
    assert (orange < 40).tolist() == [True] * 5 + [False] * 11
    inside = abs(predicted.astype(int) - real)[:, 4:-4, 4:-4].mean((1, 2, 3))
    assert (inside[:5] < 3).all() and (inside[5:] > 3).all()


def test_predicted_videos_are_drawn_to_the_given_frames(predictor, monkeypatch):
    """--refine fits the predicted tokens to the frames that are known, and to no other."""
    clip = video.to_clip(data.Shapes()[0][0])
    other = torch.cat([clip[:5], -clip[5:]])
    # What is predicted is the mean of all tokens: the fixture's denoiser, after two steps, begins too far for 20 of them.
    monkeypatch.setattr(dit, "generate", lambda model, labels, *args: torch.zeros(len(labels), *args[-1].shape[1:]))
    error = {}
    for name, frames, steps in (("plain", clip, 0), ("fitted", clip, 20), ("other", other, 20)):
        config = sample.Config(ckpt=str(predictor / "dit.pt"), refine=steps, steps=3, guidance=1.0)
        sampler = sample.Sampler(config)
        with torch.no_grad():
            tokens = sampler.generate([0], frames[None])
        error[name] = (sampler.decode(tokens, torch.arange(5.0)) - clip[None, :5]).square().mean()
    assert error["fitted"] < 0.9 * error["plain"] and error["other"] == error["fitted"]


def test_the_residual_restores_what_stays_as_it_is(predictor, tmp_path):
    still = video.to_clip(data.Shapes()[0][0])[:1].expand(16, -1, -1, -1)
    file, score = write_mp4(tmp_path / "still", still), {}
    for option in ("--residual", "--no-residual"):
        done = script("sample.py", "--ckpt", predictor / "dit.pt", "--predict", file, option, "--steps", 2, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        score[option] = float(re.search(r"predicted frames (\d+\.\d+) dB", done.stdout)[1])
    assert score["--residual"] > score["--no-residual"] + 5


def test_predict_says_what_it_needs(predictor, trained, tmp_path):
    short = write_mp4(tmp_path / "short", video.to_clip(data.Shapes()[0][0])[:4])
    for ckpt, options, words in (
        (trained / "dit.pt", [], "--cond-frames 5"),
        (trained / "vae.pt", [], "no stage 2"),
        (predictor / "dit.pt", [], "4 frames, and 5 are needed"),
        (predictor / "dit.pt", ["--time-scale", 0.05], "no position after the 5 given frames"),
    ):
        short = short if not options else write_mp4(tmp_path / "whole", video.to_clip(data.Shapes()[0][0]))
        done = script("sample.py", "--ckpt", ckpt, "--predict", short, *options, cwd=tmp_path)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_mark_draws_an_edge_and_leaves_the_clip_alone():
    clip = torch.zeros(2, 3, 64, 64)
    marked = video.mark(clip)
    assert not clip.any() and not marked[:, :, 2:-2, 2:-2].any()
    assert torch.equal(marked[1, :, 1, 30], torch.tensor([1.0, 0.2, -1.0]))
