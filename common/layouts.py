"""Data sets as they are distributed: which files are videos, of which class, for training or for testing.

find_*(root, role, name of the data set) -> (root, [(path, class name)], all class names, notes on what was left out).
"""

import csv
import itertools
import os
import re
from pathlib import Path

from common import video
from common.drawn import CLONE
from common.utils import UserError
from common.video import printable

UCF_NAME = r"v_\w+?_g\d+_c\d+"
TRAIN = ("train", "training")


def find_folder(root, role, name):
    """Any directory of videos; classes are its sub-folders, or one class where there are none.

    Of a directory with train/ in it, or of one called train, the role "test" is the test/ or val/ beside, where there is one.
    """
    root = root.resolve()  # one folder has many names
    root = part(root, "train")
    root = part(root.parent, role) if role == "test" and root.name.lower() in TRAIN else root
    paths, notes = video.list_videos(root)
    items = [(path, path.relative_to(root).parts[0]) for path in paths if len(path.relative_to(root).parts) > 1]
    if items and len(items) < len(paths):
        notes.append(f"{len(paths) - len(items)} videos beside the folders, which are the classes")
    items = items or [(path, root.name) for path in paths]
    return root, items, {name for _, name in items}, notes


def find_ucf(root, role, name):
    """UCF-101: Class/v_Class_g01_c01.avi. ucf is all 13,320 videos, as in the paper; ucf-split1, 2, 3 are official lists."""
    root = locate(root, name, lambda p: next(p.glob("*/v_*_g*_c*.*"), None))
    paths, notes = video.list_videos(root)
    videos = {p.stem: p for p in paths if re.fullmatch(UCF_NAME, p.stem)}
    listed = list(videos)
    if name != "ucf":
        lists = [p / q / f"{role}list0{name[-1]}.txt" for p in (root, root.parent) for q in ("ucfTrainTestlist", "")]
        if not (lists := [path for path in lists if path.is_file()]):
            raise UserError(f"{name} takes the lists of UCF101TrainTestSplits-RecognitionTask.zip: unpack it in {root.parent}")
        listed = re.findall(UCF_NAME, "\n".join(read_lines(lists[0])))  # they say .avi, and many keep MP4s
    items = [(videos[name], videos[name].parent.name) for name in dict.fromkeys(listed) if name in videos]
    return root, items, {path.parent.name for path in videos.values()}, notes + missing(set(listed), items)


def find_kinetics(root, role, name):
    """Kinetics: train/ and val/, with files per class or flat, and a CSV for each that names label and youtube_id.

    Files are ID_START_END.mp4 with six digits each, or ID.mp4; many are gone. Without a CSV, classes are the sub-folders. val/
    comes before test/, whose labels some releases keep back.
    """
    root = locate(root, name, lambda p: any((p / name).is_dir() for name in ("train", "val", "validate")))
    folder = part(root, role, ("val", "validate", "validation", "test"))
    paths, notes = video.list_videos(folder)
    if rows := kinetics_rows(root, folder.name):
        videos = {re.sub(r"_\d{6}_\d{6}$", "", path.stem): path for path in paths}  # an ID comes once
        items = [(videos[row["youtube_id"]], row["label"]) for row in rows if row["youtube_id"] in videos]
        return root, items, {row["label"] for row in rows}, notes + missing(rows, items)
    items = [(path, path.relative_to(folder).parts[0]) for path in paths if path.parent != folder]
    if paths and not items:
        raise UserError(f"{folder} has no sub-folders, and no {folder.name}.csv with label and youtube_id names the classes")
    return root, items, {name for _, name in items}, notes


def kinetics_rows(root, folder):
    """The labelled rows of the table of a folder of Kinetics: kinetics600_train.csv, validate.csv, …; [] where none is."""
    names = {folder} if folder in ("train", "test") else {"val", "validate", "validation"}
    for path in sorted(path for pattern in ("*.csv", "*.txt", "*/*.csv", "*/*.txt") for path in root.glob(pattern)):
        words = re.findall("[a-z]+", path.stem.lower())
        lines = read_lines(path) if names & set(words) and "holdout" not in words else []
        if lines := list(itertools.dropwhile(lambda line: "youtube_id" not in line.lower(), lines)):
            mark = max(",;\t", key=lines[0].count)  # a spreadsheet writes what its language has
            header, *rows = ([cell.strip() for cell in row] for row in csv.reader(lines, delimiter=mark))
            rows = [dict(zip(map(str.lower, header), row)) for row in rows]
            if rows := [row for row in rows if row.get("label", "").lower() not in ("", "nan") and row.get("youtube_id")]:
                return rows
    return []


def find_frames(root, role, name):
    """TaiChi-HD: train/ and test/ with MP4s or folders of frames. Sky Timelapse: sky_train/ and sky_test/. One class each."""
    prefix = "sky_" if name == "sky" else ""
    root = locate(root, name, lambda p: (p / f"{prefix}train").is_dir())
    paths, notes = video.list_videos(root / f"sky_{role}" if prefix else part(root, role))
    return root, [(path, name) for path in paths], {name}, notes


# What finds each, where it is unless named, where it comes from, and what it holds.
LAYOUTS = {
    "folder": (find_folder, "", "", ""),
    "ucf": (
        find_ucf,
        "data/UCF-101",
        "https://www.crcv.ucf.edu/data/UCF101.php",
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi",
    ),
    "kinetics": (find_kinetics, "data/kinetics600", "https://github.com/cvdfoundation/kinetics-dataset", "train/ and val/"),
    "taichi": (find_frames, "data/taichi", "https://github.com/AliaksandrSiarohin/video-preprocessing", "train/ and test/"),
    "sky": (find_frames, "data/sky_timelapse", "https://github.com/weixiong-ur/mdgan", "sky_train/ and sky_test/"),
    "sprites": (None, "data/Sprites", f"{CLONE} data/Sprites", "body/0.png, hair/0.png and so on"),
}
LAYOUTS |= {f"ucf-split{k}": LAYOUTS["ucf"] for k in (1, 2, 3)}


def same_file(item):
    """What all names of a file have in common, of an item (path, class name), however it is spelt or linked."""
    state = os.stat(item[0]) if os.path.exists(item[0]) else os.lstat(item[0])
    return state.st_dev, state.st_ino


def locate(root, name, fits):
    """root itself, a directory in it, or the one it is in: the first that is laid out as the data set is."""
    for place in (root, *sorted(p for p in root.iterdir() if p.is_dir()), root.absolute().parent):
        if fits(place):
            return place
    _, _, source, holds = LAYOUTS[name]
    raise UserError(f"{printable(root)} does not look like {name}: it should hold {holds} ({source}); name another --data-dir")


def part(root, role, names=("test", "testing", "val", "validate", "validation")):
    """The directory of a role in root: train/, or the first of names that is there, or where none is train/, or root."""
    there = {path.name.lower(): path for path in root.iterdir() if path.is_dir()}
    return next((there[name] for name in (*(names if role == "test" else ()), *TRAIN) if name in there), root)


def missing(listed, items):
    return [f"{len(listed) - len(items)} of {len(listed)} videos in the list are not there"] if len(items) < len(listed) else []


def read_lines(path):
    """Lines of a list that are not empty: UTF-8 or, as spreadsheets write it, with a mark of the encoding, or of Windows."""
    content = path.read_bytes()
    utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        text = content.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", "replace")
    return [line for line in text.splitlines() if line.strip()]


def find_root(config):
    """The directory that --data-dir or the data set names. UserError, with where to get it, where it is not there."""
    _, usual, source, _ = LAYOUTS[config.dataset]
    root = Path(config.data_dir or usual or "DIRECTORY")
    if not root.is_dir():
        where = f"download it ({source}), or name its place" if source else "name one with videos, a sub-folder per class,"
        raise UserError(f"there is no directory {printable(root)}: {where} with --data-dir")
    return root


def find_videos(config, role):
    """What --dataset and --data-dir name: (root, [(path, class name)], class names, notes on what was left out).

    A file for training is not one for testing, whatever its names; where all of them are, a note says that nothing is held out.
    """
    find, given = LAYOUTS[config.dataset][0], find_root(config)
    root, items, classes, notes = find(given, role, config.dataset)
    if role == "test":
        trained = set(map(same_file, find(given, "train", config.dataset)[1]))
        if own := [item for item in items if same_file(item) not in trained]:
            notes += [f"{len(items) - len(own)} videos that are for training, too"] if len(own) < len(items) else []
        else:
            notes = [f"nothing is held out of {printable(root)}: its training videos stand in for what is called held out"]
        items = own or items
    if not items:
        raise UserError(f"{printable(root)} holds no videos: {'; '.join(notes) or 'it is empty'}; name another with --data-dir")
    return root, [(path, printable(name)) for path, name in items], sorted(map(printable, classes)), notes
