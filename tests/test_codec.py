"""The codec: counts of the papers, bytes that come back as they were, files whole, cut and damaged, and its training."""

import copy
import csv
import functools
import json
import math
import shutil
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training import losses_of, same

import codec
import data
import vae
from codec import ALLOCATIONS, CodecConfig, NeRVDec, VideoFile
from common import checkpoints, container, degrade, entropy, rivals, utils, video
from common.utils import UserError
from common.video import cut, join
from losses import LPIPS

SIZES = "--resolution 16 --num-frames 4 --width 4 --tokens 3 8 --token-dims 8 6"
TINY = f"train {SIZES} --steps 3 --batch-size 4 --log-every 1 --workers 1"


@pytest.fixture
def call(call):
    """call("encode a.mp4 b.nerv --bits 5") runs codec.py in this process, in an empty directory; returns the exit status."""
    return functools.partial(call, "codec.py")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory with codec.pt, three steps old, a.mkv with 18 frames of 21 x 35, a.nerv with five chunks of it; small."""
    cwd = tmp_path_factory.mktemp("codec")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(codec.ENCODERS, "nano", vae.EncoderConfig(width=24, depth=2, heads=2, patch=(2, 8, 8)))
        patch.chdir(cwd)
        x, t = np.arange(35), np.arange(18)[:, None, None]
        wave = 127 + 100 * np.sin((x + 5 * t) / 6) * np.cos(np.arange(21)[:, None] / 5)
        frames = np.stack([wave, wave[:, ::-1], 255 - wave], -1).astype(np.uint8)  # [18, 21, 35, 3]
        video.write_frames("a.mkv", [frames[:7], frames[7:]], 10)
        np.save("a.npy", frames)
        video.write_frames("small.mkv", [frames[:14, :12, :16]], 10)  # four chunks of one tile
        for command in (TINY, "encode a.mkv a.nerv", "encode small.mkv small.nerv --bits 5"):
            patch.setattr(sys, "argv", ["codec.py", *command.split()])
            codec.main()
    return cwd


@pytest.fixture(scope="module")
def model(trained):
    return codec.load_codec(checkpoints.load(trained / "codec.pt", "codec", ""))


def decoded(path, model, first=0, last=None, **kw):
    file = VideoFile(path).fit(model, "codec.pt")
    with torch.no_grad():
        return np.concatenate(list(codec.decode_frames(file, model, first, last or file.frames, **kw)))


# --------------------------------------------------------------------------------------------------------------- the papers


@pytest.mark.parametrize(
    "kw, weights, codes",
    [
        ({}, 85_552, 24_064),  # FastNeRV, Table 2: 85.6k, 24.1k
        ({"width": 20, "tokens": (4, 80, 16, 0), "token_dims": (256, 240, 240, 0)}, 129_968, 24_064),  # HyperNeRV: 130k, 24.1k
    ],
)
def test_counts_of_the_papers(kw, weights, codes):
    config = CodecConfig(**kw)
    decoder = NeRVDec(config)
    assert decoder.num_weights() == weights and config.num_codes == len(decoder.mean) == codes


def test_allocations_of_table_4():
    counts = {}
    for name, (tokens, dims) in ALLOCATIONS["fastnerv"].items():
        counts[name] = CodecConfig(tokens=tokens, token_dims=dims).codes
    assert counts["uniform"] == [4096, 9216, 9216, 6912]  # 4.1k 9.2k 9.2k 6.9k
    assert counts["specific"] == [0, 36864, 0, 0]
    assert counts["adaptive"] == [1024, 18432, 4608, 0]
    for allocation in ALLOCATIONS["nano"].values():
        CodecConfig(64, tokens=allocation[0], token_dims=allocation[1])


def test_the_papers_network_by_hand():
    torch.manual_seed(0)
    c = CodecConfig(16, num_frames=4, width=4, tokens=(3, 4), token_dims=(8, 6))
    decoder, codes, t = NeRVDec(c).double(), torch.randn(2, c.num_codes, dtype=torch.float64), torch.arange(4.0)
    assert c.strides == (4, 4) and c.shapes == [(64, 16, 1, 1), (48, 4, 3, 3)]
    frames = decoder(codes, t)
    assert frames.shape == (2, 4, 3, 16, 16)
    first, second = decoder.layers
    tokens = codes[1, :24].view(3, 8)
    entries = torch.cat([row.repeat(43)[:342] for row in tokens])[:1024].view(64, 16, 1, 1)  # 1024 / 3 rounded up is 342
    kernel = first.shared * (1 + entries)
    kernel = kernel / kernel.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(first.kernel(codes[:, :24])[1], kernel)
    x = codec.nerv.sinusoid(t, 16, 4).double()[:, :, None, None]
    x = torch.nn.functional.pixel_shuffle(torch.nn.functional.conv2d(x, kernel), 4)
    x = torch.nn.functional.conv2d(
        codec.nerv.GELU_GAIN * torch.nn.functional.gelu(x), second.kernel(codes[1:, 24:])[0], padding=1
    )
    unit = torch.nn.functional.pixel_shuffle(x, 4) + 0.5  # on [0, 1], with the paper's output bias
    torch.testing.assert_close(frames[1], 2 * unit - 1)


def test_a_layer_without_tokens_is_the_same_for_all_videos():
    c = CodecConfig(16, num_frames=4, width=4, tokens=(3, 0), token_dims=(8, 0))
    decoder, codes = NeRVDec(c).double(), torch.randn(3, c.num_codes, dtype=torch.float64)
    t = torch.arange(2.0)
    whole = decoder(codes, t)
    for i in range(3):
        torch.testing.assert_close(decoder(codes[i : i + 1], t)[0], whole[i])
    assert (whole[0] - whole[1]).abs().max() > 1e-4


def test_pictures_by_hand():
    torch.manual_seed(0)
    sizes = {"resolution": 16, "num_frames": 4, "width": 4}
    c = CodecConfig(**sizes, tokens=(3, 4, 2), token_dims=(8, 6, 9), pictures=6)
    decoder, plain = NeRVDec(c).double(), NeRVDec(CodecConfig(**sizes, tokens=(3, 4), token_dims=(8, 6))).double()
    assert decoder.num_weights() == plain.num_weights() and decoder.pictures.shared.shape == (6, 3 * 16 * 16)
    plain.load_state_dict({k: v for k, v in decoder.state_dict().items() if "layers" in k}, strict=False)
    codes, t = torch.randn(2, c.num_codes, dtype=torch.float64), torch.tensor([0.0, 2.5])
    torch.testing.assert_close(decoder(codes, t), plain(codes[:, :48], t))  # pictures begin black, in all codecs the same
    own = decoder.pictures
    own.shared.data.normal_(), own.mean.data.normal_(), own.strength.data.normal_()
    waves = [own.strength[d] * math.cos(3 * d * math.pi / 4) for d in range(3)]  # 2.5 of 4 frames, and a half
    factors = [sum(codes[1, 48 + 3 * k + d] * waves[d] for d in range(3)) for k in range(6)]
    added = 4 * (own.mean + sum(factor * picture for factor, picture in zip(factors, own.shared))).view(3, 16, 16)
    torch.testing.assert_close(decoder(codes, t)[1, 1], plain(codes[:, :48], t)[1, 1] + added)
    with torch.no_grad():  # to the bit the same in any company
        assert torch.equal(decoder(codes, t), torch.cat([decoder(part, t) for part in codes.split(1)]))


def test_a_file_of_a_model_with_pictures(tmp_path):
    torch.manual_seed(0)
    sizes = CodecConfig(16, num_frames=4, width=4, tokens=(3, 4, 2), token_dims=(8, 6, 9), pictures=6)
    model = codec.Codec(sizes, vae.EncoderConfig(width=24, depth=2, heads=2, patch=(2, 8, 8))).eval().requires_grad_(False)
    model.decoder.pictures.shared.normal_(std=0.1)
    frames = np.random.default_rng(0).integers(0, 255, (9, 20, 16, 3), np.uint8)
    codec.write_video(tmp_path / "a.nerv", model, frames, 25.0, [4, 5, 6], 0.5, 0, 0.0, 16, quiet=True)
    with torch.no_grad():
        numbers = codec.encode_clips(model, cut(frames[:4], 4, 16), [4, 5, 6], 0.5)
        codes = model.decoder.dequantize(numbers, [4, 5, 6])[:, model.decoder.sources(0.5)]
        expected = video.to_frames(join(model.decoder(codes, torch.arange(4)), 20, 16))
    assert np.array_equal(decoded(tmp_path / "a.nerv", model)[:4], expected)


def test_tokens_left_out_are_read_from_those_that_are_kept():
    decoder = NeRVDec(CodecConfig(16, tokens=(4, 7), token_dims=(2, 3)))
    everything = torch.arange(29)
    assert torch.equal(decoder.sources(1.0), everything)
    half = decoder.sources(0.5)
    assert half[:8].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]  # the first half twice: HyperNeRV's
    before = set()
    for keep in (1e-6, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
        sources = decoder.sources(keep)
        kept = set(everything[sources == everything].tolist())
        assert set(sources.tolist()) == kept and before <= kept  # each prefix holds those before it
        counts = [len({i // 2 for i in kept if i < 8}), len({(i - 8) // 3 for i in kept if i >= 8})]
        assert counts == [math.ceil(keep * 4), math.ceil(keep * 7)]
        before = kept


@pytest.mark.parametrize(
    "kw, reason",
    [
        ({"resolution": 48}, "power of two"),
        ({"tokens": (4, 64, 16)}, "layer"),
        ({"tokens": (5000, 64, 16, 0)}, "fit"),
        ({"pictures": 8}, "pictures'"),
        ({"pictures": 8, "tokens": (4, 64, 16, 0, 1), "token_dims": (256, 288, 288, 0, 12)}, "8 pictures"),
        ({"tokens": (0, 0, 0, 0), "token_dims": (0, 0, 0, 0)}, "some layer"),
    ],
)
def test_sizes_that_cannot_be(kw, reason):
    with pytest.raises(ValueError, match=reason):
        CodecConfig(**kw)


# ------------------------------------------------------------------------------------------------------- numbers and bytes


def logistic_numbers(rng, scales, bits, rows):
    half = 2 ** (bits - 1)
    return np.clip(np.rint(rng.logistic(0, scales, (rows, len(scales)))), -half, half - 1).astype(int)


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
def test_numbers_come_back(bits):
    rng = np.random.default_rng(bits)
    half = 2 ** (bits - 1)
    for columns, rows in ((1, 1), (2, 3), (40, 1), (300, 5)):
        scales, kept = rng.uniform(-3, 5, columns), rng.random(columns) < 0.7
        kept[0] = True
        order = entropy.coding_order(scales, np.full(columns, bits), kept)
        assert sorted(np.concatenate([c for _, _, c in order])) == np.flatnonzero(kept).tolist()
        for numbers in (
            rng.integers(-half, half, (rows, columns)),  # nothing like the distribution, ends too
            np.zeros((rows, columns), int),
            logistic_numbers(rng, 2**scales, bits, rows),
        ):
            again = entropy.unpack(entropy.pack(numbers, order), order, numbers.shape)
            assert np.array_equal(again, np.where(kept, numbers, 0))


def test_bytes_are_within_3_percent_of_the_entropy():
    rng = np.random.default_rng(0)
    scales = 2 ** rng.uniform(-2, 3, 500)  # between those of the coder, which has a few
    for bits in (5, 6, 8):
        numbers, edges = logistic_numbers(rng, scales, bits, 8), 2 ** (bits - 1)
        logistic = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
        upper = np.where(numbers == edges - 1, 1, logistic((numbers + 0.5) / scales))
        lower = np.where(numbers == -edges, 0, logistic((numbers - 0.5) / scales))
        ideal = -np.log2(upper - lower).sum()
        order = entropy.coding_order(np.log2(scales), np.full(500, bits), np.ones(500, bool))
        packed = 8 * len(entropy.pack(numbers, order))
        assert 0.99 * ideal < packed < 1.03 * ideal


def test_bytes_are_within_3_percent_of_the_empirical_entropy():
    # One distribution for all columns, and the entropy of what came out: nothing of the coder is in it.
    rng = np.random.default_rng(1)
    numbers = logistic_numbers(rng, np.full(2000, 2.0), 6, 10)
    share = np.bincount(numbers.ravel() + 32) / numbers.size
    ideal = -(share[share > 0] * np.log2(share[share > 0])).sum() * numbers.size
    order = entropy.coding_order(np.full(2000, 1.0), np.full(2000, 6), np.ones(2000, bool))
    assert 8 * len(entropy.pack(numbers, order)) < 1.03 * ideal


def test_training_counts_the_bits_that_files_take(model):
    torch.manual_seed(0)
    decoder, bits = model.decoder, [7]
    log_scale = decoder.log_scale.detach()
    uniform = torch.rand(64, len(log_scale))
    codes = decoder.mean + log_scale.exp() * torch.logit(uniform)
    numbers = decoder.quantize(codes, bits)
    ideal = decoder.bits(decoder.dequantize(numbers, bits), decoder.steps(bits)).sum().item()
    order = codec.coding_order(decoder, bits, 1.0)
    assert 8 * len(entropy.pack(numbers.numpy().astype(int), order)) == pytest.approx(ideal, rel=0.02)


def test_quantizer_per_layer(model):
    decoder, codes = model.decoder, torch.rand(3, 72) * 6 - 3
    steps = decoder.steps([4, 8])
    assert steps.tolist() == [0.5] * 24 + [1 / 32] * 48
    numbers = decoder.quantize(codes, [4, 8])
    assert torch.equal(numbers, numbers.round()) and numbers[:, :24].abs().max() <= 8 and numbers[:, 24:].abs().max() <= 128
    error = (decoder.dequantize(numbers, [4, 8]) - codes).abs()
    assert (error <= steps / 2 + 1e-5).all()
    far = decoder.quantize(torch.full((1, 72), 1e6), [4])
    assert (far == 7).all() and (decoder.quantize(-torch.full((1, 72), 1e6), [4]) == -8).all()


@pytest.mark.parametrize("n, height, width", [(4, 16, 16), (1, 5, 40), (3, 33, 17), (4, 32, 48)])
def test_tiles_join_to_what_they_were_cut_from(n, height, width):
    frames = np.random.default_rng(0).integers(0, 256, (n, height, width, 3), np.uint8)
    tiles = cut(frames, 4, 16)
    assert tiles.shape == (math.ceil(height / 16) * math.ceil(width / 16), 4, 3, 16, 16)
    clip = join(tiles, height, width)
    assert np.array_equal(video.to_frames(clip)[:n], frames)
    assert (video.to_frames(clip)[n:] == frames[-1]).all()
    if width == 40:  # the third tile is 8 columns, and 8 times the last one
        assert torch.equal(tiles[2, 0, :, :5, 8:], video.to_clip(frames)[0, :, :, -1:].expand(-1, -1, 8))


# ---------------------------------------------------------------------------------------------------------------- the file


def test_a_video_of_any_size_comes_back_at_its_size_length_and_rate(trained, call, capsys, model):
    for name in ("a.nerv", "codec.pt"):
        shutil.copy(trained / name, name)
    assert call("decode a.nerv b.mkv") == 0 and call("decode a.nerv b.mp4") == 0
    assert video.probe("b.mkv")[:4] == (18, 10.0, 35, 21) and video.probe("b.mp4")[:4] == (18, 10.0, 35, 21)
    frames = decoded("a.nerv", model)
    assert np.array_equal(video.whole_video("b.mkv"), frames)  # .mkv is lossless
    capsys.readouterr()
    assert call("info a.nerv") == 0
    said = capsys.readouterr().out
    size = (trained / "a.nerv").stat().st_size
    assert f"{size} bytes, {8 * size / (18 * 21 * 35):.4f} bits per pixel" in said and "damaged chunks: none" in said
    assert "5 chunks" in said


def test_encode_reports_the_psnr_of_what_decodes(trained, call, capsys, model):
    shutil.copy(trained / "codec.pt", "codec.pt")
    assert call(f"encode {trained}/a.mkv b.nerv --bits 5 6 --keep 0.5 --refine 3") == 0
    real, frames = np.load(trained / "a.npy").astype(float), decoded("b.nerv", model).astype(float)
    psnr = 10 * math.log10(255**2 / np.square(real - frames).mean())
    said = capsys.readouterr().out
    assert f"PSNR {psnr:.2f} dB" in said and f"in {Path('b.nerv').stat().st_size} bytes" in said


def test_fewer_bits_fewer_tokens_fewer_bytes(trained, call):
    shutil.copy(trained / "codec.pt", "codec.pt")
    sizes = []
    for options in ("--bits 8", "--bits 6", "--bits 4", "--bits 4 --keep 0.5", "--bits 4 --keep 0.01"):
        assert call(f"encode {trained}/a.mkv b.nerv {options}") == 0
        sizes.append(Path("b.nerv").stat().st_size)
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 5


def test_frames_do_not_depend_on_what_else_is_decoded(trained, model):
    whole = decoded(trained / "a.nerv", model)
    for first, last in ((0, 1), (3, 9), (17, 18), (4, 8)):
        assert np.array_equal(decoded(trained / "a.nerv", model, first, last), whole[first:last])
    file = VideoFile(trained / "a.nerv").fit(model, "")
    codes = torch.cat([file.codes(file.numbers(i)) for i in range(5)])  # 5 chunks of 2 x 3 tiles
    with torch.no_grad():
        together = model.decoder(codes, torch.arange(4))
        for group in (1, 2, 7):
            assert torch.equal(torch.cat([model.decoder(part, torch.arange(4)) for part in codes.split(group)]), together)
    grouped = model.decoder.requires_grad_(False)(codes.requires_grad_(), torch.arange(4)).detach()  # one call of 30 groups
    torch.testing.assert_close(grouped, together, rtol=1e-4, atol=1e-5)


def test_only_the_needed_chunks_are_read(trained, model, monkeypatch):
    read = []
    monkeypatch.setattr(
        container.Reader, "__getitem__", lambda self, i, get=container.Reader.__getitem__: (read.append(i), get(self, i))[1]
    )
    decoded(trained / "a.nerv", model, 5, 9)
    assert read == [1, 2]


def test_time_scale(trained, model):
    whole = decoded(trained / "a.nerv", model)
    double = decoded(trained / "a.nerv", model, time_scale=2)
    assert len(double) == 36 and np.array_equal(double[::2], whole)
    assert np.array_equal(decoded(trained / "a.nerv", model, time_scale=0.5), whole[::2])
    assert np.array_equal(decoded(trained / "a.nerv", model, 6, 10, time_scale=2), double[12:20])


def test_refinement_helps_and_quantization_is_in_its_loop(model, trained):
    model = copy.deepcopy(model)
    model.decoder.layers[-1].shared.mul_(5)  # three steps from the start frames are grey, and codes say little
    clips = cut(np.load(trained / "a.npy")[:4], 4, 16)
    t = torch.arange(4)

    def error(refine, keep, rate=0.0):
        numbers = codec.encode_clips(model, clips, [4], keep, refine, rate)
        codes = model.decoder.dequantize(numbers, [4])
        frames = model.decoder(codes[:, model.decoder.sources(keep)], t)
        return (frames - clips).square().mean().item(), model.decoder.bits(codes, model.decoder.steps([4])).sum().item()

    with torch.no_grad():
        for keep in (1.0, 0.5):
            assert error(40, keep)[0] < 0.97 * error(0, keep)[0]
        assert error(40, 1.0, rate=1.0)[1] < error(40, 1.0)[1]  # bits that cost are saved


def test_a_header_of_any_kind_is_kept(tmp_path):
    header, chunks = {"kind": "fit", "a": [1, 2.5, None], "é": {"b": "c" * 3000}}, [b"", b"x", bytes(range(256)) * 300]
    size = container.write(tmp_path / "x", header, chunks)
    reader = container.Reader(tmp_path / "x")
    assert reader.header == header and [reader[i] for i in range(len(reader))] == chunks
    assert reader.length == size == (tmp_path / "x").stat().st_size and reader.tail == 0
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_the_header_of_a_video_is_short(trained):
    reader = container.Reader(trained / "a.nerv")
    assert reader.entries[0][0] < 100  # five chunks' index among it


def outcome(path, model, salvage):
    """A line of a UserError, or the frames; anything else fails the test. What goes wrong must say so in one line."""
    try:
        return decoded(path, model, salvage=salvage)
    except UserError as error:
        assert str(error) and "\n" not in str(error)
        return str(error)


def test_every_prefix_ends_in_one_line_or_a_salvage(trained, model, tmp_path, capsys):
    whole, frames, salvaged = (trained / "small.nerv").read_bytes(), decoded(trained / "small.nerv", model), 0
    head = container.Reader(trained / "small.nerv").entries
    for length in range(len(whole)):
        (tmp_path / "x.nerv").write_bytes(whole[:length])
        assert isinstance(outcome(tmp_path / "x.nerv", model, False), str)
        result = outcome(tmp_path / "x.nerv", model, True)
        good = sum(offset + size <= length for offset, size, _ in head)
        assert isinstance(result, str) == (length < head[0][0])
        if not isinstance(result, str):
            salvaged += 1
            assert np.array_equal(result[: 4 * good], frames[: 4 * good])
            assert (result[4 * good :] == (frames[4 * good - 1] if good else 128)).all()
            assert f"chunk {good}, frames {4 * good} to" in capsys.readouterr().err
    assert salvaged > 50


def test_random_damage_ends_in_one_line_or_a_salvage(trained, model, tmp_path):
    whole, frames = (trained / "small.nerv").read_bytes(), decoded(trained / "small.nerv", model)
    entries, rng = container.Reader(trained / "small.nerv").entries, np.random.default_rng(0)
    kinds = {"header": 0, "chunk": 0}
    for _ in range(200):
        place, length = int(rng.integers(len(whole))), int(rng.integers(1, 5))
        bad = bytearray(whole)
        bad[place : place + length] = rng.integers(0, 256, len(bad[place : place + length]), np.uint8).tobytes()
        if bytes(bad) == whole:
            continue
        (tmp_path / "x.nerv").write_bytes(bad)
        assert isinstance(outcome(tmp_path / "x.nerv", model, False), str)
        result = outcome(tmp_path / "x.nerv", model, True)
        if place < entries[0][0]:
            kinds["header"] += 1
            assert isinstance(result, str)
            continue
        kinds["chunk"] += 1
        for i, (offset, size, _) in enumerate(entries):
            if bytes(bad[offset : offset + size]) == whole[offset : offset + size]:
                assert np.array_equal(result[4 * i : 4 * i + 4], frames[4 * i : 4 * i + 4])
    assert min(kinds.values()) > 20


def seal(path, header, chunks=(b"abc",), index=None, version=1):
    """A file whose checksums are right, whatever it says."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=container.WORDS)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    head = packer.compress(text) + packer.flush()
    if index is None:
        index = container.varint(len(chunks))
        index += b"".join(container.varint(len(c)) + struct.pack("<I", zlib.crc32(c)) for c in chunks)
    head += index
    path.write_bytes(container.START.pack(b"NeRV", version, len(head), zlib.crc32(head)) + head + b"".join(chunks))


def test_files_made_to_do_harm_end_in_one_line(model, tmp_path):
    good = {
        "kind": "codec", "model": codec.model_name(model), "size": [16, 16], "frames": 4, "rate": 10.0, "bits": [6], "keep": 1.0
    }  # fmt: skip
    path = tmp_path / "x.nerv"
    changes = [
        {"kind": "fit"}, {"model": 5}, {"model": "0" * 16}, {"size": [2**31, 2**31]}, {"size": [16]}, {"size": [-16, 16]},
        {"size": "16"}, {"frames": 10**12}, {"frames": 0}, {"frames": 4.0}, {"rate": float("nan")}, {"rate": "fast"},
        {"bits": [9]}, {"bits": [6, 6, 6]}, {"bits": []}, {"bits": 6}, {"keep": 0}, {"keep": 2}, {"keep": None},
        {"size": [4096, 4096]},  # what it would take, so few bytes cannot be
    ]  # fmt: skip
    for change in changes:
        seal(path, good | change)
        assert isinstance(outcome(path, model, False), str), change
    for text in (b"[]", b"nonsense", b"[" * 200_000, b"", b"\xff\xff", b" " * 2**22):
        seal(path, text)
        assert isinstance(outcome(path, model, True), str)
    index = container.varint(2**60) + bytes(30)
    for kw in (
        {"index": index},
        {"index": b""},
        {"index": b"\xff" * 40},
        {"index": container.varint(1) + b"\x03abc"},
        {"version": 2},
    ):
        seal(path, good, **kw)
        assert isinstance(outcome(path, model, True), str)
    rng = np.random.default_rng(0)
    for length in (0, 1, 4, 40, 60, 100, 4000):  # bytes that no encoder made, under a checksum that is right
        seal(path, good, [rng.bytes(length)])
        assert isinstance(outcome(path, model, False), (str, np.ndarray))


@pytest.mark.parametrize(
    "command, reason",
    [
        ("", "name a command first"),
        ("decode", "usage: python codec.py decode"),
        ("encode a.mkv", "usage"),
        ("train a.mkv", "usage"),
        ("encode nothing.mkv b.nerv", "nothing.mkv"),
        ("encode a.mkv b.nerv --bits 3", "--bits 3"),
        ("encode a.mkv b.nerv --bits 6 6 6", "--bits 6 6 6"),
        ("encode a.mkv b.nerv --keep 0", "--keep"),
        ("encode a.mkv b.nerv --refine -1", "--refine"),
        ("encode a.mkv b.nerv --ckpt nothing.pt", "nothing.pt"),
        ("encode a.mkv b.nerv --ckpt a.mkv", "not a checkpoint"),
        ("encode a.mkv a.npy/b.nerv", "cannot write"),
        ("encode a.npy b.nerv", "a.npy"),
        ("decode nothing.nerv b.mp4", "nothing.nerv"),
        ("decode a.mkv b.mp4", "not a file of this program"),
        ("decode a.nerv b.txt", ".mp4 or .mkv"),
        ("decode a.nerv b.mp4 --frames 3", "0 to 17"),
        ("decode a.nerv b.mp4 --frames 3:3", "0 to 17"),
        ("decode a.nerv b.mp4 --frames 3:19", "0 to 17"),
        ("decode a.nerv b.mp4 --frames x:19", "0 to 17"),
        ("decode a.nerv b.mp4 --time-scale 0", "--time-scale"),
        ("decode a.nerv b.mp4 --ckpt other.pt", "another model"),
        ("decode more.nerv b.mp4", "3 bytes follow"),
        ("decode cut.nerv b.mp4", "chunk 4, frames 16 to 17, is damaged"),
        ("info a.mkv", "not a file of this program"),
        ("compare", "usage: python codec.py compare VIDEO …"),
        ("compare a.npy --no-lpips", "a.npy"),
        ("compare empty", "no videos"),
        ("compare a.mkv --crf 52", "--crf 52: x264 takes 0 to 51"),
        ("compare a.mkv --av1-crf 64", "--av1-crf 64"),
        ("compare a.mkv --keep 1 2", "--keep 2"),
        ("compare a.mkv --size -1", "--size"),
        ("train --resolution 48", "power of two"),
        ("train --resolution 128 --workers 1", "4 --tokens and --token-dims, one per layer"),
        ("train --mask 2", "--mask"),
        ("train --bits 9", "--bits"),
        ("train --batch-size 1", "batch norm"),
        ("train --steps 0", "--steps"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_2(command, reason, trained, call, capsys):
    for name in ("a.nerv", "a.mkv", "a.npy", "codec.pt"):
        shutil.copy(trained / name, name)
    Path("empty").mkdir()
    whole = (trained / "a.nerv").read_bytes()
    with open("more.nerv", "wb") as more, open("cut.nerv", "wb") as short:
        more.write(whole + b"abc")
        short.write(whole[:-2])
    if "other.pt" in command:
        ckpt = checkpoints.load("codec.pt", "codec", "")
        ckpt["ema"]["decoder.mean"] = ckpt["ema"]["decoder.mean"] + 1e-3
        checkpoints.save("other.pt", **ckpt)
    assert call(command) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and reason in said
    assert not [name for name in ("b.nerv", "b.mp4") if Path(name).exists()]


def test_salvage_by_hand(trained, call, capsys):
    for name in ("a.nerv", "codec.pt"):
        shutil.copy(trained / name, name)
    with open("a.nerv", "r+b") as file:
        file.seek(container.Reader("a.nerv").entries[2][0])
        file.write(b"\0\0\0")
    assert call("decode a.nerv b.mkv --frames 0:8") == 0  # what is damaged is not needed
    assert call("decode a.nerv c.mkv --salvage") == 0
    assert "chunk 2, frames 8 to 11, is damaged" in capsys.readouterr().err
    b, c = video.whole_video("b.mkv"), video.whole_video("c.mkv")
    assert np.array_equal(c[:8], b) and (c[8:12] == b[7]).all() and len(c) == 18


# ----------------------------------------------------------------------------------------------------------- other codecs


def test_compare_counts_what_encode_writes(trained, call, capsys, monkeypatch):
    monkeypatch.setattr(rivals, "available", lambda: ("x264",))
    for name in ("a.mkv", "small.mkv"):
        Path("clips/test").mkdir(parents=True, exist_ok=True)
        shutil.copy(trained / name, f"clips/test/{name}")
    Path("clips/train").mkdir()
    shutil.copy(trained / "a.mkv", "clips/train/b.mkv")  # not held out
    for name in ("codec.pt", "small.mkv"):
        shutil.copy(trained / name, name)
    assert call("compare clips --no-lpips --crf 20 40 --bits 5 --keep 1 0.5 --refine 0 2 --out-dir out") == 0
    said = capsys.readouterr()
    assert [line.split()[0] for line in said.err.splitlines() if "left out" in line] == ["x265", "av1", "x264-444", "x265-444"]
    with open("out/points.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    pixels = 18 * 21 * 35 + 14 * 12 * 16
    assert [row["codec"] for row in rows] == ["x264"] * 2 + ["ours, refine 0"] * 2 + ["ours, refine 2"] * 2
    assert all(int(row["frames"]) == 32 and row["lpips"] == "nan" for row in rows)
    sizes, errors = 0, 0
    model = codec.load_codec(checkpoints.load("codec.pt", "codec", ""))
    for name in ("a", "small"):
        assert call(f"encode clips/test/{name}.mkv {name}.nerv --bits 5 --keep 0.5 --refine 2") == 0
        sizes += Path(f"{name}.nerv").stat().st_size
        errors += np.square(video.whole_video(f"clips/test/{name}.mkv") - decoded(f"{name}.nerv", model).astype(float)).sum()
    last, numbers = rows[-1], sum(x.numel() for x in model.decoder.state_dict().values())
    assert int(last["bytes"]) == sizes and float(last["bpp"]) == pytest.approx(8 * sizes / pixels)
    assert float(last["bpp with model"]) == pytest.approx(8 * (sizes + 4 * numbers) / pixels)
    assert float(last["psnr"]) == pytest.approx(10 * math.log10(255**2 * 3 * pixels / errors), abs=1e-3)
    assert "| ours, refine 2 | 5 bits, keep 0.5 |" in " ".join(said.out.split()) and "BD-rate" in said.out
    assert Path("out/curves.png").stat().st_size > 5000
    assert call("compare small.mkv --no-lpips --codecs --refine 0 --size 8 --out-dir other") == 0
    with open("other/points.csv", newline="") as file:
        row = next(csv.DictReader(file))
    assert float(row["bpp"]) == 8 * int(row["bytes"]) / (14 * 8 * 8)


def test_without_weights_lpips_is_left_out(monkeypatch, capsys):
    def missing(backbone):
        raise UserError("no weights")

    monkeypatch.setattr(codec.losses, "LPIPS", missing)
    assert codec.perceptual() is None and capsys.readouterr().err == "LPIPS is left out: no weights\n"
    lpips = LPIPS("alex", pretrained=False)
    monkeypatch.setattr(codec.losses, "LPIPS", lambda backbone: lpips)
    measure, x = codec.perceptual(), torch.rand(2, 3, 40, 36)
    assert measure(x, -x) > measure(x, 0.9 * x) > measure(x, x) == 0 and math.isnan(measure(x[..., :31], x[..., :31]))


# ------------------------------------------------------------------------------------------------------------- the loader


def test_loader_gives_every_whole_clip_once_in_a_pass(trained, call, model):
    shutil.copy(trained / "codec.pt", "codec.pt")
    for i in range(2):
        shutil.copy(trained / "a.nerv", f"{i}.nerv")
    loader = codec.Loader(".", batch_size=3, seed=1)
    assert len(loader) == 8  # of 18 frames four chunks are whole
    seen, frames = [], decoded(trained / "a.nerv", model)
    for _, batch in zip(range(8), loader):  # three passes
        assert batch.shape == (3, 4, 3, 21, 35) and batch.abs().max() <= 1
        for clip in video.to_frames(batch):
            seen.append(next(k for k in range(4) if np.array_equal(clip, frames[4 * k : 4 * k + 4])))
    assert sorted(seen[:8]) == sorted(seen[8:16]) == [0, 0, 1, 1, 2, 2, 3, 3] and seen[:8] != seen[8:16]
    again = next(iter(codec.Loader(".", batch_size=3, seed=1, start=2)))
    assert torch.equal(again, loader.batch(next(iter(data.Stream(8, 3, 1, 2)))))


def test_loader_of_nothing_and_of_files_that_do_not_match(trained, call):
    shutil.copy(trained / "codec.pt", "codec.pt")
    with pytest.raises(UserError, match="holds no .nerv files"):
        codec.Loader(".")
    video.write_frames("b.mkv", [np.zeros((2, 16, 16, 3), np.uint8)], 10)
    assert call("encode b.mkv b.nerv") == 0
    assert len(codec.Loader(".")) == 1  # it is shorter than a clip, and filled up
    shutil.copy(trained / "a.nerv", "a.nerv")
    with pytest.raises(UserError, match="another size"):
        codec.Loader(".")


# --------------------------------------------------------------------------------------------------------------- training


@pytest.fixture
def small_encoder(monkeypatch):
    monkeypatch.setitem(codec.ENCODERS, "nano", vae.EncoderConfig(width=24, depth=1, heads=2, patch=(2, 8, 8)))


def test_a_training_that_was_stopped_goes_on_exactly(call, small_encoder, monkeypatch):
    options = f"train {SIZES} --steps 6 --batch-size 4 --log-every 1 --workers 1 --rate 0.01 --optimizer muon --degrade mask"
    assert call(f"{options} --out whole.pt --run-dir whole") == 0
    stop = utils.Interrupt.stop
    calls = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(utils.Interrupt, "stop", lambda self: next(calls) == 2 or stop(self))
        assert call(f"{options} --out parts.pt --run-dir parts") == 0
    assert checkpoints.load("parts.pt", "codec", "")["step"] == 3
    assert call(f"{options} --out parts.pt --run-dir parts --resume") == 0
    a, b = (checkpoints.load(f"{name}.pt", "codec", "") for name in ("whole", "parts"))
    assert a["step"] == b["step"] == 6 and same(a["ema"], b["ema"]) and same(a["training"], b["training"])
    assert losses_of(Path("whole")) == losses_of(Path("parts"))
    assert Path("whole/step0000006.png").is_file()


def test_resuming_with_other_sizes_is_refused(call, small_encoder, capsys):
    assert call(TINY) == 0
    assert call(TINY.replace("--token-dims 8 6", "--token-dims 8 5") + " --resume") == 2
    assert "--token-dims" in capsys.readouterr().err


def test_training_minimizes_the_squared_error_and_the_rate(call, small_encoder, monkeypatch):
    logged, seen = [], []
    monkeypatch.setattr(utils.RunLog, "add", lambda self, **values: logged.append(values))
    monkeypatch.setattr(utils.RunLog, "step", lambda self, step: False)
    forward = NeRVDec.forward

    def keep(self, codes, t):
        frames = forward(self, codes, t)
        if torch.is_grad_enabled():
            seen.append((self, codes.detach(), frames.detach()))
        return frames

    monkeypatch.setattr(NeRVDec, "forward", keep)
    monkeypatch.setattr(
        data,
        "endless",
        lambda dataset, *args: iter([(torch.from_numpy(np.stack([dataset[i][0] for i in range(4)])), None)] * 2),
    )
    assert call(f"train {SIZES} --steps 2 --batch-size 4 --mask 0 --rate 0.5 --bits 5") == 0
    clips = torch.stack([video.to_clip(data.Shapes("train", 16, 4)[i][0]) for i in range(4)])
    for values, (_, _, frames) in zip(logged, seen):
        l2 = (frames - clips).square().mean()
        torch.testing.assert_close(values["l2"].detach(), l2)
        torch.testing.assert_close(values["loss"].detach(), l2 + 0.5 * values["bpp"].detach())
    decoder, codes, _ = seen[0]
    # At the first step the distribution is at its start: mean 0, scale 0.3; a step of 5 bits is 8 / 32.
    logistic = lambda x: torch.sigmoid(x / 0.3)  # noqa: E731
    bits = -torch.log2(logistic(codes + 0.125) - logistic(codes - 0.125))
    torch.testing.assert_close(logged[0]["bpp"].detach(), bits.sum(1).mean() / (4 * 16 * 16), rtol=1e-3, atol=1e-4)


def test_a_restoration_sees_degraded_clips_and_is_asked_for_clean_ones(call, small_encoder, monkeypatch, capsys):
    seen, made, logged = [], [], []
    encoder, decoder = codec.Hypernetwork.forward, NeRVDec.forward
    monkeypatch.setattr(codec.Hypernetwork, "forward", lambda self, clips: (seen.append(clips), encoder(self, clips))[1])
    monkeypatch.setattr(NeRVDec, "forward", lambda self, *a: (made.append(decoder(self, *a).detach()), decoder(self, *a))[1])
    monkeypatch.setattr(utils.RunLog, "add", lambda self, **values: logged.append(values["l2"].item()))
    monkeypatch.setattr(utils.RunLog, "step", lambda self, step: False)
    clean = np.stack([data.Shapes("train", 16, 4)[i][0] for i in range(4)])
    monkeypatch.setattr(data, "endless", lambda *args: iter([(torch.from_numpy(clean), None)]))
    assert call(f"train {SIZES} --steps 1 --batch-size 4 --degrade down4") == 0
    clips = video.to_clip(clean)
    assert torch.equal(seen[0], degrade.degrade(clips, "down4", None)) and not torch.equal(seen[0], clips)
    assert logged[0] == pytest.approx((made[0] - clips).square().mean().item())
    table = [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in table] == ["down4, 64 held-out clips", "---", "degraded input", "bicubic", "ours"]
    held_out, _ = data.fixed_clips(data.Shapes("test", 16, 4), 64)
    assert float(table[2][1]) == pytest.approx(vae.psnr(held_out, degrade.degrade(held_out, "down4", None)), abs=0.006)
    assert call(f"train {SIZES} --steps 1 --batch-size 4 --degrade down4 --resume") == 0  # it is done: the table again
    assert [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines() if line.startswith("|")] == table
    video.write_frames("b.mkv", [clean[0]], 10)
    assert call("encode b.mkv b.nerv") == 0 and call("encode b.mkv b.nerv --refine 1") == 2
    assert "--degrade down4" in capsys.readouterr().err


def test_it_learns_one_clip_by_heart(small_encoder):
    torch.manual_seed(0)
    config = CodecConfig(16, 4, 8, tokens=(4, 8), token_dims=(16, 12))
    model = codec.Codec(config, codec.ENCODERS["nano"])
    shapes = data.Shapes("train", 16, 4)
    clips = torch.stack([video.to_clip(shapes[i][0]) for i in range(2)])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    errors = []
    for _ in range(150):
        error = (model.decoder(model.encoder(clips), torch.arange(4)) - clips).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.1 * errors[0]
