import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nerv import (
    CONFIGS,
    GELU_GAIN,
    ModulatedConv,
    NeRV,
    NeRVConfig,
    Pictures,
    bounded,
    double,
    double_by_slices,
    position_code,
    sinusoid,
)

# Small decoders with all that large ones have: a side connection, entries of every kind, stems of both fractions.
SMALL = {
    "divides": NeRVConfig(resolution=32, num_frames=4, num_tokens=16, token_dim=6, width=24, block=8),
    "160 tokens": NeRVConfig(resolution=64, num_frames=4, num_tokens=160, token_dim=4, width=24, block=12, stem_fraction=2),
    "7 tokens": NeRVConfig(resolution=32, num_frames=4, num_tokens=7, token_dim=5, width=16, block=16),
    "no growth": NeRVConfig(resolution=32, num_frames=4, num_tokens=16, token_dim=6, width=16, last_factor=1, block=8),
}


def small(name="divides", B=3):
    """A small decoder in double precision and tokens for it."""
    torch.manual_seed(0)
    model = NeRV(SMALL[name]).double()
    for parameter in model.parameters():  # biases start at zero, where an error in them would not show
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model, torch.randn(B, SMALL[name].num_tokens, SMALL[name].token_dim, dtype=torch.float64)


def meta(preset):
    """A preset of the paper without memory: shapes only."""
    with torch.device("meta"):
        return NeRV(CONFIGS[preset])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# ----------------------------------------------------------------------------------------------------------- Table A1, §3.2


@pytest.mark.parametrize("preset, millions", [("S", 3.52), ("B", 13.95), ("L", 55.56)])
def test_number_of_kernel_weights(preset, millions):
    count, D = meta(preset).num_kernel_weights(), CONFIGS[preset].width
    assert count == 211 * D * D + 486 * D
    assert round(count / 1e6, 2) == millions


@pytest.mark.parametrize("preset", ["S", "B", "L"])
def test_a_kernel_is_its_generated_block_and_its_shared_entries(preset):
    for name, layer in meta(preset).table_layers():
        assert math.prod(layer.kernel_shape) == math.prod(layer.block_shape) + layer.shared.numel(), name
        assert layer.kernel_shape[:2] == (layer.out_ch, layer.in_ch), name


def test_generated_entries_of_S():
    # 0.62 M at N = d = 128; the heads of the multi-head affine hold as many weights.
    model = meta("S")
    assert sum(math.prod(layer.block_shape) for _, layer in model.table_layers()) == 4811 * 128
    assert sum(layer.head.weight.numel() for _, layer in model.table_layers()) == 4811 * 128


@pytest.mark.parametrize("preset", ["S", "B", "L"])
def test_generated_blocks_and_kernels_are_those_of_table_a1(preset):
    D = CONFIGS[preset].width
    stem = (D, 48) if preset == "S" else (D // 2, 24)  # the table's [48, D] and [24, D/2] are (in, out); these are (out, in)
    same, grown, up = (64, 64), (128, 64), (D, D)
    expected = [(stem, (D, 48), 3)]
    expected += [(same, up, 4), (same, up, 3), (same, up, 3)] * 2
    expected += [(same, up, 4), (same, up, 3), (grown, (2 * D, D), 3)]
    expected += [(same, (2 * D, 2 * D), 4), (same, (2 * D, 2 * D), 3), ((3, D), (3, 2 * D), 3)]
    layers = meta(preset).table_layers()
    found = [(layer.block_shape[:2], layer.kernel_shape[:2], layer.kernel_shape[2]) for _, layer in layers]
    assert found == expected
    for name, layer in layers:
        assert layer.upsample == (layer.kernel_shape[2] == 4), name
        assert layer.kernel_shape[2:] == layer.block_shape[2:] == (layer.kernel_shape[2],) * 2, name


@pytest.mark.parametrize("preset", ["S", "B", "L"])
def test_feature_maps_are_those_of_table_a1(preset):
    model, D, B, T = meta(preset), CONFIGS[preset].width, 2, 3
    shapes = []
    for _, layer in model.table_layers():
        layer.register_forward_hook(lambda layer, args, out: shapes.append(tuple(out.shape)))
    frames = model(torch.empty(B, 128, 128, device="meta"), torch.empty(T, device="meta"))
    expected = [(D, 8)] + [(D, 16)] * 3 + [(D, 32)] * 3 + [(D, 64)] * 2 + [(2 * D, 64)] + [(2 * D, 128)] * 2 + [(3, 128)]
    assert shapes == [(T, B * channels, size, size) for channels, size in expected]
    assert frames.shape == (B, T, 3, 128, 128)


def test_one_more_block_doubles_the_resolution():
    with torch.device("meta"):
        model = NeRV(NeRVConfig(resolution=256, num_tokens=160))
    frames = model(torch.empty(1, 160, 128, device="meta"), torch.empty(1, device="meta"))
    assert len(model.blocks) == 5 and frames.shape == (1, 1, 3, 256, 256)


@torch.no_grad()
def test_S_decodes_a_frame_of_reasonable_contrast():
    torch.manual_seed(0)
    frames = NeRV(CONFIGS["S"])(torch.randn(1, 128, 128), torch.tensor([3.0]))
    assert frames.shape == (1, 1, 3, 128, 128)
    assert 0.1 < frames.std() < 0.9  # neither flat nor saturated at initialization: demodulation and gains hold the variance


def test_gain_keeps_the_second_moment():
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    assert (GELU_GAIN * F.gelu(x)).square().mean().item() == pytest.approx(1, abs=0.01)


# ----------------------------------------------------------------------------------------------------- decoding, written out


def reference_kernel(layer, tokens):
    """One video's kernel of one layer, tokens [N, d] -> [out, in, k, k]."""
    m_out, m_in, k, _ = layer.block_shape
    out_ch, in_ch = layer.kernel_shape[:2]
    if layer.upsample:  # entries in the order in, place, out; else out, place, in
        m_out, m_in, out_ch, in_ch = m_in, m_out, in_ch, out_ch
    entries = torch.cat([layer.head.weight @ token for token in tokens])[: m_out * m_in * k * k]
    W = torch.zeros(out_ch, k, k, in_ch, dtype=tokens.dtype)
    generated = torch.zeros(W.shape, dtype=torch.bool)
    generated[:m_out, :, :, :m_in] = True
    W = W.masked_scatter(generated, entries + layer.offset)
    right = torch.zeros_like(generated)
    right[:m_out, :, :, m_in:] = True
    W = W.masked_scatter(right, layer.shared)
    W = W.masked_scatter(~(generated | right), layer.shared[right.sum() :])
    W = W.permute(3, 0, 1, 2) if layer.upsample else W.permute(0, 3, 1, 2)
    return torch.stack([row / (row.square().sum() + 1e-8).sqrt() for row in W])


def reference_decode(model, tokens, t):
    """Plain loops over videos and layers instead of grouped convolutions."""

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
        videos.append(torch.tanh(x) + 0.01 * (x - x.detach()))  # nerv.bounded
    return torch.stack(videos)


@pytest.mark.parametrize("name", SMALL)
def test_grouped_decode_and_its_gradients_equal_plain_loops(name):
    model, tokens = small(name)
    tokens.requires_grad_()
    t = torch.tensor([0.0, 1.25, 3.0])
    parameters = dict(model.named_parameters())
    results = []
    for frames in (model(tokens, t), reference_decode(model, tokens, t)):
        probe = torch.sin(torch.arange(frames.numel(), dtype=torch.float64)).view_as(frames)
        results.append((frames, torch.autograd.grad((frames * probe).sum(), [tokens, *parameters.values()], allow_unused=True)))
    (frames, grads), (expected, expected_grads) = results
    assert frames.shape == (3, 3, 3, SMALL[name].resolution, SMALL[name].resolution)
    assert relative(frames, expected) < 1e-10
    for key, a, b in zip(["tokens", *parameters], grads, expected_grads):
        if b.numel():  # a layer whose kernel is generated as a whole shares nothing
            assert b.norm() > 0 and relative(a, b) < 1e-10, key


def test_single_precision_is_close_to_double():
    model, tokens = small()
    t = torch.arange(4.0)
    expected = model(tokens, t)
    assert relative(model.float()(tokens.float(), t).double(), expected) < 1e-5


def test_one_video_does_not_depend_on_the_others_in_its_batch():
    model, tokens = small()
    alone = torch.cat([model(token[None], torch.arange(4.0)) for token in tokens])
    assert relative(model(tokens, torch.arange(4.0)), alone) < 1e-10


# ------------------------------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("name", SMALL)
def test_kernels_have_the_norm_of_the_gain_per_output_channel(name):
    model, tokens = small(name)
    gains = {"stem": 1, "up": 2, "conv1": GELU_GAIN, "conv2": GELU_GAIN, "to_rgb": 1}  # of GELUs, in what reads them
    for where, layer in model.table_layers():
        norms = layer.kernel(tokens).square().sum((2, 3, 4))
        torch.testing.assert_close(norms, torch.full_like(norms, gains[where.split(".")[-1]] ** 2), rtol=1e-5, atol=0)


def test_side_connection_is_a_modulated_1x1_convolution_where_channels_change():
    model, tokens = small()
    sides = [block.side for block in model.blocks]
    assert [side is not None for side in sides] == [True, False]
    assert sides[0].kernel(tokens).shape == (3, 48, 24, 1, 1)
    assert relative(sides[0].kernel(tokens)[0], sides[0].kernel(tokens)[1]) > 1e-3
    assert all(block.side is None for block in small("no growth")[0].blocks)


@pytest.mark.parametrize("name", SMALL)
def test_tokens_generate_the_first_channels_and_nothing_else(name):
    model, tokens = small(name)
    for layer_name, layer in model.table_layers():
        m_out, m_in = layer.block_shape[:2]
        W = layer.kernel(tokens)
        shared = [W[:, :m_out, m_in:], W[:, m_out:]]
        for part in shared:
            if part.numel():  # the same for all videos, up to the demodulation of an output channel
                direction = F.normalize(part.flatten(2), dim=2)
                torch.testing.assert_close(direction, direction[:1].expand_as(direction), rtol=1e-10, atol=1e-10)
        block = F.normalize(W[:, :m_out, :m_in].flatten(2), dim=2)
        assert (block[0] - block[1]).abs().max(1).values.min() > 1e-6, layer_name  # every generated row differs


def test_every_token_matters():
    # 7 tokens do not divide the blocks: the surplus that is cut off must not be a whole token of the large layers.
    model, tokens = small("7 tokens", B=1)
    tokens.requires_grad_()
    (grad,) = torch.autograd.grad(model(tokens, torch.zeros(1)).square().sum(), tokens)
    assert (grad.abs() > 0).all()


def test_generated_block_is_linear_in_the_tokens():
    model, (a, b, _) = small()
    for name, layer in model.table_layers():
        m_out, m_in = layer.block_shape[:2]
        if m_in == layer.in_ch:
            continue  # no shared entry in these rows to undo the demodulation with
        W = layer.kernel(torch.stack([a, b, (a + b) / 2]))
        anchor = W[:, :m_out, m_in, 0, 0]  # shared, so any difference between videos is the demodulation
        before = W[:, :m_out, :m_in] / anchor[:, :, None, None, None]
        assert relative(before[2], (before[0] + before[1]) / 2) < 1e-8, name


# ---------------------------------------------------------------------------------------------------------------------- time


@torch.no_grad()
def test_frames_are_independent():
    model, tokens = small()
    full = model(tokens, torch.arange(4.0))
    picks = torch.tensor([3, 1])
    assert relative(model(tokens, picks), full[:, picks]) < 1e-10  # integer positions are fine, too
    assert relative(model(tokens, torch.linspace(0, 3, 7))[:, ::2], full) < 1e-10


@torch.no_grad()
def test_time_is_continuous():
    model, tokens = small()
    frames = model(tokens, torch.tensor([1.0, 1.001, 1.5, 2.0]))
    step, tiny = (frames[:, 3] - frames[:, 0]).norm(), (frames[:, 1] - frames[:, 0]).norm()
    assert 0 < tiny < 0.01 * step
    assert (frames[:, 2] - frames[:, 0]).norm() > 10 * tiny


@torch.no_grad()
def test_time_extrapolates_within_range():
    model, tokens = small()
    frames = model(tokens, torch.tensor([-8.0, 3.5, 12.0, 1000.0]))
    assert frames.isfinite().all() and frames.abs().max() <= 1


@pytest.mark.parametrize("length", [1, 2, 4, 8, 16, 128])
@pytest.mark.parametrize("dim", [2, 8, 16, 298])
def test_sinusoid_does_not_alias_and_tells_positions_apart(length, dim):
    a_bit = 0.01  # small enough that the angle read off below is the frequency
    sine, cosine = sinusoid(torch.tensor(a_bit, dtype=torch.float64), dim, length).chunk(2)
    frequency = torch.atan2(sine, cosine) / a_bit
    assert frequency.min() > 0 and frequency.max() < math.pi
    code = sinusoid(torch.arange(length, dtype=torch.float32), dim, length)
    assert code.shape == (length, dim)
    if length > 1:
        assert torch.pdist(code).min() > 1e-3


def test_position_code_is_time_then_height_then_width():
    code = position_code(torch.tensor([0.0, 2.5]), CONFIGS["S"])
    assert code.shape == (2, 48, 8, 8)
    time, height, width = code.split(16, 1)
    assert (time == time[:, :, :1, :1]).all() and (time[0] != time[1]).any()
    assert (height == height[:1, :, :, :1]).all() and (width == width[:1, :, :1, :]).all()
    torch.testing.assert_close(height, width.transpose(2, 3))
    assert torch.pdist(code[0].flatten(1).T).min() > 1e-2  # every cell of the grid is a place of its own


# -------------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("resolution", [0, -32, 8, 16, 48, 100])
def test_bad_resolution(resolution):
    with pytest.raises(ValueError, match=f"resolution {resolution}"):
        NeRVConfig(resolution=resolution)


@pytest.mark.parametrize("name", ["num_frames", "num_tokens", "token_dim"])
def test_sizes_must_be_positive(name):
    with pytest.raises(ValueError, match=name):
        NeRVConfig(**{name: 0})


@pytest.mark.parametrize("shape", [(2, 15, 6), (2, 16, 7), (16, 6)])
def test_wrong_token_shape(shape):
    with pytest.raises(ValueError, match="tokens are"):
        NeRV(SMALL["divides"])(torch.zeros(shape), torch.zeros(1))


# ---------------------------------------------------------------------------------------------------------- on large machines


@pytest.mark.parametrize("shape", [(2, 6, 1, 1), (1, 3, 5, 4), (2, 4, 8, 8)])
def test_doubling_by_slices_is_bilinear_interpolation(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    ours, theirs = double_by_slices(x), F.interpolate(x, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-15)
    probe = torch.randn_like(ours)
    torch.testing.assert_close(*(torch.autograd.grad((y * probe).sum(), x)[0] for y in (ours, theirs)), rtol=0, atol=1e-14)
    torch.testing.assert_close(double(x), theirs)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("preset, B", [("S", 40), ("B", 32), ("L", 32), ("S-long", 16), ("L-256-long", 1)])
def test_no_map_is_larger_than_every_kernel_can_index(preset, B, train):
    """On the meta device, which has shapes and no memory. Where no gradient is wanted, 1 GiB of float32 is the most."""
    model, largest = meta(preset), []
    for layer in model.modules():
        if isinstance(layer, ModulatedConv):
            layer.register_forward_hook(lambda layer, inputs, out: largest.append(out.numel()))
    c = model.config
    tokens, t = torch.empty(B, c.num_tokens, c.token_dim, device="meta"), torch.empty(c.num_frames, device="meta")
    with torch.set_grad_enabled(train):
        assert model(tokens, t).shape == (B, c.num_frames, 3, c.resolution, c.resolution)
    assert max(largest) < (2**31 if train else 2**28 + 1)


def test_parts_of_a_clip_are_the_clip(monkeypatch):
    """Frames that are too many at once come one after the other; the limit is lowered for it."""
    model, tokens, t = *small()[:2], torch.arange(5.0)
    with torch.no_grad():
        whole, calls = model(tokens, t), []
        frame = model.to_rgb.in_ch * (model.config.resolution + 2) ** 2  # with what padding adds
        monkeypatch.setattr(type(model), "MOST", {False: 2 * frame})
        model.stem.register_forward_hook(lambda layer, inputs, out: calls.append(out.shape[:2]))
        torch.testing.assert_close(model(tokens, t), whole)
    assert max(frames for frames, _ in calls) == 2
    assert sum(frames * maps for frames, maps in calls) == 5 * len(tokens) * model.stem.out_ch  # nothing twice


def test_black_frames_still_have_a_gradient():
    x = torch.tensor([-2000.0, -1.0, 0.0, 3.0, 50.0], requires_grad=True)
    y = bounded(x)
    assert torch.equal(y, torch.tanh(x))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, 1 - torch.tanh(x.detach()).square() + 0.01)
    model, tokens, t = *small()[:2], torch.arange(2.0)
    model.to_rgb.bias.data.fill_(-1000.0)  # as black as a decoder may get
    frames = model(tokens, t)
    assert (frames == -1).all()
    (frames - 1).square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in model.stem.head.parameters())


# ---------------------------------------------------------------------------------------------------------------- pictures


def test_pictures_are_a_sum_with_a_cosine_series_for_each():
    torch.manual_seed(0)
    pictures = Pictures(5, 4, 3, gain=2.0).double()
    for parameter in pictures.parameters():
        parameter.data = torch.randn_like(parameter)
    codes, t = torch.randn(2, 15, dtype=torch.float64), torch.tensor([0.0, 2.5, 7.0])
    frames = pictures(codes, t, 8)
    for b in range(2):
        for i, place in enumerate(t.tolist()):
            wanted = pictures.mean.clone()
            for k in range(5):
                for w in range(3):
                    wave = pictures.strength[w] * math.cos(w * math.pi * (place + 0.5) / 8)
                    wanted = wanted + codes[b, 3 * k + w] * wave * pictures.shared[k]
            torch.testing.assert_close(frames[b, i], 2 * wanted.view(3, 4, 4), rtol=0, atol=1e-5)  # positions are float32


def test_pictures_become_the_principal_components_of_frames():
    torch.manual_seed(0)
    spread = torch.tensor([5.0, 3.0, 2.0, 1.0, 0.05, 0.05])
    frames = (torch.randn(400, 6) * spread @ torch.linalg.qr(torch.randn(48, 6))[0].T + 0.3).unflatten(1, (3, 4, 4))
    pictures = Pictures(4, 4, 3, gain=2.0)
    pictures.fit(frames, length=8)
    rows = pictures.gain * pictures.shared
    size = rows[0].square().sum()
    torch.testing.assert_close(rows @ rows.T, size * torch.eye(4), rtol=0, atol=1e-3 * size.item())
    centred = frames.flatten(1) - frames.flatten(1).mean(0)
    left = centred - centred @ rows.T @ rows / size
    best = torch.linalg.svdvals(centred)[4:].square().sum()  # what no four pictures can hold (Eckart and Young 1936)
    assert best <= left.square().sum() * 1.001 and left.square().sum() <= 1.02 * best
    # A clip that shows the first picture all the time has a code of deviation 1, by an orthonormal wave.
    pictures.strength.data.fill_((1 / 8) ** 0.5)
    still = frames[:, None].expand(-1, 8, -1, -1, -1)
    assert pictures.read(still).unflatten(1, (4, 3))[:, 0, 0].std().item() == pytest.approx(1, abs=0.01)


def test_pictures_read_what_they_show():
    torch.manual_seed(0)
    pictures = Pictures(5, 4, 3, gain=2.0)
    pictures.fit(torch.rand(64, 3, 4, 4), length=8)
    codes, t = torch.randn(2, 15), torch.arange(8)
    shown = pictures(codes, t, 8)
    torch.testing.assert_close(pictures.read(shown), codes, rtol=0, atol=1e-3)
    # Something that they cannot show is not read: the part of a clip that is orthogonal to all pictures.
    other = torch.randn(2, 8, 48)
    basis = torch.linalg.qr(pictures.shared.T.detach())[0]
    other = (other - other @ basis @ basis.T).unflatten(2, (3, 4, 4))
    torch.testing.assert_close(pictures.read(shown + other), codes, rtol=0, atol=1e-3)


def test_fewer_frames_than_pictures():
    pictures = Pictures(5, 4, 3, gain=2.0)
    pictures.fit(torch.rand(3, 3, 4, 4), length=8)
    assert pictures.shared[:2].abs().sum(1).min() > 0.1 and pictures.shared[3:].abs().max() == 0
    assert pictures.read(torch.rand(2, 8, 3, 4, 4)).isfinite().all()


@pytest.mark.parametrize("tokens", [16, 7])  # 7 do not divide the 3 x 4 numbers of the pictures
def test_pictures_are_added_and_linear_in_the_tokens(tokens):
    torch.manual_seed(0)
    config = NeRVConfig(resolution=32, num_frames=4, num_tokens=tokens, token_dim=6, width=16, block=8, pictures=3)
    model, t = NeRV(config).double(), torch.tensor([0.0, 1.5])
    a, b = torch.randn(2, 2, tokens, 6, dtype=torch.float64)
    plain = NeRV(replace(config, pictures=0)).double()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "picture" not in k and k != "amplitude"})
    torch.testing.assert_close(model(a, t), 0.05 * plain(a, t), rtol=1e-6, atol=0)  # black, until they are fitted
    model.pictures.shared.data.normal_(std=0.01)

    def added(x):
        return model(x, t) - model.amplitude * plain(x, t)

    assert added(a).abs().max() > 0.001 and torch.allclose(added((a + b) / 2), (added(a) + added(b)) / 2, atol=1e-9)


def test_tokens_that_pictures_read_show_the_video():
    torch.manual_seed(0)
    config = NeRVConfig(resolution=32, num_frames=8, num_tokens=7, token_dim=6, width=16, block=8, pictures=5)
    model, shapes = NeRV(config), torch.rand(5, 3, 32, 32) - 0.5
    video = torch.einsum("btk,kchw->btchw", torch.randn(40, 8, 5), shapes)  # rank 5, and eight waves hold eight frames
    model.pictures.fit(video.flatten(0, 1), 8)
    model.amplitude.data.zero_()
    tokens = model.read(video)
    assert tokens.shape == (40, 7, 6)
    torch.testing.assert_close(model(tokens, torch.arange(8)), video, rtol=0, atol=2e-2)


def test_without_pictures_nothing_is_there():
    assert not any("picture" in name or name == "amplitude" for name in NeRV(CONFIGS["nano"]).state_dict())
    with pytest.raises(ValueError, match="pictures -1"):
        NeRVConfig(pictures=-1)
    with pytest.raises(ValueError, match="pictures 41: each takes a number or more, and tokens are 8 x 5"):
        NeRVConfig(num_tokens=8, token_dim=5, pictures=41)


def test_pictures_have_the_waves_that_tokens_have_numbers_for():
    waves = {K: NeRVConfig(num_frames=16, num_tokens=8, token_dim=5, pictures=K).waves for K in (1, 2, 3, 13, 14, 40)}
    assert waves == {1: 16, 2: 16, 3: 13, 13: 3, 14: 2, 40: 1}
    config = NeRVConfig(resolution=32, num_frames=16, num_tokens=8, token_dim=5, width=16, block=8, pictures=3)
    model = NeRV(config)
    assert model.pictures.strength.shape == (13,) and model.read(torch.rand(2, 16, 3, 32, 32)).shape == (2, 8, 5)
