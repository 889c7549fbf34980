"""Every frame of every kind of file, in its order and colours; and what is written is whole."""

import os
import resource
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from common import utils, video
from common.utils import UserError
from common.video import count_frames, probe, read_frames, to_clip, to_frames
from data import Shapes


def grey(count, size=32, step=8):
    """Frames [count, size, size, 3] that tell their number by their brightness."""
    return np.tile((16 + step * np.arange(count)).astype(np.uint8)[:, None, None, None], (1, size, size, 3))


def numbers(frames, step=8):
    """The numbers of frames of `grey`."""
    return [round((v - 16) / step) for v in np.asarray(frames).mean((1, 2, 3)).tolist()]


def encode(path, frames, codec="libx264", container=None, pixels="yuv420p", stamps=None, aspect=None, colours=None, **options):
    """A video made by PyAV itself; stamps are the times of frames in units of 1/600 s. Skips the test where it cannot."""
    try:
        with av.open(str(path), "w", format=container) as out:
            stream = out.add_stream(codec, 25, options={k: str(v) for k, v in options.items()})
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
            stream.codec_context.time_base = Fraction(1, 600) if stamps else Fraction(1, 25)
            stream.sample_aspect_ratio = aspect or 1
            if colours:
                stream.color_trc, stream.color_primaries, stream.colorspace = colours
            for k, frame in enumerate(frames):
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24").reformat(format=pixels)
                if stamps:
                    picture.pts, picture.time_base = stamps[k], Fraction(1, 600)
                out.mux(stream.encode(picture))
            out.mux(stream.encode())
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"PyAV has no encoder {codec}")
    return path


def animated(path, frames, ms):
    """A GIF or an APNG, by the suffix; ms are the times that frames are shown for."""
    first, *others = map(Image.fromarray, frames)
    first.save(path, "GIF" if path.suffix == ".gif" else "PNG", save_all=True, append_images=others, duration=ms, loop=0)
    return path


FILES = {
    "h264.mp4": dict(bf=3, g=8),
    "h264-open-gop.mp4": {"bf": 3, "g": 8, "x264-params": "open-gop=1:keyint=8"},
    "late.mp4": dict(bf=2, stamps=[300 + 24 * k for k in range(24)]),
    "phone.mov": dict(stamps=[20 * k + 5 * (k % 3 == 1) for k in range(24)]),  # 30 frames a second, on a grid of 1/120 s
    "hevc.m4v": {"codec": "libx265", "container": "mp4", "x265-params": "log-level=none:no-asm=1"},
    "xvid.avi": dict(codec="mpeg4", bf=2, g=8, qmin=1, qmax=2, b="9M"),
    "h264.avi": dict(bf=2),
    "h264.mkv": dict(bf=2, g=6),
    "vp9.webm": dict(codec="libvpx-vp9", g=8),
    "h264.ts": dict(bf=2, container="mpegts"),
    "mpeg2.mpg": dict(codec="mpeg2video", bf=2, qmin=1, qmax=2, b="9M"),
    "raw.y4m": dict(codec="wrapped_avframe", container="yuv4mpegpipe"),
    "wmv2.wmv": dict(codec="wmv2"),
    "flv1.flv": dict(codec="flv"),
    "even.gif": 70,
    "uneven.apng": [40, 40, 120, 40] * 6,
}


def made(path):
    """The file of FILES with this name, 24 frames of `grey`."""
    how = FILES[path.name]
    return encode(path, grey(24), **how) if isinstance(how, dict) else animated(path, grey(24), how)


@pytest.mark.parametrize("name", FILES)
def test_frame_k_is_frame_k_in_every_container_and_codec(tmp_path, name):
    path = made(tmp_path / name)
    assert video.list_videos(tmp_path) == ([path], [])
    whole = read_frames(path, 16)
    assert numbers(whole) == list(range(24)) and count_frames(path) == 24
    for start in (1, 7, 8, 9, 23):
        assert np.array_equal(read_frames(path, 16, start), whole[start:])
        assert np.array_equal(read_frames(path, 16, start, 4), whole[start : start + 4])
    with pytest.raises(video.BadVideo):
        read_frames(path, 16, 24)


@pytest.mark.parametrize(
    "pixels, codec", [("yuv420p10le", "libx265"), ("gray16le", "ffv1"), ("rgb48le", "ffv1"), ("bgra", "ffv1")]
)
def test_other_depths_keep_their_greys(tmp_path, pixels, codec):
    path = encode(tmp_path / "a.mkv", grey(4, step=70), codec, pixels=pixels, **{"x265-params": "log-level=none:no-asm=1"})
    assert abs(read_frames(path, 16).mean((1, 2, 3)) - [16, 86, 156, 226]).max() < 3


@pytest.mark.parametrize("transfer, white", [(16, 0.5807), (18, 0.75)])  # ITU-R BT.2408: the signal of 203 cd/m²
def test_white_of_high_dynamic_range_is_white(tmp_path, transfer, white):
    frames = np.full((2, 32, 32, 3), round(white * 255), np.uint8)
    frames[:, :, :16] = 0
    options = {"container": "mpegts", "pixels": "yuv444p10le", "x265-params": "log-level=none:no-asm=1"}
    read = read_frames(encode(tmp_path / "a.ts", frames, "libx265", colours=(transfer, 9, 9), **options), 32)
    assert read[:, 8:-8, 24:].min() > 248 and read[:, 8:-8, :8].max() < 4


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif", ".webp"])
def test_images_come_back_in_8_and_16_bits_and_not_if_they_are_cut_off(tmp_path, suffix):
    """Of 2 KB and more, the part of a file that tells FFmpeg what it is; also under a name that is a pattern of others'."""
    ramp = np.linspace(0, 255, 200).round().astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 20, (200, 200), np.uint8)  # which takes the room
    grey8 = np.maximum(ramp, ramp[:, None]) // 2 + noise
    for bits in (8, 16) if suffix in (".png", ".tif") else (8,):
        whole, cut = (tmp_path / f"{name}{bits}" / f"%d{suffix}" for name in ("whole", "cut"))
        for path in (whole, cut):
            path.parent.mkdir()
            Image.fromarray(grey8 if bits == 8 else grey8.astype(np.uint16) * 257).save(path)
        Image.new("L", (200, 200)).save(whole.parent / f"0{suffix}")
        assert whole.stat().st_size > 4096 and abs(read_frames(whole.parent, None)[0, ..., 0] - grey8.astype(int)).mean() < 6
        cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
        with pytest.raises(video.BadVideo, match="damaged"):
            read_frames(cut.parent, None)


@pytest.mark.parametrize("height, width", [(24, 64), (64, 24), (37, 53), (9, 11), (180, 32)])
def test_any_size_is_scaled_and_cut_to_its_centre(tmp_path, height, width):
    """Red ends that are cut off, a green square in the middle."""
    frames = np.zeros((2, height, width, 3), np.uint8)
    frames[..., 1] = 200
    edge = abs(height - width) // 2
    if edge > 4:
        ends = frames if height > width else frames.transpose(0, 2, 1, 3)
        ends[:, : edge - 2] = ends[:, -edge + 2 :] = (255, 0, 0)
    video.write_frames(tmp_path / "a.mkv", [frames], 10)
    out = read_frames(tmp_path / "a.mkv", 32)
    assert out.shape == (2, 32, 32, 3) and abs(out[:, 3:-3, 3:-3].astype(int) - (0, 200, 0)).max() < 45
    assert np.array_equal(read_frames(tmp_path / "a.mkv", None), frames), "lossless, also of odd sizes"


def test_pixel_aspect_is_honoured(tmp_path):
    """64 x 64 stored pixels, each twice as wide as high, are a picture of 128 x 64, of which the middle 64 x 64 is seen."""
    frames = np.zeros((5, 64, 64, 3), np.uint8)
    frames[:, :, 16:48] = 255
    path = encode(tmp_path / "a.mp4", frames, pixels="yuv444p", aspect=Fraction(2))
    assert read_frames(path, 32)[:, 4:-4, 2:-2].min() > 230 and read_frames(path, None).shape == (5, 64, 128, 3)


@pytest.mark.parametrize("orientation, turns", [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_images_are_shown_upright(tmp_path, orientation, turns):
    stored, exif = np.kron(np.arange(6).reshape(2, 3) * 40, np.ones((32, 32))).astype(np.uint8), Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(stored).save(tmp_path / "0.jpg", exif=exif, quality=95)
    shown, expected = read_frames(tmp_path, None)[0], np.rot90(stored, turns)
    assert shown.shape[:2] == expected.shape and abs(shown[..., 0] - expected.astype(int)).max() < 9


def image(path, shade=0, size=(32, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade,) * 3).save(path)


def test_what_is_a_video_and_what_is_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.mp4", "b.AVI", "b.tsv", "README", "film.rmvb", ".hidden.mp4", "set/.hidden/b.mp4", "real/wave/c.mkv"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("hello")
    for name in ("thumb.png", "set/one/1.png", "set/.h/1.png", "set/.h/2.png"):
        image(Path(name))
    for k in range(12):
        image(Path(f"set/drive/frame_{k}.png"), 16 + 8 * k, (96, 32))  # no strips, however wide
    Path("set/wave").symlink_to("../real/wave")
    Path("real/wave/up").symlink_to("../../set")  # a circle
    paths, notes = video.list_videos(".")
    assert [str(path) for path in paths] == ["a.mp4", "b.AVI", "real/wave/c.mkv", "real/wave/up/drive"]
    assert notes == ["2 files .png", "1 files .rmvb", "1 files .tsv", "1 files without a suffix"]
    assert [str(path) for path in video.list_videos("set")[0]] == ["set/drive", "set/wave/c.mkv"]
    assert count_frames("set/drive") == 12 and numbers(read_frames("set/drive", 16)) == list(range(12)), "in numerical order"
    assert numbers(read_frames("set/drive", None, 3, 4)) == [3, 4, 5, 6]


def test_frames_and_clips_are_inverse():
    frames = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    clip = to_clip(frames)
    assert clip.shape == (2, 3, 4, 4) and clip[1, 2, 3, 0] == pytest.approx(frames[1, 3, 0, 2] / 127.5 - 1)
    assert (to_frames(clip) == frames).all()
    assert to_frames(torch.tensor([-9.0, 9.0]).view(1, 1, 1, 2).expand(1, 3, 1, 2))[0, 0, :, 0].tolist() == [0, 255]


def test_a_clip_comes_back_from_its_file(tmp_path, capfd):
    clip, path = to_clip(Shapes()[4][0]), tmp_path / "new" / "folder" / "clip"
    video.write_mp4(path, iter([clip[:7], clip[7:]]), fps=10)
    assert (to_clip(read_frames(f"{path}.mp4", 32)) - clip).square().mean() < 0.012
    assert probe(f"{path}.mp4") == (16, 10, 128, 128), "large enough to be seen"
    odd = np.zeros((5, 9, 11, 3), np.uint8)
    assert video.write_frames(f"{path}.mp4", [odd], 7) == 5 and read_frames(f"{path}.mp4", None).shape == odd.shape
    assert video.write_frames(f"{path}.mkv", [odd], 7) == 5 and probe(f"{path}.mkv")[1:] == (7, 11, 9)
    with pytest.raises(UserError, match="a.xyz: give a file name that ends in .mp4 or .mkv"):
        video.write_frames(tmp_path / "a.xyz", [odd], 7)
    assert sorted(os.listdir(path.parent)) == ["clip.mkv", "clip.mp4"] and capfd.readouterr() == ("", "")


def test_what_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "clip.mp4").mkdir()
    for name in ("file/new/clip", "clip", "x" * 300):
        with pytest.raises(UserError, match=f"cannot write .*{name}.*: (it is a d|Not a d|File e|File name t)"):
            video.write_mp4(tmp_path / name, [to_clip(grey(4))])
    assert sorted(os.listdir(tmp_path)) == ["clip.mp4", "file"] and not os.listdir(tmp_path / "clip.mp4")
    with pytest.raises(UserError, match="/dev/null: it is a directory, or not a regular file"):
        utils.make_parent(os.devnull)


def test_on_a_full_disk_the_old_file_stays(tmp_path, monkeypatch):
    """A limit on the size of files stands for the end of the disk."""
    monkeypatch.chdir(tmp_path)
    Path("a.mkv").write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        with pytest.raises(UserError, match="cannot write a.mkv: File too large"):
            video.write_frames("a.mkv", [np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8)], 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir() == ["a.mkv"] and Path("a.mkv").read_bytes() == b"old"


NAMES = [
    "", "..", "../../escaped", "a\0b", "C:\\x", "日本語" * 99, "caf\udce9", "new\nline", "-i", "²", "\u202egpj.mp4", "\ud800",
    "concat:a|b", "n" * 251, "%d $(touch x) 日本語", "~", "*",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_no_name_leaves_its_directory_and_any_is_shown_written_and_read(tmp_path, name, monkeypatch):
    path = tmp_path / f"{utils.file_name(name)}.png"
    assert path.parent.resolve() == path.resolve().parent == tmp_path and len(os.fsencode(path.name)) <= 255 and path.stem
    line = video.printable(name)
    assert line.isprintable() and line.encode(errors="strict").decode() == line
    video.write_sheet(path, [to_clip(grey(2))], [name[:99]])
    path.unlink()
    if 0 < len(name) < 252 and not set(name) & set("/\0\ud800") and name[0] != ".":  # the name of a file
        monkeypatch.chdir(tmp_path)
        video.write_mp4(name, [to_clip(grey(3))])
        assert [path.name for path in video.list_videos(".")[0]] == os.listdir() == [f"{name}.mp4"]
        assert len(read_frames(f"{name}.mp4", 16)) == 3


def test_sheet_has_a_row_for_each_video_and_a_column_for_each_frame(tmp_path):
    clip = to_clip(grey(16, step=12))
    video.write_sheet(tmp_path / "a" / "sheet.png", [clip, clip], ["one", "number two"])
    with Image.open(tmp_path / "a" / "sheet.png") as image:
        margin = image.width - 8 * 64
        assert image.height == 2 * 66 and margin >= 7 * len("number two")
        shades = [image.getpixel((margin + 64 * i + 32, 66 + 32))[0] for i in range(8)]
        ink = np.asarray(image.convert("L"))[:, :margin] < 128
    assert shades == sorted(shades) and (shades[0], shades[-1]) == (16, 16 + 12 * 15)  # first to last
    assert ink[:66].any() and ink[66:].sum() > ink[:66].sum() and not ink[:, :3].any()
