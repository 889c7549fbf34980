"""Data sets as they are distributed, clips of them, what is kept of them, and the order of batches."""

import os
import random
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import write_mp4
from PIL import Image
from test_video import encode, grey, numbers

import data
from common import video
from common.cache import estimated_bytes
from common.drawn import Shapes
from common.layouts import find_videos
from common.utils import UserError
from common.video import to_clip
from data import Config, Stream, endless, fixed_clips, open_dataset, spread


def mp4(path, count=24):
    return write_mp4(path, to_clip(grey(count)))


@pytest.fixture(params=["auto", "off"])
def settings(request, tmp_path_factory):
    """Settings of a folder at 32 x 32, with a cache and without: what comes out has to be the same."""
    return Config("folder", resolution=32, cache=request.param, cache_dir=str(tmp_path_factory.mktemp("cache")))


OFF = Config("folder", resolution=32, cache="off")


def videos(settings, root, role="train", classes=None, **kw):
    return open_dataset(replace(settings, data_dir=str(root), **kw), role, classes)


def names(dataset):
    return [os.path.relpath(path, os.path.realpath(path.parents[1])) for path, _ in dataset.items]


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


def test_missing_and_empty_folders(settings, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("hello")
    cases = [("none", "folder", "no directory"), ("", "folder", "holds no videos: 1 files .txt")]
    for name in ("ucf", "ucf-split1", "kinetics", "taichi", "sky"):
        cases += [("none", name, "https://"), ("", name, "does not look like.*should hold.*--data-dir")]
    for path, name, match in cases:
        with pytest.raises(UserError, match=match):
            videos(settings, tmp_path / path, dataset=name)


@pytest.mark.parametrize("given", ["v", "v/Train", "v/./a/../Train", "link", "v/linked", "."])
@pytest.mark.parametrize("names", ["Train Test", "train val"])
def test_train_and_test_share_no_file_however_they_are_named(tmp_path, given, names, monkeypatch, capsys):
    train, test = (tmp_path / "v" / name for name in names.split())
    for path in (train / "a" / "0", train / "a" / "1", test / "a" / "2"):
        mp4(path, 4)
    (tmp_path / "v" / "a").mkdir()
    (test / "a" / "link.mp4").symlink_to(train / "a" / "0.mp4")
    (tmp_path / "link").symlink_to(train)
    (tmp_path / "v" / "linked").symlink_to(train.name)
    monkeypatch.chdir(train if given == "." else tmp_path)
    given = given.replace("Train", train.name)
    found = [videos(OFF, given, role, num_frames=4) for role in ("train", "test")]
    real = [{os.path.realpath(path) for path, _ in dataset.items} for dataset in found]
    assert [len(files) for files in real] == [2, 1] and not real[0] & real[1]
    assert "1 test videos that are also training videos" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------------------- clips


def test_a_test_clip_is_the_middle_and_training_clips_start_where_their_index_says(settings, tmp_path):
    encode(tmp_path / "clip.avi", grey(8), "mpeg4", bf=2, qmin=1, qmax=2, b="9M")
    test, train = (videos(settings, tmp_path, role, num_frames=3, stride=2) for role in ("test", "train"))
    assert numbers(test[0][0]) == numbers(test[5][0]) == [1, 3, 5]
    starts = [tuple(numbers(train[i][0])) for i in range(30)]
    assert set(starts) == {(s, s + 2, s + 4) for s in range(4)}
    random.seed(1)
    assert [tuple(numbers(train[i][0])) for i in range(30)] == starts


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


def image(path, shade, size=(40, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, shade, shade)).save(path)


@pytest.fixture
def ucf(tmp_path):
    for name in ("ApplyLipstick/v_ApplyLipstick", "Archery/v_Archery"):
        mp4(tmp_path / "data" / "UCF-101" / f"{name}_g01_c01", 16), mp4(tmp_path / "data" / "UCF-101" / f"{name}_g08_c01", 16)
    return Config("ucf", resolution=32, cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("level", ["data", "data/UCF-101", "data/UCF-101/Archery"])
def test_ucf_from_one_level_up_or_down(ucf, tmp_path, level, capsys):
    train, test = (open_dataset(replace(ucf, data_dir=str(tmp_path / level)), role) for role in ("train", "test"))
    assert train.classes == ("ApplyLipstick", "Archery") and len(train) == 4 and train[3][1] == 1
    assert len(test) == 4 and "has no held-out videos" in capsys.readouterr().out


SPLITS = {
    "as distributed": "Archery/v_Archery_g08_c01.avi 2\nArchery/v_Archery_g09_c01.avi 2\n",
    "mark": "\ufeffArchery/v_Archery_g08_c01.mp4\r\n\nArchery/v_Archery_g09_c01.MP4\r\n",
    "Windows": "UCF-101\\Archery\\v_Archery_g08_c01.avi;2\nUCF-101\\Archery\\v_Archery_g09_c01.avi;2",
    "absolute": '"/data/UCF-101/Archery/v_Archery_g08_c01",2\n"/data/UCF-101/Archery/v_Archery_g09_c01",2',
    "names, twice": "v_Archery_g08_c01\nv_Archery_g08_c01\nv_Archery_g09_c01",
}


@pytest.mark.parametrize("kind", SPLITS)
def test_official_splits_of_ucf(ucf, tmp_path, kind):
    ucf, lists = (
        replace(ucf, data_dir=str(tmp_path / "data" / "UCF-101"), dataset="ucf-split2"),
        tmp_path / "data/ucfTrainTestlist",
    )
    lists.mkdir()
    (lists / "trainlist02.txt").write_bytes(SPLITS[kind].encode())
    (lists / "testlist02.txt").write_text("ApplyLipstick/v_ApplyLipstick_g01_c01.avi\nArchery/v_Archery_g01_c01.avi\n")
    _, items, classes, notes = find_videos(ucf, "train")
    assert [(path.name, name) for path, name in items] == [("v_Archery_g08_c01.mp4", "Archery")] and classes == ["Archery"]
    assert notes == ["1 of 2 listed videos are missing"]
    test = open_dataset(ucf, "test")
    assert names(test) == ["ApplyLipstick/v_ApplyLipstick_g01_c01.mp4", "Archery/v_Archery_g01_c01.mp4"]
    with pytest.raises(UserError, match="ucf-split1 needs the lists.*unpack"):
        open_dataset(replace(ucf, dataset="ucf-split1"), "train")


TABLE = "label,youtube_id,time_start,time_end\n{}"
LISTS = {
    "as distributed": lambda text: text.encode(),
    "mark": lambda text: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(),
    "nan": lambda text: (text.replace("3,13", "nan,nan") + "nan,xxxxxxxxxxx,1,11\n,yyyyyyyyyyy,1,11\n").encode(),
    "floats": lambda text: text.replace("3,13", "3.0,13.0").encode(),
    "semicolons": lambda text: text.replace(",", ";").encode(),
    "unicode": lambda text: text.replace(",", "\t").encode("utf-16"),
    "spaces": lambda text: text.replace(",", ", ").encode(),
    "heading": lambda text: b"sep=,\r\n" + text.encode(),
    "short rows": lambda text: (text + "yoga\n,\nNaN,zzzzzzzzzzz,1,2\n").encode(),
    "numbered": lambda text: "".join(f"{k},{line}\n" for k, line in enumerate(text.splitlines())).encode(),
}


@pytest.mark.parametrize("kind", LISTS)
def test_kinetics_with_lists_as_people_have_them_and_missing_files(tmp_path, kind):
    rows = ["riding a bike,abcdefghijk,3,13", "yoga,-_345678901,10,20", "zumba,gone4567890,0,10"]
    for role, part in (("train", rows), ("val", ["riding a bike,abcdefghijl,3,13"])):
        (tmp_path / f"{role}.csv").write_bytes(LISTS[kind](TABLE.format("\n".join(part) + "\n")))
        for label, name, start, end in (row.split(",") for row in part[:2]):
            mp4(tmp_path / role / ("" if kind < "n" else label) / f"{name}_{int(start):06d}_{int(end):06d}", 16)
    settings = Config("kinetics", str(tmp_path), resolution=32, cache="off")
    _, items, classes, notes = find_videos(settings, "train")
    assert [(path.name[:11], name) for path, name in items] == [("abcdefghijk", "riding a bike"), ("-_345678901", "yoga")]
    assert notes == ["1 of 3 listed videos are missing"]
    assert classes == ["riding a bike", "yoga", "zumba"], "of the list, whatever is there"
    assert names(open_dataset(settings, "test", classes))[0].endswith("abcdefghijl_000003_000013.mp4")


def test_kinetics_without_lists_and_with_a_test_set_without_labels(tmp_path):
    for path in ("train/yoga/a", "val/yoga/b", "test/c"):
        mp4(tmp_path / path, 16)
    (tmp_path / "kinetics600_test.csv").write_text("youtube_id,time_start,time_end\nother678901,0,10\n")
    settings = Config("kinetics", str(tmp_path / "train"), resolution=32, cache_dir=str(tmp_path / "cache"))
    assert open_dataset(settings, "train").classes == ("yoga",) and names(open_dataset(settings, "test")) == ["yoga/b.mp4"]
    mp4(tmp_path / "flat" / "train" / "a", 16)
    with pytest.raises(UserError, match="no train.csv with label"):
        open_dataset(replace(settings, data_dir=str(tmp_path / "flat")), "train")


def test_taichi_and_sky(tmp_path):
    for folder in ("taichi/train/id#000001#000003.mp4", "sky/sky_train/one/one_1", "sky/sky_test/two/two_1"):
        for i in range(3):
            image(tmp_path / folder / f"frames_{i:07d}.png", 10 * i)
    mp4(tmp_path / "taichi" / "test" / "a#1#2", 3)
    for level in ("taichi", "taichi/train", "sky", "sky/sky_train"):
        for role in ("train", "test"):
            name = level.split("/")[0]
            dataset = open_dataset(Config(name, str(tmp_path / level), 32, 3, cache_dir=str(tmp_path / "cache")), role)
            assert dataset.classes == (name,) and len(dataset) == 1 and dataset[0][0].shape == (3, 32, 32, 3)


# ----------------------------------------------------------------------------------------------------------- what is kept


@pytest.fixture
def kept(tmp_path):
    """Five videos of 16 to 20 frames, one that is none, and a folder of frames -> (settings, calls: what is decoded)."""
    for i in range(5):
        mp4(tmp_path / "videos" / "a" / f"{i}", 16 + i)
        image(tmp_path / "videos" / "a" / "frames" / f"{i}.bmp", 50)
    (tmp_path / "videos" / "a" / "text.mp4").write_text("no video")
    return Config("folder", str(tmp_path / "videos"), 32, 5, cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def decoded(monkeypatch):
    calls, iterate = [], video.iterate
    monkeypatch.setattr(video, "iterate", lambda path, *args: (calls.append(path.name), iterate(path, *args))[1])
    return calls


def test_every_frame_is_decoded_once_and_the_place_of_the_data_is_free(kept, decoded, tmp_path):
    dataset = open_dataset(kept, "train")
    assert sorted(set(decoded) - {f"{k}.bmp" for k in range(5)}) == [*(f"{k}.mp4" for k in range(5)), "frames", "text.mp4"]
    assert len(dataset) == 6 and len(list((tmp_path / "cache").glob("*/*"))) == 6, "a file each"
    for path, _ in dataset.items:
        assert np.array_equal(dataset.frames[path], np.stack(list(video.iterate(path, 32))))
    decoded.clear()
    again = open_dataset(kept, "train")
    assert decoded == ["text.mp4"], "which may have been the machine's fault"
    shutil.copytree(tmp_path / "videos", tmp_path / "moved", copy_function=shutil.copyfile)
    for other in (again, open_dataset(replace(kept, data_dir=str(tmp_path / "moved")), "train")):
        assert all(np.array_equal(other[i][0], dataset[i][0]) for i in range(20)) and other.identity() == dataset.identity()


@pytest.mark.parametrize("what", ["in place", "replaced", "swapped", "new", "gone", "other class", "cache"])
def test_what_changes_is_decoded_anew_however_alike_it_looks(kept, decoded, tmp_path, what):
    """Of the same names, sizes and times: BMPs are, and files from an archive have whole seconds."""
    folder, other, time = tmp_path / "videos" / "a" / "frames", tmp_path / "videos" / "b" / "frames", (10**18, 10**18)
    for k in range(5):
        image(other / f"{k}.bmp", 200), os.utime(other / f"{k}.bmp", ns=time), os.utime(folder / f"{k}.bmp", ns=time)
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
        (folder.parent / "3.mp4").rename((tmp_path if what == "gone" else other.parent) / "3.mp4")
    dataset = open_dataset(kept, "train")
    assert len({name for name in decoded if ".bmp" not in name}) <= 2, "and nothing else"
    assert (dataset.identity() == before) == (what == "cache") and len(dataset) == {"new": 8, "gone": 6}.get(what, 7)
    frames = ((path, dataset.frames[path]) for path, _ in dataset.items if path.name == "frames")
    shades = {path.parent.name: found.mean((1, 2, 3)).tolist() for path, found in frames}
    right = {"in place": [50, 50, 50, 200, 50], "replaced": [50, 50, 50, 200, 50], "swapped": [200] * 5}.get(what, [50] * 5)
    assert shades == {"a": right, "b": [50 if what == "swapped" else 200] * 5}


def test_a_cache_that_cannot_be_written_is_gone_without(kept, tmp_path, capsys):
    frames = open_dataset(kept, "train")[3][0]
    (tmp_path / "file").write_text("")
    without = open_dataset(replace(kept, cache_dir=str(tmp_path / "file")), "train")
    assert without.frames is None and np.array_equal(without[3][0], frames)
    assert "decoding clips on demand instead" in capsys.readouterr().out


def test_streams_without_a_header_are_not_taken_for_small(tmp_path):
    path = encode(tmp_path / "a.h264", grey(24), bf=2)
    assert video.probe(path).frames == 0 and estimated_bytes([path], 16) == 24 * 16 * 16 * 3


def test_preview_of_what_is_there_whatever_its_name(call, tmp_path, capsys):
    mp4(tmp_path / "v" / os.fsdecode(b"caf\xe9\n") / "take1:30", 20), mp4(tmp_path / "v" / "b" / "1", 10)
    (tmp_path / "v" / "b" / "x.txt").write_text("")
    options = "--dataset folder --data-dir v --resolution 32 --preview"
    assert call("data.py", f"{options} v") == 2 and "cannot write v: it is a directory" in capsys.readouterr().err
    assert call("data.py", f"{options} new/out.png") == 0 and Image.open(tmp_path / "new" / "out.png").width > 8 * 64
    said = capsys.readouterr().out
    for words in ("left out: 1 files .txt", "1 videos of 1 classes", "frames    20 to 20", "sizes     128 x 128 (1)"):
        assert words in said
    assert all(words in said for words in ("it has 10 frames", "caf\\udce9\\n", "wrote new/out.png"))


def test_large_data_sets_are_decoded_as_they_are_needed(kept, monkeypatch, tmp_path):
    small = open_dataset(kept, "train")
    monkeypatch.setattr(data, "CACHE_LIMIT", 10)
    large = open_dataset(replace(kept, cache_dir=str(tmp_path / "none")), "train")
    assert not (tmp_path / "none").exists() and large.frames is None
    order = {path: k for k, (path, _) in enumerate(small.items)}
    assert all(np.array_equal(large.clip(path, i), small.clip(path, i)) for path in order for i in range(9))


# ------------------------------------------------------------------------------------------------------------------- batches


def numbered(count):
    return [(np.full((1, 2, 2, 3), i, np.uint8), i) for i in range(count)]


def test_each_clip_comes_once_in_a_pass():
    clips = numbered(12) * 3  # index i + 12 is clip i again
    batches, again = (endless(clips, Stream(12, 4, seed=3)) for _ in range(2))
    frames, labels = zip(*(next(batches) for _ in range(9)))
    frames, labels = torch.stack(frames), torch.stack(labels)
    assert frames.shape == (9, 4, 1, 2, 2, 3) and torch.equal(frames[..., 0, 0, 0, 0], labels)
    passes = labels.view(3, 12).tolist()
    assert all(sorted(one) == list(range(12)) for one in passes)
    assert passes[0] != passes[1] != passes[2] and passes[0] != sorted(passes[0])
    assert [i for _ in range(3) for i in next(again)[1].tolist()] == passes[0]
    assert Stream(12, 4, seed=4).batch(0) != Stream(12, 4, seed=3).batch(0)


def test_batches_pass_on_errors_and_leave_no_gap():
    with pytest.raises(ValueError):
        next(endless(numbered(1) + [(np.zeros((5, 5)), 0)] * 8, Stream(9, 9)))
    # 7 does not divide into batches of 3, and a batch may even be larger than the data set.
    for size in (3, 20):
        shown = [i for step in range(21) for i in Stream(7, size, seed=1).batch(step)]
        assert sorted(shown) == list(range(21 * size))  # pass p of clip i is p * 7 + i, and none is missing or twice
        assert [i // 7 for i in shown] == sorted(i // 7 for i in shown)


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
    assert Counter(fixed_clips(clips, 64)[1].tolist()) == {0: 16, 1: 16, 2: 16, 3: 16}
    assert spread(clips, 7) == [0, 17, 34, 51, 68, 85, 102] and spread(clips, 999) == list(range(120))
    shapes = Shapes("test", length=90)
    assert fixed_clips(shapes, 20)[0].shape == (20, 16, 3, 32, 32) and len(fixed_clips(shapes, 1000)[0]) == 90
