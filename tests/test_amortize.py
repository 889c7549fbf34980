"""Ways to bring the encoder nearer to what its decoder can hold."""

import csv
import sys

import pytest
import torch

import nerv
import vae
from studies import amortize


@pytest.fixture
def stage1():
    torch.manual_seed(0)
    return vae.VAE(nerv.CONFIGS["nano"], vae.ENCODERS["nano"]).eval().requires_grad_(False)


def test_a_learned_step_begins_as_none_and_is_told_the_size_of_the_gradient_once():
    torch.manual_seed(0)
    step = amortize.LearnedStep((6, 5), width=16, depth=1)
    tokens, gradient = torch.randn(2, 3, 6, 5).unbind(0)
    assert torch.equal(step(tokens, gradient), tokens)
    torch.nn.init.normal_(step.out.weight)
    step.embed.weight.data[:, -1] = 0  # which alone is told it
    torch.testing.assert_close(step(tokens, gradient), step(tokens, 1e4 * gradient), rtol=1e-3, atol=1e-4)
    step.embed.weight.data[:, -1].normal_()
    assert not torch.allclose(step(tokens, gradient), step(tokens, 1e4 * gradient), atol=0.01)


def test_the_learning_rate_goes_by_the_clock():
    rates = [amortize.learning_rate(share, 2.0) for share in (0, 0.025, 0.05, 0.5, 1, 3)]
    assert rates == pytest.approx([0.02, 0.99, 1.99, 1.0, 0.02, 0.02], abs=0.01) and max(rates) <= 2


def test_each_way_trains_what_it_says(stage1):
    clips, step = torch.rand(4, 16, 3, 32, 32) * 2 - 1, amortize.LearnedStep(stage1.token_shape)
    parts = {"encoder": stage1.encoder, "decoder": stage1.nerv, "step": step}
    for row, (loss, what, _) in amortize.ROWS.items():
        if loss is None:
            continue
        for part in parts.values():
            part.requires_grad_(what == "both" and part is not step or part is parts.get(what))
        loss(stage1, step, clips).backward()
        moved = {name for name, part in parts.items() if any(p.grad is not None for p in part.parameters())}
        assert moved == ({"encoder", "decoder"} if what == "both" else {what}), row
        for part in parts.values():
            part.zero_grad(set_to_none=True)


def test_an_encoder_that_gives_refined_tokens_has_nothing_to_distil(stage1, monkeypatch):
    clips = torch.rand(4, 16, 3, 32, 32) * 2 - 1
    assert amortize.distil(stage1, None, clips, steps=1) > 0
    monkeypatch.setattr(stage1, "refine", lambda tokens, video, steps: tokens)
    assert amortize.distil(stage1, None, clips) == 0
    torch.manual_seed(1)
    plain = amortize.go_on(stage1, None, clips)
    torch.manual_seed(1)
    torch.testing.assert_close(amortize.semi_amortize(stage1, None, clips), plain)  # no steps in between: the plain error


def test_rows_are_run_judged_and_not_run_again(stage1, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(amortize, "LPIPS", lambda backbone: lambda a, b: (a - b).abs().mean())
    monkeypatch.setattr(amortize, "STEPS", (0, 3))
    monkeypatch.setattr(amortize, "COLUMNS", [name for name in amortize.COLUMNS if not name.endswith(("10", "80"))])
    vae.main("--steps 1 --batch-size 2 --log-every 1 --out vae.pt".split())
    options = ["amortize.py", "--seconds", "0.01", "--batch-size", "2", "--seeds", "1", "--clips", "2"]
    monkeypatch.setattr(sys, "argv", options)
    amortize.main()
    with open("out/amortize/runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["row"] for row in rows] == list(amortize.ROWS)
    assert [int(row["steps"]) for row in rows] == [0, 1, 1, 1, 1, 1]
    assert all(float(row["psnr3"]) > float(row["psnr0"]) for row in rows)
    monkeypatch.setattr(amortize, "train", lambda *args: pytest.fail("run again"))
    amortize.main()
    assert "| a learned step" in capsys.readouterr().out
