"""Data sets as they are distributed: which files are videos, of which class, for training or for testing."""

import csv
import os
import re
from pathlib import Path

from common import video
from common.drawn import CLONE
from common.utils import UserError, printable

# Where each is unless it is named, names one of which its directory has in it, where it comes from, and what it holds.
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
    """The directory that --data-dir or the data set names, one in it, or the one it is in: the first that is laid out so.

    UserError, with where to get the data set, where none is.
    """
    usual, marks, source, holds = LAYOUTS[config.dataset]
    given = Path(config.data_dir or usual or "DIRECTORY")
    if not given.is_dir():
        where = f"download it ({source}), or name its place" if source else "name one with videos, a sub-folder per class,"
        raise UserError(f"there is no directory {printable(given)}: {where} with --data-dir")
    root = given.resolve()  # one folder has many names
    if not marks:
        return root.parent if root.name.lower() in TRAIN else root
    for place in (root, *sorted(p for p in root.iterdir() if p.is_dir()), root.parent):
        if any(next(place.glob(mark), None) for mark in marks.split()):
            return place
    about = f"{printable(given)} does not look like {config.dataset}"
    raise UserError(f"{about}: it should hold {holds} ({source}); name another --data-dir")


def find(root, role, name):
    """(directory, [(path, class name)], notes on what was left out) of a data set. The path is None where a list names a video
    that is not there.

    Of a directory with train/ in it, the role "test" is the test/ or val/ beside, where there is one. Classes are sub-folders,
    but TaiChi-HD and Sky Timelapse are of one. ucf is all of UCF-101, as in the paper; ucf-split1, 2, 3 are official lists. Of
    Kinetics, the test set is val/, as some releases keep back the labels of test/; a CSV with label and youtube_id names the
    classes of ID_START_END.mp4, with six digits each, or of ID.mp4. Many are gone.
    """
    there = {path.name.lower(): path for path in root.iterdir() if path.is_dir()}
    names = (VAL + TEST if name == "kinetics" else TEST + VAL) if role == "test" else ()
    folder = next((there[name] for name in (*names, *TRAIN) if name in there), root)
    paths, notes = video.list_videos(folder)
    if name in ("taichi", "sky"):
        return folder, [(path, name) for path in paths], notes
    items = [(path, path.relative_to(folder).parts[0]) for path in paths if path.parent != folder]
    if name == "kinetics" and (rows := kinetics_rows(root, VAL if folder.name in VAL else (folder.name,))):
        videos = {re.sub(r"_\d{6}_\d{6}$", "", path.stem): path for path in paths}  # an ID comes once
        return folder, [(videos.get(row["youtube_id"]), row["label"]) for row in rows], notes
    if name == "kinetics" and paths and not items:
        raise UserError(f"{folder} has no sub-folders, and no {folder.name}.csv with label and youtube_id names the classes")
    if name.startswith("ucf"):
        videos = {path.stem: (path, path.parent.name) for path in paths if re.fullmatch(UCF_NAME, path.stem)}
        listed = videos
        if name != "ucf":
            lists = [p / q / f"{role}list0{name[-1]}.txt" for p in (root, root.parent) for q in ("ucfTrainTestlist", "")]
            if not (lists := [path for path in lists if path.is_file()]):
                raise UserError(
                    f"{name} takes the lists of UCF101TrainTestSplits-RecognitionTask.zip: unpack it in {root.parent}"
                )
            listed = dict.fromkeys(re.findall(UCF_NAME, read_text(lists[0])))  # they say .avi, and many keep MP4s
        return folder, [videos.get(name, (None, "")) for name in listed], notes
    if items and len(items) < len(paths):
        notes.append(f"{len(paths) - len(items)} videos beside the folders, which are the classes")
    return folder, items or [(path, folder.name) for path in paths], notes


def kinetics_rows(root, names):
    """The labelled rows of a table that is called by one of the names: kinetics600_train.csv, validate.csv; [] without one."""
    for path in sorted([*root.glob("*.csv"), *root.glob("*/*.csv")]):
        words = re.findall("[a-z]+", path.stem.lower())
        if set(names) & set(words) and "holdout" not in words:
            lines = re.sub(r"^sep=.*\s", "", read_text(path)).splitlines()
            mark = max(",;\t", key=lines[0].count) if lines else ","  # a spreadsheet writes what its language has
            rows = list(csv.DictReader(lines, delimiter=mark, skipinitialspace=True))
            if rows := [row for row in rows if row.get("youtube_id") and row.get("label") not in (None, "", "nan", "NaN")]:
                return rows
    return []


def read_text(path):
    """The text of a list, as spreadsheets write it, too: with a mark of the encoding, or in UTF-16."""
    content = path.read_bytes()
    return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", "backslashreplace")


def find_videos(config, role):
    """What --dataset and --data-dir name: (root, [(path, class name)], class names, notes on what was left out).

    A file for training is not one for testing, whatever its names; where all of them are, a note says that nothing is held out.
    """
    given = find_root(config)
    root, listed, notes = find(given, role, config.dataset)
    items = [item for item in listed if item[0]]
    if len(items) < len(listed):
        notes.append(f"{len(listed) - len(items)} of {len(listed)} videos in the list are not there")
    if role == "test":
        trained = {os.path.realpath(path) for path, _ in find(given, "train", config.dataset)[1] if path}
        own = [item for item in items if os.path.realpath(item[0]) not in trained]
        if own and len(own) < len(items):
            notes.append(f"{len(items) - len(own)} videos that are for training, too")
        elif not own:
            notes = [f"nothing is held out of {printable(root)}: its training videos stand in for what is called held out"]
        items = own or items
    if not items:
        raise UserError(f"{printable(root)} holds no videos: {'; '.join(notes) or 'it is empty'}; name another with --data-dir")
    classes = sorted({printable(name) for _, name in listed if name})  # of the list, whatever is there
    return root, [(path, printable(name)) for path, name in items], classes, notes
