"""The codec: counts of the papers, bytes that come back as they were, files whole, cut and damaged, and its training."""

import copy
import csv
import itertools
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
import torch.nn.functional as F

import data
import nerv
import vae
from common import checkpoints, utils, video
from common.utils import UserError
from siblings import codec, container, entropy
from siblings.codec import CodecConfig, NeRVDec, VideoFile
from siblings.degrade import degrade
from siblings.frames import cut, join, read_video, write_frames

SIZES = {"resolution": 16, "num_frames": 4, "width": 4}
TINY = "train --resolution 16 --num-frames 4 --width 4 --tokens 3x8 8x6 --batch-size 4 --steps 3"
VIT = vae.EncoderConfig(width=24, depth=1, heads=2, patch=(2, 8, 8))


def run(command):
    """Run codec.py in this process, with a small encoder; returns the exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(codec.ENCODERS, "nano", VIT)
        patch.setattr(codec, "LOG_EVERY", 1)
        patch.setattr(sys, "argv", ["codec.py", *command.split()])
        try:
            utils.run(codec.main)
        except SystemExit as stop:
            return stop.code
    return 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory with codec.pt, three steps old, a.mkv with 18 frames of 21 x 35, a.nerv with five chunks of it; small."""
    cwd = tmp_path_factory.mktemp("codec")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        x, t = np.arange(35), np.arange(18)[:, None, None]
        wave = 127 + 100 * np.sin((x + 5 * t) / 6) * np.cos(np.arange(21)[:, None] / 5)
        frames = np.stack([wave, wave[:, ::-1], 255 - wave], -1).astype(np.uint8)  # [18, 21, 35, 3]
        write_frames("a.mkv", [frames[:7], frames[7:]], 10)
        write_frames("small.mkv", [frames[:14, :12, :16]], 10)  # four chunks of one tile
        for command in (TINY, "encode a.mkv a.nerv", "encode small.mkv small.nerv --bits 5"):
            assert run(command) == 0
    return cwd


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    """An empty directory to work in, with copies of the files of `trained`."""
    for file in trained.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def model(trained):
    return codec.open_codec(trained / "codec.pt")[0]


def decoded(path, model, first=0, last=None, **kw):
    file = VideoFile(path, model, "codec.pt")
    return np.concatenate(list(codec.decode_frames(file, model, first, last or file.frames, **kw)))


# --------------------------------------------------------------------------------------------------------------- the papers


@pytest.mark.parametrize(
    "kw, weights, codes",
    [
        ({}, 85_552, [1024, 18432, 4608, 0]),  # FastNeRV, Table 2: 85.6k; Table 4, layer-adaptive: 1.1k 18.4k 4.6k 0
        ({"tokens": ((64, 64), (64, 144), (64, 144), (64, 108))}, 85_552, [4096, 9216, 9216, 6912]),  # and layer-uniform
        ({"width": 20, "tokens": ((4, 256), (80, 240), (16, 240), (0, 0))}, 129_968, [1024, 19200, 3840, 0]),  # HyperNeRV: 130k
    ],
)
def test_counts_of_the_papers(kw, weights, codes):
    config = CodecConfig(**kw)
    decoder = NeRVDec(config)
    assert decoder.num_weights() == weights and config.codes == codes and len(decoder.mean) == sum(codes)


def test_the_papers_network_by_hand():
    torch.manual_seed(0)
    c = CodecConfig(**SIZES, tokens=((3, 8), (4, 6)))
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
    x = nerv.sinusoid(t, 16, 4).double()[:, :, None, None]
    x = F.pixel_shuffle(F.conv2d(x, kernel), 4)
    x = F.conv2d(nerv.GELU_GAIN * F.gelu(x), second.kernel(codes[1:, 24:])[0], padding=1)
    unit = F.pixel_shuffle(x, 4) + 0.5  # on [0, 1], with the paper's output bias
    torch.testing.assert_close(frames[1], 2 * unit - 1)


def test_a_layer_without_tokens_is_the_same_for_all_videos():
    c = CodecConfig(**SIZES, tokens=((3, 8), (0, 0)))
    decoder, codes, t = NeRVDec(c).double(), torch.randn(3, c.num_codes, dtype=torch.float64), torch.arange(2.0)
    whole = decoder(codes, t)
    for i in range(3):
        torch.testing.assert_close(decoder(codes[i : i + 1], t)[0], whole[i])
    assert (whole[0] - whole[1]).abs().max() > 1e-4


def test_a_basis_by_hand():
    torch.manual_seed(0)
    c = CodecConfig(**SIZES, tokens=((3, 8), (4, 6), (2, 9)), basis=6)
    decoder, plain = NeRVDec(c).double(), NeRVDec(CodecConfig(**SIZES, tokens=((3, 8), (4, 6)))).double()
    plain.layers.load_state_dict(decoder.layers.state_dict())
    codes, t = torch.randn(2, c.num_codes, dtype=torch.float64), torch.tensor([0.0, 2.5])
    torch.testing.assert_close(decoder(codes, t), plain(codes[:, :48], t))  # it begins black
    own = decoder.basis
    own.components.data.normal_(), own.mean.data.normal_(), own.strength.data.normal_()
    waves = [own.strength[d] * math.cos(3 * d * math.pi / 4) for d in range(3)]  # 2.5 of 4 frames, and a half
    factors = [sum(codes[1, 48 + 3 * k + d] * waves[d] for d in range(3)) for k in range(6)]
    added = 4 * (own.mean + sum(factor * frame for factor, frame in zip(factors, own.components))).view(3, 16, 16)
    torch.testing.assert_close(decoder(codes, t)[1, 1], plain(codes[:, :48], t)[1, 1] + added)


def test_tokens_left_out_are_read_from_those_that_are_kept():
    config, everything, before = CodecConfig(16, tokens=((4, 2), (7, 3))), torch.arange(29), set()
    assert torch.equal(config.sources(1.0), everything)
    assert config.sources(0.5)[:8].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]  # the first half twice: HyperNeRV's
    for keep in (1e-6, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
        sources = config.sources(keep)
        kept = set(everything[sources == everything].tolist())
        assert set(sources.tolist()) == kept and before <= kept  # each prefix holds those before it
        assert len(kept) == 2 * math.ceil(keep * 4) + 3 * math.ceil(keep * 7)
        before = kept


# ------------------------------------------------------------------------------------------------------- numbers and bytes


def logistic_numbers(rng, scales, bits, rows):
    half = 2 ** (bits - 1)
    return np.clip(np.rint(rng.logistic(0, scales, (rows, len(scales)))), -half, half - 1).astype(int)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_numbers_come_back(bits):
    rng, half = np.random.default_rng(bits), 2 ** (bits - 1)
    for columns, rows in ((1, 1), (40, 1), (300, 5)):
        scales, kept = rng.uniform(-3, 5, columns), rng.random(columns) < 0.7
        kept[0] = True
        order = entropy.coding_order(scales, np.full(columns, bits), kept)
        few = rng.integers(-half, half, (rows, columns))  # nothing like the distribution, ends too
        for numbers in (few, np.zeros((rows, columns), int), logistic_numbers(rng, 2**scales, bits, rows)):
            again = entropy.unpack(entropy.pack(numbers, order), order, numbers.shape)
            assert np.array_equal(again, np.where(kept, numbers, 0))


def test_bytes_are_within_3_percent_of_the_empirical_entropy():
    # One distribution for all columns, and the entropy of what came out: nothing of the coder is in it.
    numbers = logistic_numbers(np.random.default_rng(1), np.full(2000, 2.0), 6, 10)
    share = np.bincount(numbers.ravel() + 32) / numbers.size
    ideal = -(share[share > 0] * np.log2(share[share > 0])).sum() * numbers.size
    order = entropy.coding_order(np.full(2000, 1.0), np.full(2000, 6), np.ones(2000, bool))
    assert ideal < 8 * len(entropy.pack(numbers, order)) < 1.03 * ideal


def test_training_counts_the_bits_that_files_take(model):
    torch.manual_seed(0)
    decoder, bits = model.decoder, [7]
    codes = decoder.mean + decoder.log_scale.exp() * torch.logit(torch.rand(64, len(decoder.mean)))
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
    assert ((decoder.dequantize(numbers, [4, 8]) - codes).abs() <= steps / 2 + 1e-5).all()
    far = torch.full((1, 72), 1e6)
    assert (decoder.quantize(far, [4]) == 7).all() and (decoder.quantize(-far, [4]) == -8).all()


@pytest.mark.parametrize("n, height, width", [(1, 5, 40), (3, 33, 17), (4, 32, 48)])
def test_tiles_join_to_what_they_were_cut_from(n, height, width):
    frames = np.random.default_rng(0).integers(0, 256, (n, height, width, 3), np.uint8)
    tiles = cut(frames, 4, 16)
    assert tiles.shape == (math.ceil(height / 16) * math.ceil(width / 16), 4, 3, 16, 16)
    again = video.to_frames(join(tiles, height, width))
    assert np.array_equal(again[:n], frames) and (again[n:] == frames[-1]).all()
    if width == 40:  # the third tile is 8 columns, and 8 times the last one
        assert torch.equal(tiles[2, 0, :, :5, 8:], video.to_clip(frames)[0, :, :, -1:].expand(-1, -1, 8))


# ---------------------------------------------------------------------------------------------------------------- the file


def test_a_video_of_any_size_comes_back_at_its_size_length_and_rate(here, capsys, model):
    assert run("decode a.nerv b.mkv") == run("decode a.nerv b.mp4") == 0
    lossless, rate = read_video("b.mkv")
    assert np.array_equal(lossless, decoded("a.nerv", model)) and lossless.shape == (18, 21, 35, 3) and rate == 10
    near, rate = read_video("b.mp4")
    assert near.shape == (18, 21, 35, 3) and rate == 10 and np.abs(near - lossless.astype(float)).mean() < 4
    assert run("info a.nerv") == 0
    said = capsys.readouterr().out
    assert f"5 chunks in {Path('a.nerv').stat().st_size} bytes, damaged: none" in said and "size [35, 21]" in said


def test_encode_reports_the_psnr_of_what_decodes(here, capsys, model):
    assert run("encode a.mkv b.nerv --bits 5 6 --keep 0.5 --refine 3") == 0
    error = np.square(read_video("a.mkv")[0] - decoded("b.nerv", model).astype(float)).mean()
    size = Path("b.nerv").stat().st_size
    said = capsys.readouterr().out
    assert f"PSNR {10 * math.log10(255**2 / error):.2f} dB" in said and f"in {size} bytes" in said
    assert f"{8 * size / (18 * 21 * 35):.4f} bits per pixel" in said


def test_fewer_bits_fewer_tokens_fewer_bytes(trained, model, tmp_path):
    (frames, fps), sizes = read_video(trained / "a.mkv"), []
    ckpt = checkpoints.load(trained / "codec.pt", "codec", "")
    for bits, keep in ((8, 1.0), (6, 1.0), (4, 1.0), (4, 0.5), (4, 0.01)):
        sizes.append(codec.write_video(tmp_path / "b.nerv", model, ckpt, frames, fps, [bits], keep, 0)[0])
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 5


def test_frames_do_not_depend_on_what_else_is_decoded(trained, model):
    whole = decoded(trained / "a.nerv", model)
    for first, last in ((0, 1), (3, 9), (17, 18)):
        assert np.array_equal(decoded(trained / "a.nerv", model, first, last), whole[first:last])
    file, t = VideoFile(trained / "a.nerv", model, ""), torch.arange(4)
    codes = torch.cat([file.codes(file.numbers(i)) for i in range(5)])  # 5 chunks of 2 x 3 tiles
    with torch.no_grad():
        together = model.decoder(codes, t)
        assert torch.equal(torch.cat([model.decoder(part, t) for part in codes.split(7)]), together)
    torch.testing.assert_close(model.decoder(codes.requires_grad_(), t), together, rtol=1e-4, atol=1e-5)  # 30 groups, one call


def test_time_scale(trained, model):
    whole, double = (decoded(trained / "a.nerv", model, time_scale=scale) for scale in (1, 2))
    assert len(double) == 36 and np.array_equal(double[::2], whole)
    assert np.array_equal(decoded(trained / "a.nerv", model, 6, 10, time_scale=2), double[12:20])


def test_refinement_helps_and_quantization_is_in_its_loop(model, trained):
    model = copy.deepcopy(model)
    model.decoder.layers[-1].shared.mul_(5)  # three steps from the start frames are grey, whatever the codes
    clips, t = cut(read_video(trained / "a.mkv")[0][:4], 4, 16), torch.arange(4)

    @torch.no_grad()
    def error(steps, keep, price=0.0):
        codes = model.decoder.dequantize(codec.encode_clips(model, clips, [4], keep, steps, price), [4])
        frames = model.decoder(codes[:, model.config.sources(keep)], t)
        return (frames - clips).square().mean().item(), model.decoder.bits(codes, model.decoder.steps([4])).sum().item()

    assert error(30, 0.5)[0] < 0.97 * error(0, 0.5)[0]
    assert error(30, 1.0, price=1.0)[1] < error(30, 1.0)[1]  # bits that cost are saved


def test_clips_of_a_directory_come_once_in_a_pass(trained, model):
    files, frames = [VideoFile(trained / "a.nerv", model, "")] * 2, decoded(trained / "a.nerv", model)
    seen = []
    for batch in itertools.islice(codec.load_clips(files, model, batch_size=4, seed=1), 4):  # two passes over 8 whole chunks
        assert batch.shape == (4, 4, 3, 21, 35) and batch.abs().max() <= 1
        seen += [
            next(k for k in range(4) if np.array_equal(clip, frames[4 * k : 4 * k + 4])) for clip in video.to_frames(batch)
        ]
    assert sorted(seen[:8]) == sorted(seen[8:]) == [0, 0, 1, 1, 2, 2, 3, 3] and seen[:8] != seen[8:]


# ----------------------------------------------------------------------------------------------------------- damaged files


def test_a_header_of_any_kind_is_kept(tmp_path):
    header, chunks = {"kind": "fit", "a": [1, 2.5, None], "é": {"b": "c" * 3000}}, [b"", b"x", bytes(range(256)) * 300]
    size = container.write(tmp_path / "x", header, chunks)
    reader = container.Reader(tmp_path / "x")
    assert reader.header == header and [reader[i] for i in range(len(reader))] == chunks
    assert reader.length == size == (tmp_path / "x").stat().st_size and reader.tail == 0


def test_the_header_of_a_video_is_short(trained):
    assert container.Reader(trained / "a.nerv").entries[0][0] < 100  # five chunks' index among it


def outcome(path, model, *frames):
    """A line of a UserError, or the frames; anything else fails the test. What goes wrong must say so in one line."""
    try:
        return decoded(path, model, *frames)
    except UserError as error:
        assert str(error) and "\n" not in str(error)
        return str(error)


def test_damage_ends_in_one_line_and_what_is_whole_decodes(trained, model, tmp_path):
    whole, frames = (trained / "small.nerv").read_bytes(), decoded(trained / "small.nerv", model)
    entries, rng, path = container.Reader(trained / "small.nerv").entries, np.random.default_rng(0), tmp_path / "x.nerv"
    bad = [whole[:length] for length in range(0, len(whole), 3)]
    for _ in range(60):
        place = int(rng.integers(len(whole) - 4))
        bad.append(whole[:place] + bytes(byte ^ 85 for byte in whole[place : place + 3]) + whole[place + 3 :])
    survived = 0
    for content in bad:
        path.write_bytes(content)
        assert isinstance(outcome(path, model), str)
        for i, (offset, size, _) in enumerate(entries):
            result = outcome(path, model, 4 * i, min(4 * i + 4, 14))
            same = (
                content[: entries[0][0]] == whole[: entries[0][0]] and content[offset : offset + size] == whole[offset:][:size]
            )
            assert np.array_equal(result, frames[4 * i : 4 * i + 4]) if same else isinstance(result, str)
            survived += same
    assert survived > 50


def seal(path, header, chunks=(b"abc",), index=None, version=1):
    """A file whose checksums are right, whatever it says."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=container.WORDS)
    head = packer.compress(header if isinstance(header, bytes) else json.dumps(header).encode()) + packer.flush()
    if index is None:
        index = container.varint(len(chunks))
        index += b"".join(container.varint(len(c)) + struct.pack("<I", zlib.crc32(c)) for c in chunks)
    head += index
    path.write_bytes(container.START.pack(b"NeRV", version, len(head), zlib.crc32(head)) + head + b"".join(chunks))


def test_files_made_to_do_harm_end_in_one_line(model, tmp_path):
    good = {"kind": "codec", "model": codec.model_name(model), "size": [16, 16], "frames": 4, "rate": 10.0, "bits": [6]}
    good, path = good | {"keep": 1.0}, tmp_path / "x.nerv"
    changes = [
        {"kind": "fit"}, {"model": 5}, {"model": "0" * 16}, {"size": [2**31, 2**31]}, {"size": [16]}, {"size": [-16, 16]},
        {"size": "16"}, {"frames": 10**12}, {"frames": 0}, {"frames": 4.0}, {"rate": float("nan")}, {"rate": "fast"},
        {"bits": [9]}, {"bits": [6, 6, 6]}, {"bits": []}, {"bits": 6}, {"keep": 0}, {"keep": 2}, {"keep": None},
        {"size": [4096, 4096]},  # what it would take, so few bytes cannot be
    ]  # fmt: skip
    headers = [good | change for change in changes] + [b"[]", b"nonsense", b"[" * 200_000, b"", b"\xff\xff", b" " * 2**22]
    for header in headers:
        seal(path, header)
        assert isinstance(outcome(path, model), str), header
    index = container.varint(2**60) + bytes(30)
    for kw in ({"index": index}, {"index": b""}, {"index": b"\xff" * 40}, {"version": 2}):
        seal(path, good, **kw)
        assert isinstance(outcome(path, model), str)
    for length in (0, 1, 4, 40, 4000):  # bytes that no encoder made, under a checksum that is right
        seal(path, good, [np.random.default_rng(0).bytes(length)])
        assert isinstance(outcome(path, model), (str, np.ndarray))


@pytest.mark.parametrize(
    "command, reason",
    [
        ("", "name a command first"),
        ("encode a.mkv", "usage: python -m siblings.codec encode VIDEO FILE.nerv"),
        ("encode nothing.mkv b.nerv", "nothing.mkv"),
        ("encode a.mkv b.nerv --bits 6 6 6", "--bits 6 6 6"),
        ("encode a.mkv b.nerv --keep 0", "--keep"),
        ("encode a.mkv b.nerv --refine -1", "--refine"),
        ("encode a.mkv b.nerv --ckpt nothing.pt", "nothing.pt"),
        ("encode a.mkv a.mkv/b.nerv", "cannot write"),
        ("decode a.mkv b.mp4", "not a file of this program"),
        ("decode a.nerv b.txt", ".mp4 or .mkv"),
        ("decode a.nerv b.mp4 --frames 3:19", "0 to 17"),
        ("decode a.nerv b.mp4 --frames x", "0 to 17"),
        ("decode a.nerv b.mp4 --time-scale 0", "--time-scale"),
        ("decode more.nerv b.mp4", "3 bytes follow"),
        ("decode cut.nerv b.mp4", "chunk 4, frames 16 to 17, is damaged"),
        ("compare", "usage: python -m siblings.codec compare VIDEO …"),
        ("compare empty", "no videos"),
        ("compare a.mkv --codecs --keep 1 2", "--keep 2"),
        ("train --resolution 48", "power of two"),
        ("train --resolution 128", "one NxD for each layer"),
        ("train --tokens 8 32 8", "--tokens 8 32 8"),
        ("train --mask 2", "--mask"),
        ("train --steps 0", "--steps"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_2(command, reason, here, capsys):
    Path("empty").mkdir()
    whole = Path("a.nerv").read_bytes()
    Path("more.nerv").write_bytes(whole + b"abc")
    Path("cut.nerv").write_bytes(whole[:-2])
    assert run(command) == 2
    said = capsys.readouterr().err.split("\r")[-1].strip()
    assert said.splitlines()[-1].startswith("error: ") and reason in said
    assert not Path("b.mp4").exists()


# ---------------------------------------------------------------------------------------------------------------- training


def test_compare_counts_what_encode_writes(here, capsys, model):
    Path("clips/test").mkdir(parents=True)
    for name in ("a", "small"):
        shutil.copy(f"{name}.mkv", f"clips/test/{name}.mkv")
    shutil.copy("a.mkv", "clips/b.mkv")  # not held out
    assert run("compare clips --codecs x264 --crf 20 40 --bits 5 --keep 1 0.5 --refine 0 2 --out-dir out") == 0
    said = capsys.readouterr().out
    with open("out/points.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["codec"] for row in rows] == ["x264"] * 2 + ["ours, refine 0"] * 2 + ["ours, refine 2"] * 2
    size = error = 0
    for name in ("a", "small"):
        assert run(f"encode {name}.mkv {name}.nerv --bits 5 --keep 0.5 --refine 2") == 0
        size += Path(f"{name}.nerv").stat().st_size
        error += np.square(read_video(f"{name}.mkv")[0] - decoded(f"{name}.nerv", model).astype(float)).sum()
    last, pixels, weights = rows[-1], 18 * 21 * 35 + 14 * 12 * 16, sum(x.numel() for x in model.decoder.state_dict().values())
    assert int(last["bytes"]) == size and float(last["bpp"]) == pytest.approx(8 * size / pixels)
    assert float(last["bpp with model"]) == pytest.approx(8 * (size + 4 * weights) / pixels)
    assert float(last["psnr"]) == pytest.approx(10 * math.log10(255**2 * 3 * pixels / error), abs=1e-3)
    assert "BD-rate" in said and Path("out/curves.png").stat().st_size > 5000


def same(a, b):
    """Whether two checkpoints' parts are equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_training_that_was_stopped_goes_on_exactly(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = TINY.replace("--steps 3", "--steps 6 --rate 0.01 --degrade mask")
    assert run(f"{options} --out whole.pt --run-dir whole") == 0
    calls = itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(utils.Interrupt, "stop", lambda self: next(calls) == 2)
        assert run(f"{options} --out parts.pt --run-dir parts") == 0
    assert checkpoints.load("parts.pt", "codec", "")["step"] == 3
    assert run(f"{options.replace('8x6', '8x5')} --out parts.pt --resume") == 2 and "--tokens" in capsys.readouterr().err
    assert run(f"{options} --out parts.pt --run-dir parts --resume") == 0
    a, b = (checkpoints.load(f"{name}.pt", "codec", "") for name in ("whole", "parts"))
    assert a["step"] == b["step"] == 6 and same(a["ema"], b["ema"]) and same(a["training"], b["training"])
    assert Path("whole/step0000006.png").is_file()


@pytest.fixture
def watched(monkeypatch, tmp_path):
    """Lists that a training fills: (clips the encoder sees, codes, frames) of each step, and the values it logs."""
    seen, logged, clean = [], [], np.stack([data.Shapes("train", 16, 4)[i][0] for i in range(4)])
    encoder, decoder = codec.Hypernetwork.forward, NeRVDec.forward

    def decode(self, codes, t):
        frames = decoder(self, codes, t)
        if torch.is_grad_enabled():
            seen[-1] += codes.detach(), frames.detach()
        return frames

    def encode(self, clips):
        if torch.is_grad_enabled():
            seen.append((clips,))
        return encoder(self, clips)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(codec.Hypernetwork, "forward", encode)
    monkeypatch.setattr(NeRVDec, "forward", decode)
    monkeypatch.setattr(utils.RunLog, "add", lambda self, **values: logged.append({k: v.detach() for k, v in values.items()}))
    monkeypatch.setattr(utils.RunLog, "step", lambda self, step: False)
    monkeypatch.setattr(data, "endless", lambda *args: itertools.repeat((torch.from_numpy(clean), None)))
    return seen, logged, video.to_clip(clean)


def test_training_minimizes_the_squared_error_and_the_rate(watched):
    seen, logged, clips = watched
    assert run(f"{TINY} --mask 0 --rate 0.5") == 0
    for values, (_, _, frames) in zip(logged, seen, strict=True):
        l2 = (frames - clips).square().mean()
        torch.testing.assert_close(values["l2"], l2)
        torch.testing.assert_close(values["loss"], l2 + 0.5 * values["bpp"])
    # At the first step the distribution is at its start: mean 0, scale 0.3; a step of 6 bits is 8 / 64.
    upper, lower = (torch.sigmoid((seen[0][1] + half) / 0.3) for half in (1 / 16, -1 / 16))
    torch.testing.assert_close(logged[0]["bpp"], -torch.log2(upper - lower).sum(1).mean() / 1024, rtol=1e-3, atol=1e-4)


def test_a_restoration_sees_degraded_clips_and_is_asked_for_clean_ones(watched, capsys):
    seen, logged, clips = watched
    assert run(f"{TINY} --degrade down4") == 0
    assert torch.equal(seen[0][0], degrade(clips, "down4", None)) and not torch.equal(seen[0][0], clips)
    torch.testing.assert_close(logged[0]["l2"], (seen[0][2] - clips).square().mean())
    write_frames("b.mkv", [video.to_frames(clips[0])], 10)
    assert run("encode b.mkv b.nerv") == 0 and run("encode b.mkv b.nerv --refine 1") == 2
    assert "degraded" in capsys.readouterr().err


def test_the_preset_is_the_papers_and_extras_are_asked_for(watched, monkeypatch):
    rates = []
    monkeypatch.setattr(utils.FiniteStep, "__call__", lambda self, loss, lr: rates.append(lr))
    assert run(TINY.replace("--steps 3", "--steps 20 --lr 1e-4 --extras")) == 0
    assert rates == [1e-4] * 18 + [pytest.approx(1e-5)] * 2  # §4.1
    ckpt = checkpoints.load("codec.pt", "codec", "")
    assert same(ckpt["ema"], ckpt["training"]["model"])
    patch = utils.parse_options(codec.Config, "", codec.preset_defaults, ["--dataset", "folder"])
    assert (patch.preset, patch.extras, patch.mask, patch.batch_size, patch.steps) == ("fastnerv", [], 0, 32, 46_875)
    assert codec.new_codec(patch).config == CodecConfig()


def test_it_learns_clips_by_heart():
    torch.manual_seed(0)
    model = codec.Codec(CodecConfig(16, 4, 8, tokens=((4, 16), (8, 12))), VIT)
    clips = torch.stack([video.to_clip(data.Shapes("train", 16, 4)[i][0]) for i in range(2)])
    optimizer, errors = torch.optim.Adam(model.parameters(), 3e-3), []
    for _ in range(120):
        error = (model.decoder(model.encoder(clips), torch.arange(4)) - clips).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.1 * errors[0]
