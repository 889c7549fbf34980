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


def test_fmm_is_a_gate_of_low_rank():
    model, tokens = tiny(modulation="fmm")
    layer = model.blocks[0].convs[0]
    numbers = layer.generate(tokens)[1]
    a, b = numbers[:80].view(8, 10), numbers[80:].view(10, 8)
    for place in ((0, 0), (2, 1)):
        expected = torch.sigmoid(a @ b) * layer.shared[:, :, *place]
        torch.testing.assert_close(layer.weight(tokens)[1, :, :, *place], expected)


def test_repeat_multiplies_along_the_inputs():
    model, tokens = tiny(modulation="repeat")
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
        torch.testing.assert_close(got[:, :48], numbers[:, : got.shape[1]])
        torch.testing.assert_close(got[:, 48:96], numbers[:, : max(0, min(96, got.shape[1]) - 48)])
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


def test_no_reuse_and_multiplication_do_not_go_together():
    assert variants.decoder() is variants.decoder(side="residual", reuse="multihead") is nerv.NeRV
    with pytest.raises(UserError, match="reuse none has too few numbers for modulation fmm"):
        variants.decoder(reuse="none", modulation="fmm")
    with pytest.raises(ValueError, match="the 6 numbers of a layer cannot fill a 3 x 3 kernel"):
        tiny(reuse="none")


def test_a_variant_is_trained_sampled_and_measured(tmp_path, monkeypatch, capsys):
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
    assert "classifier accuracy" in capsys.readouterr().out


def maps():
    """The input of a block for three videos, and two frames."""
    return torch.randn(2, 3 * 8, 4, 4, dtype=torch.float64)


def one_by_one(x, kernels):
    """A 3×3 convolution for each video by itself."""
    return torch.cat([F.conv2d(part, W, padding=1) for part, W in zip(x.chunk(len(kernels), 1), kernels)], 1)


def test_pixel_shuffle_has_four_times_the_kernel():
    model, tokens = tiny(upsampling="pixelshuffle")
    up, x = model.blocks[0].up, maps()
    assert tiny()[0].blocks[0].up.kernel_shape == (8, 8, 4, 4)
    assert up.kernel_shape == (32, 8, 3, 3) and up.block_shape == (16, 4, 3, 3)
    y = one_by_one(x, up.kernel(tokens)).unflatten(1, (-1, 2, 2)).permute(0, 1, 4, 2, 5, 3).flatten(4).flatten(2, 3)
    torch.testing.assert_close(up(x, tokens), y)


def test_bilinear_convolves_after_interpolation():
    model, tokens = tiny(upsampling="bilinear")
    up, x = model.blocks[0].up, maps()
    big = F.interpolate(x, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(up(x, tokens), one_by_one(big, up.kernel(tokens)))


def test_skips_sum_the_images_of_all_levels():
    model, tokens = tiny(side="skip")
    x = maps()
    first = model.blocks[0](x, tokens)
    second = model.blocks[1](first, tokens)
    expected = model.to_rgb(second, tokens) + F.interpolate(model.skips[0](first, tokens), scale_factor=2, mode="bilinear")
    torch.testing.assert_close(model.blocks_to_rgb(x, tokens), expected)


def test_plain_blocks_are_the_main_path_alone():
    model, tokens = tiny(side="none")
    block, x = model.blocks[0], maps()
    h = x
    for layer in [block.up, *block.convs]:
        h = F.gelu(layer(h, tokens))
    torch.testing.assert_close(block(x, tokens), nerv.GELU_GAIN * h)
    assert block.side is None


def denoiser(name):
    torch.manual_seed(0)
    model = variants.DENOISERS[name](dit.DiTConfig(6, 8, 3, width=16, depth=2, heads=2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # gates and the last layer start at zero
    return model


@pytest.mark.parametrize("name", ["dit", "gpt", "latte"])
def test_denoisers_depend_on_timestep_class_and_tokens(name):
    model, tokens, timestep, label = denoiser(name), torch.randn(2, 6, 8), torch.tensor([5, 700]), torch.tensor([0, 2])
    eps = model(tokens, timestep, label)
    assert eps.shape == tokens.shape
    for changed in ((tokens, timestep + 1, label), (tokens, timestep, label.flip(0)), (tokens.flip(1), timestep, label)):
        assert (model(*changed) - eps).abs().max() > 1e-4
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
