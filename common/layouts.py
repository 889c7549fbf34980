"""Layouts of data sets as distributed: which files are videos, their classes, and the split into training and test sets."""

import csv
import os
import re
from pathlib import Path

from common import video
from common.drawn import CLONE
from common.utils import UserError, printable

# Default directory, glob patterns of which its root matches at least one, source, and what a root holds (for messages).
LAYOUTS = {
    "folder": ("", "", "", ""),
    "ucf": ("data/UCF-101", "*/v_*_g*_c*.*", "https://www.crcv.ucf.edu/data/UCF101.php", "Archery/v_Archery_g01_c01.avi"),
    "kinetics": ("data/kinetics600", "train val", "https://github.com/cvdfoundation/kinetics-dataset", "train/ and val/"),
    "taichi": ("data/taichi", "train", "https://github.com/AliaksandrSiarohin/video-preprocessing", "train/ and test/"),
    "sky": ("data/sky_timelapse", "sky_train", "https://github.com/weixiong-ur/mdgan", "sky_train/ and sky_test/"),
    "sprites": ("data/Sprites", "hair", f"{CLONE} data/Sprites", "body/0.png, hair/0.png and so on"),
}
LAYOUTS |= {f"ucf-split{k}": LAYOUTS["ucf"] for k in (1, 2, 3)}
TRAIN, VAL, TEST = ("train", "training", "sky_train"), ("val", "validate", "validation"), ("test", "testing", "sky_test")
UCF_NAME = r"v_\w+?_g\d+_c\d+"


def find_root(config):
    """The root of a data set: the first with its layout among --data-dir (or the default), its sub-folders and its parent.

    UserError, with the source of the data set, if there is none.
    """
    usual, marks, source, holds = LAYOUTS[config.dataset]
    given = Path(config.data_dir or usual or "DIRECTORY")
    if not given.is_dir():
        where = f"download it ({source}), or give its path" if source else "give one with videos, a sub-folder per class,"
        raise UserError(f"there is no directory {printable(given)}: {where} with --data-dir")
    root = given.resolve()  # links and relative paths, too
    if not marks:
        return root.parent if root.name.lower() in TRAIN else root
    for place in (root, *sorted(p for p in root.iterdir() if p.is_dir()), root.parent):
        if any(next(place.glob(mark), None) for mark in marks.split()):
            return place
    about = f"{printable(given)} does not look like {config.dataset}"
    raise UserError(f"{about}: it should hold {holds} ({source}); give another --data-dir")


def find(root, role, name):
    """(directory, [(path, class name)], notes on what was left out) of a data set. The path of a listed video that is missing
    is None.

    If there is a train/, the role "test" takes the test/ or val/ beside it, if any. Classes are sub-folders; TaiChi-HD and Sky
    Timelapse have one class. ucf is all of UCF-101, as in the paper; ucf-split1, 2, 3 are the official splits. Kinetics is
    tested on val/, since some releases withhold the labels of test/; a CSV with label and youtube_id gives the classes of
    ID_START_END.mp4, six digits each, or of ID.mp4. Many of its videos are no longer online.
    """
    there = {path.name.lower(): path for path in root.iterdir() if path.is_dir()}
    names = (VAL + TEST if name == "kinetics" else TEST + VAL) if role == "test" else ()
    folder = next((there[name] for name in (*names, *TRAIN) if name in there), root)
    paths, notes = video.list_videos(folder)
    if name in ("taichi", "sky"):
        return folder, [(path, name) for path in paths], notes
    items = [(path, path.relative_to(folder).parts[0]) for path in paths if path.parent != folder]
    if name == "kinetics" and (rows := kinetics_rows(root, VAL if folder.name in VAL else (folder.name,))):
        videos = {re.sub(r"_\d{6}_\d{6}$", "", path.stem): path for path in paths}  # IDs are unique
        return folder, [(videos.get(row["youtube_id"]), row["label"]) for row in rows], notes
    if name == "kinetics" and paths and not items:
        raise UserError(f"{folder} has no sub-folders, and no {folder.name}.csv with label and youtube_id gives the classes")
    if name.startswith("ucf"):
        videos = {path.stem: (path, path.parent.name) for path in paths if re.fullmatch(UCF_NAME, path.stem)}
        listed = videos
        if name != "ucf":
            lists = [p / q / f"{role}list0{name[-1]}.txt" for p in (root, root.parent) for q in ("ucfTrainTestlist", "")]
            if not (lists := [path for path in lists if path.is_file()]):
                archive = "UCF101TrainTestSplits-RecognitionTask.zip"
                raise UserError(f"{name} needs the lists of {archive}: unpack it in {root.parent}")
            listed = dict.fromkeys(re.findall(UCF_NAME, read_text(lists[0])))  # lists have .avi, copies often .mp4
        return folder, [videos.get(name, (None, "")) for name in listed], notes
    if items and len(items) < len(paths):
        notes.append(f"{len(paths) - len(items)} videos outside the class folders")
    return folder, items or [(path, folder.name) for path in paths], notes


def kinetics_rows(root, names):
    """Labelled rows of the CSV whose name contains one of `names` as a word: kinetics600_train.csv, validate.csv; else []."""
    for path in sorted([*root.glob("*.csv"), *root.glob("*/*.csv")]):
        words = re.findall("[a-z]+", path.stem.lower())
        if set(names) & set(words) and "holdout" not in words:
            lines = re.sub(r"^sep=.*\s", "", read_text(path)).splitlines()
            mark = max(",;\t", key=lines[0].count) if lines else ","  # the separator depends on the spreadsheet's locale
            rows = list(csv.DictReader(lines, delimiter=mark, skipinitialspace=True))
            if rows := [row for row in rows if row.get("youtube_id") and row.get("label") not in (None, "", "nan", "NaN")]:
                return rows
    return []


def read_text(path):
    """The text of a list: UTF-8, or as spreadsheets write it, with a byte order mark or in UTF-16."""
    content = path.read_bytes()
    return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", "backslashreplace")


def find_videos(config, role):
    """The videos of --dataset and --data-dir: (root, [(path, class name)], class names, notes on what was left out).

    Test videos exclude files of the training set, links included. If none is left, all are used and a note says so.
    """
    given = find_root(config)
    root, listed, notes = find(given, role, config.dataset)
    items = [item for item in listed if item[0]]
    if len(items) < len(listed):
        notes.append(f"{len(listed) - len(items)} of {len(listed)} listed videos are missing")
    if role == "test":
        trained = {os.path.realpath(path) for path, _ in find(given, "train", config.dataset)[1] if path}
        own = [item for item in items if os.path.realpath(item[0]) not in trained]
        if own and len(own) < len(items):
            notes.append(f"{len(items) - len(own)} test videos that are also training videos")
        elif not own:
            notes = [f"{printable(root)} has no held-out videos: the training videos are used in their place"]
        items = own or items
    if not items:
        raise UserError(f"{printable(root)} holds no videos: {'; '.join(notes) or 'it is empty'}; give another --data-dir")
    classes = sorted({printable(name) for _, name in listed if name})  # those listed, even if no video of a class is there
    return root, [(path, printable(name)) for path, name in items], classes, notes
