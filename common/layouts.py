"""Layouts of data sets as distributed: which files are videos, their classes, and the split into training and test sets."""

import csv
import re

from common import video
from common.drawn import CLONE
from common.utils import UserError, printable

LAYOUTS = {  # default directory, and source
    "folder": ("DIRECTORY", "videos in sub-folders, one for each class"),
    "kinetics": ("data/kinetics600", "https://github.com/cvdfoundation/kinetics-dataset"),
    "taichi": ("data/taichi", "https://github.com/AliaksandrSiarohin/video-preprocessing"),
    "sprites": ("data/Sprites", f"{CLONE} data/Sprites"),
}
UCF = ("ucf", "ucf-split1", "ucf-split2", "ucf-split3")
LAYOUTS |= dict.fromkeys(UCF, ("data/UCF-101", "https://www.crcv.ucf.edu/data/UCF101.php"))
TRAIN, VAL, TEST = ("train", "training"), ("val", "validate", "validation"), ("test", "testing")
UCF_NAME = r"v_\w+?_g\d+_c\d+"


def find_videos(root, name, role):
    """(directory, [(path, class name)], class names, notes on what was left out) of a data set in a directory. UserError.

    If there is a train/, the role "test" takes the test/ or val/ beside it. If nothing is held out, it takes the training
    videos, and a note says so. Classes are sub-folders; TaiChi-HD has one class. ucf is all of UCF-101, as in the paper;
    ucf-split1, 2, 3 are the official splits. Kinetics is tested on val/, since some releases withhold the labels of test/; its
    CSVs, if there, give the classes of ID_START_END.mp4, six digits each. Many of the videos are no longer online.
    """
    there = {path.name.lower(): path for path in root.iterdir() if path.is_dir()}
    train = next((there[part] for part in TRAIN if part in there), root)
    held_out = VAL if name == "kinetics" else TEST + VAL
    folder = train if role == "train" else next((there[part] for part in held_out if part in there), train)
    paths, notes = video.list_videos(folder)
    tables = [*root.glob(f"{folder.name}*.csv"), *root.glob(f"annotations/{folder.name}*.csv")]  # val.csv or validate.csv
    if name in UCF:
        known = {path.stem: (path, path.parent.name) for path in paths if re.fullmatch(UCF_NAME, path.stem)}
        listed = list(known.values())
        if name != "ucf":
            place = root if (root / "ucfTrainTestlist").is_dir() else root.parent
            text = (place / f"ucfTrainTestlist/{role}list0{name[-1]}.txt").read_text()
            listed = [known.get(stem, (None, "")) for stem in re.findall(UCF_NAME, text)]  # .avi, but copies are often .mp4
    elif name == "kinetics" and tables:
        known = {re.sub(r"_\d{6}_\d{6}$", "", path.stem): path for path in paths}  # IDs are unique
        with open(tables[0], encoding="utf-8-sig", errors="replace", newline="") as file:  # spreadsheets add a byte order mark
            listed = [(known.get(row.get("youtube_id")), row["label"]) for row in csv.DictReader(file) if row.get("label")]
    else:
        listed = [(path, path.relative_to(folder).parts[0]) for path in paths if path.parent != folder]
        if not listed and name != "kinetics":
            listed = [(path, folder.name if name == "folder" else name) for path in paths]
        if len(listed) < len(paths):
            notes.append(f"{len(paths) - len(listed)} videos outside the class folders")

    items = [(path, printable(label)) for path, label in listed if path]
    if len(items) < len(listed):
        notes.append(f"{len(listed) - len(items)} of {len(listed)} listed videos are missing")
    if not items:
        raise UserError("; ".join([f"{printable(folder)} holds no videos of {name}: give another --data-dir", *notes]))
    if role == "test" and folder == train and "split" not in name:
        notes = [f"{printable(folder)} has no held-out videos: the training videos are used in their place"]
    classes = sorted({printable(label) for _, label in listed if label})  # those listed, even if no video of a class is there
    return folder, items, classes, notes
