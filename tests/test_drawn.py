"""Shapes and Sprites: what moves how, which characters and cells, laid over each other as PIL does."""

import hashlib
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import data
from common import drawn
from common.drawn import CELL, COLUMNS, LOOPS, Shapes, Sprites
from common.utils import UserError

SHARED = ROOT.parent / "shared" / "data" / "sprites"
SHEETS = [(layer, k) for layer, numbers in drawn.LAYERS.items() for k in numbers]


def digest(*parts):
    """A hash of clips of (data set, indices)."""
    found = hashlib.sha256()
    for dataset, indices in parts:
        for i in indices:
            frames, label = dataset[i]
            found.update(frames.tobytes() + bytes([label]))
    return found.hexdigest()[:16]


# -------------------------------------------------------------------------------------------------------------------- shapes


def test_shapes_are_what_they_always_were():
    sets = (Shapes(), range(18)), (Shapes("test", 64, 8), range(9)), (Shapes("train", 32, 16, period=64), range(9))
    assert digest(*sets) == "1549f1b394590ad0"


def test_shapes_do_not_depend_on_global_random_state_and_on_nothing_but_role_and_index():
    frames, label = Shapes()[3]
    np.random.seed(7), random.seed(7), torch.manual_seed(7)
    assert np.array_equal(Shapes()[3][0], frames) and label == 3 and frames.shape == (16, 32, 32, 3)
    assert all(abs(other.astype(int) - frames).mean() > 1 for other in (Shapes("test")[3][0], Shapes()[3 + 9][0]))
    assert [Shapes("test")[i][1] for i in range(18)] == list(range(9)) * 2


def test_shapes_move_as_their_class_says():
    for i, name in enumerate(Shapes.classes):
        frames = Shapes()[i][0].mean(-1)  # [T, H, W]
        bright = (frames - np.median(frames, (1, 2), keepdims=True)).clip(0) ** 2
        for axis, motions in ((1, ("sideways", "circle")), (2, ("updown", "circle"))):  # what is left after the other axis
            line = bright.sum(axis)
            centre = (line * np.linspace(0, 1, 32)).sum(1) / line.sum(1)
            assert (np.ptp(centre) > 0.1) == name.endswith(motions), name


def test_long_shapes_take_several_clips_for_a_turn():
    settings = data.Config("shapes-long", resolution=32)
    clips, longer = (data.open_dataset(replace(settings, num_frames=n), "train") for n in (16, 2 * data.LONG_PERIOD))
    for i in (0, 2, 4):
        frames = longer[i][0].astype(int)
        assert np.array_equal(clips[i][0], frames[:16])  # what stage 1 learns from is the beginning of what vin.py does
        assert abs(frames[: data.LONG_PERIOD] - frames[data.LONG_PERIOD :]).max() <= 1
        assert abs(frames[: data.LONG_PERIOD] - frames[0]).mean((1, 2, 3)).max() > 5
    steps = [abs(np.diff(s[2][0].astype(int), axis=0)).mean() for s in (clips, Shapes())]
    assert steps[0] < 0.5 * steps[1]  # and slower
    spaced = data.open_dataset(replace(settings, num_frames=16, stride=8), "train")  # every eighth frame of the same videos
    assert all(np.array_equal(spaced[i][0], longer[i][0][::8]) for i in (0, 2, 4))
    start = [int(clips[i][0][0].sum((0, 2), int).argmax()) for i in range(0, 90, 9)]  # the brightest column at the beginning
    assert min(start) < 12 and max(start) > 19  # left or right


def test_shapes_can_be_drawn_between_their_frames():
    shapes = Shapes()
    assert np.array_equal(Shapes(stride=8)[3][0], shapes[3][0])  # a clip is one turn, whatever its frames are called
    assert np.array_equal(shapes.draw(3, [2, 5.0]), shapes.draw(3)[[2, 5]])
    left, between, right = (shapes.draw(0, [t]).astype(float) for t in (3, 3.5, 4))  # class 0 moves sideways, fast at t = 4
    assert min(abs(between - left).mean(), abs(between - right).mean()) > 0.3 * abs(left - right).mean() > 0


# ------------------------------------------------------------------------------------------------------------------- sprites


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    """Sheets of one translucent square per cell: place and colour follow from the layer, its number and the cell."""
    root = tmp_path_factory.mktemp("Sprites")
    for n, (layer, k) in enumerate(SHEETS):
        rng = np.random.default_rng([n])
        sheet = np.zeros((drawn.ROWS * CELL, COLUMNS * CELL, 4), np.uint8)
        for cell in {c + COLUMNS * row for loop in LOOPS.values() for c in loop for row in range(3)}:
            y, x = cell // COLUMNS * CELL, cell % COLUMNS * CELL
            corner_y, corner_x = rng.integers(0, 24, 2)
            part = sheet[y + corner_y : y + corner_y + 40, x + corner_x : x + corner_x + 40]
            part[:] = rng.integers(0, 256, (40, 40, 4), np.uint8)  # alpha too, from 0 to 255
            part[:10] = (*rng.integers(0, 256, 3), 255)
        (root / layer).mkdir(exist_ok=True)
        Image.fromarray(sheet).save(root / layer / f"{k}.png", compress_level=1)
    return root


@pytest.fixture(scope="module")
def train(layers):
    return Sprites(layers)


def test_characters_and_classes(layers, train):
    test = Sprites(layers, "test")
    assert (len(train), len(test)) == (9 * 1000, 9 * 296)
    both = [*train.characters.tolist(), *test.characters.tolist()]
    assert sorted(both) == list(range(6**4))  # each in one of the two roles
    assert both[:4] == [1116, 1135, 17, 469] and both[1000:1004] == [884, 1285, 252, 297]  # on any machine
    assert len(set(train.classes)) == 9 and train.classes[3] == "walk_left"
    for k in range(0, len(train), 9):
        assert {train.label(i) for i in range(k, k + 9)} == set(range(9))


def cell(root, layer, k, number):
    y, x = number // COLUMNS * CELL, number % COLUMNS * CELL
    return Image.open(root / layer / f"{k}.png").convert("RGBA").crop((x, y, x + CELL, y + CELL))


# The first cell of each class and those after it, written out.
FIRST = {"spellcard": (13, 26, 39), "walk": (118, 131, 144), "slash": (169, 182, 195)}
STEPS = {"spellcard": (0, 1, 2, 3, 4, 5, 4, 0), "walk": range(8), "slash": (0, 1, 2, 3, 4, 5, 4, 0)}


def composed(root, dataset, i):
    """Clip i the slow way: frame by frame, layer by layer, with PIL."""
    number, frames = int(dataset.characters[i // 9]), []
    body, bottom, top, hair = (number // 6**k % 6 for k in (3, 2, 1, 0))
    action, direction = dataset.classes[dataset[i][1]].split("_")
    for n in (FIRST[action][("left", "front", "right").index(direction)] + step for step in STEPS[action]):
        frame = Image.new("RGBA", (CELL, CELL), "black")
        for layer, k in (("body", body), ("shoes", 1), ("bottomwear", bottom), ("topwear", top), ("hair", hair)):
            frame = Image.alpha_composite(frame, cell(root, layer, k, n))
        frames.append(np.asarray(frame.convert("RGB")))
    return np.stack(frames)


@pytest.mark.parametrize("i", [*range(9), 4321, 9000 + 4321])
def test_clips_are_what_pil_composes(layers, train, i):
    frames, label = train[i]
    assert frames.dtype == np.uint8 and label == train.label(i % 9000)
    assert np.array_equal(frames, composed(layers, train, i % 9000))


def test_sizes_and_loops_that_are_repeated_cut_and_strided(layers, train):
    frames = train[3][0]
    large, small = Sprites(layers, resolution=128)[3][0], Sprites(layers, resolution=32)[3][0]
    for length, stride, loop in ((19, 1, [*range(8), *range(8), 0, 1, 2]), (3, 1, [0, 1, 2]), (5, 3, [0, 3, 6, 1, 4])):
        assert np.array_equal(Sprites(layers, num_frames=length, stride=stride)[3][0], frames[loop])
    assert np.array_equal(large, np.kron(frames, np.ones((1, 2, 2, 1), np.uint8)))  # whole pixels: edges stay
    means = frames.reshape(8, 32, 2, 32, 2, 3).mean((2, 4))
    assert small.shape == (8, 32, 32, 3) and abs(small - means).mean() < 0.6 * abs(frames[:, ::2, ::2] - means).mean()
    assert Sprites(layers, resolution=48)[3][0].shape == (8, 48, 48, 3)


CONFIG = data.Config("sprites", resolution=64, num_frames=8)


def test_directories_around_and_within_are_understood(layers, tmp_path, monkeypatch, train):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "Sprites").symlink_to(layers)
    monkeypatch.chdir(tmp_path)
    for where in ("", str(layers), str(tmp_path / "data"), str(layers / "body")):
        dataset = data.open_dataset(replace(CONFIG, data_dir=where), "train")
        assert np.array_equal(dataset[11][0], train[11][0])


def test_bad_input(layers, tmp_path, monkeypatch):
    def error(where, **options):
        with pytest.raises(UserError) as caught:
            data.open_dataset(replace(CONFIG, data_dir=str(where), **options), "train")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    monkeypatch.chdir(tmp_path)
    assert "git clone https://github.com/YingzhenLi/Sprites data/Sprites" in error("")
    (tmp_path / "empty" / "within").mkdir(parents=True)
    assert "does not look like sprites" in (line := error("empty/within")) and drawn.CLONE in line
    assert "leave out --flip" in error(layers, flip=True)

    shutil.copytree(layers, root := tmp_path / "copy")
    hair = root / "hair" / "5.png"
    whole = hair.read_bytes()
    hair.unlink()
    assert f"{hair} is not a sheet of 832 x 1344 ([Errno 2] No such file" in (line := error(root)) and drawn.CLONE in line
    for content in (b"", whole[: len(whole) // 2], b"no PNG"):
        hair.write_bytes(content)
        assert f"{hair} is not a sheet" in (line := error(root)) and drawn.CLONE in line
    Image.new("RGBA", (640, 64)).save(hair)
    assert "(640 x 64 pixels)" in error(root)


@pytest.mark.skipif(not SHARED.is_dir(), reason="shared/data is not here")
def test_the_published_layers():
    train, test = (Sprites(SHARED, role) for role in ("train", "test"))
    sets = (train, range(0, 900, 7)), (Sprites(SHARED, "test", 128, 11, 2), range(9)), (Sprites(SHARED, "test", 48), range(9))
    assert digest(*sets) == "15b35afc41a5cb59"
    for i in (0, 100, 2000):
        assert np.array_equal(test[i][0], composed(SHARED, test, i))
    by_class = {test.classes[test.label(i)]: test[i][0].astype(int) for i in range(9)}  # of one character
    for action in LOOPS:  # left is about right, mirrored
        left, front, right = (by_class[f"{action}_{direction}"] for direction in ("left", "front", "right"))
        assert abs(left - right[:, :, ::-1]).mean() < 0.5 * abs(left - front).mean()
    assert not {test[i][0].tobytes() for i in range(90)} & {train[i][0].tobytes() for i in range(900)}
