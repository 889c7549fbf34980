"""The house in order: which files there are, who imports whom, and that each script says what it can do."""

import ast
import re
import runpy
import sys

import pytest
from conftest import ROOT

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


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, tmp_path, monkeypatch, capsys):
    (path,) = (path for path, module in FILES.items() if module == name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr()
    assert end.value.code == 0 and printed.err == "" and not list(tmp_path.iterdir())
    options = re.split(r"\n  --", printed.out)[1:]
    if name == "studies.variants":  # all others are those of vae.py and dit.py
        return
    assert len(options) > 3 and all("(default:" in " ".join(option.split()) for option in options)


@pytest.mark.parametrize("name", ["vae", "dit"])
def test_options_of_the_ablations_are_not_the_trainings(name, call, capsys):
    assert call(f"{name}.py", "--help") == 0
    assert not re.search("--(modulation|reuse|upsampling|side|denoiser) ", capsys.readouterr().out)
