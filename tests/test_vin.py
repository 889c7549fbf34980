"""Long videos by chunks: the interface beside the DiT, the seams, training and sampling; the study of them."""

import csv
import functools
import math
import re
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
import torch

import data
import dit
import fvd
import vae
from common import checkpoints, utils, video
from siblings import vin
from siblings.vin import VIN, VINConfig, play
from studies import long

SIZES = dit.DiTConfig(num_tokens=6, token_dim=5, num_classes=3, width=24, depth=2, heads=2)


def trained_like(zero=False, heads=2, **config):
    """A tiny VIN whose gates and outputs are not zero any more, but for the interface's where asked."""
    torch.manual_seed(0)
    model = VIN(SIZES, VINConfig(global_tokens=4, heads=heads, **config))
    for name, parameter in model.named_parameters():
        if not (zero and re.fullmatch(r"write_attention\.\d\.out\.\w+", name)):
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def noised(B=2, C=3):
    """Latents [B * C, N, d], timesteps and labels [B * C], the same in all chunks of a video."""
    latents = torch.randn(B * C, 6, 5, generator=torch.Generator().manual_seed(1))
    return latents, torch.tensor([700, 3])[:B].repeat_interleave(C), torch.tensor([0, 2])[:B].repeat_interleave(C)


@pytest.mark.parametrize("neighbours", [False, True])
@torch.no_grad()
def test_with_the_output_of_the_interface_at_zero_it_is_the_dit(neighbours):
    inputs, model = noised(), trained_like(zero=True, neighbours=neighbours)
    alone = model.dit(*inputs)
    torch.testing.assert_close(model(*inputs, chunks=3), alone, rtol=1e-5, atol=1e-6)
    fresh = VIN(SIZES, VINConfig(neighbours=neighbours))  # and so does a new one start
    assert not any(p.any() for write in fresh.write_attention for p in write.out.parameters())
    assert (trained_like(neighbours=neighbours)(*inputs, chunks=3) - alone).abs().max() > 1e-3
    made = vin.generate(model, torch.tensor([0, 2]), 4, steps=3, seed=5).flatten(0, 1)
    torch.testing.assert_close(made, dit.generate(model.dit, torch.tensor([0, 2]).repeat_interleave(4), 3, seed=5))


@pytest.mark.parametrize("way", ["interface", "neighbours", "full attention"])
@torch.no_grad()
def test_each_chunk_depends_on_the_chunks_of_its_video_alone(way):
    model, (latents, timestep, label) = trained_like(neighbours=way == "neighbours"), noised(C=5)
    if way == "full attention":
        model = long.FullAttention(SIZES, VINConfig()).requires_grad_(False)
        model.dit.load_state_dict(trained_like().dit.state_dict())

    def moved(chunk, **how):
        changed = latents + (torch.arange(10) == chunk)[:, None, None]
        eps, other = (model(x, timestep, label, chunks=5, **how) for x in (latents, changed))
        return ((eps - other).abs().amax((1, 2)) > 1e-6).tolist()

    assert moved(4) == [True] * 5 + [False] * 5 and moved(5) == [False] * 5 + [True] * 5
    if way != "full attention":
        for p in model.read_attention.out.parameters():  # without global tokens, two blocks lead to the second neighbour
            p.zero_()
        reach = 3 if way == "neighbours" else 1
        assert moved(4) == [False] * (5 - reach) + [True] * reach + [False] * 5
        assert moved(5) == [False] * 5 + [True] * reach + [False] * (5 - reach)
        assert moved(5, neighbours=False) == [False] * 5 + [True] + [False] * 4


def test_the_interface_learns_what_chunks_have_in_common():
    # All chunks of a video are the same latents, each with noise of its own. At α² = 0.5 the least squared error of the noise
    # that a chunk by itself allows is α² = 0.5; that of four is (α² / σ²) / (1 + 4 α² / σ²) = 0.2.
    torch.manual_seed(0)
    sizes = dit.DiTConfig(num_tokens=1, token_dim=4, num_classes=1, width=32, depth=1, heads=2)
    model = VIN(sizes, VINConfig(global_tokens=2, depth=1, heads=2))
    alpha, sigma = dit.noise_schedule()
    timestep = (alpha.square() - 0.5).abs().argmin().expand(128)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(80):
        theta, noise = torch.randn(32, 1, 4).repeat_interleave(4, 0), torch.randn(128, 1, 4)
        x = alpha[timestep][:, None, None] * theta + sigma[timestep][:, None, None] * noise
        loss = (model(x, timestep, torch.zeros_like(timestep), chunks=4) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.4 and all(p.grad.any() for p in model.parameters())


@torch.no_grad()
def test_a_known_chunk_is_seen_clean_and_kept():
    model, (latents, timestep, label) = trained_like(), noised()
    alpha, sigma = (schedule[timestep][:, None, None] for schedule in dit.noise_schedule())
    given = torch.zeros_like(latents)
    given[3] = torch.randn(6, 5)
    eps, without = model(latents, timestep, label, given, 3), model(latents, timestep, label, chunks=3)
    torch.testing.assert_close(eps[:3], without[:3])  # zeros are no chunk
    torch.testing.assert_close(((latents - sigma * eps) / alpha)[3], given[3], rtol=1e-3, atol=1e-4)
    assert (eps[4:] - without[4:]).abs().amax((1, 2)).min() > 1e-4
    latents[3] += 1  # its noise is not seen
    torch.testing.assert_close(model(latents, timestep, label, given, 3)[4:], eps[4:])
    first = torch.randn(2, 6, 5)
    made, free = (vin.generate(model, torch.tensor([0, 2]), 3, steps=4, seed=0, first=x) for x in (first, None))
    assert torch.equal(made[:, 0], first) and (made[:, 1:] - free[:, 1:]).abs().max() > 1e-4


# A decoder whose frames say of which chunk they are, and at which position, with chunks of eight frames.
CONSTANT = SimpleNamespace(
    nerv_config=SimpleNamespace(num_frames=8),
    decode=lambda tokens, t: (tokens[:, 0, :1] + 0.001 * t)[..., None, None, None].expand(-1, -1, 3, 2, 2).clone(),
)


def played(t, overlap):
    parts = list(play(CONSTANT, torch.arange(3.0)[:, None, None].expand(-1, 6, 5), t, overlap))
    assert max(map(len, parts)) <= 8  # never more than a chunk at a time
    return torch.cat(parts)[:, 0, 0, 0]


@pytest.mark.parametrize("overlap", [0, 1, 3])
def test_chunks_follow_each_other_and_fade_over_shared_frames(overlap):
    length = 3 * (8 - overlap) + overlap
    values = torch.zeros(length)
    for c in range(3):  # each chunk's ramp, written out
        up, down = torch.arange(1, overlap + 1) / (overlap + 1), torch.arange(overlap, 0, -1) / (overlap + 1)
        ramp = torch.ones(8)
        ramp[:overlap] = up if c > 0 else 1
        ramp[8 - overlap :] = down if c < 2 else 1
        values[c * (8 - overlap) :][:8] += ramp * (c + 0.001 * torch.arange(8))
    torch.testing.assert_close(played(torch.arange(float(length)), overlap), values)
    between = torch.tensor([0.007, 0.75 * 0.00725 + 0.25 * (1 - 0.00075), 1.0, 2.0075])  # without shared frames, they fade too
    torch.testing.assert_close(played(torch.tensor([7.0, 7.25, 8.0, 23.5]), 0), between)


run = functools.partial(conftest.run, "siblings.vin")


OPTIONS = "train --batch-size 4 --num-latents 8 --chunks 3 --overlap 2 --lr 1e-3"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory with vae.pt and dit.pt of one step, of the long shapes, and a vin.pt of three."""
    cwd = tmp_path_factory.mktemp("vin")
    small = "--resolution 16 --num-frames 8 --num-tokens 8 --token-dim 8 --width 8 --batch-size 4 --steps 1"
    vae.main([*f"--dataset shapes-long {small} --out {cwd}/vae.pt".split()])
    small = "--extras muon --width 48 --depth 2 --heads 3 --steps 1 --batch-size 2 --num-latents 4"
    dit.main([*f"--ckpt {cwd}/vae.pt {small} --out {cwd}/dit.pt".split()])
    assert run(f"{OPTIONS} --ckpt {cwd}/dit.pt --steps 3 --out {cwd}/vin.pt") == 0
    return cwd


def test_training_starts_from_the_denoiser(trained):
    ckpt, before = (checkpoints.load(trained / f"{stage}.pt", stage, "") for stage in ("vin", "dit"))
    model, network, latent_map = vin.load_vin(ckpt)
    changes = [(p - before["ema"][name]).abs().max() for name, p in model.dit.named_parameters()]
    assert 0 < max(changes) < 0.02 and latent_map.scale == before["latent_map"]["scale"]
    assert (trained / "runs" / "vin" / "step0000003.png").is_file()
    values = torch.from_numpy(np.load(trained / "runs/vin/values.npy"))  # chunks of whole long clips, mean and deviation
    train_set = data.Shapes(resolution=16, num_frames=20, period=64)
    frames, _ = train_set[data.spread(train_set, len(values))[4]]  # fewer clips than videos are spread over all of them
    mean, _ = network.encode(video.to_clip(frames[6:14])[None])
    torch.testing.assert_close(values[4, 1, 0].float(), mean[0], rtol=1e-2, atol=1e-2)


def test_sample_predict_interpolate_and_wrong_use(trained, tmp_path, capsys):
    frames = data.Shapes(resolution=16, num_frames=21, period=64)[0][0]
    path = conftest.write_mp4(tmp_path / "a", video.to_clip(frames))
    sample = f"sample --ckpt {trained}/vin.pt --steps 2 --out-dir {tmp_path}"
    assert run(f"{sample} --classes 0 ring_circle --chunks 7") == 0  # more than in training
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["00_square_sideways.mp4", "01_ring_circle.mp4"] and (tmp_path / "samples.png").is_file()
    assert len(video.read_frames(tmp_path / "samples" / names[0], 16)) == 7 * 6 + 2
    assert run(f"{sample} --predict {path} --count 2 --chunks 4") == 0
    made = [video.read_frames(tmp_path / "predict" / f"{i:02d}_predicted.mp4", 16).astype(int) for i in range(2)]
    assert made[0].shape == (26, 16, 16, 3) and abs(made[0] - made[1])[8:].mean() > 0.5
    assert abs(made[0][:8] - frames[:8]).mean() < 15  # as given
    assert run(f"{sample} --chunks 3 --interp {path} {path} --time-scale 2") == 0
    (last,) = (tmp_path / "interp").glob("06_*.mp4")
    assert len(video.read_frames(last, 16)) == 40
    assert run(f"{sample} --chunks 4 --interp {path} {path}") == 2 and "26 are needed" in capsys.readouterr().err
    assert run(f"train --ckpt {trained}/dit.pt --overlap 4") == 2 and "can share 0 to 3" in capsys.readouterr().err


def test_it_resumes_to_the_bit(trained, tmp_path, monkeypatch):
    options = f"{OPTIONS} --ckpt {trained}/dit.pt --out {tmp_path}/vin.pt"
    steps = utils.training_steps
    with monkeypatch.context() as patch:  # stopped after two of three steps
        stopped = SimpleNamespace(steps=2, save_every=2)
        patch.setattr(utils, "training_steps", lambda start, config, save: steps(start, stopped, save))
        assert run(f"{options} --steps 3") == 0
    assert run(f"{options} --steps 3 --resume") == 0
    whole, ckpt = (checkpoints.load(place / "vin.pt", "vin", "") for place in (trained, tmp_path))
    assert all(torch.equal(x, whole["ema"][name]) for name, x in ckpt["ema"].items())


def test_two_processes_share_the_batch_of_one_and_every_tenth_step_is_without_neighbours(trained, tmp_path, monkeypatch):
    seen, near, loss = [], [], dit.diffusion_loss

    def keep(network, *inputs):
        seen.append([*inputs[:5], network.keywords["place"]])
        near.append(network.keywords["neighbours"])
        return loss(network, *inputs)

    monkeypatch.setattr(dit, "diffusion_loss", keep)
    for process in ((0, 1), (0, 2), (1, 2)):
        monkeypatch.setattr(utils, "start_processes", lambda device, process=process: (torch.device("cpu"), *process))
        assert run(f"{OPTIONS} --ckpt {trained}/dit.pt --steps 2 --out {tmp_path}/vin.pt") == 0
    assert near == [False, True] * 3
    assert all(torch.equal(whole, torch.cat(parts)) for whole, *parts in zip(*seen[::2]))


def test_the_shape_is_tracked_and_another_subject_is_seen():
    shapes = data.Shapes(num_frames=64, period=64)
    for i in range(9):
        colour, side, centre = long.track(shapes[i][0])
        assert np.isfinite(centre).all() and np.ptp(side) < 0.1 and np.ptp(colour, 0).max() < 0.05
        assert long.path_error(centre, 64) < 0.02 and np.ptp(centre, 0).max() > 0.4  # a third of a pixel
        wrong = np.roll(centre, 20, 0) * (np.arange(64) < 32)[:, None] + centre * (np.arange(64) >= 32)[:, None]
        assert long.path_error(wrong, 64) > 0.05
    other = np.concatenate([shapes[0][0][:16], *(shapes[i][0][16:32] for i in (9, 18, 27))])
    same, different = long.subject(shapes[0][0], 16), long.subject(other, 16)
    assert max(same) < 0.03 and different[0] > same[0] + 0.02 and different[1] > same[1] + 0.02


@pytest.mark.parametrize("overlap, chunks, jump", [(0, 3, 5.0), (0, 3, 1.0), (1, 3, 3.0), (0, 1, math.nan)])
def test_seam_is_the_jump_over_the_steps_within(overlap, chunks, jump):
    steps = torch.ones(chunks * (4 - overlap) + overlap - 1)
    steps[3 - overlap : (chunks - 1) * (4 - overlap) : 4 - overlap] = jump  # in a fade, the largest step counts
    level = torch.cat([torch.zeros(1), steps.cumsum(0)])
    clips = 0.01 * level[None, :, None, None, None].expand(2, -1, 3, 2, 2)
    assert long.seam(clips, 4, overlap) == pytest.approx(jump, rel=1e-4, nan_ok=True)


def test_rows_train_sample_and_are_not_done_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dit, "generate", lambda *args, generate=dit.generate, **kw: generate(*args[:2], 1, **kw))
    monkeypatch.setattr(long, "train_classifier", lambda *args: None)
    monkeypatch.setattr(long, "classify", lambda classifier, clips: torch.arange(len(clips)) % 9)
    monkeypatch.setattr(fvd, "load_detector", lambda *args: lambda clips: clips.reshape(len(clips), -1)[:, ::999])
    rows = ["reconstructed", "one after the other", "one network", "full attention", "interface, neighbours, overlap 2"]
    small = "--resolution 16 --num-frames 12 --num-tokens 8 --token-dim 8 --width 8 --batch-size 2 --steps 1"
    options = [f"--vae-options={small} --decode-frames 1", "--vin-options=--batch-size 2 --num-latents 4 --chunks 2"]
    options += ["--dit-options=--width 24 --heads 2 --depth 1 --batch-size 2 --num-latents 4 --extras muon"]
    options += ["--chunks", "3", "--seconds", "1e-9", "--videos", "2", "--out-dir", str(tmp_path), "--only", *rows]
    long.main(options)
    with open(tmp_path / "runs.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["row"] for row in found] == rows and all(row["shape"] == "1" for row in found)
    assert all(math.isfinite(float(row[name])) for row in found for name in ("seam", "path", "fvd_start", "fvd_across"))
    # FLOPs of one evaluation of the DiT: maps of 12 w² a token, attention, and conditions; of two, with guidance.
    w, N = 24, 8 * 3
    flops = 24 * N * w * w + 4 * N**2 * w + 12 * w * w + 2 * N * 8 * w * 2 + 3 * (2 * 256 * w + 2 * w * w) + 4 * w * w
    assert float(found[3]["gflop"]) == pytest.approx(2 * flops / 20 / 1e9, rel=1e-3)  # over 20 steps, of which one was taken
    monkeypatch.setattr(long, "Study", lambda config: pytest.fail("done again"))
    long.main(options)
    assert "| interface, neighbours, overlap 2 |" in capsys.readouterr().out


def test_frames_between_shown_ones_are_compared_at_their_own_times(trained, monkeypatch, capsys):
    shapes = data.Shapes("test", 16, 8, period=64)

    def perfect(network, clips, device, t):
        drawn = [video.to_clip(shapes.draw(i, t.numpy())) for i in data.spread(shapes, 2)]
        assert torch.equal(clips, torch.stack([x[::2] for x in drawn]))  # every second is shown
        return torch.stack(drawn)

    monkeypatch.setattr(vae, "reconstruct", perfect)
    long.main(f"--between {trained}/vae.pt --videos 2 --scale 2".split())
    shown, other = capsys.readouterr().out.splitlines()
    assert shown.split()[:2] == ["shown", "8"] and other.split()[:2] == ["between", "7"]
    assert "PSNR 100.00 dB, of the blend 100.00 dB" in shown
    assert "PSNR 100.00 dB" in other and float(other.split()[-2]) < 60
