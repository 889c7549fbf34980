import imageio_ffmpeg
import numpy as np
import pytest
import torch
from conftest import ROOT, write_mp4
from PIL import Image, ImageDraw, ImageFont
from test_data import counting_clip

from common import plot, video
from common.utils import UserError
from common.video import read_frames, tile, to_clip, to_frames, write_sheet
from data import Shapes
from vae import psnr

SHARED = ROOT.parent / "shared" / "data"


def test_frames_and_clips_are_inverse():
    frames = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    clip = to_clip(frames)
    assert clip.shape == (2, 3, 4, 4) and clip[1, 2, 3, 0] == pytest.approx(frames[1, 3, 0, 2] / 127.5 - 1)
    assert (to_frames(clip) == frames).all()
    assert to_frames(torch.tensor([-9.0, 9.0]).view(1, 1, 1, 2).expand(1, 3, 1, 2))[0, 0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_video_comes_back_from_a_file(tmp_path, suffix):
    clip = to_clip(Shapes()[4][0])
    video.write_video(tmp_path / "new" / "folder" / "clip", clip)
    frames = read_frames(f"{tmp_path}/new/folder/clip{suffix}", 32)
    assert frames.shape == (16, 32, 32, 3) and frames.dtype == np.uint8
    assert psnr(to_clip(frames)[None], clip[None]) > 25


def test_files_carry_frame_rate_and_a_size_that_can_be_seen(tmp_path):
    video.write_video(tmp_path / "clip", to_clip(Shapes()[0][0]), fps=10)
    meta = next(imageio_ffmpeg.read_frames(str(tmp_path / "clip.mp4")))
    assert meta["fps"] == 10 and meta["size"] == (128, 128)
    with Image.open(tmp_path / "clip.gif") as image:
        assert image.n_frames == 16 and image.size == (128, 128) and image.info["duration"] == 100


def raw_video(path, frames):
    """A video with none of video.write_video's steps, so that its size may be odd."""
    frames = np.ascontiguousarray(frames)
    if path.suffix == ".gif":
        images = [Image.fromarray(f) for f in frames]
        images[0].save(path, save_all=True, append_images=images[1:], duration=100)
    else:
        writer = imageio_ffmpeg.write_frames(
            str(path), frames.shape[2:0:-1], fps=10, macro_block_size=1, pix_fmt_out="yuv444p", ffmpeg_log_level="error"
        )
        writer.send(None)
        for frame in frames:
            writer.send(frame)
        writer.close()
    return path


@pytest.mark.parametrize("height, width", [(24, 64), (64, 24), (37, 53), (53, 37), (9, 11), (33, 33), (180, 32)])
@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_any_size_is_scaled_and_cut_to_its_centre(tmp_path, height, width, suffix):
    # Red ends that a centre crop leaves out, a green square in the middle.
    frames = np.zeros((5, height, width, 3), np.uint8)
    short, long = min(height, width), max(height, width)
    edge = (long - short) // 2
    frames[..., 1] = 200 + 4 * np.arange(5)[:, None, None]  # frames differ: a GIF keeps equal ones only once
    if edge > 4:
        ends = frames if height > width else frames.transpose(0, 2, 1, 3)
        ends[:, : edge - 2] = ends[:, -edge + 2 :] = (255, 0, 0)
    out = read_frames(raw_video(tmp_path / f"clip{suffix}", frames), 32)
    assert out.shape == (5, 32, 32, 3)
    inner = out[:, 3:-3, 3:-3].reshape(-1, 3).astype(int)
    assert abs(inner - (0, 208, 0)).max() < 45


def test_colours_and_orientation_survive(tmp_path):
    frames = np.zeros((3, 32, 32, 3), np.uint8)
    frames[:, :16, :16], frames[:, :16, 16:], frames[:, 16:, :16] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    frames[:, 31, 31] = np.arange(3)[:, None] * 50  # frames differ: a GIF keeps equal ones only once
    for suffix in (".mp4", ".gif"):
        out = read_frames(raw_video(tmp_path / f"clip{suffix}", frames), 32)
        assert abs(out[:, [6, 6, 26, 26], [6, 26, 6, 26]].astype(int) - frames[:, [6, 6, 26, 26], [6, 26, 6, 26]]).max() < 40


def test_reading_says_nothing_on_the_terminal(tmp_path, capfd, caplog):
    raw_video(tmp_path / "clip.mp4", np.zeros((3, 48, 64, 3), np.uint8))
    read_frames(tmp_path / "clip.mp4", 32)
    assert not caplog.records and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("content", [b"", b"this is not a video\n" * 40, bytes(range(256)) * 20])
def test_what_is_not_a_video_is_a_user_error(tmp_path, content):
    (tmp_path / "clip.mp4").write_bytes(content)
    with pytest.raises(UserError, match="clip.mp4"):
        read_frames(tmp_path / "clip.mp4", 32)


def test_a_missing_file_and_a_directory_are_user_errors(tmp_path):
    for path in (tmp_path / "none.mp4", tmp_path):
        with pytest.raises(UserError, match=path.name):
            read_frames(path, 32)


def test_a_truncated_video_is_frames_or_a_user_error(tmp_path):
    whole = write_mp4(tmp_path / "clip", to_clip(Shapes()[0][0])).read_bytes()
    for share in (0.2, 0.5, 0.9):
        (tmp_path / "cut.mp4").write_bytes(whole[: int(share * len(whole))])
        try:
            assert read_frames(tmp_path / "cut.mp4", 32).shape[1:] == (32, 32, 3)
        except UserError as error:
            assert "cut.mp4" in str(error)


def test_sheet_has_a_row_for_each_video_and_a_column_for_each_frame(tmp_path):
    clip = counting_clip(16)
    write_sheet(tmp_path / "a" / "sheet.png", [clip, clip], ["one", "number two"])
    with Image.open(tmp_path / "a" / "sheet.png") as image:
        margin = image.width - 8 * 64
        assert image.height == 2 * 66 and margin >= 7 * len("number two")
        shades = [image.getpixel((margin + 64 * i + 32, 66 + 32))[0] for i in range(8)]
    assert shades == sorted(shades) and shades[0] == 0 and shades[-1] == to_frames(clip)[15, 0, 0, 0]  # first to last
    write_sheet(tmp_path / "few.png", [clip[:3]])
    with Image.open(tmp_path / "few.png") as image:
        assert image.size == (3 * 64, 66)


@pytest.mark.parametrize("resolution", [32, 64, 128])
def test_titles_are_whole_and_as_large_as_the_frames_ask_for(tmp_path, resolution):
    clips = [torch.full((2, 3, resolution, resolution), -1.0)] * 3  # black
    titles = ["real", "WOMEN_DOWN_MOVEMENTS", "Señor 10 müde über"]
    video.write_sheet(tmp_path / "sheet.png", clips, titles)
    with Image.open(tmp_path / "sheet.png") as image:
        sheet = np.asarray(image.convert("L"))
    row = max(64, resolution)
    margin = sheet.shape[1] - 2 * row
    rest = sheet[:, :margin].reshape(3, row + 2, margin)
    for title, part in zip(titles, rest):
        alone = Image.new("L", (2000, 200), "white")
        font = ImageFont.truetype(plot.font_file(), max(14, resolution // 6))
        ImageDraw.Draw(alone).text((50, 50), title, "black", font)
        (y, x), (whole_y, whole_x) = np.nonzero(part < 128), np.nonzero(np.asarray(alone) < 128)
        assert abs(np.ptp(x) - np.ptp(whole_x)) <= 1 and abs(np.ptp(y) - np.ptp(whole_y)) <= 1
        assert x.min() >= 4 and x.max() < margin - 4 and abs((y.min() + y.max()) / 2 - row / 2) < row / 8
    write_sheet(tmp_path / "odd.png", clips[:2], ["two\nlines\tof a folder", "not text \udce9"])  # what names of folders may be


@pytest.mark.parametrize("count, rows, columns", [(1, 1, 1), (2, 1, 2), (3, 2, 2), (5, 2, 3), (9, 3, 3)])
def test_tile(count, rows, columns):
    clips = torch.rand(count, 2, 3, 4, 6)
    grid = tile(clips)
    assert grid.shape == (2, 3, rows * 4, columns * 6)
    for i in range(rows * columns):
        part = grid[:, :, i // columns * 4 :, i % columns * 6 :][:, :, :4, :6]
        assert torch.equal(part, clips[i]) if i < count else (part == 1).all()
