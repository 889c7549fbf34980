"""The codec: counts of the papers, files whole, cut and damaged, its training; its rivals, rate and distortion."""

import copy
import csv
import itertools
import json
import math
import shutil
import struct
import zlib
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import same
from scipy.ndimage import gaussian_filter
from test_fit import moving_frames

import data
import nerv
import vae
from common import checkpoints, utils, video
from common.utils import UserError
from siblings import codec, container, entropy, fit, rd, rivals, xinc
from siblings.codec import CodecConfig, NeRVDec, VideoFile
from siblings.degrade import degrade
from siblings.frames import cut, join, read_video

SIZES = {"resolution": 16, "num_frames": 4, "width": 4}
TINY = "train --resolution 16 --num-frames 4 --width 4 --tokens 3x8 8x6 --batch-size 4 --steps 3"
VIT = vae.EncoderConfig(width=24, depth=1, heads=2, patch=(2, 8, 8))


def run(command):
    """Run codec.py in this process, with a small encoder; returns the exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(codec.ENCODERS, "nano", VIT)
        return conftest.run("siblings.codec", command)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory with codec.pt, three steps old, a.mkv with 18 frames of 21 x 35, a.nerv with five chunks of it; small."""
    cwd = tmp_path_factory.mktemp("codec")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        video.write_frames("a.mkv", [moving_frames(18, 21, 35)], 10)
        video.write_frames("small.mkv", [moving_frames(14, 12, 16)], 10)  # four chunks of one tile
        for command in (TINY, "encode a.mkv a.nerv", "encode small.mkv small.nerv --bits 5"):
            assert run(command) == 0
    return cwd


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    """A copy of `trained` to work in."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model(trained):
    return codec.open_codec(trained / "codec.pt")[0]


def decoded(path, model, first=0, last=None, **kw):
    file = VideoFile(path, model, "codec.pt")
    return np.concatenate(list(codec.decode_frames(file, model, first, last or file.frames, **kw)))


def test_counts_of_the_papers():
    fastnerv, uniform = CodecConfig(), CodecConfig(tokens=((64, 64), (64, 144), (64, 144), (64, 108)))
    hypernerv = CodecConfig(width=20, tokens=((4, 256), (80, 240), (16, 240), (0, 0)))
    assert NeRVDec(fastnerv).num_weights() == 85_552 and sum(fastnerv.codes) == 24_064  # FastNeRV, Table 2: 85.6k, 24.1k
    assert fastnerv.codes == [1024, 18432, 4608, 0] and uniform.codes == [4096, 9216, 9216, 6912]  # Table 4, in thousands
    assert NeRVDec(hypernerv).num_weights() == 129_968 and sum(hypernerv.codes) == 24_064  # HyperNeRV: 130k, 24.1k
    config = utils.parse_options(codec.Config, "", codec.preset_defaults, ["--dataset", "folder"])
    assert (config.preset, config.extras, config.mask, config.batch_size, config.steps) == ("fastnerv", [], 0, 32, 46_875)
    assert codec.new_codec(config).config == fastnerv


def test_the_papers_network_by_hand():
    torch.manual_seed(0)
    c = CodecConfig(**SIZES, tokens=((3, 8), (0, 0), (2, 9)), basis=6)  # the last layer is the same for all videos
    decoder, codes, t = NeRVDec(c).double(), torch.randn(2, sum(c.codes), dtype=torch.float64), torch.arange(4.0)
    assert c.layers == [((64, 16, 1, 1), 4), ((48, 4, 3, 3), 4)]
    first, second = decoder.layers
    tokens = codes[1, :24].view(3, 8)
    entries = torch.cat([row.repeat(43)[:342] for row in tokens])[:1024].view(64, 16, 1, 1)  # 1024 / 3 rounded up is 342
    kernel = first.shared * (1 + entries)
    kernel = kernel / kernel.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(first.kernel(codes[:, :24])[1], kernel)
    x = nerv.sinusoid(t, 16, 4).double()[:, :, None, None]
    x = F.pixel_shuffle(F.conv2d(x, kernel), 4)
    x = F.conv2d(nerv.GELU_GAIN * F.gelu(x), second.shared, padding=1)
    unit = F.pixel_shuffle(x, 4) + 0.5  # on [0, 1], with the paper's output bias
    torch.testing.assert_close(decoder(codes, t)[1], 2 * unit - 1)  # the basis, ours, begins black
    decoder.shared.components.data.normal_()
    torch.testing.assert_close(decoder(codes, t)[1], 2 * unit - 1 + decoder.shared(codes[1:, 24:], t, 4)[0])


def test_an_mlp_of_pixels_by_hand():
    torch.manual_seed(0)
    c = CodecConfig(**SIZES, tokens=((3, 8), (4, 4), (0, 0), (2, 6)), pixelwise=True)
    decoder, codes, t = NeRVDec(c).double(), torch.randn(2, sum(c.codes), dtype=torch.float64), torch.tensor([0.0, 2.5])
    frames, parts, y, x, place = decoder(codes, t), codes[1].split(c.codes), 3, 14, codec.pixel_code(t, c)
    frequency = torch.pi / 16 * 2 ** torch.linspace(0, math.log2(14.4), 8)  # up to 0.9 π a pixel
    for first, where in ((16, y), (32, x)):
        torch.testing.assert_close(place[0, first : first + 8, y, x], math.sqrt(2) * (where * frequency).sin())
    h = place[1, :, y, x].double()
    for i, layer in enumerate(decoder.layers):
        h = layer.kernel(parts[i][None])[0, :, :, 0, 0] @ (nerv.GELU_GAIN * F.gelu(h) if i else h)
    torch.testing.assert_close(frames[1, 1, :, y, x], 2 * h)
    config = utils.parse_options(codec.Config, "", codec.preset_defaults, ["--preset", "fastnerv", "--pixelwise"])
    assert sum(codec.new_codec(config).config.codes) == 25_200  # FastNeRV, Table 2: 25k


def test_tokens_left_out_are_read_from_those_that_are_kept():
    config, everything, before = CodecConfig(16, tokens=((4, 2), (7, 3))), torch.arange(29), set()
    assert config.sources(0.5)[:8].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]  # the first half twice: HyperNeRV's
    for keep in (1e-6, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
        sources = config.sources(keep)
        kept = set(everything[sources == everything].tolist())
        assert set(sources.tolist()) == kept and before <= kept  # each prefix holds those before it
        assert len(kept) == 2 * math.ceil(keep * 4) + 3 * math.ceil(keep * 7)
        before = kept


def test_numbers_come_back_in_the_bits_that_training_counts(model):
    for bits, (columns, rows) in itertools.product((4, 6, 8), ((1, 1), (300, 5))):
        rng, half, kept = np.random.default_rng(bits), 2 ** (bits - 1), np.arange(columns) % 3 == 0
        order = entropy.coding_order(rng.uniform(-3, 5, columns), np.full(columns, bits), kept)
        for numbers in (rng.integers(-half, half, (rows, columns)), np.zeros((rows, columns), int)):
            again = entropy.unpack(entropy.pack(numbers, order), order, numbers.shape)
            assert np.array_equal(again, np.where(kept, numbers, 0))
    torch.manual_seed(0)
    decoder, codes, far = model.decoder, torch.rand(3, 72) * 6 - 3, torch.full((1, 72), 1e6)
    assert ((decoder.dequantize(decoder.quantize(codes, 5), 5) - codes).abs() <= 0.1251).all()
    assert (decoder.quantize(far, 4) == 7).all() and (decoder.quantize(-far, 4) == -8).all()
    codes = decoder.mean + decoder.log_scale.exp() * torch.logit(torch.rand(64, len(decoder.mean)))
    numbers = decoder.quantize(codes, 7)
    ideal = decoder.cost(decoder.dequantize(numbers, 7), 7).sum().item()
    order = codec.coding_order(decoder, 7, 1.0)
    assert 8 * len(entropy.pack(numbers.numpy().astype(int), order)) == pytest.approx(ideal, rel=0.02)


def test_tiles_join_to_what_they_were_cut_from():
    frames = np.random.default_rng(0).integers(0, 256, (3, 21, 40, 3), np.uint8)
    tiles = cut(frames, 4, 16)
    again = video.to_frames(join(tiles, 21, 40))
    assert tiles.shape == (2 * 3, 4, 3, 16, 16) and np.array_equal(again[:3], frames) and np.array_equal(again[3], frames[2])
    wanted = video.to_clip(frames)[0, :, :16, -1:].expand(-1, -1, 8)
    assert torch.equal(tiles[2, 0, :, :, 8:], wanted)  # the third tile is 8 columns, and 8 times the last one


def test_a_video_of_any_size_comes_back_whatever_else_is_decoded(here, model):
    whole, double = (decoded("a.nerv", model, time_scale=scale) for scale in (1, 2))
    assert run("decode a.nerv b.mkv") == 0 and whole.shape == (18, 21, 35, 3)
    frames, rate = read_video("b.mkv")
    assert np.array_equal(frames, whole) and rate == 10
    for first, last in ((0, 1), (3, 9), (17, 18)):
        assert np.array_equal(decoded("a.nerv", model, first, last), whole[first:last])
    assert len(double) == 36 and np.array_equal(double[::2], whole)
    assert np.array_equal(decoded("a.nerv", model, 6, 10, time_scale=2), double[12:20])
    file, t = VideoFile("a.nerv", model, ""), torch.arange(4)
    codes = torch.cat([file.codes(file.numbers(i)) for i in range(5)])  # 5 chunks of 2 x 3 tiles
    with torch.no_grad():
        together = model.decoder(codes, t)
        assert torch.equal(torch.cat([model.decoder(part, t) for part in codes.split(7)]), together)
    torch.testing.assert_close(model.decoder(codes.requires_grad_(), t), together, rtol=1e-4, atol=1e-5)  # 30 groups, one call


def test_refinement_helps_and_quantization_is_in_its_loop(model, trained):
    model = copy.deepcopy(model)
    model.decoder.layers[-1].shared.mul_(5)  # three steps from the start frames are grey, whatever the codes
    clips, t = cut(read_video(trained / "a.mkv")[0][:4], 4, 16), torch.arange(4)

    @torch.no_grad()
    def error(steps, keep, price=0.0):
        codes = model.decoder.dequantize(codec.encode_clips(model, clips, 4, keep, steps, price), 4)
        frames = model.decoder(codes[:, model.config.sources(keep)], t)
        return (frames - clips).square().mean().item(), model.decoder.cost(codes, 4).sum().item()

    assert error(30, 0.5)[0] < 0.97 * error(0, 0.5)[0]
    assert error(30, 1.0, price=1.0)[1] < error(30, 1.0)[1]  # bits that cost are saved


def test_explaining_shows_each_chunk_as_it_decodes(here, monkeypatch, model, capsys):
    seen, explain_cuts, whole = [], xinc.explain_cuts, decoded("a.nerv", model)
    monkeypatch.setattr(xinc, "explain_cuts", lambda chunks, *rest: (seen.extend(chunks), explain_cuts(chunks, *rest))[1])
    monkeypatch.setattr("sys.argv", ["fit", "--explain", "a.nerv", "--out", "x.png"])
    fit.main()
    assert "3 cuts" in capsys.readouterr().out and Path("x.png").stat().st_size > 10_000
    assert [count for count, _ in seen] == [4, 4, 4, 4]
    for number, (k, place) in {0: (0, 0), 7: (1, 3), 15: (3, 3)}.items():
        frame, total = seen[k][1](place)
        assert np.array_equal(frame, whole[number]) and total.shape == (21, 35)
        # Six tiles of 16 x 16, row by row: that of the last pixel is the sixth.
        assert total[20, 34] == pytest.approx(alone(model, "a.nerv", k, 5, place)[4, 2].item(), rel=1e-5)


def alone(model, path, chunk, tile, place):
    """xinc.painted of one tile of a chunk, from the layers themselves."""
    file = VideoFile(path, model, "")
    code, (first, last) = file.codes(file.numbers(chunk))[tile : tile + 1], model.decoder.layers
    parts = code.split(model.config.codes, 1)
    x = first(nerv.sinusoid(torch.tensor([float(place)]), 16, 4)[..., None, None], parts[0])
    return xinc.painted(nerv.GELU_GAIN * F.gelu(x), last.kernel(parts[1])[0], last.stride)[0]


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
            good = all(content[a:b] == whole[a:b] for a, b in ((0, entries[0][0]), (offset, offset + size)))
            assert np.array_equal(result, frames[4 * i : 4 * i + 4]) if good else isinstance(result, str)
            survived += good
    assert survived > 50


INDEX = container.varint(1) + container.varint(3) + struct.pack("<I", zlib.crc32(b"abc"))  # one chunk


def seal(path, header, index=INDEX, version=1):
    """A file whose checksums are right, whatever it says."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=container.WORDS)
    head = packer.compress(header if isinstance(header, bytes) else json.dumps(header).encode()) + packer.flush() + index
    path.write_bytes(container.START.pack(b"NeRV", version, len(head), zlib.crc32(head)) + head + b"abc")


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
    broken = {"index": container.varint(2**60) + bytes(30)}, {"index": b""}, {"index": b"\xff" * 40}, {"version": 2}
    for header, kw in [*((header, {}) for header in headers), *((good, kw) for kw in broken)]:
        seal(path, header, **kw)
        assert isinstance(outcome(path, model), str), header
    for length in (0, 1, 4, 40, 4000):  # bytes that no encoder made, under a checksum that is right
        container.write(path, good, [np.random.default_rng(0).bytes(length)])
        assert isinstance(outcome(path, model), (str, np.ndarray))


def test_wrong_use_and_damaged_files_are_one_line_and_status_2(here, capsys):
    source, whole = Path("a.mkv").read_bytes(), Path("a.nerv").read_bytes()
    Path("cut.nerv").write_bytes(whole[:-2])
    for command, reason in {
        "encode a.mkv": "usage: python -m siblings.codec encode VIDEO FILE.nerv",
        "encode a.mkv ./a.mkv": "would overwrite",
        "decode a.mkv b.mp4": "not a file written by this program",
        "decode a.nerv b.mp4 --frames 3:19": "0 to 17",
        "decode a.nerv b.mp4 --frames 3:4 --time-scale 0.4": "no frame at these times",
        "decode cut.nerv b.mp4": "chunk 4, frames 16 to 17, is damaged",
        "train --tokens 8 32 8": "--tokens 8 32 8",
    }.items():
        assert run(command) == 2
        said = capsys.readouterr().err.split("\r")[-1].strip()
        assert said.splitlines()[-1].startswith("error: ") and reason in said
    assert not Path("b.mp4").exists() and Path("a.mkv").read_bytes() == source


def test_compare_counts_what_encode_writes(here, capsys, model):
    for name in ("val", "train"):
        Path("clips", name).mkdir(parents=True)
    shutil.copy("a.mkv", "clips/val/a.mkv"), shutil.copy("small.mkv", "clips/train/b.mkv")  # which is not held out
    assert (
        run("compare clips/train small.mkv --codecs x264 --crf 20 40 --bits 5 4 --keep 1 0.5 --refine 0 2 --out-dir out") == 0
    )
    assert "BD-rate" in capsys.readouterr().out and Path("out/curves.png").stat().st_size > 5000
    assert conftest.run("studies.codec", "--data-dir clips --size 16 --out-dir out") == 0 and Path("out/frames.png").is_file()
    with open("out/points.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["codec"] for row in rows] == ["x264"] * 2 + ["ours, refine 0"] * 4 + ["ours, refine 2"] * 4
    assert int(rows[2]["bytes"]) > int(rows[4]["bytes"]) > int(rows[5]["bytes"])  # fewer bits, fewer tokens
    size = error = 0
    for name in ("a", "small"):
        assert run(f"encode {name}.mkv {name}.nerv --bits 4 --keep 0.5 --refine 2") == 0
        size += (own := Path(f"{name}.nerv").stat().st_size)
        squares = np.square(read_video(f"{name}.mkv")[0] - decoded(f"{name}.nerv", model).astype(float))
        error, said = error + squares.sum(), capsys.readouterr().out
        assert f"PSNR {10 * math.log10(255**2 / squares.mean()):.2f} dB" in said and f"in {own} bytes" in said
    pixels, weights = 18 * 21 * 35 + 14 * 12 * 16, sum(x.numel() for x in model.decoder.state_dict().values())
    assert float(rows[-1]["bpp with model"]) == pytest.approx(8 * (size + 4 * weights) / pixels)
    assert float(rows[-1]["psnr"]) == pytest.approx(10 * math.log10(255**2 * 3 * pixels / error), abs=1e-3)


def test_a_training_that_was_stopped_goes_on_exactly(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options, calls = TINY.replace("--steps 3", "--steps 6 --rate 0.01 --degrade mask"), itertools.count()
    assert run(f"{options} --out whole.pt") == 0
    with monkeypatch.context() as patch:
        patch.setattr(utils.Interrupt, "stop", lambda self: next(calls) == 2)
        assert run(f"{options} --out parts.pt") == 0
    assert checkpoints.load("parts.pt", "codec", "")["step"] == 3
    assert run(f"{options} --out parts.pt --resume") == 0
    a, b = (checkpoints.load(f"{name}.pt", "codec", "") for name in ("whole", "parts"))
    assert a["step"] == b["step"] == 6 and same(a["ema"], b["ema"]) and same(a["training"], b["training"])
    assert Path("runs/whole/step0000006.png").is_file()


def test_a_step_minimizes_the_error_of_clean_clips_and_the_rate_at_the_papers_learning_rate(here, monkeypatch, capsys):
    seen, made, logged, clean = [], [], [], np.stack([data.Shapes("train", 16, 4)[i][0] for i in range(4)])
    encoder, decoder, clips = codec.Hypernetwork.forward, NeRVDec.forward, video.to_clip(clean)
    rates, step = [], utils.FiniteStep.__call__
    monkeypatch.setattr(codec.Hypernetwork, "forward", lambda self, x: (seen.append(x), encoder(self, x))[1])
    monkeypatch.setattr(NeRVDec, "forward", lambda self, *a: (made.append((a[0], decoder(self, *a))), made[-1][1])[1])
    monkeypatch.setattr(utils.RunLog, "add", lambda self, **values: logged.append(values) if "loss" in values else None)
    monkeypatch.setattr(utils.RunLog, "step", lambda self, step: False)
    monkeypatch.setattr(utils.FiniteStep, "__call__", lambda self, loss, lr: (rates.append(lr), step(self, loss, lr))[1])
    monkeypatch.setattr(data, "endless", lambda *args: itertools.repeat((torch.from_numpy(clean), None)))
    assert run(f"{TINY} --steps 10 --lr 1e-4 --extras --mask 0 --rate 0.5 --degrade down4") == 0
    assert torch.equal(seen[0], degrade(clips, "down4", None)) and not torch.equal(seen[0], clips)
    for values, (_, frames) in zip(logged, made[:10], strict=True):
        l2 = (frames.detach() - clips).square().mean()
        torch.testing.assert_close([values["l2"], values["loss"]], [l2, l2 + 0.5 * values["bpp"]])
    # At the first step the distribution is at its start: mean 0, scale 0.3; a step of 6 bits is 8 / 64.
    upper, lower = (torch.sigmoid((made[0][0].detach() + half) / 0.3) for half in (1 / 16, -1 / 16))
    torch.testing.assert_close(logged[0]["bpp"], -torch.log2(upper - lower).sum(1).mean() / 1024, rtol=1e-3, atol=1e-4)
    assert rates == [1e-4] * 9 + [pytest.approx(1e-5)]  # §4.1
    ckpt = checkpoints.load("codec.pt", "codec", "")
    assert same(ckpt["ema"], ckpt["training"]["model"])  # no average, which is an extra
    assert run("encode a.mkv b.nerv --refine 1") == 2 and "would fit the degraded video" in capsys.readouterr().err


NAN = pytest.approx(math.nan, nan_ok=True)


@pytest.fixture(scope="module")
def frames():
    """uint8 [10, 66, 71, 3]: grey waves that move, in colours that change slowly over the frame."""
    t, y, x = np.arange(10)[:, None, None], np.arange(66)[:, None], np.arange(71)
    wave = 120 + 60 * np.sin((x + 3 * t) / 9) * np.cos((y - t) / 7)
    return np.stack([wave, wave + y / 3, wave - x / 3], -1).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", list(rivals.RIVALS))
def test_what_a_codec_writes_is_small_and_decodes(name, frames):
    if name not in rivals.available():
        pytest.skip(f"PyAV has no {rivals.RIVALS[name].encoder} here")
    files = [rivals.encode(name, frames[:5], 25, crf) for crf in (15, 45)]
    made = [rivals.decode(name, data, frames[:5].shape) for data in files]
    errors = [np.square(clip - frames[:5].astype(float)).mean() for clip in made]
    assert len(files[1]) < len(files[0]) < 3000 and errors[0] < errors[1] and errors[0] < 4  # colours come back as they were
    assert not any(word in files[0] for word in (b"x264", b"x265", b"Lavc", b"SVT"))
    best, size = rivals.within(name, frames[:5], 25, len(files[0]))
    assert len(files[1]) < size <= len(files[0]) and best.shape == made[0].shape
    assert rivals.within(name, frames[:5], 25, 1)[1] < len(files[1])  # the fewest that it takes
    tiles = np.kron(np.random.default_rng(0).integers(90, 160, (1, 16, 16, 3)), np.ones((1, 4, 4, 1))).astype(np.uint8)
    error = np.square(rivals.decode(name, rivals.encode(name, tiles, 25, 4), tiles.shape) - tiles.astype(float)).mean()
    assert error < 45  # 4:2:0 costs 36, and 56 with chroma samples that are shifted by half a pixel


def test_bd_rate_is_the_mean_distance_over_the_overlap():
    # Log rate is linear in quality: 10 and 8 dB an octave, equal at 30 dB. Over 30 to 40 dB the mean distance is 1 / 8 octaves.
    a = [(2 ** ((q - 30) / 10), q) for q in (20, 28, 33, 40)]
    b = [(2 ** ((q - 30) / 8), q) for q in (30, 35, 47)]
    beaten = [(2.5, 29.0), (1.9, 32.9)]  # points of which a curve takes no notice
    assert rd.bd_rate(a + beaten, b[::-1]) == (pytest.approx(2 ** (5 / 8 - 5 / 10) - 1), 30, 40)
    for other in ([], [(0.1, 31.0)], [(0.1, 2.0), (0.2, 19.0)], [(0.1, 32.0), (0.2, 31.0)]):
        assert rd.bd_rate(a, other) == rd.bd_rate(other, a) == (NAN, NAN, NAN)


@pytest.mark.parametrize("size, side", [(33, 3), (64, 3), (65, 5), (161, 11)])
def test_ms_ssim_takes_the_largest_window_that_fits(size, side):
    x = torch.rand(2, 3, size, 200) * 2 - 1
    assert rd.ms_ssim(x, x).tolist() == pytest.approx([1, 1])
    wanted = rd.pytorch_msssim.ms_ssim(x + 1, 0.9 * x + 1, data_range=2, size_average=False, win_size=side)
    assert torch.equal(rd.ms_ssim(x, 0.9 * x), wanted) and rd.ms_ssim(x[..., :32], x[..., :32]).isnan().all()


def test_measures_pool_over_videos_and_batches(tmp_path):
    rng = np.random.default_rng(0)
    videos = [(rng.integers(0, 256, (n, 40, 36, 3), np.uint8), 25) for n in (3, 20)]
    made = {n: np.clip(v.astype(int) + step, 0, 255).astype(np.uint8) for (v, _), n, step in zip(videos, (3, 20), (9, -2))}
    point = rd.Point("a", "b", lambda frames, fps, path: (100, 0.5, made[len(frames)]), model=1000)
    row = rd.measure(point, videos, tmp_path)
    error = np.concatenate([v - made[len(v)].astype(float) for v, _ in videos])
    assert row["psnr"] == pytest.approx(10 * math.log10(255**2 / np.square(error).mean()))
    similar = [rd.ms_ssim(video.to_clip(v), video.to_clip(made[len(v)])) for v, _ in videos]
    assert row["ms-ssim"] == pytest.approx(torch.cat(similar).mean().item(), rel=1e-4)
    assert row["bpp"] == 1600 / (23 * 40 * 36) and row["bpp with model"] == 9600 / (23 * 40 * 36) and row["seconds"] == 1
    assert (row["videos"], row["frames"], row["bytes"]) == (2, 23, 200)


def test_degraded_clips_are_what_they_are_called(frames):
    clips = torch.stack([video.to_clip(frames[:4, :64, :64]), video.to_clip(frames[4:8, :64, 7:])])
    draws = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(1))
    small, blurred, holed = (degrade(clips, kind, draws) for kind in ("down4", "blur", "mask"))
    assert degrade(clips, "none", draws) is clips
    assert small[1, 2, 0, 9, 14].item() == pytest.approx(clips[1, 2, 0, 8:12, 12:16].mean().item(), abs=1 / 255)
    assert (small[..., 8, 12] == small[..., 11, 15]).all()
    assert np.abs(blurred.numpy() - gaussian_filter(clips.numpy(), (0, 0, 0, 2, 2), truncate=6)).max() < 1.1 / 255
    hole = (draws < 0.25).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None, None].expand_as(clips)
    assert 0.1 < hole.float().mean() < 0.4 and (holed[hole].abs() < 1.01 / 255).all()
    torch.testing.assert_close(holed[~hole], clips[~hole])
