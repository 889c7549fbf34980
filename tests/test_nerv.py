"""The decoder: Table A1, kernels and decoding against plain loops, time."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from nerv import CONFIGS, NeRV, NeRVConfig, double, position_code, sinusoid

# Small decoders with all that large ones have: a side connection, entries of every kind, stems of both fractions.
SMALL = {
    "divides": NeRVConfig(resolution=32, num_frames=4, num_tokens=16, token_dim=6, width=24, block=8),
    "160 tokens": NeRVConfig(resolution=64, num_frames=4, num_tokens=160, token_dim=4, width=24, block=12, stem_fraction=2),
    "7 tokens": NeRVConfig(resolution=32, num_frames=4, num_tokens=7, token_dim=5, width=16, block=16),
    "no growth": NeRVConfig(resolution=32, num_frames=4, num_tokens=16, token_dim=6, width=16, last_factor=1, block=8),
}


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("preset, millions", [("S", 3.52), ("B", 13.95), ("L", 55.56)])
def test_layers_blocks_and_maps_are_those_of_table_a1(preset, millions):
    with torch.device("meta"):
        model = NeRV(CONFIGS[preset])
    D, B, T = CONFIGS[preset].width, 2, 3
    assert model.num_kernel_weights() == 211 * D * D + 486 * D and round(model.num_kernel_weights() / 1e6, 2) == millions
    stem = (D, 48) if preset == "S" else (D // 2, 24)  # the table's [48, D] and [24, D/2] are (in, out); these are (out, in)
    same, grown, up = (64, 64), (128, 64), (D, D)
    expected = [(stem, (D, 48), 3)]
    expected += [(same, up, 4), (same, up, 3), (same, up, 3)] * 2
    expected += [(same, up, 4), (same, up, 3), (grown, (2 * D, D), 3)]
    expected += [(same, (2 * D, 2 * D), 4), (same, (2 * D, 2 * D), 3), ((3, D), (3, 2 * D), 3)]
    layers, shapes = model.table_layers(), []
    assert [(layer.block_shape[:2], layer.kernel_shape[:2], layer.kernel_shape[2]) for _, layer in layers] == expected
    for name, layer in layers:
        assert layer.upsample == (layer.kernel_shape[2] == 4), name
        assert math.prod(layer.kernel_shape) == len(layer.offset) + layer.beside.numel() + layer.below.numel(), name
        layer.register_forward_hook(lambda layer, args, out: shapes.append(tuple(out.shape)))
    frames = model(torch.empty(B, 128, 128, device="meta"), torch.empty(T, device="meta"))
    maps = [(D, 8)] + [(D, 16)] * 3 + [(D, 32)] * 3 + [(D, 64)] * 2 + [(2 * D, 64)] + [(2 * D, 128)] * 2 + [(3, 128)]
    assert shapes == [(T, B * channels, size, size) for channels, size in maps]
    assert frames.shape == (B, T, 3, 128, 128)
    if preset == "S":  # 0.62 M generated entries at N = d = 128; the heads of the multi-head affine have as many weights
        assert sum(math.prod(layer.block_shape) for _, layer in layers) == 4811 * 128
        assert sum(layer.head.weight.numel() for _, layer in layers) == 4811 * 128


def reference_kernel(layer, tokens):
    """One video's kernel of one layer, entry by entry: tokens [N, d] -> [out, in, k, k]."""
    (m_out, m_in, k, _), (out_ch, in_ch) = layer.block_shape, layer.kernel_shape[:2]
    entries = torch.cat([layer.head.weight @ token for token in tokens])[: len(layer.offset)] + layer.offset
    rows = []
    for o in range(out_ch):
        row = torch.zeros(in_ch, k, k, dtype=tokens.dtype)
        if o < m_out:
            for i, y, x in itertools.product(range(m_in), range(k), range(k)):
                place = ((i * k + y) * k + x) * m_out + o if layer.upsample else ((o * k + y) * k + x) * m_in + i
                row[i, y, x] = entries[place]
            row[m_in:] = layer.beside[o]
        else:
            row[:] = layer.below[o - m_out]
        rows.append(row / (row.square().sum() + 1e-8).sqrt())
    return torch.stack(rows)


def reference_decode(model, tokens, t):
    """Plain loops over videos and layers instead of group convolutions."""

    def apply(layer, x, token):
        W = reference_kernel(layer, token)
        if layer.upsample:
            return F.conv_transpose2d(x, 2 * W.transpose(0, 1), layer.bias, stride=2, padding=1)
        return F.conv2d(x, W, layer.bias, padding=W.shape[-1] // 2)

    def gelu(x):
        return 1.5336 * x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    videos = []
    for token in tokens:
        x = gelu(apply(model.stem, position_code(t, model.config).double(), token))
        for block in model.blocks:
            h = gelu(apply(block.up, x, token))
            for conv in block.convs:
                h = gelu(apply(conv, h, token))
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = apply(block.side, x, token) if block.side else x
            x = (h + x) / math.sqrt(2)
        x = apply(model.to_rgb, x, token)
        videos.append(torch.tanh(x) + 0.01 * (x - x.detach()))  # as NeRV.forward
    return torch.stack(videos)


@pytest.mark.parametrize("name", SMALL)
def test_videos_of_one_call_and_their_gradients_are_those_of_plain_loops(name):
    torch.manual_seed(0)
    model, c = NeRV(SMALL[name]).double(), SMALL[name]
    for parameter in model.parameters():  # biases start at zero, where an error in them would not show
        parameter.data += 0.1 * torch.randn_like(parameter)
    tokens = torch.randn(3, c.num_tokens, c.token_dim, dtype=torch.float64, requires_grad=True)
    t, parameters, results = torch.tensor([0.0, 1.25, 3.0]), dict(model.named_parameters()), []
    for frames in (model(tokens, t), reference_decode(model, tokens, t)):
        probe = torch.sin(torch.arange(frames.numel(), dtype=torch.float64)).view_as(frames)
        results.append((frames, torch.autograd.grad((frames * probe).sum(), [tokens, *parameters.values()], allow_unused=True)))
    (frames, grads), (expected, expected_grads) = results
    assert frames.shape == (3, 3, 3, c.resolution, c.resolution)
    assert relative(frames, expected) < 1e-10
    for key, a, b in zip(["tokens", *parameters], grads, expected_grads):
        if b is not None and b.numel():  # a layer whose kernel is generated as a whole shares nothing
            assert b.norm() > 0 and relative(a, b) < 1e-10, key
    if name != "160 tokens":  # of which some are left over here
        assert (grads[0].abs() > 0).all()  # every number of every token matters
    for wrong in (tokens.repeat(1, 2, 1), tokens.repeat(1, 1, 2)):  # twice as many would be cut off in silence
        with pytest.raises(ValueError, match="expected"):
            model(wrong, t)


@pytest.mark.parametrize("length, dim", [(1, 2), (2, 16), (8, 298), (16, 16), (128, 2)])
def test_sinusoid_does_not_alias_and_tells_positions_apart(length, dim):
    a_bit = 0.01  # small enough that the angle read off below is the frequency
    sine, cosine = sinusoid(torch.tensor(a_bit, dtype=torch.float64), dim, length).chunk(2)
    frequency = torch.atan2(sine, cosine) / a_bit
    assert frequency.min() > 0 and frequency.max() < math.pi
    code = sinusoid(torch.arange(length, dtype=torch.float32), dim, length)
    assert code.shape == (length, dim) and (length == 1 or torch.pdist(code).min() > 1e-3)


def test_position_code_is_time_then_height_then_width():
    code = position_code(torch.tensor([0.0, 2.5]), CONFIGS["S"])
    assert code.shape == (2, 48, 8, 8)
    time, height, width = code.split(16, 1)
    assert (time == time[:, :, :1, :1]).all() and (time[0] != time[1]).any()
    assert (height == height[:1, :, :, :1]).all() and (width == width[:1, :, :1, :]).all()
    torch.testing.assert_close(height, width.transpose(2, 3))
    assert torch.pdist(code[0].flatten(1).T).min() > 1e-2  # every cell of the grid is a place of its own
    more = position_code(torch.tensor([-8.0, 2.5, 9.0, 1000.0]), CONFIGS["S"])  # no frame depends on the others
    assert torch.equal(more[1], code[1]) and more.isfinite().all()


@pytest.mark.parametrize("shape", [(2, 6, 1, 1), (1, 3, 5, 4), (2, 4, 8, 8)])
def test_doubling_on_a_gpu_is_bilinear_interpolation(shape):
    class OnGPU(torch.Tensor):
        is_cuda = True

    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(torch.Tensor(double(x.as_subclass(OnGPU))), double(x), rtol=0, atol=1e-15)
