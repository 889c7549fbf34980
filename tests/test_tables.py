"""The tables of results in the pages are those that studies.tables prints."""

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


def test_a_cell_is_of_the_runs_that_have_all_words():
    runs = [{"method": "a", "lr": lr, "settings": "x 1", "gFVD": gFVD, "n": "2000"} for lr, gFVD in zip("122", "479")]
    assert tables.measured(runs, ("a 2", "x"), "gFVD", 0) == "8 (7 to 9)"
    assert tables.measured(runs, ("a 1",), "gFVD", 1) == "4.0" and tables.measured(runs, ("a 2",), "n", 0) == "2,000"
    assert tables.measured(runs, ("a", "y"), "gFVD", 0) == "not run"
