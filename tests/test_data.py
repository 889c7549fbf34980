import random
import subprocess
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from conftest import ROOT, write_mp4
from PIL import Image

import data
from common import drawn, video
from common.utils import UserError
from common.video import to_clip
from data import Config, Shapes, Stream, endless, fixed_clips, open_dataset
from vae import psnr

SHARED = ROOT.parent / "shared" / "data"


def counting_clip(length=24, height=32, width=32):
    """A clip whose frames tell their number by their brightness."""
    return (torch.arange(length) / 12 - 1).view(-1, 1, 1, 1).expand(-1, 3, height, width).contiguous()


def numbers(frames):
    """The frame numbers of frames cut from counting_clip."""
    return [round(v * 12 / 127.5) for v in frames.mean((1, 2, 3)).tolist()]


def clip(dataset, i):
    return to_clip(dataset[i][0])


@pytest.fixture(params=["on", "off"])
def settings(request, tmp_path_factory):
    """Settings of a folder at 32 x 32, with a cache and without: what comes out has to be the same."""
    where = str(tmp_path_factory.mktemp("cache"))
    return Config("folder", resolution=32, cache=request.param, cache_dir=where)


def videos(settings, root, role="train", classes=None, **kw):
    return open_dataset(replace(settings, data_dir=str(root), **kw), role, classes)


# -------------------------------------------------------------------------------------------------------------------- shapes


def test_shapes_are_deterministic_and_in_range():
    frames, label = Shapes()[5]
    assert frames.shape == (16, 32, 32, 3) and frames.dtype == np.uint8 and label == 5
    assert np.array_equal(frames, Shapes()[5][0])
    assert frames.min() < 110 and frames.max() > 190
    assert not np.array_equal(frames, Shapes(seed=1)[5][0])
    assert not np.array_equal(frames, Shapes()[5 + 9][0])


def test_shapes_do_not_depend_on_global_random_state():
    frames = Shapes()[3][0]
    np.random.seed(7), random.seed(7), torch.manual_seed(7)
    assert np.array_equal(Shapes()[3][0], frames)


def test_shapes_show_all_classes_in_turn():
    shapes = Shapes("test")
    assert len(shapes.classes) == len(set(shapes.classes)) == 9
    assert [shapes[i][1] for i in range(18)] == list(range(9)) * 2


def test_test_shapes_are_others_than_train_shapes():
    train, test = (torch.stack([clip(Shapes(role), i) for i in range(18)]) for role in ("train", "test"))
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
        motion = shapes.classes[label := shapes[i][1]].split("_")[1]
        path = bright_centre(clip(shapes, i))
        across, down = (path.amax(0) - path.amin(0)).tolist()
        assert (across > 0.1) == (motion in ("sideways", "circle")), (shapes.classes[label], across, down)
        assert (down > 0.1) == (motion in ("updown", "circle")), (shapes.classes[label], across, down)


def test_shapes_at_other_sizes():
    assert Shapes("test", 64, 8)[0][0].shape == (8, 64, 64, 3)
    small, large = clip(Shapes(resolution=32), 1), clip(Shapes(resolution=64), 1)
    assert (torch.nn.functional.avg_pool2d(large, 2) - small).abs().mean() < 0.01  # the same scene


def test_long_shapes_take_several_clips_for_a_turn(settings):
    settings = replace(settings, dataset="shapes-long", data_dir="", num_frames=16)
    clips, longer = open_dataset(settings, "train"), open_dataset(replace(settings, num_frames=2 * data.LONG_PERIOD), "train")
    for i in (0, 2, 4):
        frames = longer[i][0]
        assert np.array_equal(clips[i][0], frames[:16])  # what stage 1 learns from is the beginning of what vin.py does
        turn = abs(frames[: data.LONG_PERIOD].astype(int) - frames[data.LONG_PERIOD :])
        moved = abs(frames[: data.LONG_PERIOD].astype(int) - frames[0]).mean((1, 2, 3))
        assert turn.max() <= 1 and moved.max() > 5
    steps = [abs(np.diff(s[2][0].astype(int), axis=0)).mean() for s in (clips, Shapes())]
    assert steps[0] < 0.5 * steps[1]  # and slower
    start = [int(clips[i][0][0].sum((0, 2), int).argmax()) for i in range(0, 90, 9)]  # the brightest column at the beginning
    assert min(start) < 12 and max(start) > 19  # left or right


def test_shapes_can_be_drawn_between_their_frames():
    shapes = Shapes()
    assert np.array_equal(shapes.draw(3, [2, 5.0]), shapes.draw(3)[[2, 5]])
    left, between, right = (shapes.draw(0, [t]).astype(float) for t in (3, 3.5, 4))  # class 0 moves sideways, fast at t = 4
    assert min(abs(between - left).mean(), abs(between - right).mean()) > 0.3 * abs(left - right).mean() > 0


def test_shapes_keep_what_they_drew_up_to_a_limit(monkeypatch):
    made = []
    monkeypatch.setattr(Shapes, "draw", lambda self, i, draw=Shapes.draw: made.append(i) or draw(self, i))
    monkeypatch.setattr(drawn, "KEPT_SHAPES", 10 * 4 * 32 * 32 * 3)
    shapes = Shapes(num_frames=4)
    before = [shapes[i][0] for i in range(30)]
    assert len(shapes.cache) == 10 and sum(frames.nbytes for frames in shapes.cache.values()) <= drawn.KEPT_SHAPES
    assert all(np.array_equal(shapes[i][0], frames) for i, frames in enumerate(before))
    assert made == [*range(30), *range(10, 30)]


@pytest.mark.parametrize("role", ["train", "test"])
def test_all_of_the_nano_preset_is_drawn_once(role):
    assert len(Shapes(role)) * Shapes(role)[0][0].nbytes <= drawn.KEPT_SHAPES


# ------------------------------------------------------------------------------------------------------------------- folders


def test_classes_are_the_sub_folders(settings, folder):
    train = videos(settings, folder / "train")
    assert train.classes == ("ring_circle", "square_updown")
    assert [label for _, label in train.items] == [0, 0, 0, 1, 1, 1]
    frames, label = train[4]
    assert frames.shape == (16, 32, 32, 3) and frames.dtype == np.uint8 and label == 1
    shapes = Shapes()
    original = clip(shapes, shapes.classes.index("square_updown") + 9)
    assert psnr(to_clip(frames)[None], original[None]) > 25


def test_labels_follow_the_classes_of_the_checkpoint(settings, folder):
    known = ["a", "square_updown", "ring_circle"]
    train = videos(settings, folder / "train", classes=known)
    assert list(train.classes) == known and [label for _, label in train.items] == [2, 2, 2, 1, 1, 1]
    with pytest.raises(UserError, match="square_updown"):
        videos(settings, folder / "train", classes=["ring_circle"])


@pytest.mark.parametrize("given", ["train", "."])
def test_the_test_role_is_the_folder_beside_train(settings, folder, given):
    train, test = (videos(settings, folder / given, role) for role in ("train", "test"))
    assert [path.parts[-3] for path, _ in train.items] == ["train"] * 6
    assert [path.parts[-3] for path, _ in test.items] == ["test"] * 2
    assert [path.parts[-3] for path, _ in videos(settings, folder / "test", "test").items] == ["test"] * 2


def test_a_folder_of_videos_is_one_class(settings, tmp_path):
    write_mp4(tmp_path / "mine" / "clip", counting_clip())
    assert videos(settings, tmp_path / "mine").classes == ("mine",)


def test_folders_train_and_test_without_classes(settings, tmp_path):
    for role in ("train", "test"):
        write_mp4(tmp_path / role / "clip", counting_clip())
    train = videos(settings, tmp_path / "train")
    test = videos(settings, tmp_path / "train", "test", train.classes)
    assert test.items[0][0].parent == tmp_path / "test" and test[0][1] == train[0][1] == 0


def test_deeper_folders_and_other_files_are_fine(settings, tmp_path):
    write_mp4(tmp_path / "b" / "deep" / "clip", counting_clip())
    (write_mp4(tmp_path / "a" / "clip", counting_clip())).rename(tmp_path / "a" / "clip.MP4")
    (tmp_path / "a" / "notes.txt").write_text("hello")
    (tmp_path / "a" / ".hidden.mp4").write_text("hello")
    train = videos(settings, tmp_path)
    assert train.classes == ("a", "b") and len(train) == 2 and train[0][0].shape == (16, 32, 32, 3)
    assert data.find_videos(replace(settings, data_dir=str(tmp_path)), "train")[3] == ["1 files .txt"]


@pytest.mark.parametrize("stride", [1, 3])
def test_stride_and_the_middle_of_a_test_video(settings, tmp_path, stride):
    write_mp4(tmp_path / "clip", counting_clip(24))
    test = videos(settings, tmp_path, "test", num_frames=6, stride=stride)
    first = (24 - (5 * stride + 1)) // 2
    assert numbers(test[0][0]) == [first + stride * i for i in range(6)]
    assert np.array_equal(test[0][0], test[5][0])


def test_train_clips_start_anywhere_and_the_index_says_where(settings, tmp_path):
    write_mp4(tmp_path / "clip", counting_clip(8))
    train = videos(settings, tmp_path, num_frames=3, stride=2)
    starts = [tuple(numbers(train[i][0])) for i in range(30)]
    assert set(starts) == {(s, s + 2, s + 4) for s in range(4)}
    random.seed(1)
    assert [tuple(numbers(train[i][0])) for i in range(30)] == starts


def test_a_rate_in_frames_per_second(settings, tmp_path):
    video.write_video(tmp_path / "clip", counting_clip(24), fps=12)
    (tmp_path / "clip.gif").unlink()
    slow = videos(settings, tmp_path, "test", num_frames=5, fps=4.0)[0][0]
    assert numbers(slow)[0] in range(3, 8) and [b - a for a, b in zip(numbers(slow), numbers(slow)[1:])] == [3, 3, 3, 3]
    fast = numbers(videos(settings, tmp_path, "test", num_frames=9, fps=24.0)[0][0])
    assert fast[-1] - fast[0] == 4 and fast == sorted(fast)
    path = tmp_path / "clip.mp4"
    said = list(data.describe(tmp_path, [(path, "")], [], 9, {}, fps=4.0))
    assert "frames    8 to 8, median 8" in said and "too short 1, of which a clip of 9 frames cannot be cut" in said
    assert not any("too short" in line for line in data.describe(tmp_path, [(path, "")], [], 9, {}))


def test_a_video_may_be_exactly_as_long_as_a_clip_but_not_shorter(settings, tmp_path, capsys):
    write_mp4(tmp_path / "clip", counting_clip(16))
    assert numbers(videos(settings, tmp_path)[0][0]) == list(range(16))
    assert numbers(videos(settings, tmp_path, num_frames=6, stride=3)[0][0]) == list(range(0, 16, 3))
    with pytest.raises(UserError, match="none of the 1 videos.*clip.mp4, for one: it has 16 frames, and a clip takes 17"):
        videos(settings, tmp_path, num_frames=17)[0]
    write_mp4(tmp_path / "longer", counting_clip(17))
    train = videos(settings, tmp_path, num_frames=17)
    assert [numbers(train[i][0]) for i in range(4)] == [list(range(17))] * 4
    assert capsys.readouterr().out.count("skipping") == 2, "once for each training"


def test_flips_and_crops_are_of_training_clips_and_follow_from_the_index(settings, tmp_path):
    ramp = torch.linspace(-1, 1, 64).expand(4, 3, 64, 64)  # brighter to the right
    write_mp4(tmp_path / "clip", ramp)
    plain = clip(videos(settings, tmp_path, num_frames=4), 0)
    flipping, cropping = (videos(settings, tmp_path, num_frames=4, **kw) for kw in ({"flip": True}, {"crop_scale": 0.5}))
    clips = [clip(flipping, i) for i in range(20)]
    mirrored = [torch.equal(c, plain.flip(-1)) for c in clips]
    assert all(m or torch.equal(c, plain) for m, c in zip(mirrored, clips)) and 3 < sum(mirrored) < 17
    clips = [clip(cropping, i) for i in range(40)]
    spans = [(c[0, 0, 0, -1] - c[0, 0, 0, 0]).item() / 2 for c in clips]
    assert 0.4 < min(spans) < 0.6 and 0.85 < max(spans) < 1.05, "of the ramp's height, what a crop can see"
    assert all(c.shape == (4, 3, 32, 32) for c in clips)
    assert torch.equal(clip(cropping, 7), clips[7]) and not torch.equal(clips[7], clips[8])
    test = videos(settings, tmp_path, "test", num_frames=4, flip=True, crop_scale=0.5)
    assert all(torch.equal(clip(test, i), plain) for i in range(5))


def test_missing_and_empty_folders(settings, tmp_path):
    for path, match in ((tmp_path / "none", "no directory"), (tmp_path, "holds no videos")):
        with pytest.raises(UserError, match=match):
            videos(settings, path)
    with pytest.raises(UserError, match="--data-dir"):
        open_dataset(Config("folder"), "train")
    with pytest.raises(UserError, match="crcv.ucf.edu.*|/nowhere"):
        open_dataset(Config("ucf", "/nowhere"), "train")


# ------------------------------------------------------------------------------------------------------------------- layouts


def image(path, shade, size=(40, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, shade, shade)).save(path)


def test_folders_of_frames_are_videos_in_the_order_of_their_numbers(settings, tmp_path):
    for i in range(12):
        image(tmp_path / "a" / "one" / f"frame_{i}.png", 10 * i)
        image(tmp_path / "b" / f"{i:03d}.jpg", 20 * i)
    train = videos(settings, tmp_path, num_frames=12)
    assert train.classes == ("a", "b") or [str(p.name) for p, _ in train.items] == ["one", "b"]
    assert [round(v / 10) for v in train[0][0].mean((1, 2, 3))] == list(range(12))
    assert [round(v / 20) for v in train[1][0].mean((1, 2, 3))] == list(range(12))


@pytest.mark.parametrize("across", [True, False])
def test_strips_as_mocogan_has_them(settings, tmp_path, across):
    frames = [np.full((24, 24, 3), 10 * i, np.uint8) for i in range(10)]
    (tmp_path / "walk").mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(np.concatenate(frames, 1 if across else 0)).save(tmp_path / "walk" / name)
    train = videos(settings, tmp_path, num_frames=10)
    assert train.classes == ("walk",) and len(train) == 2
    assert [round(v / 10) for v in train[1][0].mean((1, 2, 3))] == list(range(10))


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp"])
def test_animated_images_of_uneven_timing(settings, tmp_path, suffix):
    frames = [Image.fromarray(np.full((32, 32, 3), 20 * i, np.uint8)) for i in range(5)]
    for k, frame in enumerate(frames):
        frame.putpixel((k, k), (255, 0, 0))
    durations = [40, 40, 120, 40, 40]
    frames[0].save(tmp_path / f"clip{suffix}", save_all=True, append_images=frames[1:], duration=durations)
    shown = videos(settings, tmp_path, num_frames=7)[0][0]
    assert [round(v / 20) for v in shown[:, 20, 10].mean(1)] == [0, 1, 2, 2, 2, 3, 4]


@pytest.fixture
def ucf(tmp_path):
    for name in ("ApplyLipstick", "Archery"):
        for group in (1, 8):
            write_mp4(tmp_path / "data" / "UCF-101" / name / f"v_{name}_g{group:02d}_c01", counting_clip(16))
    lists = tmp_path / "data" / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "trainlist02.txt").write_text("Archery/v_Archery_g08_c01.mp4 2\nArchery/v_Archery_g09_c01.mp4 2\n")
    (lists / "testlist02.txt").write_text("ApplyLipstick/v_ApplyLipstick_g01_c01.mp4\r\nArchery/v_Archery_g01_c01.mp4\r\n")
    return replace(Config("ucf"), resolution=32, cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("level", ["data", "data/UCF-101", "data/UCF-101/Archery"])
def test_ucf_from_one_level_up_or_down(ucf, tmp_path, level):
    train = open_dataset(replace(ucf, data_dir=str(tmp_path / level)), "train")
    assert train.classes == ("ApplyLipstick", "Archery") and len(train) == 4 and train[3][1] == 1


def test_official_splits_of_ucf(ucf, tmp_path):
    ucf = replace(ucf, data_dir=str(tmp_path / "data" / "UCF-101"), split=2)
    _, items, classes, notes = data.find_videos(ucf, "train")
    assert [path.name for path, _ in items] == ["v_Archery_g08_c01.mp4"]
    assert notes == ["1 of 2 videos in the list are not there"] and classes == ["ApplyLipstick", "Archery"]
    test = open_dataset(ucf, "test")
    assert [test.name(i).split("/")[-1][2:-4] for i in range(2)] == ["ApplyLipstick_g01_c01", "Archery_g01_c01"]
    with pytest.raises(UserError, match="trainlist01.txt.*unpack"):
        open_dataset(replace(ucf, split=1), "train")


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("level", [".", "train"])
def test_kinetics_with_missing_files(tmp_path, flat, level):
    rows = [("riding a bike", "abcdefghijk", 3, 13), ("yoga", "-_345678901", 10, 20), ("zumba", "gone4567890", 0, 10)]
    for role, part in (("train", rows), ("val", rows[:1])):
        lines = [f"{label},{name},{start},{end},{role}" for label, name, start, end in part]
        (tmp_path / role).mkdir()
        (tmp_path / f"{role}.csv").write_text("\n".join(["label,youtube_id,time_start,time_end,split", *lines]))
        for label, name, start, end in part[:2]:
            folder = tmp_path / role if flat else tmp_path / role / label
            write_mp4(folder / f"{name}_{start:06d}_{end:06d}", counting_clip(16))
    settings = Config("kinetics", str(tmp_path / level), resolution=32, cache_dir=str(tmp_path / "cache"))
    _, items, _, notes = data.find_videos(settings, "train")
    assert [(path.name[:11], name) for path, name in items] == [("abcdefghijk", "riding a bike"), ("-_345678901", "yoga")]
    assert notes == ["1 of 3 videos in the list are not there"]
    train = open_dataset(settings, "train")
    assert train.classes == ("riding a bike", "yoga", "zumba"), "of the list, whatever is there"
    assert len(open_dataset(settings, "test", train.classes)) == 1
    # As DeepMind and its mirrors have them: a test set that is not there, one without labels, one that was held back.
    (tmp_path / "holdout_test.csv").write_text("label,youtube_id,time_start,time_end\nyoga,other678901,0,10\n")
    (tmp_path / "kinetics600_test.csv").write_text("youtube_id,time_start,time_end\nother678901,0,10\n")
    write_mp4(tmp_path / "test" / "other678901_000000_000010", counting_clip(16))
    assert len(open_dataset(settings, "test", train.classes)) == 1 and len(open_dataset(settings, "train")) == 2
    for file in tmp_path.glob("*.csv"):
        file.unlink()
    if flat:
        with pytest.raises(UserError, match="no train.csv with label"):
            open_dataset(settings, "train")
    else:
        assert open_dataset(settings, "train").classes == ("riding a bike", "yoga")


def ffmpeg(*options):
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *map(str, options)], check=True, stdin=subprocess.DEVNULL)


def test_a_header_that_promises_more_than_there_is(settings, tmp_path):
    """Ten seconds of sound beside two of pictures: clips that start in the sound come from the beginning."""
    silent = write_mp4(tmp_path / "silent", counting_clip(24))
    (tmp_path / "data").mkdir()
    sound = ("-f", "lavfi", "-t", "20", "-i", "sine", "-c:v", "copy", "-c:a", "aac")
    ffmpeg("-i", silent, *sound, tmp_path / "data" / "loud.mp4")
    for role in ("train", "test"):
        dataset = videos(settings, tmp_path / "data", role)
        for i in range(8):
            first, *rest = numbers(dataset[i][0])
            assert len(rest) == 15 and rest == list(range(first + 1, first + 16))
        assert not dataset.skipped


def test_a_title_is_not_a_stream(tmp_path):
    plain = write_mp4(tmp_path / "plain", counting_clip(24))
    ffmpeg("-i", plain, "-c", "copy", "-metadata", "title=Funny Video: cats, 7 tbr", tmp_path / "titled.mp4")
    assert video.probe(tmp_path / "titled.mp4") == video.probe(plain)


def test_what_lies_about_beside_videos(tmp_path):
    """Links are followed, once; hidden directories, thumbnails and images of two squares are no videos."""
    write_mp4(tmp_path / "real" / "wave" / "a", counting_clip(16))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "wave").symlink_to(tmp_path / "real" / "wave")
    (tmp_path / "real" / "wave" / "up").symlink_to(tmp_path / "set")
    write_mp4(tmp_path / "set" / ".hidden" / "b", counting_clip(16))
    for name in ("1.png", "2.png"):
        image(tmp_path / "real" / "wave" / name, 0)
    Image.new("RGB", (64, 32)).save(tmp_path / "real" / "wave" / "0.png")
    found, _ = video.list_videos(tmp_path / "set")
    assert found == [tmp_path / "set" / "wave" / "a.mp4"]
    (tmp_path / "frames").mkdir()
    for i in range(3):
        Image.new("RGB", (64, 32)).save(tmp_path / "frames" / f"{i}.png")
    assert video.list_videos(tmp_path / "frames")[0] == [tmp_path / "frames"]


def test_taichi_and_sky(tmp_path):
    for i in range(3):
        image(tmp_path / "taichi" / "train" / "id#000001#000003.mp4" / f"{i:07d}.png", 10 * i)
        image(tmp_path / "sky" / "sky_train" / "one" / "one_1" / f"one_frames_{i:08d}.jpg", 10 * i)
        image(tmp_path / "sky" / "sky_test" / "two" / "two_1" / f"two_frames_{i:08d}.jpg", 10 * i)
    write_mp4(tmp_path / "taichi" / "test" / "a#1#2", counting_clip(3))
    shared = dict(resolution=32, num_frames=3, cache_dir=str(tmp_path / "cache"))
    for name in ("taichi", "sky"):
        for level in (f"{name}", f"{name}/{'sky_' if name == 'sky' else ''}train"):
            for role in ("train", "test"):
                dataset = open_dataset(Config(name, str(tmp_path / level), **shared), role)
                assert dataset.classes == (name,) and len(dataset) == 1 and dataset[0][0].shape == (3, 32, 32, 3)


@pytest.mark.parametrize("name", ["ucf", "kinetics", "taichi", "sky"])
def test_what_does_not_look_like_the_data_set_is_explained(tmp_path, name):
    (tmp_path / "a" / "photos").mkdir(parents=True)
    with pytest.raises(UserError, match="does not look like.*should hold.*--data-dir"):
        open_dataset(Config(name, str(tmp_path / "a")), "train")
    with pytest.raises(UserError, match="https://"):
        open_dataset(Config(name, str(tmp_path / "none")), "train")


# ------------------------------------------------------------------------------------------------------------------- batches


class Numbers(list):
    decodes = False


@pytest.mark.parametrize("workers", [-1, 1, 3])
def test_each_clip_comes_once_in_a_pass(workers):
    clips = Numbers([(np.full((1, 2, 2, 3), i, np.uint8), i) for i in range(12)] * 3)  # index i + 12 is clip i again
    batches = endless(clips, Stream(12, 4, seed=3), workers)
    passes = []
    for _ in range(3):
        labels = []
        for _ in range(3):
            frames, label = next(batches)
            assert frames.shape == (4, 1, 2, 2, 3) and frames.dtype == torch.uint8 and (frames[:, 0, 0, 0, 0] == label).all()
            labels += label.tolist()
        assert Counter(labels) == Counter(range(12))
        passes.append(labels)
    assert passes[0] != passes[1] != passes[2] and passes[0] != sorted(passes[0])
    again = endless(clips, Stream(12, 4, seed=3))
    assert [i for _ in range(3) for i in next(again)[1].tolist()] == passes[0]
    assert Stream(12, 4, seed=4).batch(0) != Stream(12, 4, seed=3).batch(0)


class Events:
    """The current stream of a GPU that is `late` copies behind: each event is of the batch that was given out last."""

    def __init__(self, late):
        self.late, self.shown, self.waiting = late, None, []

    def record_event(self):
        event = SimpleNamespace(done=False, query=lambda: event.done)
        self.waiting.append((event, *self.shown))
        while len(self.waiting) > self.late:
            copied, batch, label = self.waiting.pop(0)
            assert (batch[:, 0, 0, 0, 0] == label).all(), "overwritten before it was copied"
            copied.done = True
        return event


@pytest.mark.parametrize("late", [0, 3, 1000])
def test_pinned_batches_are_used_again_once_they_are_copied(monkeypatch, late):
    buffers, empty, stream = [], torch.empty, Events(late)

    def pinned(*args, pin_memory=False, **kw):
        tensor = empty(*args, **kw)
        if pin_memory:
            buffers.append(tensor)
        return tensor

    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    clips = Numbers((np.full((1, 2, 2, 3), i, np.uint8), i) for i in range(250))
    batches = endless(clips, Stream(250, 1), 2, torch.device("cuda"))
    for _ in range(200):
        stream.shown = next(batches)
    assert len({b.data_ptr() for b in buffers}) == len(buffers)
    assert len(buffers) <= late + 3 if late < 200 else len(buffers) == 201  # two in the making, one shown, those copied
    for _, batch, label in stream.waiting:
        assert batch.flatten()[0] == label


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
def test_weizmann(settings):
    train = videos(settings, SHARED / "weizmann" / "train")
    test = videos(settings, SHARED / "weizmann" / "train", "test", train.classes)
    assert train.classes == ("bend", "jumping_jack", "wave_one_hand", "wave_two_hands")
    assert Counter(label for _, label in train.items) == {i: 16 for i in range(4)} and len(test) == 8
    clips, labels = fixed_clips(test, 8)
    assert clips.shape == (8, 16, 3, 32, 32) and labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert clips.std((1, 2, 3, 4)).min() > 0.05
    assert clips.diff(dim=1).abs().mean((1, 2, 3, 4)).min() > 1e-3  # people move


@pytest.mark.skipif(not (SHARED / "weizmann").is_dir(), reason="shared/data is not here")
def test_clips_are_the_same_with_a_cache_and_without(tmp_path):
    where = dict(data_dir=str(SHARED / "weizmann" / "test"), resolution=32, cache_dir=str(tmp_path))
    cached, decoded = (open_dataset(Config("folder", cache=cache, **where), "train") for cache in ("on", "off"))
    assert all(np.array_equal(cached[i][0], decoded[i][0]) for i in range(16))
