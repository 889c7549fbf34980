"""Shapes and Sprites: what moves how, which characters and cells, laid over each other as PIL does."""

import hashlib
import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import data
from common import drawn
from common.drawn import CELL, COLUMNS, Shapes, Sprites
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


def test_a_long_motion_begins_as_its_clips_do_and_returns():
    settings = data.Config("shapes-long", resolution=32)
    clips, longer = (data.open_dataset(replace(settings, num_frames=n), "train") for n in (16, 2 * data.LONG_PERIOD))
    spaced = data.open_dataset(replace(settings, num_frames=16, stride=8), "train")  # every eighth frame of the same videos
    for i in (0, 2, 4):
        frames = longer[i][0].astype(int)
        assert np.array_equal(clips[i][0], frames[:16])  # what stage 1 learns from is the beginning of what vin.py does
        assert abs(frames[: data.LONG_PERIOD] - frames[data.LONG_PERIOD :]).max() <= 1
        assert abs(frames[: data.LONG_PERIOD] - frames[0]).mean((1, 2, 3)).max() > 5
        assert np.array_equal(spaced[i][0], longer[i][0][::8])


def test_shapes_can_be_drawn_between_their_frames():
    shapes = Shapes()
    assert np.array_equal(Shapes(stride=8)[3][0], shapes[3][0])  # a clip is one turn, whatever its frames are called
    assert np.array_equal(shapes.draw(3, [2, 5.0]), shapes.draw(3)[[2, 5]])
    left, between, right = (shapes.draw(0, [t]).astype(float) for t in (3, 3.5, 4))  # class 0 moves sideways, fast at t = 4
    assert min(abs(between - left).mean(), abs(between - right).mean()) > 0.3 * abs(left - right).mean() > 0


# ------------------------------------------------------------------------------------------------------------------- sprites


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    """Sheets of translucent noise, each of its own."""
    root = tmp_path_factory.mktemp("Sprites")
    for n, (layer, k) in enumerate(SHEETS):
        coarse = np.random.default_rng(n).integers(0, 256, (21 * 8, COLUMNS * 8, 4), np.uint8)  # 8 x 8 values a cell, alpha too
        (root / layer).mkdir(exist_ok=True)
        Image.fromarray(coarse).resize((COLUMNS * CELL, 21 * CELL)).save(root / layer / f"{k}.png", compress_level=1)
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
    assert {train.label(i) for i in range(0, 81, 9)} == set(range(9))  # an evenly spaced sample, too


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


def test_wrong_use(layers, tmp_path, monkeypatch, train):
    def error(where, **options):
        with pytest.raises((UserError, OSError)) as caught:  # both are one line and status 2
            data.open_dataset(replace(CONFIG, data_dir=str(where), **options), "train")
        return str(caught.value)

    monkeypatch.chdir(tmp_path)
    assert "git clone https://github.com/YingzhenLi/Sprites data/Sprites" in error("")
    assert "leave out --flip" in error(layers, flip=True)
    shutil.copytree(layers, root := tmp_path / "data" / "Sprites")
    assert np.array_equal(data.open_dataset(CONFIG, "train")[11][0], train[11][0])
    hair = root / "hair" / "5.png"
    hair.write_bytes(b"no PNG")
    assert str(hair) in error(root)
    hair.unlink()
    assert str(hair) in error(root)


@pytest.mark.skipif(not SHARED.is_dir(), reason="shared/data is not here")
def test_the_published_layers():
    test, more = Sprites(SHARED, "test", 48), Sprites(SHARED, "test", 128, 11, 2)
    assert digest((Sprites(SHARED), range(0, 900, 7)), (more, range(9)), (test, range(9))) == "15b35afc41a5cb59"
