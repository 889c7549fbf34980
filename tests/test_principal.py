"""Principal components of tokens: the map and back, what fit finds, and a stage 2 that diffuses them."""

import numpy as np
import pytest
import torch

import dit
import fit
import sample
import vin
from common import checkpoints, utils
from common.principal import Principal
from vae import load_vae


def correlated(count=400):
    """Tokens [count, 4, 3] around a mean, of three directions of deviations 5, 1 and 0.2 and nothing else."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(12, 3, generator=generator))[0].T
    numbers = torch.randn(count, 3, generator=generator)
    return (2 + (numbers * torch.tensor([5.0, 1.0, 0.2])) @ directions).view(-1, 4, 3)


def test_components_are_uncorrelated_large_ones_first_and_lead_back():
    tokens = correlated()
    principal = Principal((4, 1), (4, 3))
    assert principal.fit(tokens) == pytest.approx(1, abs=1e-5)
    found = principal(tokens)
    assert found.shape == (400, 4, 1)
    flat = found.flatten(1).double()
    power = flat.T @ flat / 400
    assert (power - power.diag().diag()).abs().max() < 0.01
    torch.testing.assert_close(power.diag().sqrt(), torch.tensor([5, 1, 0.2, 0]).double(), rtol=0.1, atol=1e-3)
    torch.testing.assert_close(principal.tokens(found), tokens, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        principal.tokens(principal(tokens[:, None])), tokens[:, None], rtol=0, atol=1e-4
    )  # any axes before


def test_what_is_outside_is_left_out_and_the_share_says_how_much():
    tokens = correlated()
    principal = Principal((4, 1), (4, 3))
    principal.fit(tokens + 0.05 * torch.randn(400, 4, 3, generator=torch.Generator().manual_seed(1)))
    one = Principal((2, 2), (4, 3))
    noisy = tokens + torch.randn(400, 4, 3, generator=torch.Generator().manual_seed(1))
    share = one.fit(noisy)
    error = (one.tokens(one(noisy)) - noisy).square().sum() / (noisy - noisy.mean(0)).square().sum()
    assert share == pytest.approx(1 - error.item(), abs=1e-4) and share < 0.9


def test_the_first_token_has_the_largest_components():
    torch.manual_seed(0)
    tokens = (torch.linspace(12, 1, 12) * torch.randn(20_000, 12)).view(-1, 4, 3)
    principal = Principal((2, 4), (4, 3))
    principal.fit(tokens)
    expected = torch.tensor([[12.0, 11, 10, 9], [8, 7, 6, 5]])
    torch.testing.assert_close(principal(tokens).std(0), expected, rtol=0.03, atol=0)


def test_spread_is_the_deviation_of_noise_on_the_tokens():
    torch.manual_seed(0)
    principal = Principal((2, 4), (4, 3))
    principal.fit(torch.randn(100, 4, 3) * torch.linspace(0.1, 3, 12).view(4, 3))
    deviation = torch.rand(4, 3)
    made = principal(deviation * torch.randn(20000, 4, 3))
    torch.testing.assert_close(principal.spread(deviation), made.std(0), rtol=0.03, atol=0)


def test_stage_2_of_components_decodes_encodes_and_refines_tokens(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = load_vae(checkpoints.load(trained / "vae.pt", "vae", ""))
    c = plain.nerv_config
    options = f"--ckpt {trained / 'vae.pt'} --batch-size 4 --num-latents 80 --refine 0 --bf16 off --run-dir run --steps"
    dit.main([*options.split(), "2", "--principal", "5", "3"])
    model, vae, scale = dit.load_dit(checkpoints.load("dit.pt", "dit", ""))
    assert (model.config.num_tokens, model.config.token_dim) == vae.token_shape == (5, 3)
    clips, t = torch.rand(3, c.num_frames, 3, c.resolution, c.resolution) * 2 - 1, torch.arange(c.num_frames)
    (mean, logvar), (ours, spread) = plain.encode(clips), vae.encode(clips)
    own = vae.principal
    torch.testing.assert_close(ours, own(mean))
    torch.testing.assert_close(torch.exp(0.5 * spread), own.spread(torch.exp(0.5 * logvar)))
    torch.testing.assert_close(vae.decode(ours, t), plain.decode(own.tokens(ours), t))
    torch.testing.assert_close(vae.refine(ours, clips, 2), own(plain.refine(own.tokens(ours), clips, 2)))
    # Refined where stage 2 refines what it learns from: among all tokens, of which the components are taken afterwards.
    torch.testing.assert_close(vae.encode(clips, 2)[0], own(plain.refine(mean, clips, 2)))
    assert not torch.equal(vae.encode(clips, 2)[0], vae.refine(ours, clips, 2))
    dit.main([*options.split(), "3", "--principal", "5", "3", "--resume"])
    _, again, _ = dit.load_dit(checkpoints.load("dit.pt", "dit", ""))
    assert torch.equal(again.principal.directions, own.directions)
    latents = torch.from_numpy(np.load("dit.latents/latents.npy")).float()  # of which the scale makes unit deviation
    variance = own(latents[:, 0]).var() + own.spread(latents[:, 1]).square().mean()
    assert scale == pytest.approx(variance.item() ** -0.5, rel=1e-3)
    # What else takes a dit.pt: long videos, contribution maps, samples, an export.
    vin.main("--ckpt dit.pt --chunks 2 --steps 1 --batch-size 2 --num-latents 4 --run-dir run --bf16 off".split())
    assert vin.load_vin(checkpoints.load("vin.pt", "vin", ""))[0].dit.config.num_tokens == 5
    for program, words in ((fit.main, "--explain dit.pt --out maps.png"), (sample.main, "--export small.pt")):
        monkeypatch.setattr("sys.argv", ["x", *words.split()])
        program()
    monkeypatch.setattr("sys.argv", ["x", *"--ckpt small.pt --interp --interp-steps 2 --steps 2 --out-dir out".split()])
    sample.main()
    # Frame prediction takes the components of what the given frames say.
    known = ["--principal", "5", "3", "--cond-frames", "2", "--out", "predict.pt"]
    dit.main([*options.split(), "2", *known])
    model, vae, _ = dit.load_dit(checkpoints.load("predict.pt", "dit", ""))
    given = dit.encode_given(vae, clips, 2)
    first, _ = plain.encode(clips * (t < 2)[:, None, None, None])
    assert model.config.cond_frames == 2 and given.shape == (3, 5, 3)
    torch.testing.assert_close(given, vae.principal(first))
    for wrong in (("0", "3"), ("5", "0"), (str(c.num_tokens), str(c.token_dim + 1))):
        with pytest.raises(utils.UserError, match="components"):
            dit.main([*options.split(), "2", "--principal", *wrong])
    for wrong in ("--no-cache-latents", "--num-latents 14"):
        with pytest.raises(utils.UserError, match="cache-latents"):
            dit.main([*options.split(), "2", "--principal", "5", "3", *wrong.split()])
