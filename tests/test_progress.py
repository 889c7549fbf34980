"""Progress of a loop where nobody watches: lines in a file, few of them."""

import re
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT
from tqdm import tqdm

from common import progress, utils


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves: clock.now is in seconds."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def lines_of(clock, capsys, steps, seconds):
    """(seconds, line) of all that a loop of so many steps, of so many seconds each, leaves on stderr, which is no terminal."""
    seen = []
    for _ in progress.bar(range(steps), "work", unit="step"):
        clock.now += seconds
        seen += [(clock.now - seconds, line) for line in capsys.readouterr().err.splitlines(keepends=True)]
    return seen + [(clock.now, line) for line in capsys.readouterr().err.splitlines(keepends=True)]


@pytest.mark.parametrize("seconds", [0.0, 0.001, 0.01, 0.1])
def test_a_thousand_steps_are_few_lines(clock, capsys, seconds):
    lines = [line for _, line in lines_of(clock, capsys, 1000, seconds)]
    assert 1 <= len(lines) <= 14
    assert all(line.startswith("work: ") and line.endswith("]\n") and "\r" not in line for line in lines)
    assert lines[-1].startswith("work: 100% 1000/1000 [")
    if seconds == 0.1:
        steps = [int(re.search(r"(\d+)/1000 ", line)[1]) for line in lines]
        for tenth in range(100, 1001, 100):
            assert any(0 <= step - tenth <= 10 for step in steps), tenth  # within a second


def test_a_long_loop_says_something_soon_and_then_every_half_minute(clock, capsys):
    times = [when for when, _ in lines_of(clock, capsys, 1000, 1.5)]
    assert times[0] < 5 and max(b - a for a, b in zip(times, times[1:])) <= 31.5
    assert len(times) <= 1500 / 30 + 10 + 6


def test_lines_count_what_was_done_before_and_show_the_losses(clock, capsys):
    log = progress.bar(desc="vae", total=400, unit="step", initial=300)
    for _ in range(100):
        clock.now += 0.125
        log.set_postfix_str("loss 0.5")
        log.update()
    log.close()
    log.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("vae: 100% 400/400 [00:12<") and "8.00step/s" in lines[-1] and "loss 0.5" in lines[-1]
    assert len(lines) < 10 and len(set(lines)) == len(lines)


def test_nothing_is_said_of_nothing_done_and_where_another_process_says_it(capsys):
    assert list(progress.bar([], "none")) == [] and list(progress.bar(range(9), "other", disable=True)) == list(range(9))
    with progress.bar(total=5, desc="failed"):
        pass
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.bar(total=5, desc="work", initial=2, unit="step") as bar:
        assert isinstance(bar, tqdm)
        bar.update(3)
    assert "\rwork: 100%|" in capsys.readouterr().err


def test_a_log_of_a_run_is_lines(tmp_path, capsys):
    import torch

    log = utils.RunLog(tmp_path / "run", 300, 100)
    for step in range(300):
        log.add(loss=torch.tensor(1.0))
        log.step(step)
    log.print("a message")
    log.close()
    out, err = capsys.readouterr()
    assert out == "a message\n" and err.count("\n") == 1 and err.startswith("run: 100% 300/300 [") and "loss 1]" in err


def test_all_loops_show_progress_the_same_way():
    rooms = [path for room in (".", "common", "bench", "studies") for path in (ROOT / room).glob("*.py")]
    assert len(rooms) > 15
    assert [path.name for path in rooms if "tqdm(" in path.read_text()] == ["progress.py"]
