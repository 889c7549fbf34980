"""bench/gpu.py on a CPU: what it starts, what it makes of failures, and one part of it from end to end."""

import shlex
import sys
import time

import pytest
import torch
from conftest import ROOT

import dit
import evaluate
import sample
import vae
from bench import costs, gpu, speed
from common import utils


@pytest.fixture
def report(tmp_path):
    report = gpu.Report(gpu.Config(preset="nano", batch_size=4, steps=2, out_dir=str(tmp_path / "out")), torch.device("cpu"))
    report.part, report.part_end = "part", time.time() + 60
    return report


def rows(report):
    return (report.out / "table.md").read_text().splitlines()[4:]


def last_line(output):
    return output.strip().splitlines()[-1]


def program(code):
    return f"-c {shlex.quote(code)}"


def test_what_goes_wrong_is_a_row_and_the_next_one_starts(report):
    assert report.run("good", program("print('fine')"), last_line)
    assert not report.run("bad", program("raise ValueError('a | b')"), last_line)
    assert not report.run("large", program("raise RuntimeError('CUDA out of memory. Tried')"), last_line)
    assert not report.run("unread", program("print('fine')"), lambda output: output[1000])
    good, bad, large, unread = rows(report)
    assert "| good | fine |" in good and "failed: ValueError: a / b" in bad
    assert "failed: out of memory" in large and "failed: string index" in unread and report.failed == 3
    assert (report.out / "02.log").read_text().startswith("$ python -c")


def test_programs_find_the_packages_that_this_one_finds(report, tmp_path, monkeypatch):
    (tmp_path / "elsewhere.py").write_text("where = 'found'")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert report.run("import", program("import elsewhere, nerv; print(elsewhere.where)"), last_line)
    assert "| import | found |" in rows(report)[0]


def test_a_part_ends_in_its_time(report):
    """One program is asked to stop and does, one is asked as its part's time is over, and for one there is none left."""
    stops = "import signal, sys, time; signal.signal(signal.SIGINT, lambda *_: sys.exit(0)); print('up', flush=True)"
    start = time.time()
    assert report.run("asked", program(stops + "; time.sleep(50)"), last_line, seconds=2)
    report.part_end = time.time() + 3.5
    hears = "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a background job's child does not
    assert not report.run("late", program(hears + "; time.sleep(50)"), last_line)
    assert not report.run("after", program("print('fine')"), last_line)
    assert time.time() - start < 30
    asked, late, after = rows(report)
    assert "| up |" in asked and "failed: no end within" in late and "left out: no time" in after


def test_a_loss_that_is_not_finite_is_no_result(report, monkeypatch):
    (report.out / "vae").mkdir()
    monkeypatch.setattr(report, "run", lambda what, command, read, seconds: read("peak memory 2.00 GiB"))
    losses = report.out / "vae" / "losses.csv"
    losses.write_text("step,seconds,loss,gan\n1,0.5,2.0,\n5,2.5,1.5,0.25\n")
    assert gpu.train(report, "", "vae.py", "vae", "") == "loss 1.5 in step 5, 2.00 steps / s, peak memory 2.00 GiB"
    losses.write_text("step,seconds,loss,gan\n1,0.5,2.0,\n5,2.5,1.5,nan\n")
    with pytest.raises(utils.UserError):
        gpu.train(report, "", "vae.py", "vae", "")


def test_its_programs_know_their_options(report, monkeypatch):
    """Every command of every part, as on a GPU: the file is there, and takes the options."""
    commands = []

    def run(what, command, read, seconds=None, **env):
        commands.append(shlex.split(command))
        return True

    monkeypatch.setattr(report, "run", run)
    monkeypatch.setattr(costs, "training_memory", lambda *_: {})
    monkeypatch.setattr(costs, "stage2_memory", lambda *_: {})
    report.gpu = True
    for part in gpu.PARTS.values():
        part(report.config, report)
    parsers = {"vae.py": (vae.Config, vae.preset_defaults), "dit.py": (dit.Config, dit.preset_defaults)}
    parsers |= {"evaluate.py": (evaluate.Config, None), "sample.py": (sample.Config, None)}
    parsers |= {"bench.costs": (costs.Config, None), "bench.speed": (speed.Config, None)}
    seen = set()
    for command in commands:
        name = next((word for word in command if word.startswith("bench.")), None)
        path = next((word for word in command if word.startswith(str(ROOT))), None)
        seen.add(name or path.removeprefix(f"{ROOT}/"))
        if name:
            topic, *options = command[command.index(name) + 1 :]
            assert topic in {"bench.costs": costs, "bench.speed": speed}[name].TOPICS
        else:
            assert (ROOT / path).exists()
            name, options = path.removeprefix(f"{ROOT}/"), command[command.index(path) + 1 :]
        if name in parsers:
            utils.parse_options(parsers[name][0], "", parsers[name][1], options)
    assert seen == {*parsers, "tests", "tests/test_cuda.py"}


def test_steps_of_both_trainings_here(tmp_path, monkeypatch, capsys):
    out = tmp_path / "a b"
    options = f"--preset nano --steps 2 --batch-size 4 --device cpu --only steps --out-dir {shlex.quote(str(out))}"
    monkeypatch.setattr(sys, "argv", ["gpu", *shlex.split(options)])
    gpu.main()
    table = (out / "table.md").read_text()
    assert "0 failed" in capsys.readouterr().out and table.count("| steps |") == 5
    assert "equal to the bit" in table and "differ" in table
