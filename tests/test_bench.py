import dataclasses
import functools
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_nerv import SMALL, relative, small
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import dit
import losses
import nerv
import vae
from bench import costs, speed
from bench.speed import image_decoder, loop_over_videos, pixel_shuffle, shared_and_block
from common import memory, utils


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_other_ways_to_convolve_give_the_same(name):
    model, tokens = small(name)
    for where, layer in model.table_layers():
        x = torch.randn(2, 3 * layer.in_ch, 5, 6, dtype=torch.float64)
        for way in (loop_over_videos, pixel_shuffle if layer.upsample else shared_and_block):
            assert relative(way(layer, x, tokens), layer(x, tokens)) < 1e-10, (where, way.__name__)


def test_the_image_decoder_is_stable_diffusions():
    with torch.device("meta"):
        model = image_decoder()
    assert sum(p.numel() for p in model.parameters()) == 49_490_179  # AutoencoderKL's decoder, as published
    assert model(torch.empty(1, 4, 8, 8, device="meta")).shape == (1, 3, 64, 64)


GIB = 2**30
TWO_LEVELS = dataclasses.replace(nerv.CONFIGS["S"], resolution=32, num_frames=4)


def networks(recompute=False, gan=True):
    """S with a small encoder at 32 x 32, and a narrow discriminator."""
    model = vae.VAE(TWO_LEVELS, vae.EncoderConfig(width=128, depth=3, heads=4, patch=(1, 4, 4)))
    if recompute:
        for block in model.encoder.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model, losses.Discriminator(losses.DiscriminatorConfig(16, 3)) if gan else None, None


@functools.cache
def predicted(recompute=False, bf16=True, gan=False):
    return memory.stage1(partial(networks, recompute, gan), 4, bf16)


def test_memory_is_counted_while_it_is_there():
    """A chain of exponentials: each keeps its result, of 4 MiB; the backward pass holds a gradient and makes the next."""
    with FakeTensorMode(), memory.Alive() as alive:
        before = torch.empty(2**20, requires_grad=True)
        x = before.exp().exp().exp()
        assert alive.bytes == 4 * 2**22
        view = x.detach().view(2, -1)  # takes nothing
        assert view.numel() and alive.bytes == alive.top() == 4 * 2**22
        x.sum().backward()
        assert 5 * 2**22 <= alive.top() <= 6 * 2**22 + 64
        del x, view
        assert alive.bytes == 2 * 2**22  # before, and its gradient


def test_what_the_encoder_keeps_is_what_autograd_saves():
    with FakeTensorMode():
        model = networks()[0]
        video = torch.empty(8, 4, 3, 32, 32)
        _, saved = costs.forward_costs(lambda: model.encode(video))
    weights = sum(p.nbytes for p in model.encoder.parameters())  # transposed ones count among what is saved
    assert saved - weights < predicted(bf16=False)(8)["encoder"] <= saved and weights < saved / 20


def test_autocast_halves_what_is_large():
    sizes = [predicted(bf16=bf16)(8) for bf16 in (False, True)]
    assert sizes[1]["weights"] == sizes[0]["weights"]
    assert 0.5 < sizes[1]["decoder"] / sizes[0]["decoder"] < 0.65  # kernels are made in float32
    assert 0.5 < sizes[1]["encoder"] / sizes[0]["encoder"] < 0.75  # norms and the residual stream stay in float32


@pytest.mark.parametrize("bf16", [False, True])
def test_recomputed_blocks_keep_their_inputs(bf16):
    kept, recomputed = (predicted(again, bf16)(32) for again in (False, True))
    tokens = 4 * 8 * 8 + TWO_LEVELS.num_tokens
    inputs = 32 * (4 * tokens * 128 * 4 + 4 * 3 * 32 * 32 * 4)  # of each block, the concatenated tokens, the clips
    assert inputs < recomputed["encoder"] < 1.6 * inputs < kept["encoder"] / 3
    assert recomputed["decoder"] == kept["decoder"] and sum(recomputed.values()) < sum(kept.values())


def test_memory_grows_with_the_clips():
    predict = predicted(gan=True)
    two, eight, many = (predict(rows) for rows in (2, 8, 32))
    assert many["weights"] == two["weights"] and many["encoder"] > 3.9 * eight["encoder"] - 3 * two["encoder"]
    assert many["decoder"] - eight["decoder"] == pytest.approx(4 * (eight["decoder"] - two["decoder"]))
    model, discriminator, _ = networks()
    count = [sum(p.nbytes for p in network.parameters()) for network in (model, discriminator)]
    assert two["weights"] == 5 * count[0] + 4 * count[1]


def test_r1_may_be_the_peak():
    def wide():
        return networks()[0], losses.Discriminator(losses.DiscriminatorConfig(64)), None

    with_r1, without = (memory.stage1(wide, 4, bf16=False, r1=r1)(2) for r1 in (True, False))
    assert set(with_r1) == {"weights", "discriminator"} and sum(with_r1.values()) > sum(without.values())


def test_a_prediction_leaves_random_numbers_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    memory.stage1(partial(networks, gan=False), 4)
    assert torch.equal(before, torch.get_rng_state())


def test_the_smallest_frames_go_through_lpips_as_in_training():
    def make():
        model = vae.VAE(dataclasses.replace(nerv.CONFIGS["nano"], resolution=16), vae.ENCODERS["nano"])
        return model, None, losses.LPIPS("alex", pretrained=False)

    assert memory.stage1(make, 2)(2)["LPIPS"] > 0  # AlexNet has nothing to pool at 16 pixels


def test_memory_of_stage_2():
    def make():
        return dit.DiT(dit.DiTConfig(128, 128, width=256, depth=6, heads=4)), networks()[0]

    predict = memory.stage2(make)
    few, many = predict(8), predict(64)
    assert 7 < many["denoiser"] / few["denoiser"] < 8 and many["weights"] == few["weights"]


def test_s_takes_what_was_found_by_hand():
    """95 GiB of the encoder, 22 of the decoder, 8 of the discriminator: counted from the code, before there was a program."""
    parts = costs.training_memory("S", 32, lpips="none")
    found = [parts[name] for name in ("encoder", "decoder", "discriminator")]
    assert found == pytest.approx([95.3, 21.8, 8.4], abs=0.2)


def test_the_plan_takes_as_few_parts_as_fit():
    def linear(each):
        return lambda rows: {"weights": GIB, "encoder": rows * each * GIB}

    kept, recomputed = linear(4), linear(1)
    card = 20 * GIB  # 18 of which are used
    assert memory.plan([kept, recomputed], 4, card) == (1, 0)
    assert memory.plan([kept, recomputed], 16, card) == (1, 1)
    assert memory.plan([kept, recomputed], 32, card) == (2, 1)
    assert memory.plan([kept], 6, card) == (2, 0)
    assert memory.plan([kept], 4, 2 * GIB) is None
    assert memory.plan([kept], 2, 7 * GIB) is None  # one clip alone would leave batch norm nothing to compare with
    assert memory.plan([kept], 2, 7 * GIB, world=2) == (2, 0)


def test_the_table_prints_rows_as_they_come(capsys):
    def rows():
        yield ["a", 1]
        assert "| a" in capsys.readouterr().out
        yield ["b", 2]

    costs.table(["name", "number"], rows())
    assert "| b" in capsys.readouterr().out


def test_out_of_memory_is_a_row(monkeypatch, capsys):
    """train prints what fits and goes on; the eager float32 row of stage 1 does not fit."""

    def run(command, directory, steps, threads=None):
        if "vae.py" in str(command[0]) and steps != 4 and command[-3:] == ["off", "--bf16", "off"]:
            raise MemoryError
        return 0.5, "peak memory 1.25 GiB"

    monkeypatch.setattr(costs, "seconds_per_step", run)
    costs.train(costs.Config())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| vae.py", "| dit.py"))]
    assert ["out of memory" in line for line in lines] == [True, False, False, False, False, False]
    assert "1.25 GiB" in lines[-1]


def test_a_call_that_runs_out_of_memory_loses_no_other():
    def fail():
        raise RuntimeError("CUDA out of memory. Tried to allocate 64.00 GiB")

    seconds = speed.measure({"a": lambda: None, "b": fail}, 3, torch.device("cpu"))
    assert len(seconds["a"]) == 3 and seconds["b"] == []
    assert speed.spread(seconds["b"]) == "out of memory" and speed.ratio(seconds, "b", "a") == "" == speed.ratio(
        seconds, "a", "b"
    )
    with pytest.raises(RuntimeError, match="shape"):
        speed.measure({"a": lambda: torch.zeros(2) @ torch.zeros(3, 1).expand(3, 2), "b": fail}, 1, torch.device("cpu"))


def test_steps_of_the_family_are_timed(monkeypatch, capsys):
    frames = speed.Noise().frames
    assert frames.shape == (132, 160, 320, 3) and frames.std() > 70
    monkeypatch.setattr(speed.np.random, "default_rng", lambda seed: SimpleNamespace(integers=lambda *_: frames[:4, :32, :48]))
    monkeypatch.setattr(speed, "METHODS", ["rnerv", "ffnerv"])
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x)  # of large products; a minute where it is emulated
    monkeypatch.setattr(speed.fit, "Config", partial(speed.fit.Config, size="30k"))
    speed.fitting(speed.Config(repeats=1, device="cpu"))
    found = {line.split("|")[1].strip(): line.split("|")[2:] for line in capsys.readouterr().out.splitlines() if "|" in line}
    assert {"rnerv", "ffnerv"} < found.keys() and 0 < float(found["rnerv"][2]) and found["rnerv"][3].strip().endswith("%")


def test_a_training_that_runs_out_of_memory_says_so(tmp_path):
    for text, error in (
        ("RuntimeError: CUDA out of memory. Tried " + "x" * 900, MemoryError),
        ("no such file", utils.UserError),
    ):
        program = tmp_path / "program.py"
        program.write_text(f"import sys; sys.exit({text!r})")
        with pytest.raises(error):
            costs.seconds_per_step([program], tmp_path, 4)


def test_equality_is_checked_without_tf32():
    torch.set_float32_matmul_precision("high")
    before = torch.backends.cudnn.allow_tf32
    try:
        with speed.exact_float32():
            assert torch.backends.cudnn.enabled and not torch.backends.cudnn.allow_tf32
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32 == before
    finally:
        torch.set_float32_matmul_precision("highest")
