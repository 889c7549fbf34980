"""The house in order: who imports whom, how many lines each room has, and that the root can be read alone."""

import ast

import pytest
from conftest import ROOT

ROOMS = ("", "common", "extras", "page", "siblings", "studies", "bench")
FILES = {
    path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for room in ROOMS
    for path in (ROOT / room).glob("*.py")
}
# What each room may import. The root is the paper's method; extras may build on its decoder, and nothing on what is above it.
BELOW = {
    "common": {"common"},
    "extras": {"common", "extras", "nerv", "losses"},
    "page": {"common", "extras", "page"},
    "root": {"common", "extras", "page", "root"},
    "siblings": {"common", "extras", "root", "siblings"},
    "bench": {"common", "extras", "root", "siblings", "studies", "bench"},
    "studies": {"common", "extras", "root", "siblings", "studies"},
}
MOST_LINES = {
    "nerv.py": 220, "vae.py": 360, "dit.py": 360, "losses.py": 130, "data.py": 300, "fvd.py": 320, "sample.py": 220,
    "evaluate.py": 330, "demo.py": 110, "common": 1100, "extras": 450, "siblings": 2800, "studies": 1500, "bench": 500,
    "tests": 5000,
}  # fmt: skip
ROOT_LINES, ALL_LINES, MAIN_LINES = 2400, 8700, 100  # of the root, of all but tests, of each main


def room(name):
    return name.split(".")[0] if name.split(".")[0] in ROOMS else "root"


def imports(path):
    """The modules of this repository that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(FILES.values())


def lines(path):
    return sum(len(file.read_text().splitlines()) for file in ([path] if path.is_file() else path.glob("*.py")))


def test_imports_go_down_only_and_in_no_circle():
    graph = {name: imports(path) for path, name in FILES.items()}
    assert "nerv" in graph["vae"] and "common.utils" in graph["data"] and "vae" in graph["dit"]  # it sees them
    for name, others in graph.items():
        wrong = [other for other in others if not {other, room(other)} & BELOW[room(name)]]
        assert not wrong, f"{name} imports {wrong}"
    while graph:  # take away what imports nothing that is left, until nothing is left
        leaves = {name for name, others in graph.items() if not (others - {name}) & set(graph)}
        assert leaves, f"a circle among {sorted(graph)}"
        graph = {name: others for name, others in graph.items() if name not in leaves}


def test_the_root_is_the_method():
    assert {name for name in FILES.values() if room(name) == "root"} == {
        place.removesuffix(".py") for place in MOST_LINES if place.endswith(".py")
    }


@pytest.mark.parametrize("place", MOST_LINES)
def test_no_room_outgrows_its_reader(place):
    assert lines(ROOT / place) <= MOST_LINES[place]


def test_the_root_and_each_training_can_be_read_in_an_evening():
    root = {place: ROOT / place for place in MOST_LINES if place.endswith(".py")}
    assert sum(map(lines, root.values())) <= ROOT_LINES and sum(map(lines, FILES)) <= ALL_LINES
    for place, path in root.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name == "main":
                assert node.end_lineno - node.lineno < MAIN_LINES, place
