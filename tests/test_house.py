"""The house in order: which files there are, who imports whom, and that each script says what it can do."""

import ast
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from common import utils

ROOMS = ("common", "bench", "studies")
FILES = {
    path: ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for room in (".", *ROOMS)
    for path in (ROOT / room).glob("*.py")
}
SCRIPTS = sorted(name for path, name in FILES.items() if "__main__" in path.read_text())
METHOD = {"nerv", "vae", "dit", "sample", "data", "fvd"}


def imports(path):
    """The modules of this repository that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(FILES.values())


def test_the_root_is_the_method():
    root = {name for name in FILES.values() if "." not in name}
    assert METHOD | {"losses", "evaluate", "demo"} <= root and len(root) <= 12


def test_no_import_runs_in_a_circle_or_back_up():
    graph = {name: imports(path) for path, name in FILES.items()}
    assert "nerv" in graph["vae"] and "common.utils" in graph["data"] and "vae" in graph["dit"]  # it sees them
    for name, others in graph.items():
        room = name.split(".")[0] if "." in name else "root"
        below = {"common": {"common"}, "root": {"root", "common"}, "bench": {"root", "common", "bench"}}
        rooms = {other.split(".")[0] if "." in other else "root" for other in others}
        assert rooms <= below.get(room, {"root", "common", "bench", "studies"}), name
    while graph:  # take away what imports nothing that is left, until nothing is left
        leaves = {name for name, others in graph.items() if not others & set(graph)}
        assert leaves, f"a circle among {sorted(graph)}"
        graph = {name: others for name, others in graph.items() if name not in leaves}


ASK = """
import runpy, sys
for path in sys.argv[1:]:
    sys.argv = [path, "--help"]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        print(end.code, end="\\f")
"""


@pytest.fixture(scope="module")
def helps(tmp_path_factory):
    """What each script prints for --help, and its exit status. One new Python asks all: an import of torch takes seconds."""
    cwd, env = tmp_path_factory.mktemp("help"), os.environ | {"PYTHONPATH": utils.python_path(ROOT)}
    paths = [str(ROOT / f"{name.replace('.', '/')}.py") for name in SCRIPTS]
    done = subprocess.run([sys.executable, "-c", ASK, *paths], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "" and not list(cwd.iterdir())
    return dict(zip(SCRIPTS, done.stdout.split("\f")[:-1], strict=True))


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, helps):
    assert helps[name].endswith("\n0")
    options = re.split(r"\n  --", helps[name])[1:]
    if name == "studies.variants":  # all others are those of vae.py and dit.py
        return
    assert len(options) > 3 and all("(default:" in " ".join(option.split()) for option in options)


@pytest.mark.parametrize("name", ["vae", "dit"])
def test_options_of_the_ablations_are_not_the_trainings(name, call, capsys):
    assert call(f"{name}.py", "--help") == 0
    assert not re.search("--(modulation|reuse|upsampling|side|denoiser) ", capsys.readouterr().out)
