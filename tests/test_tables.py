"""The tables of results in the pages are those that studies.tables prints."""

import csv
from statistics import mean

import pytest
from conftest import ROOT

from studies import tables

TABLES = tables.tables(ROOT / "docs")


def cells(lines):
    return [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in lines.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("pages, title", TABLES, ids=[title for _, title in TABLES])
def test_pages_have_the_tables(pages, title, monkeypatch, capsys):
    monkeypatch.setattr(tables, "tables", lambda docs: {(pages, title): TABLES[pages, title]})
    monkeypatch.setattr("sys.argv", ["tables"])
    tables.main()
    header, _, *rows = cells(capsys.readouterr().out)
    for page in pages.split(", "):
        found = cells((ROOT / page).read_text())
        start = found.index(header)
        assert found[start + 2 : start + 2 + len(rows)] == rows


# What the method, learning rate and settings of a row's runs contain.
ROWS = {
    "NeRV-Diffusion, the paper's decoder (replicate padding)": ("ours 2 sprites", "--token-dim 64 --lpips"),
    "… with a shared basis (not the paper's)": ("ours 1 sprites", "--pictures"),  # as the option was called
    "frame-wise latent diffusion, Latte's shape": ("frames 4 sprites",),
    "diffusion of space-time patches of pixels": ("pixels 4 sprites",),
}
COLUMNS = {  # column -> (column of compare.csv, digits, settings)
    "latent size": ("numbers", 0, "| 12 min, 0.6, bf16 on"),
    "12 minutes, three seeds": ("gFVD", 0, "| 12 min, 0.6, bf16 on"),
    "an hour, one seed": ("gFVD", 0, "| 60 min, 0.6, bf16 on"),
    "seconds to sample a clip": ("seconds a clip", 2, "| 12 min, 0.6, bf16 on"),
}


@pytest.mark.parametrize("column", COLUMNS)
def test_the_comparison_is_of_its_runs(column):
    """Each cell is the mean of the runs with all words, with the least and most gFVD of several; the best is bold."""
    (name, digits, settings), texts, means = COLUMNS[column], {}, {}
    with open(ROOT / "docs/compare.csv", newline="") as file:
        runs = list(csv.DictReader(file))
    for row, words in ROWS.items():
        found = [run for run in runs if all(w in f"{run['method']} {run['lr']} {run['settings']}" for w in (*words, settings))]
        values = [float(run[name]) for run in found]
        middle, low, high = (f"{value:,.{digits}f}" for value in (mean(values), min(values), max(values))) if values else "..."
        several = name == "gFVD" and len(values) > 1
        texts[row] = (f"{middle} ({low} to {high})" if several else middle) if values else "not run"
        if values and name != "numbers":
            means[row] = float(middle)
    best = [row for row in means if means[row] == min(means.values())]
    cells = TABLES["README.md, docs/compare.md", "gFVD after equal time"]
    assert {row: cells[row][column].replace("**", "") for row in cells} == texts
    assert [row for row in cells if cells[row][column].startswith("**")] == best
