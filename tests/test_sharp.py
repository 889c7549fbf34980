"""What closes the gap between what the decoder can hold and what the encoder gives it: refinement, Muon, batch renormalization,
and the filter and edges of the nano decoder."""

import copy
import dataclasses
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import nerv
import vae
from common import utils
from common.optim import Muon, adamw, orthogonalize
from common.video import to_clip, to_frames
from data import Shapes
from studies import sharp
from vae import psnr


@pytest.fixture(scope="module")
def stage1():
    torch.manual_seed(0)
    return vae.VAE(nerv.CONFIGS["nano"], vae.ENCODERS["nano"]).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def clips():
    return torch.stack([to_clip(Shapes("test")[i][0]) for i in range(3)])


def error(stage1, tokens, clips):
    with torch.no_grad():
        decoded = stage1.decode(tokens, torch.arange(clips.shape[1]))
    return (decoded - clips).square().mean((1, 2, 3, 4))


def test_refinement_lowers_the_error_of_every_clip(stage1, clips):
    tokens = stage1.encode(clips)[0]
    refined = stage1.refine(tokens, clips, 20)
    assert (error(stage1, refined, clips) < 0.9 * error(stage1, tokens, clips)).all()
    assert torch.equal(stage1.refine(tokens, clips, 0), tokens)
    assert all(p.grad is None for p in stage1.parameters())


def test_refinement_of_a_clip_does_not_depend_on_the_others(stage1, clips):
    tokens = stage1.encode(clips)[0]
    together, alone = stage1.refine(tokens, clips, 3), stage1.refine(tokens[1:2], clips[1:2], 3)
    torch.testing.assert_close(together[1:2], alone, rtol=1e-3, atol=1e-4)


def test_given_frames_are_refined_by_themselves(stage1, clips):
    from dit import encode_batch, encode_given

    changed = torch.cat([clips[:, :5], -clips[:, 5:]], 1)
    assert torch.equal(encode_given(stage1, clips, 5, refine=3), encode_given(stage1, changed, 5, refine=3))
    assert not torch.equal(encode_given(stage1, clips, 5, refine=3), encode_given(stage1, clips, 5))
    alone = stage1.encode(clips * (torch.arange(16) < 5)[:, None, None, None])[0]
    assert torch.equal(encode_given(stage1, clips, 5, refine=3), stage1.refine(alone, clips[:, :5], 3))
    mean, _, given = encode_batch(stage1, clips, 5, refine=3).unbind(1)
    assert torch.equal(mean, stage1.refine(stage1.encode(clips)[0], clips, 3))
    assert torch.equal(given, encode_given(stage1, clips, 5, refine=3))


def test_renorm_has_the_values_of_running_statistics_and_the_gradient_of_batch_norm():
    torch.manual_seed(0)
    x = (torch.randn(6, 4, dtype=torch.float64) * 3 + 1).float().requires_grad_()
    norm = vae.BatchNorm(4)
    for _ in range(20):
        norm(x.detach() * 1.5 - 2)  # running statistics that are not the batch's
    plain = copy.deepcopy(norm)
    norm.renorm = True
    y, z = norm(x), plain(x)
    expected = (x - norm.running_mean) * torch.rsqrt(norm.running_var + norm.eps)  # the running statistics with this batch in
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(y, z, atol=0.1)
    weights = torch.randn(6, 4)
    (gradient,), (batch,) = (torch.autograd.grad((out * weights).sum(), x) for out in (y, z))
    ratio = torch.sqrt((x.detach().var(0, correction=0) + norm.eps) / (norm.running_var + norm.eps))
    torch.testing.assert_close(gradient, batch * ratio, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(gradient.sum(0), torch.zeros(4), rtol=0, atol=1e-5)  # what all clips share has none


def make_muon(seed=0):
    torch.manual_seed(seed)
    network = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 3))
    others = [network[0].bias, *network[1].parameters()]
    return network, utils.FiniteStep(network, Muon([network[0].weight], others, 0.0), 1.0)


def test_muon_steps_along_the_nearest_orthogonal_matrix_and_adamw_beside_it():
    network, step = make_muon()
    before = network[0].weight.detach().clone()
    u, _, v = torch.linalg.svd(torch.randn(4, 6), full_matrices=False)
    network[0].weight.grad = u @ torch.diag(torch.tensor([1.0, 2.0, 4.0, 8.0])) @ v
    step(torch.tensor(0.0), 0.1)
    moved = before - network[0].weight.detach()
    cosine = F.cosine_similarity(moved.flatten(), (u @ v).flatten(), dim=0)
    assert cosine > 0.97  # Newton-Schulz steps are no exact polar decomposition
    assert 0.5 < moved.square().mean().sqrt() / (0.1 * 0.2) < 1.5  # the size of AdamW's updates (Liu et al. 2025)


@pytest.mark.parametrize("shape", [(12, 90), (90, 12), (12, 12)])
def test_steps_on_the_gram_matrix_are_those_on_the_matrix(shape):
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    x = u @ torch.diag(torch.logspace(0, -6, 12, dtype=torch.float64)) @ v  # singular values of 1 to a millionth
    wanted = x / x.norm()
    for _ in range(5):
        square = wanted @ wanted.T
        wanted = 3.4445 * wanted - 4.7750 * square @ wanted + 2.0315 * square @ square @ wanted
    torch.testing.assert_close(orthogonalize(x), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(orthogonalize(x.float()), wanted.float(), rtol=0, atol=1e-3)


def test_muon_is_torchs():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(size)) for size in ((8, 16), (16, 8))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    bias = torch.nn.Parameter(torch.zeros(3))
    muon = Muon(ours, [bias], 0.1)
    reference = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for group in muon.param_groups:
        group["lr"] = 0.01
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        muon.found_inf = torch.tensor(0.0)
        muon.step(), reference.step()
    for a, b, before in zip(ours, theirs, start):
        assert (a - b).norm() < 0.02 * (a - before).norm()  # theirs is in bfloat16


def test_muon_skips_what_is_not_finite_and_resumes():
    network, step = make_muon()
    x = torch.randn(5, 6)

    def train(network, step, bad=False):
        loss = network(x).square().mean()
        loss.backward()
        if bad:
            network[1].weight.grad[0, 0] = float("nan")
        step(loss, 0.01)

    train(network, step)
    before = [p.detach().clone() for p in network.parameters()]
    train(network, step, bad=True)
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters()))
    assert int(step.skipped) == 1
    again, other = make_muon(1)
    again.load_state_dict(network.state_dict())
    other.load_state_dict(copy.deepcopy(step.state_dict()))
    train(network, step), train(again, other)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), network.parameters()))


def test_every_matrix_of_the_transformer_is_muons(stage1):
    names = {name for name, p in stage1.encoder.named_parameters() if any(p is m for m in stage1.encoder.matrices())}
    blocks = [f"blocks.{i}.{part}.weight" for i in range(3) for part in ("attention.qkv", "attention.out", "mlp.0", "mlp.2")]
    assert names == {"embed.weight", "mix", *blocks}
    assert isinstance(adamw([torch.nn.Parameter(torch.zeros(1))], 0.1), torch.optim.AdamW)


def level(**choices):
    """The nano decoder's first upsampling with a constant kernel for each pair of channels, and a constant map."""
    torch.manual_seed(0)
    config = dataclasses.replace(nerv.CONFIGS["nano"], **choices)
    decoder = nerv.NeRV(config).requires_grad_(False)
    tokens = torch.randn(2, config.num_tokens, config.token_dim)
    return decoder, tokens, torch.ones(1, 2 * config.width, 8, 8)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("padding", nerv.PADDINGS)
def test_repeated_edges_leave_no_rim_and_the_filter_no_mesh_on_a_constant_map(antialias, padding):
    decoder, tokens, x = level(antialias=antialias, padding=padding)
    up, conv = decoder.blocks[0].up(x, tokens), decoder.blocks[0].convs[0](x, tokens)
    rim = (conv[..., 0, :] - conv[..., 1, :]).abs().max() / conv.std()
    mesh = (up[..., 4:12:2, 4:12] - up[..., 5:13:2, 4:12]).abs().max() / up.std()
    assert up.shape[-2:] == (16, 16) and conv.shape[-2:] == (8, 8)
    assert rim < 1e-4 if padding == "replicate" else rim > 0.1
    assert mesh < 1e-4 if antialias else mesh > 0.1


def test_smooth_is_a_binomial_filter():
    x = torch.zeros(1, 1, 5, 5)
    x[..., 2, 2] = 16.0
    expected = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])
    torch.testing.assert_close(nerv.smooth(x)[0, 0, 1:4, 1:4], expected)
    torch.testing.assert_close(nerv.smooth(torch.full((1, 2, 4, 4), 3.0)), torch.full((1, 2, 4, 4), 3.0))


def test_small_frames_are_doubled_for_the_perceptual_loss_which_counts(monkeypatch, tmp_path):
    sizes, gradients = [], []

    class Distance(torch.nn.Module):
        def __init__(self, *args):
            super().__init__()

        def forward(self, frames, real):
            sizes.append((frames.shape, real.shape))
            frames.register_hook(gradients.append)
            return (frames - real).square().mean()

    monkeypatch.setattr(vae.losses, "LPIPS", Distance)
    options = f"--steps 1 --batch-size 2 --lpips alex --device cpu --out {tmp_path}/v.pt --run-dir {tmp_path}/run"
    vae.main(options.split())
    assert sizes == [((1, 4, 3, 64, 64), (1, 4, 3, 64, 64))]
    assert len(gradients) == 1 and gradients[0].abs().max() > 0


def test_mesh_is_what_alternates_on_flat_places_only():
    real = torch.zeros(2, 3, 3, 16, 16)
    real[..., 8:, :] = 0.5  # an edge, where nothing counts
    i = torch.arange(16)
    waves = 0.1 * (-1.0) ** (i[:, None] + i)
    assert sharp.mesh(real, real) == 0
    assert sharp.mesh(real, real + waves) == pytest.approx(0.1 * 127.5, rel=1e-3)
    assert sharp.mesh(real, real + 0.01 * i) == pytest.approx(0, abs=1e-3)  # a ramp
    edge = torch.zeros_like(real)
    edge[..., 7:9, :] = 0.3
    everywhere = sharp.mesh(torch.zeros_like(real), edge)
    assert sharp.mesh(real, edge) < everywhere


def test_motion_is_what_differs_from_the_time_average():
    torch.manual_seed(0)
    real = torch.randn(2, 5, 3, 4, 4)
    still = real.mean(1, keepdim=True)
    assert sharp.motion(real, real + 7) == pytest.approx(100, abs=1e-3)  # another colour is no motion
    assert sharp.motion(real, still.expand_as(real)) == pytest.approx(0, abs=1e-3)
    assert sharp.motion(real, still + 0.9 * (real - still)) == pytest.approx(99, abs=1e-3)
    assert sharp.motion(real, 2 * still - real) == pytest.approx(-300, abs=1e-3)


def test_linear_finds_what_the_tokens_tell_and_no_more():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 3 * 8 * 8, generator=generator) / 20

    class Network:
        """Tokens from which a linear map makes the frame: the six numbers of a clip, or three of them, mixed up."""

        def __init__(self, knows):
            turned = torch.linalg.qr(torch.randn(knows, knows, generator=generator))[0]
            self.matrix = torch.linalg.pinv(mixing)[:, :knows] @ turned

        def encode(self, video):
            return ((video[:, 2].flatten(1) - 0.1) @ self.matrix)[:, None], None  # a clip is the same frame throughout

    def clip():
        frame = 0.1 + torch.randn(6, generator=generator).clamp(-2, 2) @ mixing
        return (frame.clamp(-1, 1)).view(3, 8, 8).expand(4, -1, -1, -1)

    train_set = [(to_frames(clip()), 0) for _ in range(300)]
    clips = torch.stack([clip() for _ in range(8)])
    all_of_it, half = (psnr(clips[:, ::2], sharp.linear(Network(knows), train_set, clips, 300)) for knows in (6, 3))
    assert all_of_it > half + 10


def test_what_pictures_bring_alone():
    torch.manual_seed(0)
    config = nerv.NeRVConfig(resolution=32, num_frames=4, num_tokens=6, token_dim=8, width=16, block=8, pictures=6)
    network, clips = (
        vae.VAE(config, vae.EncoderConfig(width=24, depth=1, heads=2, patch=(2, 8, 8))),
        torch.rand(8, 4, 3, 32, 32),
    )
    network.nerv.pictures.fit(clips.flatten(0, 1), 4)
    alone = sharp.pictures_alone(network, clips)
    network.nerv.amplitude.data.fill_(100)  # of the convolutions, of which nothing is to be seen
    assert sharp.pictures_alone(network, clips) == alone > psnr(clips, clips.mean((0, 1)).expand_as(clips))
    assert sharp.pictures_alone(vae.VAE(nerv.NeRVConfig(resolution=32, width=16, block=8), network.encoder_config), clips) == ""


def test_study_runs_a_row_once(monkeypatch, tmp_path, capsys):
    calls = []

    def call(command, **kw):
        calls.append(command)
        return subprocess_run(command, **kw)

    subprocess_run = sharp.subprocess.run
    monkeypatch.setattr(sharp.subprocess, "run", call)
    monkeypatch.setattr(sharp, "LPIPS", partial(sharp.LPIPS, pretrained=False))
    monkeypatch.setattr(sharp, "STEPS", (0, 3))
    monkeypatch.setattr(sharp, "COLUMNS", [c for c in sharp.COLUMNS if c not in ("psnr10", "psnr80")])
    command = f"x --only before --clips 9 --out-dir {tmp_path}/out --jobs 1 --options".split() + ["--steps 2 --batch-size 4"]
    monkeypatch.setattr("sys.argv", command)
    sharp.main(), sharp.main()
    trainings = [c for c in calls if "vae.py" in c]
    assert len(trainings) == 1 and "--no-antialias" in trainings[0]
    assert capsys.readouterr().out.count("| before | 0 ") == 2
