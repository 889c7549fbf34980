"""Data sets as they are distributed, clips of them, what is kept of them, and the order of batches."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_mp4
from PIL import Image
from test_video import encode, grey, numbers

import data
from common import layouts, video
from common.drawn import Shapes
from common.utils import UserError
from common.video import to_clip
from data import Config, Stream, endless, fixed_clips, open_dataset, spread


def find_videos(config, role):
    return layouts.find_videos(data.find_root(config), config.dataset, role)


def mp4(path, count=24):
    return write_mp4(path, to_clip(grey(count)))


@pytest.fixture(params=["auto", "off"])
def settings(request, tmp_path_factory):
    """Settings of a folder at 32 x 32, with a cache and without: what comes out has to be the same."""
    return Config("folder", resolution=32, cache=request.param, cache_dir=str(tmp_path_factory.mktemp("cache")))


def videos(settings, root, role="train", classes=None, **kw):
    return open_dataset(replace(settings, data_dir=str(root), **kw), role, classes)


# ------------------------------------------------------------------------------------------------------------------- folders


def test_labels_follow_the_classes_of_the_checkpoint(settings, folder, tmp_path):
    known = ["a", "square_updown", "ring_circle"]
    train = videos(settings, folder / "train")
    assert train.classes == ("ring_circle", "square_updown") and [label for _, label in train.items] == [0, 0, 0, 1, 1, 1]
    frames, label = train[4]
    original = Shapes()[Shapes.classes.index("square_updown") + 9][0]
    assert frames.dtype == np.uint8 and label == 1 and (to_clip(frames) - to_clip(original)).square().mean() < 0.012
    train = videos(settings, folder / "train", classes=known)
    assert list(train.classes) == known and [label for _, label in train.items] == [2, 2, 2, 1, 1, 1]
    with pytest.raises(UserError, match="square_updown"):
        videos(settings, folder / "train", classes=["ring_circle"])
    mp4(tmp_path / "other" / "clip")
    assert videos(settings, tmp_path / "other", classes=["mine"])[0][1] == 0, "one class is one class, of whatever name"


def test_deeper_folders_loose_files_and_others(settings, tmp_path, capsys):
    mp4(tmp_path / "b" / "deep" / "clip")
    mp4(tmp_path / "a" / "clip").rename(tmp_path / "a" / "clip.MP4")
    mp4(tmp_path / "loose")
    (tmp_path / "a" / "notes.txt").write_text("hello")
    train = videos(settings, tmp_path)
    assert train.classes == ("a", "b") and len(train) == 2 and train[0][0].shape == (16, 32, 32, 3)
    said = capsys.readouterr().out
    assert "left out: 1 videos outside the class folders" in said and "left out: 1 files .txt" in said


@pytest.mark.parametrize("name", ["folder", "ucf", "kinetics", "taichi"])
def test_missing_and_empty_folders(tmp_path, name):
    (tmp_path / "notes.txt").write_text("hello")
    for folder, words in (("none", "no directory .*none: give another"), ("", f"no videos of {name}.*; 1 files .txt")):
        with pytest.raises(UserError, match=words):
            find_videos(Config(name, str(tmp_path / folder)), "train")


@pytest.mark.parametrize("given", ["v", "v/Train", "v/./a/../Train", "link", "v/linked", "."])
@pytest.mark.parametrize("names", ["Train Test", "train val"])
def test_train_and_test_share_no_file_however_they_are_named(tmp_path, given, names, monkeypatch):
    train, test = (tmp_path / "v" / name for name in names.split())
    for path in (train / "a" / "0", train / "a" / "1", test / "a" / "2"):
        mp4(path, 4)
    (tmp_path / "v" / "a").mkdir()
    (tmp_path / "link").symlink_to(train)
    (tmp_path / "v" / "linked").symlink_to(train.name)
    monkeypatch.chdir(train if given == "." else tmp_path)
    given, right = Config("folder", given.replace("Train", train.name)), {"train": ["0.mp4", "1.mp4"], "test": ["2.mp4"]}
    assert {role: [path.name for path, _ in find_videos(given, role)[1]] for role in right} == right


# --------------------------------------------------------------------------------------------------------------------- clips


def test_a_test_clip_is_the_middle_and_training_clips_start_where_their_index_says(settings, tmp_path):
    encode(tmp_path / "clip.avi", grey(8), "mpeg4", bf=2, qmin=1, qmax=2, b="9M")
    test, train = (videos(settings, tmp_path, role, num_frames=3, stride=2) for role in ("test", "train"))
    assert numbers(test[0][0]) == numbers(test[5][0]) == [1, 3, 5]
    starts = [[tuple(numbers(train[i][0])) for i in range(30)] for _ in range(2)]
    assert set(starts[0]) == {(s, s + 2, s + 4) for s in range(4)} and starts[0] == starts[1]


def test_a_video_may_be_exactly_as_long_as_a_clip_but_not_shorter(settings, tmp_path, capsys):
    mp4(tmp_path / "clip", 16)
    assert numbers(videos(settings, tmp_path)[0][0]) == list(range(16))
    assert numbers(videos(settings, tmp_path, num_frames=6, stride=3)[0][0]) == list(range(0, 16, 3))
    with pytest.raises(UserError, match="none of the 1 videos.*for example, .*clip.mp4: it has 16 frames, but a clip needs 17"):
        videos(settings, tmp_path, num_frames=17)[0]
    mp4(tmp_path / "longer", 17)
    train = videos(settings, tmp_path, num_frames=17)
    assert all(numbers(train[i][0]) == list(range(17)) for i in range(4))
    assert capsys.readouterr().out.count("skipping") == 2, "once for each training"


def test_half_of_the_training_clips_are_mirrored(settings, tmp_path):
    write_mp4(tmp_path / "clip", torch.linspace(-1, 1, 64).expand(4, 3, 64, 64))  # brighter to the right
    plain = videos(settings, tmp_path, num_frames=4)[0][0]
    train, test = (videos(settings, tmp_path, role, num_frames=4, flip=True) for role in ("train", "test"))
    mirrored = [np.array_equal(train[i][0], plain[:, :, ::-1]) for i in range(20)]
    assert all(m or np.array_equal(train[i][0], plain) for i, m in enumerate(mirrored)) and 3 < sum(mirrored) < 17
    assert all(np.array_equal(test[i][0], plain) for i in range(5))


# ------------------------------------------------------------------------------------------------------------------- layouts


def image(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 40), (shade, shade, shade)).save(path)


@pytest.fixture
def ucf(tmp_path):
    for name in ("ApplyLipstick/v_ApplyLipstick", "Archery/v_Archery"):
        for group in ("g01", "g08"):
            mp4(tmp_path / "data" / "UCF-101" / f"{name}_{group}_c01", 16)
    return Config("ucf", str(tmp_path / "data" / "UCF-101"), resolution=32, cache="off")


@pytest.mark.parametrize("role", ["train", "test"])
def test_ucf_holds_nothing_out(ucf, role):
    _, items, classes, notes = find_videos(ucf, role)
    assert classes == ["ApplyLipstick", "Archery"] and len(items) == 4 and items[3][1] == "Archery"
    assert ("no held-out videos" in "".join(notes)) == (role == "test")


@pytest.mark.parametrize("where", ["data", "data/UCF-101"])
@pytest.mark.parametrize("lines", ["{}.avi 2\n{}.avi 2\n", "\ufeff{}.mp4 2\r\n{}.mp4 2\r\n"])
def test_official_splits_of_ucf(ucf, tmp_path, where, lines):
    ucf, lists = replace(ucf, data_dir=str(tmp_path / where), dataset="ucf-split2"), tmp_path / "data" / "ucfTrainTestlist"
    lists.mkdir()
    listed = lines.format("Archery/v_Archery_g08_c01", "Archery/v_Archery_g09_c01")
    (lists / "trainlist02.txt").write_bytes(listed.encode())
    (lists / "testlist02.txt").write_text("ApplyLipstick/v_ApplyLipstick_g01_c01.avi\nArchery/v_Archery_g01_c01.avi\n")
    _, items, classes, notes = find_videos(ucf, "train")
    assert [(path.name, name) for path, name in items] == [("v_Archery_g08_c01.mp4", "Archery")] and classes == ["Archery"]
    assert notes[-1] == "1 of 2 listed videos are missing"
    test = find_videos(ucf, "test")[1]
    assert [path.stem for path, _ in test] == ["v_ApplyLipstick_g01_c01", "v_Archery_g01_c01"]


@pytest.mark.parametrize("place, val", [("", "validate"), ("annotations", "val")])  # DeepMind's and CVDF's
def test_kinetics_with_its_tables_and_missing_files(tmp_path, place, val):
    rows = ["riding a bike,abcdefghijk,3,13", "yoga,-_345678901,nan,nan", '"zumba, slow",gone4567890,0,10']
    for file, part in (("train", rows), (val, ["riding a bike,abcdefghijl,3,13"])):
        (tmp_path / place).mkdir(exist_ok=True)
        table = "\r\n".join(["label,youtube_id,time_start,time_end", *part, ""])
        (tmp_path / place / f"{file}.csv").write_bytes(b"\xef\xbb\xbf" + table.encode())  # as spreadsheets write it
    for path in ("train/abcdefghijk_000003_000013", "train/-_345678901", "val/abcdefghijl_000003_000013", "test/unlabelled"):
        mp4(tmp_path / path, 16)
    settings = Config("kinetics", str(tmp_path), resolution=32, cache="off")
    _, items, classes, notes = find_videos(settings, "train")
    assert [(path.name[:11], name) for path, name in items] == [("abcdefghijk", "riding a bike"), ("-_345678901", "yoga")]
    assert notes == ["1 of 3 listed videos are missing"]
    assert classes == ["riding a bike", "yoga", "zumba, slow"], "of the list, whatever is there"
    ((path, label),) = open_dataset(settings, "test", ["other", *classes]).items
    assert path.name == "abcdefghijl_000003_000013.mp4" and label == 1


def test_kinetics_without_tables_has_the_classes_of_its_folders(tmp_path):
    for path in ("k/train/yoga/a", "k/val/yoga/b", "k/test/c", "flat/train/a"):
        mp4(tmp_path / path, 16)
    test = find_videos(Config("kinetics", str(tmp_path / "k/train")), "test")
    assert [(path.name, name) for path, name in test[1]] == [("b.mp4", "yoga")]
    with pytest.raises(UserError, match="1 videos outside the class folders"):
        find_videos(Config("kinetics", str(tmp_path / "flat")), "train")


def test_taichi_has_one_class_of_files_and_folders_of_frames(tmp_path):
    for i in range(3):
        image(tmp_path / "train" / "id#000001#000003.mp4" / f"{i:07d}.png", 10 * i)
    mp4(tmp_path / "test" / "a#1#2", 3)
    for role in ("train", "test"):
        dataset = open_dataset(Config("taichi", str(tmp_path), 32, 3, cache="off"), role)
        assert dataset.classes == ("taichi",) and len(dataset) == 1 and dataset[0][0].shape == (3, 32, 32, 3)


# ----------------------------------------------------------------------------------------------------------- what is kept


@pytest.fixture
def kept(tmp_path):
    """Settings of a folder of three videos of 16 to 18 frames, one file that is none, and two folders of five frames."""
    for i in range(3):
        mp4(tmp_path / "videos" / "a" / f"{i}", 16 + i)
    for name, shade in (("a", 50), ("b", 200)):
        for i in range(5):
            image(path := tmp_path / "videos" / name / "frames" / f"{i}.bmp", shade)
            os.utime(path, ns=(10**18, 10**18))
    (tmp_path / "videos" / "a" / "text.mp4").write_text("no video")
    return Config("folder", str(tmp_path / "videos"), 32, 5, cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def decoded(monkeypatch):
    """Names of the files that are decoded."""
    calls, read = [], video.read_frames
    monkeypatch.setattr(video, "read_frames", lambda path, *args: (calls.append(path.name), read(path, *args))[1])
    return calls


def test_every_frame_is_decoded_once_and_clips_are_those_of_a_large_data_set(kept, decoded, tmp_path, monkeypatch):
    small = open_dataset(kept, "train")
    assert len(small) == 5 and len(list((tmp_path / "cache").glob("*/*"))) == 5, "a file each"
    assert not [fd for fd in Path("/proc/self/fd").glob("*") if fd.resolve().suffix == ".u8"], "a shell may allow 256 files"
    for path, _ in small.items:
        assert np.array_equal(small.frames[path], video.read_frames(path, 32))
    decoded.clear()
    assert open_dataset(kept, "train").identity() == small.identity()
    assert decoded == ["text.mp4"], "which may have been the machine's fault"
    monkeypatch.setattr(data, "CACHE_LIMIT", 10)
    large = open_dataset(replace(kept, cache_dir=str(tmp_path / "none")), "train")
    assert not (tmp_path / "none").exists() and large.frames is None
    assert all(np.array_equal(large.clip(path, i), small.clip(path, i)) for path, _ in small.items for i in range(9))
    (tmp_path / "file").write_text("")
    monkeypatch.undo()
    with pytest.raises(UserError, match="cannot write"):
        open_dataset(replace(kept, cache_dir=str(tmp_path / "file")), "train")


@pytest.mark.parametrize("what", ["in place", "replaced", "swapped", "new", "gone", "other class", "cache"])
def test_what_changes_is_decoded_anew_however_alike_it_looks(kept, decoded, tmp_path, what):
    """Of the same names, sizes and times: BMPs are, and files from an archive have whole seconds."""
    folder, other, time = tmp_path / "videos" / "a" / "frames", tmp_path / "videos" / "b" / "frames", (10**18, 10**18)
    before = open_dataset(kept, "train").identity()
    decoded.clear()
    if what in ("in place", "replaced"):
        (folder / "3.bmp").unlink() if what == "replaced" else None
        image(folder / "3.bmp", 200), os.utime(folder / "3.bmp", ns=time)
    elif what == "swapped":
        folder.rename(tmp_path / "t"), other.rename(folder), (tmp_path / "t").rename(other)
    elif what == "new":
        mp4(folder.parent / "new", 17)
    elif what == "cache":
        next(tmp_path.glob("cache/*/*.u8")).unlink()
    else:
        (folder.parent / "2.mp4").rename((tmp_path if what == "gone" else other.parent) / "2.mp4")
    dataset = open_dataset(kept, "train")
    assert len({name for name in decoded if ".bmp" not in name}) <= 2, "and nothing else"
    assert (dataset.identity() == before) == (what == "cache") and len(dataset) == {"new": 6, "gone": 4}.get(what, 5)
    shades = {path.parent.name: f.mean((1, 2, 3)).tolist() for path, f in dataset.frames.items() if path.name == "frames"}
    right = {"in place": [50, 50, 50, 200, 50], "replaced": [50, 50, 50, 200, 50], "swapped": [200] * 5}.get(what, [50] * 5)
    assert shades == {"a": right, "b": [50 if what == "swapped" else 200] * 5}


def test_preview_of_what_is_there_whatever_its_name(call, tmp_path, capsys):
    mp4(tmp_path / "v" / os.fsdecode(b"caf\xe9\n") / "take1:30", 20), mp4(tmp_path / "v" / "b" / "1", 10)
    assert call("data.py", "--dataset folder --data-dir v --resolution 32 --preview new/out.png") == 0
    assert Image.open(tmp_path / "new" / "out.png").width > 8 * 64
    said = capsys.readouterr().out
    for words in ("1 clips or videos", "frames    20 to 20", "sizes     128 x 128 (1)", "it has 10 frames", "caf\\udce9\\n"):
        assert words in said


# ------------------------------------------------------------------------------------------------------------------- batches


def test_batches_are_those_of_the_stream_and_errors_are_passed_on():
    clips = [(np.full((1, 2, 2, 3), i % 12, np.uint8), i % 12) for i in range(36)]
    stream = Stream(12, 5, seed=3)
    for step, (frames, labels) in zip(range(7), endless(clips, stream)):
        assert frames.shape == (5, 1, 2, 2, 3) and torch.equal(frames[:, 0, 0, 0, 0], labels)
        assert labels.tolist() == [i % 12 for i in stream.batch(step)]
    with pytest.raises(ValueError):
        next(endless(clips[:1] + [(np.zeros((5, 5)), 0)] * 8, Stream(9, 9)))


@pytest.mark.parametrize("size", [3, 20])  # 7 does not divide into batches of 3, and a batch may be larger than the data set
def test_each_clip_comes_once_in_a_pass_of_an_order_of_its_own(size):
    shown = [i for step in range(21) for i in Stream(7, size, seed=1).batch(step)]
    assert sorted(shown) == list(range(21 * size))  # pass p of clip i is p * 7 + i, and none is missing or twice
    assert [i // 7 for i in shown] == sorted(i // 7 for i in shown)
    orders = {tuple(i % 7 for i in shown[k : k + 7]) for k in (0, 7, 14)} | {tuple(Stream(7, 7, seed=2).batch(0)), (*range(7),)}
    assert len(orders) == 5


@pytest.mark.parametrize("parts, world", [(1, 1), (1, 2), (3, 1), (2, 3)])
def test_processes_and_parts_share_the_same_batches(parts, world):
    whole = [Stream(10, 12, seed=5).batch(step) for step in range(4)]
    shares = [iter(Stream(10, 12, 5, 1, parts, rank, world)) for rank in range(world)]
    for batch in whole[1:]:  # from step 1 on
        pieces = [[next(share) for share in shares] for _ in range(parts)]
        assert [i for part in pieces for rows in part for i in rows] == batch
        assert all(len(rows) == 12 // (parts * world) for part in pieces for rows in part)


def test_fixed_clips_are_spread_over_all_classes():
    clips = [(np.zeros((1, 2, 2, 3), np.uint8), i // 30) for i in range(120)]
    assert fixed_clips(clips, 64)[1].bincount().tolist() == [16] * 4
    assert spread(clips, 7) == [8, 25, 42, 60, 77, 94, 111] and spread(clips, 999) == list(range(120))
    shapes = Shapes("train")  # whose classes alternate: every 117th would be of one of two classes
    for count in (9, 70):
        assert {count // 9, -(-count // 9)} >= {*np.bincount([shapes.label(i) for i in spread(shapes, count)], minlength=9)}
