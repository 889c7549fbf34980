import random
from collections import Counter

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from conftest import ROOT, write_mp4
from PIL import Image

import data
from data import (
    Shapes,
    Stream,
    VideoFolder,
    endless,
    fixed_clips,
    open_dataset,
    read_video,
    tile,
    to_clip,
    to_frames,
    write_sheet,
)
from utils import UserError
from vae import psnr

SHARED = ROOT.parent / "shared" / "data"


def counting_clip(length=24, height=32, width=32):
    """A clip whose frames tell their number by their brightness."""
    return (torch.arange(length) / 12 - 1).view(-1, 1, 1, 1).expand(-1, 3, height, width).contiguous()


def numbers(clip):
    """The frame numbers of a clip cut from counting_clip."""
    return [round(v) for v in ((clip.mean((1, 2, 3)) + 1) * 12).tolist()]


# -------------------------------------------------------------------------------------------------------------------- shapes


def test_shapes_are_deterministic_and_in_range():
    clip, label = Shapes()[5]
    again, _ = Shapes()[5]
    assert clip.shape == (16, 3, 32, 32) and clip.dtype == torch.float32
    assert torch.equal(clip, again) and label == 5
    assert -1 <= clip.min() < -0.1 and 0.5 < clip.max() <= 1
    assert not torch.equal(clip, Shapes(seed=1)[5][0])
    assert not torch.equal(clip, Shapes()[5 + 9][0])


def test_shapes_do_not_depend_on_global_random_state():
    clip = Shapes()[3][0]
    np.random.seed(7), random.seed(7), torch.manual_seed(7)
    assert torch.equal(Shapes()[3][0], clip)


def test_shapes_show_all_classes_in_turn():
    shapes = Shapes("test")
    assert len(shapes.classes) == len(set(shapes.classes)) == 9
    assert [shapes[i][1] for i in range(18)] == list(range(9)) * 2


def test_test_shapes_are_others_than_train_shapes():
    train, test = (torch.stack([Shapes(split)[i][0] for i in range(18)]) for split in ("train", "test"))
    distance = (train[:, None] - test[None]).square().mean((2, 3, 4, 5))
    assert distance.min() > 1e-3


def bright_centre(clip):
    """Path [T, 2] of the bright shape, (x, y), both in frame widths."""
    weight = (clip.mean(1) - clip.mean(1).quantile(0.5)).clamp_min(0).square()
    grid = torch.linspace(0, 1, clip.shape[-1])
    total = weight.sum((1, 2))
    return torch.stack([(weight * grid).sum((1, 2)) / total, (weight * grid[:, None]).sum((1, 2)) / total], 1)


def test_shapes_move_as_their_class_says():
    shapes = Shapes()
    for i in range(9):
        clip, label = shapes[i]
        motion = shapes.classes[label].split("_")[1]
        across, down = (bright_centre(clip).amax(0) - bright_centre(clip).amin(0)).tolist()
        assert (across > 0.1) == (motion in ("sideways", "circle")), (shapes.classes[label], across, down)
        assert (down > 0.1) == (motion in ("updown", "circle")), (shapes.classes[label], across, down)


def test_shapes_at_other_sizes():
    assert Shapes("test", 64, 8)[0][0].shape == (8, 3, 64, 64)
    small, large = Shapes(resolution=32)[1][0], Shapes(resolution=64)[1][0]
    assert (torch.nn.functional.avg_pool2d(large, 2) - small).abs().mean() < 0.01  # the same scene


# --------------------------------------------------------------------------------------------------------------------- files


def test_frames_and_clips_are_inverse():
    frames = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    clip = to_clip(frames)
    assert clip.shape == (2, 3, 4, 4) and clip[1, 2, 3, 0] == pytest.approx(frames[1, 3, 0, 2] / 127.5 - 1)
    assert (to_frames(clip) == frames).all()
    assert to_frames(torch.tensor([-9.0, 9.0]).view(1, 1, 1, 2).expand(1, 3, 1, 2))[0, 0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_video_comes_back_from_a_file(tmp_path, suffix):
    clip = Shapes()[4][0]
    data.write_video(tmp_path / "new" / "folder" / "clip", clip)
    frames = read_video(f"{tmp_path}/new/folder/clip{suffix}", 32)
    assert frames.shape == (16, 32, 32, 3) and frames.dtype == np.uint8
    assert psnr(to_clip(frames)[None], clip[None]) > 25


def test_files_carry_frame_rate_and_a_size_that_can_be_seen(tmp_path):
    data.write_video(tmp_path / "clip", Shapes()[0][0], fps=10)
    meta = next(imageio_ffmpeg.read_frames(str(tmp_path / "clip.mp4")))
    assert meta["fps"] == 10 and meta["size"] == (128, 128)
    with Image.open(tmp_path / "clip.gif") as image:
        assert image.n_frames == 16 and image.size == (128, 128) and image.info["duration"] == 100


def raw_video(path, frames):
    """A video with none of data.write_video's steps, so that its size may be odd."""
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
    out = read_video(raw_video(tmp_path / f"clip{suffix}", frames), 32)
    assert out.shape == (5, 32, 32, 3)
    inner = out[:, 3:-3, 3:-3].reshape(-1, 3).astype(int)
    assert abs(inner - (0, 208, 0)).max() < 45


def test_colours_and_orientation_survive(tmp_path):
    frames = np.zeros((3, 32, 32, 3), np.uint8)
    frames[:, :16, :16], frames[:, :16, 16:], frames[:, 16:, :16] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    frames[:, 31, 31] = np.arange(3)[:, None] * 50  # frames differ: a GIF keeps equal ones only once
    for suffix in (".mp4", ".gif"):
        out = read_video(raw_video(tmp_path / f"clip{suffix}", frames), 32)
        assert abs(out[:, [6, 6, 26, 26], [6, 26, 6, 26]].astype(int) - frames[:, [6, 6, 26, 26], [6, 26, 6, 26]]).max() < 40


def test_reading_says_nothing_on_the_terminal(tmp_path, capfd, caplog):
    raw_video(tmp_path / "clip.mp4", np.zeros((3, 48, 64, 3), np.uint8))
    read_video(tmp_path / "clip.mp4", 32)
    assert not caplog.records and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("content", [b"", b"this is not a video\n" * 40, bytes(range(256)) * 20])
def test_what_is_not_a_video_is_a_user_error(tmp_path, content):
    (tmp_path / "clip.mp4").write_bytes(content)
    with pytest.raises(UserError, match="clip.mp4"):
        read_video(tmp_path / "clip.mp4", 32)


def test_a_missing_file_and_a_directory_are_user_errors(tmp_path):
    for path in (tmp_path / "none.mp4", tmp_path):
        with pytest.raises(UserError, match=path.name):
            read_video(path, 32)


def test_a_truncated_video_is_frames_or_a_user_error(tmp_path):
    whole = write_mp4(tmp_path / "clip", Shapes()[0][0]).read_bytes()
    for share in (0.2, 0.5, 0.9):
        (tmp_path / "cut.mp4").write_bytes(whole[: int(share * len(whole))])
        try:
            assert read_video(tmp_path / "cut.mp4", 32).shape[1:] == (32, 32, 3)
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


@pytest.mark.parametrize("count, rows, columns", [(1, 1, 1), (2, 1, 2), (3, 2, 2), (5, 2, 3), (9, 3, 3)])
def test_tile(count, rows, columns):
    clips = torch.rand(count, 2, 3, 4, 6)
    grid = tile(clips)
    assert grid.shape == (2, 3, rows * 4, columns * 6)
    for i in range(rows * columns):
        part = grid[:, :, i // columns * 4 :, i % columns * 6 :][:, :, :4, :6]
        assert torch.equal(part, clips[i]) if i < count else (part == 1).all()


# ------------------------------------------------------------------------------------------------------------------- folders


def test_classes_are_the_sub_folders(folder):
    train = VideoFolder(folder / "train", resolution=32)
    assert train.classes == ("ring_circle", "square_updown")
    assert [label for _, label in train.items] == [0, 0, 0, 1, 1, 1]
    clip, label = train[4]
    assert clip.shape == (16, 3, 32, 32) and clip.dtype == torch.float32 and label == 1
    shapes = Shapes()
    original = shapes[shapes.classes.index("square_updown") + 9][0]
    assert psnr(clip[None], original[None]) > 25


def test_labels_follow_the_classes_of_the_checkpoint(folder):
    known = ["a", "square_updown", "ring_circle"]
    train = VideoFolder(folder / "train", resolution=32, classes=known)
    assert list(train.classes) == known and [label for _, label in train.items] == [2, 2, 2, 1, 1, 1]
    with pytest.raises(UserError, match="square_updown"):
        VideoFolder(folder / "train", resolution=32, classes=["ring_circle"])


def test_the_test_split_is_the_folder_beside_train(folder):
    test = open_dataset("folder", str(folder / "train"), "test", 32, 16)
    assert test.root == folder / "test" and len(test) == 2
    same = open_dataset("folder", str(folder / "test"), "test", 32, 16)
    assert same.root == folder / "test"


def test_a_folder_of_videos_is_one_class(tmp_path):
    write_mp4(tmp_path / "mine" / "clip", counting_clip())
    assert VideoFolder(tmp_path / "mine", resolution=32).classes == ("mine",)


def test_folders_train_and_test_without_classes(tmp_path):
    for split in ("train", "test"):
        write_mp4(tmp_path / split / "clip", counting_clip())
    train = open_dataset("folder", str(tmp_path / "train"), "train", 32, 16)
    test = open_dataset("folder", str(tmp_path / "train"), "test", 32, 16, classes=train.classes)
    assert test.root == tmp_path / "test" and test[0][1] == train[0][1] == 0


def test_deeper_folders_and_other_files_are_fine(tmp_path):
    write_mp4(tmp_path / "b" / "deep" / "clip", counting_clip())
    (write_mp4(tmp_path / "a" / "clip", counting_clip())).rename(tmp_path / "a" / "clip.MP4")
    (tmp_path / "a" / "notes.txt").write_text("hello")
    videos = VideoFolder(tmp_path, resolution=32)
    assert videos.classes == ("a", "b") and len(videos) == 2 and videos[0][0].shape == (16, 3, 32, 32)


@pytest.mark.parametrize("stride", [1, 3])
def test_stride_and_the_middle_of_a_test_video(tmp_path, stride):
    write_mp4(tmp_path / "clip", counting_clip(24))
    videos = VideoFolder(tmp_path, "test", 32, num_frames=6, stride=stride)
    first = (24 - (5 * stride + 1)) // 2
    assert numbers(videos[0][0]) == [first + stride * i for i in range(6)]
    assert torch.equal(videos[0][0], videos[0][0])


def test_train_clips_start_anywhere_and_the_index_says_where(tmp_path):
    write_mp4(tmp_path / "clip", counting_clip(8))
    videos = VideoFolder(tmp_path, "train", 32, num_frames=3, stride=2)
    starts = [tuple(numbers(videos[i][0])) for i in range(60)]
    assert set(starts) == {(s, s + 2, s + 4) for s in range(4)}
    random.seed(1)
    assert [tuple(numbers(videos[i][0])) for i in range(60)] == starts


def test_a_video_may_be_exactly_as_long_as_a_clip_but_not_shorter(tmp_path):
    write_mp4(tmp_path / "clip", counting_clip(16))
    assert numbers(VideoFolder(tmp_path, "train", 32, 16)[0][0]) == list(range(16))
    assert numbers(VideoFolder(tmp_path, "train", 32, 6, stride=3)[0][0]) == list(range(0, 16, 3))
    with pytest.raises(UserError, match="clip.mp4 has 16 frames, and a clip takes 17"):
        VideoFolder(tmp_path, "train", 32, 17)[0]


def test_cache_is_bounded_and_changes_nothing(folder):
    frame_bytes = 16 * 32 * 32 * 3
    full, tight = (VideoFolder(folder / "train", "test", 32, cache_gb=gb) for gb in (1, 2.5 * frame_bytes / 2**30))
    for _ in range(2):
        for i in range(len(full)):
            assert torch.equal(full[i][0], tight[i][0])
    assert len(full.cache) == 6 and len(tight.cache) == 2


def test_missing_and_empty_folders(tmp_path):
    for path, match in ((tmp_path / "none", "no directory"), (tmp_path, "holds no videos")):
        with pytest.raises(UserError, match=match):
            VideoFolder(path)
    with pytest.raises(UserError, match="--data-dir"):
        open_dataset("folder", "", "train", 32, 16)
    with pytest.raises(UserError, match="crcv.ucf.edu.*|/nowhere"):
        open_dataset("ucf", "/nowhere", "train", 32, 16)


# ------------------------------------------------------------------------------------------------------------------- batches


def test_each_clip_comes_once_in_a_pass():
    clips = [(torch.full((1, 3, 2, 2), float(i)), i) for i in range(12)]
    clips += clips + clips  # index i + 12 is clip i again
    batches = endless(clips, Stream(12, 4, seed=3))
    passes = []
    for _ in range(3):
        labels = []
        for _ in range(3):
            clip, label = next(batches)
            assert clip.shape == (4, 1, 3, 2, 2) and (clip[:, 0, 0, 0, 0] == label).all()
            labels += label.tolist()
        assert Counter(labels) == Counter(range(12))
        passes.append(labels)
    assert passes[0] != passes[1] != passes[2] and passes[0] != sorted(passes[0])
    again = endless(clips, Stream(12, 4, seed=3))
    assert [i for _ in range(3) for i in next(again)[1].tolist()] == passes[0]
    assert Stream(12, 4, seed=4).batch(0) != Stream(12, 4, seed=3).batch(0)


def test_passes_follow_each_other_without_a_gap():
    # 7 does not divide into batches of 3, and a batch may even be larger than the data set.
    for size in (3, 20):
        stream = Stream(7, size, seed=1)
        shown = [i for step in range(21) for i in stream.batch(step)]
        assert sorted(shown) == list(range(21 * size))  # pass p of clip i is p * 7 + i, and none is missing or twice
        assert [i // 7 for i in shown] == sorted(i // 7 for i in shown)


@pytest.mark.parametrize("parts, world", [(1, 1), (1, 2), (3, 1), (2, 3)])
def test_processes_and_parts_share_the_same_batches(parts, world):
    whole = [Stream(10, 12, seed=5).batch(step) for step in range(4)]
    shares = [iter(Stream(10, 12, 5, parts=parts, rank=rank, world=world)) for rank in range(world)]
    for batch in whole:
        pieces = [[next(share) for share in shares] for _ in range(parts)]
        assert [i for part in pieces for rows in part for i in rows] == batch
        assert all(len(rows) == 12 // (parts * world) for part in pieces for rows in part)


def test_a_stream_goes_on_from_any_step():
    stream = iter(Stream(10, 4, seed=5))
    shown = [next(stream) for _ in range(9)]
    assert [next(part) for part in [iter(Stream(10, 4, 5, start=6))] for _ in range(3)] == shown[6:]


def test_fixed_clips_are_spread_and_the_same():
    shapes = Shapes("test", length=90)
    clips, labels = fixed_clips(shapes, 20)
    assert clips.shape == (20, 16, 3, 32, 32) and torch.equal(clips, fixed_clips(shapes, 20)[0])
    assert len(fixed_clips(shapes, 1000)[0]) == 90
    assert len(set(fixed_clips(Shapes("test"), 64)[1].tolist())) == 9  # the sheets and the PSNR are over all classes


# ----------------------------------------------------------------------------------------------------------------- real videos


@pytest.mark.skipif(not (SHARED / "weizmann").is_dir(), reason="shared/data is not here")
def test_weizmann():
    train = open_dataset("folder", str(SHARED / "weizmann" / "train"), "train", 32, 16)
    test = open_dataset("folder", str(SHARED / "weizmann" / "train"), "test", 32, 16, classes=train.classes)
    assert train.classes == ("bend", "jumping_jack", "wave_one_hand", "wave_two_hands")
    assert Counter(label for _, label in train.items) == {i: 16 for i in range(4)} and len(test) == 8
    clips, labels = fixed_clips(test, 8)
    assert clips.shape == (8, 16, 3, 32, 32) and labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert clips.std((1, 2, 3, 4)).min() > 0.05
    assert clips.diff(dim=1).abs().mean((1, 2, 3, 4)).min() > 1e-3  # people move
    assert train[0][0].shape == (16, 3, 32, 32)


@pytest.mark.skipif(not (SHARED / "clips").is_dir(), reason="shared/data is not here")
@pytest.mark.parametrize("name", ["corrupted.mp4", "demo.mp4", "test.mp4", "video_90.mov"])
def test_clips_from_the_wild_are_frames_or_a_user_error(name):
    try:
        assert read_video(SHARED / "clips" / name, 32).shape[1:] == (32, 32, 3)
    except UserError as error:
        assert name == "corrupted.mp4" and name in str(error)


def test_shapes_can_be_drawn_between_their_frames():
    shapes = Shapes()
    assert np.array_equal(shapes.draw(3, [2, 5.0]), shapes.draw(3)[[2, 5]])
    left, between, right = (shapes.draw(0, [t]).astype(float) for t in (3, 3.5, 4))  # class 0 moves sideways, fast at t = 4
    assert min(abs(between - left).mean(), abs(between - right).mean()) > 0.3 * abs(left - right).mean() > 0


def test_flips_and_crops_are_of_training_clips_and_follow_from_the_index(tmp_path):
    ramp = torch.linspace(-1, 1, 64).expand(4, 3, 64, 64)  # brighter to the right
    write_mp4(tmp_path / "clip", ramp)
    plain = VideoFolder(tmp_path, "train", 32, num_frames=4)[0][0]
    flipping, cropping = (VideoFolder(tmp_path, "train", 32, 4, **kw) for kw in ({"flip": True}, {"crop_scale": 0.5}))
    clips = [flipping[i][0] for i in range(20)]
    mirrored = [torch.equal(clip, plain.flip(-1)) for clip in clips]
    assert all(m or torch.equal(clip, plain) for m, clip in zip(mirrored, clips)) and 3 < sum(mirrored) < 17
    spans = [(cropping[i][0][0, 0, 0, -1] - cropping[i][0][0, 0, 0, 0]).item() / 2 for i in range(40)]
    assert 0.4 < min(spans) < 0.6 and 0.85 < max(spans) < 1.05, "of the ramp's height, what a crop can see"
    assert all(cropping[i][0].shape == (4, 3, 32, 32) for i in range(40))
    assert torch.equal(cropping[7][0], cropping[7][0]) and not torch.equal(cropping[7][0], cropping[8][0])
    test = VideoFolder(tmp_path, "test", 32, num_frames=4, flip=True, crop_scale=0.5)
    assert all(torch.equal(test[i][0], plain) for i in range(20))
