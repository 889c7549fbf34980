"""Every frame of every kind of file, in its order and colours; and what is written is whole."""

import os
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from common import utils, video
from common.utils import UserError
from common.video import count_frames, probe, read_frames, to_clip, to_frames
from data import Shapes

CLIPS = ROOT.parent / "shared" / "data" / "clips"


def grey(count, size=32, step=8):
    """Frames [count, size, size, 3] that tell their number by their brightness."""
    return np.tile((16 + step * np.arange(count)).astype(np.uint8)[:, None, None, None], (1, size, size, 3))


def numbers(frames, step=8):
    """The numbers of frames of `grey`."""
    return [round((v - 16) / step) for v in np.asarray(frames).mean((1, 2, 3)).tolist()]


def encode(
    path, frames, codec="libx264", container=None, rate=25, pixels="yuv420p", stamps=None, aspect=None, colours=None, **options
):
    """A video made by PyAV itself; stamps are the times of frames in units of 1/600 s. Skips the test where it cannot."""
    try:
        with av.open(str(path), "w", format=container) as out:
            stream = out.add_stream(codec, rate, options={k: str(v) for k, v in options.items()})
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
            if stamps:
                stream.codec_context.time_base = Fraction(1, 600)
            if aspect:
                stream.sample_aspect_ratio = aspect
            if colours:
                stream.color_trc, stream.color_primaries, stream.colorspace = colours
            for k, frame in enumerate(frames):
                picture = av.VideoFrame.from_ndarray(
                    np.ascontiguousarray(frame), "rgb24" if frame.dtype == np.uint8 else "rgb48le"
                )
                picture = picture.reformat(format=pixels, dst_colorspace=colours and 9)
                if stamps:
                    picture.pts, picture.time_base = stamps[k], Fraction(1, 600)
                out.mux(stream.encode(picture))
            out.mux(stream.encode())
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"PyAV has no encoder {codec}")
    return path


def animated(path, frames, ms):
    """A GIF or an APNG, by the suffix; ms are the times that frames are shown for."""
    images = [Image.fromarray(np.ascontiguousarray(frame)) for frame in frames]
    images[0].save(
        path, "GIF" if path.suffix == ".gif" else "PNG", save_all=True, append_images=images[1:], duration=ms, loop=0
    )


PHONE = [20 * k + 5 * (k % 3 == 1) for k in range(24)]  # 30 frames a second, on a grid of 1/120 s
FILES = {
    "h264.mp4": dict(bf=3, g=8),
    "h264-open-gop.mp4": {"bf": 3, "g": 8, "x264-params": "open-gop=1:keyint=8"},
    "late.mp4": dict(bf=2, stamps=[300 + 24 * k for k in range(24)]),
    "phone.mp4": dict(stamps=PHONE),
    "slow.mp4": dict(rate=240),
    "hevc.mp4": dict(codec="libx265", **{"x265-params": "log-level=none"}),
    "xvid.avi": dict(codec="mpeg4", bf=2, g=8, qmin=1, qmax=2, b="9M"),
    "h264.avi": dict(bf=2),
    "h264.mkv": dict(bf=2, g=6),
    "ffv1.mkv": dict(codec="ffv1"),
    "vp9.webm": dict(codec="libvpx-vp9", g=8),
    "vp8.ogv": dict(codec="libvpx", container="webm"),
    "h264.ts": dict(bf=2, container="mpegts"),
    "mpeg2.mpg": dict(codec="mpeg2video", bf=2, qmin=1, qmax=2, b="9M"),
    "raw.y4m": dict(codec="wrapped_avframe", container="yuv4mpegpipe"),
    "h264.3gp": dict(bf=2, container="3gp"),
    "wmv2.wmv": dict(codec="wmv2"),
    "flv1.flv": dict(codec="flv"),
}


@pytest.mark.parametrize("name", FILES)
def test_frame_k_is_frame_k_in_every_container_and_codec(tmp_path, name):
    path = encode(tmp_path / name, grey(24), **FILES[name])
    assert video.list_videos(tmp_path) == ([path], [])
    whole = read_frames(path, 16)
    assert numbers(whole) == list(range(24)) and count_frames(path) == 24
    for start in (1, 2, 3, 7, 8, 9, 20, 23):
        assert np.array_equal(read_frames(path, 16, start), whole[start:])
        assert np.array_equal(read_frames(path, 16, start, 4), whole[start : start + 4])
    with pytest.raises(video.BadVideo, match="ends before frame 24"):
        read_frames(path, 16, 24)


@pytest.mark.parametrize("ms", [20, 70, 143, [40, 40, 120, 40] * 6])
@pytest.mark.parametrize("suffix", [".gif", ".apng"])
def test_animated_images_have_as_many_frames_as_were_encoded(tmp_path, suffix, ms):
    animated(path := tmp_path / f"a{suffix}", grey(24), ms)
    assert video.list_videos(tmp_path) == ([path], [])
    whole = read_frames(path, 16)
    assert numbers(whole) == list(range(24)) and count_frames(path) == 24
    assert np.array_equal(read_frames(path, 16, 5, 3), whole[5:8])


# ---------------------------------------------------------------------------------------------------------- depths and colours


@pytest.mark.parametrize(
    "pixels, codec", [("yuv420p10le", "libx265"), ("gray16le", "ffv1"), ("rgb48le", "ffv1"), ("bgra", "ffv1")]
)
def test_other_depths_keep_their_greys(tmp_path, pixels, codec):
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    path = encode(tmp_path / "a.mkv", grey(4, step=70), codec, pixels=pixels, **options)
    assert abs(read_frames(path, 16).mean((1, 2, 3)) - [16, 86, 156, 226]).max() < 3


@pytest.mark.parametrize("transfer, white", [(16, 0.5807), (18, 0.75)])  # ITU-R BT.2408: the signal of 203 cd/m²
def test_white_of_high_dynamic_range_is_white(tmp_path, transfer, white):
    frames = np.full((2, 32, 32, 3), round(white * 65535), np.uint16)
    frames[:, :, :16] = 0
    options = {"container": "mpegts", "pixels": "yuv444p10le", "x265-params": "log-level=none"}
    read = read_frames(encode(tmp_path / "a.ts", frames, "libx265", colours=(transfer, 9, 9), **options), 32)
    assert read[:, 8:-8, 24:].min() > 248 and read[:, 8:-8, :8].max() < 4


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif", ".webp"])
def test_images_come_back_in_8_and_16_bits_and_not_if_they_are_cut_off(tmp_path, suffix):
    """Of 2 KB and more, the part of a file that tells FFmpeg what it is; also under a name that could be a pattern."""
    ramp = np.linspace(0, 255, 200).round().astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 20, (200, 200), np.uint8)  # which takes the room
    grey8 = np.maximum(ramp, ramp[:, None]) // 2 + noise
    for bits in (8, 16) if suffix in (".png", ".tif") else (8,):
        whole, cut = (tmp_path / f"{name}{bits}" / f"%0{bits}d{suffix}" for name in ("whole", "cut"))
        for path in (whole, cut):
            path.parent.mkdir()
            Image.fromarray(grey8 if bits == 8 else grey8.astype(np.uint16) * 257).save(path)
        assert whole.stat().st_size > 4096 and abs(read_frames(whole.parent, None)[0, ..., 0] - grey8.astype(int)).mean() < 6
        cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
        with pytest.raises(video.BadVideo, match="damaged"):
            read_frames(cut.parent, None)


@pytest.mark.parametrize("height, width", [(24, 64), (64, 24), (37, 53), (9, 11), (180, 32)])
@pytest.mark.parametrize("suffix", [".mkv", ".gif"])
def test_any_size_is_scaled_and_cut_to_its_centre(tmp_path, height, width, suffix):
    """Red ends that are cut off, a green square in the middle."""
    frames = np.zeros((5, height, width, 3), np.uint8)
    frames[..., 1] = 200 + 4 * np.arange(5)[:, None, None]
    edge = abs(height - width) // 2
    if edge > 4:
        ends = frames if height > width else frames.transpose(0, 2, 1, 3)
        ends[:, : edge - 2] = ends[:, -edge + 2 :] = (255, 0, 0)
    path = tmp_path / f"a{suffix}"
    video.write_frames(path, [frames], 10) if suffix == ".mkv" else animated(path, frames, 100)
    out = read_frames(path, 32)
    assert out.shape == (5, 32, 32, 3) and abs(out[:, 3:-3, 3:-3].astype(int) - (0, 208, 0)).max() < 45
    assert read_frames(path, None).shape == frames.shape


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
    for k in range(2):
        Image.fromarray(stored).save(tmp_path / f"{k}.jpg", exif=exif, quality=95)
    shown = read_frames(tmp_path, None)[1]
    assert (
        shown.shape[:2] == np.rot90(stored, turns).shape and abs(shown[..., 0] - np.rot90(stored, turns).astype(int)).max() < 9
    )


@pytest.mark.skipif(not CLIPS.is_dir(), reason="shared/data is not here")
def test_the_rotated_one_stands_upright():
    path = CLIPS / "video_90.mov"
    with av.open(str(path)) as container:
        stored = next(container.decode(video=0)).to_ndarray(format="rgb24").astype(int)
    shown = read_frames(path, None)[0]
    assert probe(path)[2:] == (568, 320) and shown.shape == (568, 320, 3)
    assert abs(np.rot90(stored, 3) - shown).mean() < 3, "a display matrix of -90 degrees is a quarter turn clockwise"


# ---------------------------------------------------------------------------------------------------------- what counts as one


def test_one_name_is_one_video_and_what_is_left_out_is_named(tmp_path, monkeypatch):
    for name in ("a.mp4", "b.avi", "c.mp4", "f.mp4"):
        encode(tmp_path / name, grey(4))
    animated(tmp_path / "a.gif", grey(4), 100), animated(tmp_path / "d.gif", grey(4), 100)
    for name in ("f/1.png", "f/2.png", "g/1.png", "g/2.png", "g/.h/1.png", "g/.h/2.png", "run/1.png", "run/2.png", "thumb.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    for name in ("c.ts", "notes.txt", "README", ".hidden.mp4", "film.rmvb", "run/losses.csv"):
        (tmp_path / name).write_text("hello")
    monkeypatch.chdir(tmp_path)
    paths, notes = video.list_videos(".")
    assert [str(path) for path in paths] == ["a.mp4", "b.avi", "c.mp4", "d.gif", "f.mp4", "g"]
    assert notes == [
        "1 .gif beside a .mp4 of the same name", "1 .ts beside a .mp4 of the same name", "1 files .csv", "1 files .rmvb",
        "1 files .txt", "1 files without a suffix", "1 folders of frames beside a .mp4 of the same name",
        "3 still images, too few for a video or beside videos",
    ]  # fmt: skip


def test_links_are_followed_once(tmp_path):
    for path in ("real/wave/a.mp4", "set/.hidden/b.mp4"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_bytes(b"x")
    for name in ("wave", "wave2"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "real" / "wave")
    (tmp_path / "real" / "wave" / "up").symlink_to(tmp_path / "set")
    assert video.list_videos(tmp_path / "set")[0] == [tmp_path / "set" / "wave" / "a.mp4"]


@pytest.mark.parametrize("size", [(96, 32), (32, 96)])
def test_frames_are_no_strips_however_wide(tmp_path, size):
    (tmp_path / "drive").mkdir()
    for k in range(12):
        Image.new("RGB", size, (16 + 8 * k,) * 3).save(tmp_path / "drive" / f"frame_{k}.png")
    assert video.list_videos(tmp_path)[0] == [tmp_path / "drive"] and count_frames(tmp_path / "drive") == 12
    assert numbers(read_frames(tmp_path / "drive", 16)) == list(range(12)), "in the order of their numbers"
    assert numbers(read_frames(tmp_path / "drive", None, 3, 4)) == [3, 4, 5, 6]


# ------------------------------------------------------------------------------------------------------------------ to files


def test_frames_and_clips_are_inverse():
    frames = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    clip = to_clip(frames)
    assert clip.shape == (2, 3, 4, 4) and clip[1, 2, 3, 0] == pytest.approx(frames[1, 3, 0, 2] / 127.5 - 1)
    assert (to_frames(clip) == frames).all()
    assert to_frames(torch.tensor([-9.0, 9.0]).view(1, 1, 1, 2).expand(1, 3, 1, 2))[0, 0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_clip_comes_back_from_its_files(tmp_path, suffix, capfd):
    clip = to_clip(Shapes()[4][0])
    video.write_video(tmp_path / "new" / "folder" / "clip", clip, fps=10)
    path = tmp_path / "new" / "folder" / f"clip{suffix}"
    assert (to_clip(read_frames(path, 32)) - clip).square().mean() < 0.012
    assert probe(path) == (16, 10, 128, 128), "large enough to be seen"
    assert len(os.listdir(path.parent)) == 2 and capfd.readouterr() == ("", "")


def test_mkv_is_lossless_and_odd_sizes_are_kept(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (5, 9, 11, 3), np.uint8)
    assert video.write_frames(tmp_path / "a.mkv", iter([frames[:2], frames[2:]]), 7) == 5
    assert np.array_equal(read_frames(tmp_path / "a.mkv", None), frames)
    assert video.write_frames(tmp_path / "a.mp4", [frames], 7) == 5 == len(read_frames(tmp_path / "a.mp4", None))
    with pytest.raises(UserError, match="a.xyz: give a file name that ends in .mp4 or .mkv"):
        video.write_frames(tmp_path / "a.xyz", [frames], 7)


@pytest.mark.parametrize("name", ["file/clip", "file/new/clip", "clip", "x" * 300])
@pytest.mark.parametrize("write", [
    lambda path: video.write_video(path, to_clip(grey(4))), lambda path: video.write_sheet(f"{path}.mp4", [to_clip(grey(4))]),
    lambda path: utils.make_parent(f"{path}.mp4"),
])  # fmt: skip
def test_what_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path, write, name):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "clip.mp4").mkdir()
    with pytest.raises(UserError, match=f"cannot write .*{name}.*: (it is a d|Not a d|File e|File name t)"):
        write(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["clip.mp4", "file"] and not os.listdir(tmp_path / "clip.mp4")


FULL = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from common import video
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
video.write_frames("a.mkv", [np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8)], 10)
"""


def test_on_a_full_disk_the_old_file_stays_and_devices_stay_devices(tmp_path):
    """A limit on the size of files stands for the end of the disk."""
    (tmp_path / "a.mkv").write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", FULL, ROOT], cwd=tmp_path, capture_output=True, text=True)
    assert "UserError: cannot write a.mkv: File too large" in done.stderr
    assert os.listdir(tmp_path) == ["a.mkv"] and (tmp_path / "a.mkv").read_bytes() == b"old"
    with pytest.raises(UserError, match="/dev/null: it is a directory, or not a regular file"):
        utils.make_parent(os.devnull)


def test_a_video_that_is_not_whole_gets_no_name(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"old")

    def parts():
        yield grey(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        video.write_frames(tmp_path / "a.mp4", parts(), 10)
    assert os.listdir(tmp_path) == ["a.mp4"] and (tmp_path / "a.mp4").read_bytes() == b"old"


NAMES = [
    "", ".", "..", "../../escaped", "carry/hold", "a\0b", "C:\\x", "x" * 999, "日本語" * 99, "caf\udce9", "new\nline", "-i",
    "con:1|2", "²", "\u202egpj.mp4", "\ud800", "take1:30", "concat:a|b", "n" * 251, "%d $(touch x) 日本語", "~", "*",
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


@pytest.mark.parametrize("count, rows, columns", [(1, 1, 1), (2, 1, 2), (3, 2, 2), (5, 2, 3), (9, 3, 3)])
def test_tile(count, rows, columns):
    clips = torch.rand(count, 2, 3, 4, 6)
    grid = video.tile(clips)
    assert grid.shape == (2, 3, rows * 4, columns * 6)
    for i in range(rows * columns):
        part = grid[:, :, i // columns * 4 :, i % columns * 6 :][:, :, :4, :6]
        assert torch.equal(part, clips[i]) if i < count else (part == 1).all()
