"""The alternatives of Tables 2 and 3, each against what its docstring says."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import dit
import nerv
import vae
from common.utils import UserError
from studies import variants

TINY = nerv.NeRVConfig(resolution=16, num_frames=4, num_tokens=6, token_dim=8, width=8, block=4, pos_size=4)
CASES = [(name, value) for name, (_, *others) in variants.CHOICES.items() for value in others if value not in ("8", "16")]


def tiny(num_tokens=6, **options):
    torch.manual_seed(0)
    model = variants.decoder(**options)(replace(TINY, num_tokens=num_tokens)).double()
    return model, torch.randn(3, num_tokens, 8, dtype=torch.float64)


def layers_of(model):
    return [layer for layer in model.modules() if isinstance(layer, nerv.ModulatedConv)]


@pytest.mark.parametrize("name, value", CASES)
def test_videos_do_not_affect_each_other_and_everything_learns(name, value):
    model, tokens = tiny(64 if value == "none" else 6, **{name: value})
    t = torch.tensor([0.0, 1.5])
    frames = model(tokens, t)
    assert frames.shape == (3, 2, 3, 16, 16)
    alone = torch.cat([model(one, t) for one in tokens.split(1)])
    torch.testing.assert_close(alone, frames)
    assert (frames[0] - frames[1]).abs().max() > 1e-3
    frames.square().mean().backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.numel():
            assert parameter.grad.abs().max() > 0, parameter_name
    for layer in layers_of(model):
        norms = layer.kernel(tokens).square().sum((2, 3, 4))
        torch.testing.assert_close(norms, torch.full_like(norms, layer.gain**2), rtol=1e-4, atol=0)


def test_multiplied_kernels():
    model, tokens = tiny(modulation="fmm")  # a gate of low rank
    layer = model.blocks[0].convs[0]
    numbers = layer.generate(tokens)[1]
    gate = torch.sigmoid(numbers[:80].view(8, 10) @ numbers[80:].view(10, 8))
    torch.testing.assert_close(layer.weight(tokens)[1], torch.einsum("oi,oihw->oihw", gate, layer.shared))
    model, tokens = tiny(modulation="repeat")  # along the inputs
    layer = model.blocks[0].up
    factors = layer.head(tokens)[2] + layer.offset.view(6, 8)  # [N, out]
    weight = layer.weight(tokens)[2].flatten(1) / layer.shared.flatten(1)  # [out, in * k * k]
    for i in (0, 5, 6, 127):
        torch.testing.assert_close(weight[:, i], factors[i % 6])


def test_direct_reuse_gives_every_layer_the_same_numbers():
    model, tokens = tiny(reuse="direct")
    numbers = tokens.flatten(1)  # 48
    for layer in layers_of(model):
        got = (layer.generate(tokens) - layer.offset) / layer.std
        torch.testing.assert_close(got, numbers.repeat(1, 99)[:, : got.shape[1]])
    assert not any("head" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("side", ["residual", "skip", "none"])
def test_no_reuse_gives_each_layer_its_own_numbers(side):
    model, tokens = tiny(64, reuse="none", side=side)
    tokens.requires_grad_()
    used = torch.zeros(tokens[0].numel())
    for layer in layers_of(model):
        (grad,) = torch.autograd.grad(layer.generate(tokens)[0].sum(), tokens)
        used += (grad[0].flatten() != 0).float()
        assert (grad != 0).sum() == len(layer.offset) > 0
    assert used.max() == 1


def test_a_variant_is_trained_sampled_and_measured(tmp_path, monkeypatch):
    """Neither side connections nor position codes have parameters here: only the name tells the decoders apart."""

    def detector(frames):
        return frames.reshape(len(frames), -1)[:, :2] / 255.0

    detector.meta = {"features": "random"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fvd.load_detector", lambda *args, **kw: detector)
    name, tiny = "NeRV pos_size=4 side=none", "--steps 1 --batch-size 2 --bf16 off"
    variants.main(f"vae --side none --pos-size 4 --num-frames 4 --decode-frames 1 {tiny}".split())
    ckpt = torch.load("vae.pt", weights_only=True)
    network = variants.load_vae(ckpt).nerv
    assert ckpt["decoder"] == type(network).__name__ == name and network.config.pos_size == 4
    for load in (lambda: vae.load_vae(ckpt), lambda: dit.main(["--steps", "1"])):
        with pytest.raises(UserError, match=f"its network is '{name}', not 'NeRV'"):
            load()
    variants.main(f"dit --denoiser latte --num-latents 4 --width 24 --depth 2 --extras {tiny}".split())
    ckpt = torch.load("dit.pt", weights_only=True)
    model, autoencoder, _ = variants.load_dit(ckpt)
    assert type(model) is variants.Latte and type(autoencoder.nerv).__name__ == name
    with pytest.raises(UserError, match="its network is 'Latte', not 'DiT'"):
        dit.load_dit(ckpt, load_vae=variants.load_vae)
    variants.main("sample --classes 0 --steps 2".split())
    assert (tmp_path / "out/samples/samples.png").is_file()
    for file in ("vae.pt", "dit.pt"):
        variants.main(f"evaluate --ckpt {file} --lpips none --videos 4 --classifier-clips 4 --bootstrap 0 --steps 2".split())


def one_by_one(x, kernels):
    """A 3×3 convolution for each video by itself."""
    return torch.cat([F.conv2d(part, W, padding=1) for part, W in zip(x.chunk(len(kernels), 1), kernels)], 1)


def test_upsampling():
    x = torch.randn(2, 3 * 8, 4, 4, dtype=torch.float64)  # of three videos and two frames
    model, tokens = tiny(upsampling="pixelshuffle")
    up = model.blocks[0].up
    assert tiny()[0].blocks[0].up.kernel_shape == (8, 8, 4, 4)
    assert up.kernel_shape == (32, 8, 3, 3) and up.block_shape == (16, 4, 3, 3)
    y = one_by_one(x, up.kernel(tokens)).unflatten(1, (-1, 2, 2)).permute(0, 1, 4, 2, 5, 3).flatten(4).flatten(2, 3)
    torch.testing.assert_close(up(x, tokens), y)
    model, tokens = tiny(upsampling="bilinear")
    big, up = F.interpolate(x, scale_factor=2, mode="bilinear"), model.blocks[0].up
    torch.testing.assert_close(up(x, tokens), one_by_one(big, up.kernel(tokens)))


@pytest.mark.parametrize("side", ["none", "skip"])
def test_without_side_connections_the_main_path_is_alone_or_images_of_all_levels_are_summed(side):
    model, tokens = tiny(side=side)
    x = first = torch.randn(2, 3 * 8, 4, 4, dtype=torch.float64)
    maps = []
    for block in model.blocks:
        for layer in [block.up, *block.convs]:
            x = F.gelu(layer(x, tokens))
        x = nerv.GELU_GAIN * x
        maps.append(x)
    expected = model.to_rgb(x, tokens)
    if side == "skip":
        expected = expected + F.interpolate(model.skips[0](maps[0], tokens), scale_factor=2, mode="bilinear")
    torch.testing.assert_close(model.blocks_to_rgb(first, tokens), expected)


def denoiser(name):
    torch.manual_seed(0)
    model = variants.DENOISERS[name](dit.DiTConfig(6, 8, 3, width=16, depth=2, heads=2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # gates and the last layer start at zero
    return model


@pytest.mark.parametrize("name", ["dit", "gpt", "latte"])
def test_denoisers_depend_on_timestep_class_and_the_place_of_tokens_and_everything_learns(name):
    model, tokens, timestep, label = denoiser(name), torch.randn(4, 6, 8), torch.arange(1, 5), torch.arange(4)
    eps = model(tokens, timestep, label)
    others = (
        model(tokens, timestep + 1, label),
        model(tokens, timestep, label.flip(0)),
        model(tokens.flip(1), timestep, label).flip(1),
    )
    assert eps.shape == tokens.shape and all((other - eps).abs().max() > 1e-4 for other in others)
    eps.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("rows, reached", [(0, ({3, 4, 5}, {1, 4})), (3, ({4, 5}, {0, 2, 4}))])
def test_latte_attends_to_a_row_or_a_column(rows, reached):
    model, x = denoiser("latte"), torch.randn(1, 6, 16)
    condition, changed = torch.randn(1, 16), x.clone()
    changed[0, 4] = torch.randn(16)  # of rows 0 1 2 and 3 4 5, or of rows 0 1, 2 3 and 4 5
    for block, expected in zip(model.blocks, reached):
        block.rows = rows or block.rows
        difference = (block(changed, condition) - block(x, condition)).abs().amax(2)[0]
        assert {i for i in range(6) if difference[i] > 1e-6} == expected
    assert variants.LatteBlock(dit.DiTConfig(7, 8, 3, width=16, depth=2, heads=2), columns=False).rows == 1  # 7 is prime
