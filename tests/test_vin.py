"""Long videos by chunks: the interface beside the DiT, the seams, and what vin.py and sample.py make of them."""

import functools
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, write_mp4
from PIL import Image
from test_training import check_it_resumes, losses_of, torchrun

import data
import dit
import vae
import vin
from bench.costs import forward_costs
from common import checkpoints, video
from vin import VIN, VINConfig, play, seam

SIZES = dit.DiTConfig(num_tokens=6, token_dim=5, num_classes=3, width=24, depth=2, heads=2)
TINY = "--resolution 16 --num-frames 8 --batch-size 4"  # a stage 1 that is made in a second


def trained_like(zero=False, **config):
    """A tiny VIN whose gates and outputs are not zero any more, but for the interface's where asked."""
    torch.manual_seed(0)
    model = VIN(SIZES, VINConfig(global_tokens=4, heads=1, **config))
    for name, parameter in model.named_parameters():
        if not (zero and re.fullmatch(r"write\.\d\.out\.\w+", name)):
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def noised(B=2, C=3, seed=1):
    """Tokens [B, C, N, d], steps and labels [B, C], the same in all chunks of a video."""
    tokens = torch.randn(B, C, 6, 5, generator=torch.Generator().manual_seed(seed))
    return tokens, torch.tensor([700, 3])[:B, None].expand(B, C), torch.tensor([0, 2])[:B, None].expand(B, C)


@pytest.fixture(autouse=True)
def short_previews(monkeypatch):
    """Sampling in two steps unless a test says otherwise: previews would be most of the time."""
    monkeypatch.setattr(vin, "generate", functools.partial(vin.generate, steps=2))


both = pytest.mark.parametrize("neighbours", [False, True])

# --------------------------------------------------------------------------------------------------------------------- model


@both
@torch.no_grad()
def test_with_the_output_of_the_interface_at_zero_it_is_the_dit(neighbours):
    tokens, step, label = noised()
    model = trained_like(zero=True, neighbours=neighbours)
    alone = model.dit(tokens.flatten(0, 1), step.flatten(), label.flatten()).unflatten(0, (2, 3))
    assert alone.abs().mean() > 0.1
    torch.testing.assert_close(model(tokens, step, label), alone, rtol=1e-5, atol=1e-6)
    fresh = VIN(SIZES, VINConfig(neighbours=neighbours))  # and so does a new one begin
    assert not any(p.any() for write in fresh.write for p in write.out.parameters())
    other = trained_like(neighbours=neighbours)(tokens, step, label)
    assert (other - alone).abs().max() > 1e-3


@both
@torch.no_grad()
def test_every_chunk_hears_of_every_other_of_its_video(neighbours):
    model, (tokens, step, label) = trained_like(neighbours=neighbours), noised(C=4)
    before, changed = model(tokens, step, label), tokens.clone()
    changed[0, 0] += 1
    difference = (model(changed, step, label) - before).abs().amax((2, 3))
    assert (difference[0] > 1e-5).all() and (difference[1] == 0).all()


@both
@torch.no_grad()
def test_permuting_chunks_together_with_their_places_permutes_the_output(neighbours):
    model, (tokens, step, label) = trained_like(neighbours=neighbours), noised(C=5)
    order, place = torch.tensor([3, 0, 4, 2, 1]), torch.arange(5).expand(2, 5)
    eps = model(tokens, step, label)
    permuted = model(tokens[:, order], step, label, place=place[:, order])
    torch.testing.assert_close(permuted, eps[:, order], rtol=1e-4, atol=1e-5)
    assert (model(tokens[:, order], step, label) - eps[:, order]).abs().max() > 1e-3  # without their places it does not


def test_neighbours_are_found_by_their_places():
    model = trained_like(neighbours=True)
    (before, after), mask = model.near(torch.tensor([[7, 5, 6]]), 6)
    assert (before[0, 0], before[0, 2]) == (2, 1) and (after[0, 1], after[0, 2]) == (2, 0)
    assert mask.shape == (3, 1, 4 + 12) and mask[..., :4].all()
    assert [row[4::6].tolist() for row in mask[:, 0]] == [[True, False], [False, True], [True, True]]
    model.config.heads = 2  # one looks back and one ahead
    mask = model.near(torch.tensor([[7, 5, 6]]), 6)[1]
    assert [row[4::6].tolist() for row in mask[:, 0]] == [[True, False], [False, False], [True, False]]
    assert [row[4::6].tolist() for row in mask[:, 1]] == [[False, False], [False, True], [False, True]]


@both
def test_flops_counted_equal_the_formula(neighbours):
    model, costs = trained_like(neighbours=neighbours), []
    for C in (1, 2, 9):
        tokens, step, label = noised(1, C)
        counted, _ = forward_costs(lambda x=tokens, s=step, k=label: model(x, s, k))
        assert counted == vin.flops(SIZES, model.config, C)
        costs.append(counted)
    assert (costs[2] - costs[1]) == 7 * (costs[1] - costs[0])  # linear
    x = torch.zeros(1, 6, 5)
    counted, _ = forward_costs(lambda: model.dit(x, torch.zeros(1).long(), torch.zeros(1).long()))
    assert counted == vin.dit_flops(SIZES, 6)


def test_gradient_reaches_all_parameters():
    model, (tokens, step, label) = trained_like(neighbours=True).train(), noised()
    model(tokens, step, label).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_the_interface_learns_what_chunks_have_in_common():
    # All chunks of a video are the same tokens, each with noise of its own. At α² = 0.5 the least squared error of the noise
    # that a chunk by itself allows is α² = 0.5; that of four is (α² / σ²) / (1 + 4 α² / σ²) = 0.2.
    torch.manual_seed(0)
    sizes = dit.DiTConfig(num_tokens=1, token_dim=4, num_classes=1, width=32, depth=1, heads=2)
    model = VIN(sizes, VINConfig(global_tokens=2, depth=1, heads=2))
    alpha, sigma = dit.noise_schedule()
    step = (alpha.square() - 0.5).abs().argmin().expand(32, 4)
    optimizer, losses = torch.optim.Adam(model.parameters(), 5e-3), []
    for _ in range(80):
        theta, noise = torch.randn(32, 1, 1, 4).expand(-1, 4, -1, -1), torch.randn(32, 4, 1, 4)
        x = alpha[step][..., None, None] * theta + sigma[step][..., None, None] * noise
        loss = (model(x, step, torch.zeros_like(step)) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) / 20 < 0.4


@both
def test_other_company_is_noticed_by_those_who_hear_of_it(neighbours):
    torch.manual_seed(0)
    tokens, label = torch.randn(5, 3, 6, 5), torch.tensor([2, 0, 1, 0, 2])[:, None].expand(-1, 3)
    alike, mixed = vin.error_in_company(trained_like(zero=True, neighbours=neighbours), tokens, label)
    assert alike == pytest.approx(mixed, rel=1e-5)  # the same chunks, classes and noise
    alike, mixed = vin.error_in_company(trained_like(neighbours=neighbours), tokens, label)
    assert abs(alike - mixed) > 1e-4


@torch.no_grad()
def test_queries_begin_at_the_tokens_they_read():
    torch.manual_seed(0)
    model = VIN(SIZES, VINConfig(global_tokens=12, heads=2))
    reads = model.reads()
    assert reads.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    queries, memory = vin.normalize(model.dit.position[reads])[None], vin.normalize(model.dit.position).repeat(3, 1)[None]
    for n in range(6):  # a token that changes in all three chunks moves what its own two queries read more than any other's
        changed = memory.clone()
        changed[0, n::6] += 0.3 * torch.randn(24)
        moved = (model.read(queries, model.read.kv(changed)) - model.read(queries, model.read.kv(memory)))[0].norm(dim=1)
        assert moved[reads == n].min() > moved[reads != n].max()


@torch.no_grad()
def test_a_known_chunk_is_seen_clean_and_kept():
    model, (tokens, step, label) = trained_like(), noised(C=3)
    alpha, sigma = (schedule[step][..., None, None] for schedule in dit.noise_schedule())
    theta = torch.randn(2, 6, 5)
    given = torch.zeros_like(tokens)
    given[1, 0] = theta[1]
    eps, without = model(tokens, step, label, given), model(tokens, step, label)
    torch.testing.assert_close(eps[0], without[0])  # zeros are no chunk
    landed = (tokens - sigma * eps) / alpha
    torch.testing.assert_close(landed[1, 0], theta[1], rtol=1e-3, atol=1e-4)
    assert (eps[1, 1:] - without[1, 1:]).abs().amax((1, 2)).min() > 1e-4
    tokens[1, 0] += 1  # its noise is not seen
    torch.testing.assert_close(model(tokens, step, label, given)[1, 1:], eps[1, 1:])


# ------------------------------------------------------------------------------------------------------------------ sampling


def test_more_chunks_than_in_training_and_one():
    model, labels = trained_like(chunks=3), torch.tensor([0, 2])
    for C in (1, 11):
        tokens = vin.generate(model, labels, C, steps=3, seed=0)
        assert tokens.shape == (2, C, 6, 5) and tokens.isfinite().all()
        assert torch.equal(tokens, vin.generate(model, labels, C, steps=3, seed=0))
    assert not torch.equal(tokens[:, 0], tokens[:, 1])


def test_without_the_interface_chunks_are_what_the_dit_makes():
    model, labels = trained_like(zero=True), torch.tensor([0, 2])
    alone = dit.generate(model.dit, labels.repeat_interleave(4), steps=4, seed=5)
    torch.testing.assert_close(vin.generate(model, labels, 4, steps=4, seed=5).flatten(0, 1), alone, rtol=1e-4, atol=1e-5)


def test_the_first_chunk_may_be_known():
    model, labels, first = trained_like(), torch.tensor([0, 2]), torch.randn(2, 6, 5)
    tokens, free = (vin.generate(model, labels, 3, steps=4, seed=0, first=x) for x in (first, None))
    assert torch.equal(tokens[:, 0], first) and (tokens[:, 1:] - free[:, 1:]).abs().max() > 1e-4


# --------------------------------------------------------------------------------------------------------------------- seams


def constant(tokens, t):
    """A decoder whose frames say which chunk they are of, and are asked for at t: [1, n, 3, 2, 2]."""
    frames = tokens[:, 0, 0, None] + 0.001 * t
    return frames[..., None, None, None].expand(-1, -1, 3, 2, 2).clone()


def test_chunks_follow_each_other():
    tokens = torch.arange(3.0)[:, None, None].expand(3, 6, 5)
    parts = list(play(constant, tokens, torch.arange(24.0), 8, 0))
    assert [len(part) for part in parts] == [8, 8, 8]  # never more than a chunk at a time
    frames = torch.cat(parts)[:, 0, 0, 0]
    torch.testing.assert_close(frames, torch.arange(24) // 8 + 0.001 * (torch.arange(24) % 8))
    between = torch.cat(list(play(constant, tokens, torch.tensor([7.0, 7.25, 8.0, 23.5]), 8, 0)))[:, 0, 0, 0]
    expected = [0.007, 0.75 * 0.00725 + 0.25 * (1 - 0.00075), 1.0, 2.0075]
    torch.testing.assert_close(between, torch.tensor(expected))


@pytest.mark.parametrize("overlap", [1, 2, 3])
def test_shared_frames_fade(overlap):
    C, T, k = 3, 8, overlap
    F = vin.video_frames(C, T, k)
    tokens = torch.arange(float(C))[:, None, None].expand(C, 6, 5)
    parts = list(play(constant, tokens, torch.arange(float(F)), T, k))
    assert len(parts) == C and max(map(len, parts)) <= T
    weights, values = torch.zeros(F), torch.zeros(F)
    for c in range(C):  # each chunk's ramp, written out
        ramp = torch.ones(T)
        if c > 0:
            ramp[:k] = torch.arange(1, k + 1) / (k + 1)
        if c < C - 1:
            ramp[T - k :] = torch.arange(k, 0, -1) / (k + 1)
        place = slice(c * (T - k), c * (T - k) + T)
        weights[place] += ramp
        values[place] += ramp * (c + 0.001 * torch.arange(T))
    torch.testing.assert_close(weights, torch.ones(F))
    torch.testing.assert_close(torch.cat(parts)[:, 0, 0, 0], values)


def test_seam_is_the_jump_over_the_steps_within():
    def clips(jump, overlap=0, C=3, T=4):
        steps = torch.ones(vin.video_frames(C, T, overlap) - 1)
        steps[T - overlap - 1 : (C - 1) * (T - overlap) : T - overlap] = jump
        level = torch.cat([torch.zeros(1), steps.cumsum(0)])
        return 0.01 * level[None, :, None, None, None].expand(2, -1, 3, 2, 2)

    assert seam(clips(5.0), 4, 0) == pytest.approx(5) and seam(clips(1.0), 4, 0) == pytest.approx(1)
    assert seam(clips(3.0, overlap=1), 4, 1) == pytest.approx(3, rel=1e-4)  # the largest of the steps of a fade
    assert np.isnan(seam(clips(5.0, C=1), 4, 0))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A directory with a vae.pt and a dit.pt of one step, of the long shapes at 16 x 16."""
    cwd = tmp_path_factory.mktemp("start")
    made = ["--out", f"{cwd}/vae.pt", "--run-dir", f"{cwd}/vae"]
    vae.main([*f"--dataset shapes-long {TINY} --steps 1".split(), *made])
    made = ["--out", f"{cwd}/dit.pt", "--run-dir", f"{cwd}/dit"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dit, "generate", lambda model, labels, **_: torch.zeros(len(labels), 32, 16))
        small = "--width 48 --depth 2 --heads 3 --steps 1 --batch-size 2 --num-latents 4"
        dit.main([*f"--ckpt {cwd}/vae.pt {small}".split(), *made])
    return cwd


def test_seam_error_is_that_of_the_jump(start):
    network = vae.load_vae(checkpoints.load(start / "vae.pt", "vae", ""))
    for overlap in (0, 2):
        real, made = torch.randn(2, 2, 3, 32, 16).unbind(0)
        made.requires_grad_()
        assert vin.seam_error(network, real, real, overlap).abs().max() == 0
        n = max(1, overlap)
        error = vin.seam_error(network, made, real, overlap)
        jumps = []
        for tokens in (made, real):
            clips = network.decode(tokens.flatten(0, 1), torch.arange(8)).unflatten(0, (2, 3))
            jumps.append(clips[:, 1:, :n] - clips[:, :-1, 8 - n :])
        torch.testing.assert_close(error, (jumps[0] - jumps[1]).square().mean((1, 2, 3, 4, 5)), rtol=1e-4, atol=1e-6)
        error.sum().backward()
        assert (made.grad.flatten(2).abs().sum(2) > 0).all()


def test_further_losses_are_of_the_predicted_tokens():
    theta0, noise = torch.randn(2, 4, 6, 5).unbind(0)
    alpha, sigma = dit.noise_schedule()
    step, labels, seen = torch.tensor([5, 100, 500, 900]), torch.zeros(4).long(), []

    def perfect(x, step, label, given):
        a, s = alpha[step][:, None, None], sigma[step][:, None, None]
        return (x - a * theta0) / s

    def further(x0, step):
        seen.append(step)
        torch.testing.assert_close(x0, theta0, rtol=1e-3, atol=2e-3)
        return torch.tensor(7.0)

    loss = dit.diffusion_loss(perfect, theta0, labels, None, step, noise, alpha, sigma, 5.0, True, further)
    assert loss.item() == pytest.approx(14, abs=1e-4) and torch.equal(seen[1], step - 1)


# --------------------------------------------------------------------------------------------------------------- the scripts


def test_chunks_of_a_data_set():
    shapes = data.Shapes(num_frames=vin.video_frames(3, 8, 2))
    chunks = vin.Chunks(shapes, 3, 8, 2)
    frames, label = chunks[3 * 4 + 1]
    assert label == 4 and np.array_equal(frames, shapes[4][0][6:14]) and chunks[2][0].shape == (8, 32, 32, 3)


OPTIONS = "--batch-size 4 --num-latents 8 --log-every 1"


@pytest.fixture(scope="module")
def trained(start):
    """vin.pt of two steps beside the others: every mechanism is on."""
    made = ["--out", f"{start}/vin.pt", "--run-dir", f"{start}/vin"]
    options = f"{OPTIONS} --steps 2 --chunks 3 --overlap 2 --seam-weight 1 --known 0.5"
    vin.main(["--ckpt", f"{start}/dit.pt", *options.split(), *made])
    return start


def test_training_starts_from_the_denoiser(trained):
    ckpt, before = (checkpoints.load(trained / f"{stage}.pt", stage, "") for stage in ("vin", "dit"))
    assert ckpt["vin_config"]["neighbours"] and ckpt["config"]["dataset"] == "shapes-long" and ckpt["config"]["refine"] == 3
    assert ckpt["latent_scale"] == before["latent_scale"] and ckpt["classes"] == before["classes"]
    model, _, _ = vin.load_vin(ckpt)
    changes = [(p - before["ema"][name]).abs().max() for name, p in model.dit.named_parameters()]
    assert 0 < max(changes) < 0.01
    (row, _) = losses_of(trained / "vin")
    assert row["loss"] > 0
    with Image.open(trained / "vin" / "step0000002.png") as image:
        assert image.width >= 6 * 64  # the ends of each of three chunks


def frames_of(path):
    return video.read_frames(path, 16)


def test_sample_more_chunks_than_it_was_trained_with(trained, call, tmp_path, capsys):
    assert call("sample.py", f"--ckpt {trained}/vin.pt --chunks 7 --steps 2 --classes 0 ring_circle --out-dir o") == 0
    names = sorted(path.name for path in (tmp_path / "o" / "samples").iterdir())
    assert names == ["00_square_sideways.mp4", "01_ring_circle.mp4"]
    assert "2 videos of 44 frames, 7 chunks" in capsys.readouterr().out
    assert all(len(frames_of(tmp_path / "o" / "samples" / name)) == 7 * 6 + 2 for name in names)
    with Image.open(tmp_path / "o" / "samples.png") as image:
        assert image.width >= 16 * 64
    assert call("sample.py", f"--ckpt {trained}/vin.pt --chunks 2 --time-scale 2 --extrapolate 1 --steps 1 --classes 0") == 0
    assert len(frames_of(tmp_path / "out" / "samples" / "samples" / "00_square_sideways.mp4")) == 2 * 14 + 2


def test_predict_and_interpolate_long_videos(trained, call, tmp_path):
    frames = data.Shapes(resolution=16, num_frames=21, period=64)[0][0]
    path = write_mp4(tmp_path / "a", video.to_clip(frames))
    model = f"--ckpt {trained}/vin.pt --steps 2"
    assert call("sample.py", f"{model} --predict {path} --count 2 --chunks 4 --refine 0") == 0
    made = [frames_of(tmp_path / "out" / "samples" / "predict" / f"{i:02d}_predicted.mp4") for i in range(2)]
    assert made[0].shape == (26, 16, 16, 3) and abs(made[0].astype(int) - made[1])[8:].mean() > 0.5
    assert abs(made[0][:8, 3:-3, 3:-3].astype(int) - frames[:8, 3:-3, 3:-3]).mean() < 15  # as given
    from_orange = abs(made[0].astype(int)[:, 0] - [255, 153, 0]).mean((1, 2))
    assert from_orange[:8].max() < from_orange[8:].min(), from_orange.round()
    assert call("sample.py", f"{model} --interp {path} {path} --interp-steps 3 --refine 0") == 0
    assert len(list((tmp_path / "out" / "samples" / "interp").glob("*.mp4"))) == 3
    assert call("sample.py", f"{model} --interp --interp-steps 2 --chunks 1") == 0
    assert len(frames_of(tmp_path / "out" / "samples" / "interp" / "01_1.00.mp4")) == 8


def test_long_videos_are_written_as_they_come(tmp_path):
    alive = []

    def parts():
        for k in range(5):
            alive.append(k)
            yield torch.full((3, 3, 16, 16), k / 5)

    written = []
    real = video.to_frames
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video, "to_frames", lambda clip: written.append(alive[-1]) or real(clip))
        video.write_mp4(tmp_path / "long", parts())
    assert written == [0, 1, 2, 3, 4] and len(video.read_frames(tmp_path / "long.mp4", 16)) == 15


def test_one_chunk_trains_and_an_export_samples(start, call):
    made = "--steps 1 --chunks 1 --neighbours --seam-weight 1 --out one.pt --run-dir one --no-cache-latents"
    assert call("vin.py", f"--ckpt {start}/dit.pt {OPTIONS} {made}") == 0
    assert call("sample.py", f"--ckpt {start}/dit.pt --export dit.pt") == 0
    assert call("vin.py", f"{OPTIONS} --steps 1 --chunks 2 --out from_export.pt --run-dir from_export") == 0
    assert call("sample.py", "--ckpt one.pt --export small.pt") == 0
    assert call("sample.py", "--ckpt small.pt --steps 1 --classes 0 --chunks 2") == 0
    assert call("vin.py", f"--ckpt {start}/dit.pt {OPTIONS} {made} --resume --chunks 2") == 2


@pytest.mark.parametrize(
    "program, options, words",
    [
        ("vin.py", "--ckpt {}/vae.pt", "a vae checkpoint, and a dit one is needed"),
        ("vin.py", "--ckpt nothing.pt", "there is no checkpoint nothing.pt"),
        ("vin.py", "--ckpt {}/dit.pt --chunks 0", "--chunks 0: it must be positive"),
        ("vin.py", "--ckpt {}/dit.pt --overlap 4", "chunks of 8 frames can share 0 to 3"),
        (
            "vin.py",
            "--ckpt {}/dit.pt --dataset folder --data-dir short",
            "it has 20 frames, and a clip takes 64 (--num-frames, --chu",
        ),
        ("sample.py", "--ckpt {}/dit.pt --chunks 3", "long videos take one of `python vin.py`"),
        ("sample.py", "--ckpt {}/vin.pt --chunks -1", "must not be negative"),
        ("sample.py", "--ckpt {}/vin.pt --chunks 4 --interp short/square_updown/a.mp4", "has 20 frames, and 26 are needed"),
        ("sample.py", "--ckpt {}/vin.pt --residual", "--residual"),
    ],
)
def test_bad_input_is_one_line(trained, call, tmp_path, capsys, program, options, words):
    if "short" in options:
        write_mp4(tmp_path / "short" / "square_updown" / "a", torch.zeros(20, 3, 16, 16))
        options += " --chunks 8" if program == "vin.py" else ""
    assert call(program, options.format(trained)) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and words in line


# ------------------------------------------------------------------------------------------------------- what keeps it right


def test_it_resumes_to_the_bit(start, call, monkeypatch):
    options = f"{OPTIONS} --no-cache-latents --save-every 2 --chunks 2 --seam-weight 1 --known 0.5"
    check_it_resumes(call, monkeypatch, "vin.py", f"--ckpt {start}/dit.pt {options}", steps=3)


def test_two_processes_train_as_one(start, call, tmp_path):
    options = f"--ckpt {start}/dit.pt --batch-size 24 --num-latents 25 --log-every 1 --steps 3 --chunks 2 --known 0.5"
    options += " --seam-weight 1"  # of every third video of the batch
    assert call("vin.py", f"{options} --out one.pt --run-dir one") == 0
    torchrun(2, ROOT / "vin.py", *options.split(), "--out", "two.pt", "--run-dir", "two", cwd=tmp_path)
    one, two = (losses_of(tmp_path / name) for name in ("one", "two"))
    assert len(one) == 3
    for a, b in zip(one, two):
        assert a == pytest.approx(b, rel=2e-4)
