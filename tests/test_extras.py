"""What is not the paper's: each extra against its closed form or a loop, and nothing of it where none is asked for."""

import argparse
import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import data
import dit
import extras
import nerv
import vae
from common import utils
from extras.basis import BasisDecoder
from extras.components import Components, LatentScale
from extras.edges import blur
from extras.muon import Muon, make_optimizer

TINY = nerv.NeRVConfig(resolution=32, num_frames=4, num_tokens=6, token_dim=5, width=16, block=8)
ENCODER = vae.EncoderConfig(width=24, depth=2, heads=2, patch=(2, 8, 8))


def build(*names, config=TINY, steps=0):
    torch.manual_seed(0)
    return extras.build_vae(vae.VAE, config, ENCODER, nerv.NeRV, names, steps)


def test_without_extras_both_stages_are_the_papers():
    plain, ours = vae.VAE(TINY, ENCODER), build()
    assert {k: type(m) for k, m in plain.named_modules()} == {k: type(m) for k, m in ours.named_modules()}
    assert type(extras.latent_map([], (6, 5))) is LatentScale and type(make_optimizer(plain)) is torch.optim.AdamW
    assert vae.Config().extras == dit.Config().extras == []
    for preset in set(nerv.CONFIGS) - {"nano"}:
        assert "extras" not in vae.preset_defaults(argparse.Namespace(preset=preset, dataset="shapes"))


@pytest.mark.parametrize(
    "stage, name", [("vae", n) for n in ("nonsense", "mixing", "mixing=5", "mixing=-1", "renorm=x", "basis=0", "basis=31")]
    + [("dit", n) for n in ("mixing=8", "components", "components=4", "components=0x3", "components=-1x-1", "components=9x9")],
)  # fmt: skip
def test_an_extra_that_is_not_there_or_does_not_fit(stage, name):
    with pytest.raises((utils.UserError, ValueError), match=name.split("=")[0]):
        build(name) if stage == "vae" else extras.latent_map([name], (6, 5))


def test_edges_take_a_decoder_that_convolves_as_the_papers():
    own = type("Own", (nerv.NeRV,), {"Conv": type("Conv", (nerv.ModulatedConv,), {"convolve": None})})
    for decoder in (own, torch.nn.Identity):
        with pytest.raises(ValueError, match=f"edges, filter: the layers of {decoder.__name__}"):
            extras.build_vae(vae.VAE, TINY, ENCODER, decoder, ["edges"])


@torch.no_grad()
def test_mixing_adds_a_fixed_sum_of_patches_to_each_query():
    ours, plain = build("mixing=3").double().eval().encoder, build().double().eval().encoder
    block = ours.blocks[-1]
    plain.load_state_dict({k.replace(".block.", "."): v for k, v in ours.state_dict().items() if not k.endswith("mix")})
    video, seen = torch.rand(2, 4, 3, 32, 32, dtype=torch.float64), []
    plain.blocks[-1].register_forward_pre_hook(lambda layer, args: seen.append(args[0][:, :-6]))  # patches [2, 32, 24]
    wanted = vae.ViT.forward(plain, video)
    for n in range(6):
        for head in range(3):
            own = slice(8 * head, 8 * head + 8)
            total = sum(block.mix[3 * n + head, patch] * seen[0][:, patch, own] for patch in range(32))
            wanted[:, n, own] += total / math.sqrt(1 + ours.norm.eps)  # what a fresh batch norm makes of it
    torch.testing.assert_close(vae.ViT.forward(ours, video), wanted, rtol=0, atol=1e-12)


def test_renorm_has_the_values_of_running_statistics_and_the_gradient_of_batch_norm():
    torch.manual_seed(0)
    x = (torch.randn(6, 4) * 3 + 1).requires_grad_()
    norm = utils.BatchNorm(4)
    for _ in range(20):
        norm(x.detach() * 1.5 - 2)  # running statistics that are not the batch's
    plain, late = copy.deepcopy(norm), extras.BatchRenorm(copy.deepcopy(norm), begin=2)
    y, z = extras.BatchRenorm(norm, begin=0)(x), plain(x)
    expected = (x - norm.running_mean) * torch.rsqrt(norm.running_var + norm.eps)  # the running statistics with this batch in
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(y, z, atol=0.1) and torch.allclose(late(x), z)  # which is plain batch norm before it begins
    weights = torch.randn(6, 4)
    (gradient,), (batch,) = (torch.autograd.grad((out * weights).sum(), x) for out in (y, z))
    ratio = torch.sqrt((x.detach().var(0, correction=0) + norm.eps) / (norm.running_var + norm.eps))
    torch.testing.assert_close(gradient, batch * ratio, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("names", [(), ("edges",), ("filter",)])
def test_repeated_edges_leave_no_rim_and_the_filter_no_mesh_on_a_constant_map(names):
    decoder = build(*names).nerv.requires_grad_(False)
    tokens, x = torch.randn(2, 6, 5), torch.ones(1, 32, 8, 8)
    up, conv = decoder.blocks[0].up(x, tokens), decoder.blocks[0].convs[0](x, tokens)
    rim = (conv[..., 0, :] - conv[..., 1, :]).abs().max() / conv.std()
    mesh = (up[..., 4:12:2, 4:12] - up[..., 5:13:2, 4:12]).abs().max() / up.std()
    assert up.shape[-2:] == (16, 16) and conv.shape[-2:] == (8, 8)
    assert rim < 1e-4 if names else rim > 0.1
    assert mesh < 1e-4 if "filter" in names else mesh > 0.1
    impulse = F.pad(torch.full((1, 1, 1, 1), 16.0), (2, 2, 2, 2))
    torch.testing.assert_close(blur(impulse)[0, 0, 1:4, 1:4], torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]))


@pytest.mark.parametrize("tokens", [16, 7])  # 7 do not divide the 3 x 4 numbers of the codes
def test_the_basis_is_added_and_its_encoder_starts_from_the_projection(tokens):
    config = replace(TINY, num_tokens=tokens, token_dim=6)
    model = build("basis=3", config=config).eval()
    t, shapes = torch.tensor([0.0, 1.5]), torch.rand(3, 3, 32, 32) - 0.5
    some = torch.randn(2, tokens, 6)
    torch.testing.assert_close(model.decode(some, t), 0.05 * model.nerv.nerv(some, t))  # black, until it is fitted
    video = torch.einsum("btk,kchw->btchw", torch.randn(20, 4, 3), shapes)  # rank 3, and four waves hold four frames
    model.nerv.basis.fit(video.flatten(0, 1), 4)
    mean, logvar = model.encode(video)
    assert mean.shape == (20, tokens, 6) and torch.all(logvar == -12)
    model.nerv.amplitude.data.zero_()
    torch.testing.assert_close(model.decode(mean, torch.arange(4)), video, rtol=0, atol=2e-2)
    waves = [BasisDecoder(nerv.NeRV(replace(TINY, num_frames=16)), K).basis.strength.numel() for K in (1, 2, 7, 8, 30)]
    assert waves == [16, 15, 4, 3, 1]  # as many as 6 x 5 tokens have numbers for


def test_a_training_starts_from_the_principal_components_of_its_clips():
    shapes = data.open_dataset(vae.Config(resolution=32, num_frames=4), "train")
    clips, _ = data.fixed_clips(data.open_dataset(vae.Config(resolution=32, num_frames=4), "test"), 64)
    model = build("basis=15")
    ema = copy.deepcopy(model)
    extras.start(model, ema, data.endless(shapes, data.Stream(len(shapes), 4, 0)), 0, count=128)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), ema.state_dict().values()))
    shown = model.nerv.basis(model.nerv.basis.project(clips), torch.arange(4), 4)
    assert vae.psnr(clips, shown) > vae.psnr(clips, clips.mean((0, 1), keepdim=True).expand_as(clips)) + 2  # clips it never saw


@pytest.mark.parametrize("make", [lambda: LatentScale((4, 3)), lambda: Components((2, 4), (4, 3))], ids=["scale", "components"])
def test_latents_have_unit_deviation_and_lead_back_and_components_are_the_largest(make):
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(12, 12))[0]
    tokens = (2 + (torch.linspace(12, 1, 12) * torch.randn(20_000, 12)) @ turn).view(-1, 4, 3)
    latent_map, deviation = make(), torch.rand(20_000, 4, 3)
    latent_map.fit(tokens, deviation)
    latents = latent_map(tokens + deviation * torch.randn(20_000, 4, 3))
    assert latents.shape[1:] == latent_map.shape and latents.std().item() == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(latent_map(latent_map.inverse(latents)), latents, rtol=0, atol=1e-4)
    made = latent_map(deviation[0] * torch.randn(20_000, 4, 3))
    torch.testing.assert_close(latent_map.deviation(deviation[:1])[0], made.std(0), rtol=0.03, atol=0)
    if isinstance(latent_map, Components):
        found = latent_map(tokens).std(0) / latent_map.scale
        torch.testing.assert_close(found, torch.tensor([[12.0, 11, 10, 9], [8, 7, 6, 5]]), rtol=0.03, atol=0)
        error = (latent_map.inverse(latent_map(tokens)) - tokens).square().sum() / len(tokens)
        assert error.item() == pytest.approx(4**2 + 3**2 + 2**2 + 1, rel=0.03)  # the variance of what is left out


def test_muon_has_the_matrices_of_transformers_and_adamw_the_rest():
    parts = ("attention.qkv", "attention.out", "mlp.0", "mlp.2")
    blocks = [f"encoder.encoder.blocks.{block}.{part}.weight" for block in ("0", "1.block") for part in parts]
    basis = ["encoder.encoder.embed.weight", "encoder.encoder.blocks.1.mix", "nerv.head.weight", "nerv.basis.components"]
    denoiser = dit.DiT(dit.DiTConfig(6, 5, 3, width=24, depth=1, heads=2))
    for model, names in (
        (build("mixing=3", "basis=3"), {*blocks, *basis}), (denoiser, {f"blocks.0.{part}.weight" for part in parts})
    ):  # fmt: skip
        own = {id(p) for p in make_optimizer(model, muon=True).own["params"]}
        assert {name for name, p in model.named_parameters() if id(p) in own} == names


def test_muon_is_torchs_and_skips_what_is_not_finite():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(size)) for size in ((8, 16), (16, 8))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    bias = torch.nn.Parameter(torch.zeros(3))
    muon = Muon(ours, torch.optim.AdamW([bias], fused=True), 0.1)
    reference = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    muon.param_groups[0]["lr"] = 0.01
    for found_inf in (0.0, 1.0, 0.0, 0.0):
        for a, b in zip(ours, theirs):
            a.grad = torch.full_like(a, float("nan")) if found_inf else torch.randn_like(a)
            b.grad = a.grad.clone()
        muon.found_inf = torch.tensor(found_inf)
        muon.step()
        if not found_inf:
            reference.step()
    for a, b, before in zip(ours, theirs, start):
        assert (a - b).norm() < 0.02 * (a - before).norm()  # theirs is in bfloat16
