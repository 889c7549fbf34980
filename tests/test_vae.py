"""Stage 1: the encoder's parts, the presets of the paper, the losses of a real step."""

import dataclasses
import math

import pytest
import torch
from conftest import SMALL
from torch.distributions import Normal, kl_divergence

import vae
from common import checkpoints, utils
from nerv import CONFIGS, NeRVConfig
from vae import VAE, EncoderConfig, encoder_config, load_vae, psnr

TINY = NeRVConfig(resolution=32, num_frames=4, num_tokens=6, token_dim=5, width=16, block=8)


def tiny(patch=(2, 8, 4)):
    torch.manual_seed(0)
    return VAE(TINY, EncoderConfig(width=24, depth=2, heads=2, patch=patch)).eval()


@torch.no_grad()
def test_patches_are_cut_out_in_order_of_time_height_and_width():
    pt, ph, pw = patch = (2, 8, 4)
    model, video, seen = tiny(patch), torch.rand(2, 4, 3, 32, 32), []
    model.encoder.embed.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    mean, logvar = model.encode(video)
    assert mean.shape == logvar.shape == (2, 6, 5)
    patches = []
    for t in range(0, 4, pt):
        for h in range(0, 32, ph):
            for w in range(0, 32, pw):
                patches.append(video[:, t : t + pt, :, h : h + ph, w : w + pw].flatten(1))
    assert torch.equal(seen[0], torch.stack(patches, 1))
    for axis in (1, 3, 4):  # what is elsewhere, or at another time, has other tokens
        assert (model.encode(video.roll(16 if axis > 1 else 2, axis))[0] - mean).abs().max() > 1e-4
    code = vae.grid_position((4, 8, 8), 128)
    assert code.shape == (256, 128) and torch.pdist(code).min() > 1e-2


def test_the_last_block_computes_the_queries_only():
    torch.manual_seed(0)
    block, x = vae.EncoderBlock(24, 2).double(), torch.randn(2, 9, 24, dtype=torch.float64)
    torch.testing.assert_close(block(x, last=4), block(x)[:, -4:], rtol=0, atol=1e-12)
    model, lengths = tiny(), []
    for layer in model.encoder.blocks:
        layer.mlp.register_forward_pre_hook(lambda layer, args: lengths.append(args[0].shape[1]))
    model.encode(torch.rand(2, 4, 3, 32, 32))
    assert lengths == [2 * 4 * 8 + 6, 6]


def test_attention_is_that_of_torch():
    torch.manual_seed(0)
    ours, theirs = vae.Attention(24, 4), torch.nn.MultiheadAttention(24, 4, batch_first=True)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data
    theirs.out_proj.weight.data, theirs.out_proj.bias.data = ours.out.weight.data, ours.out.bias.data
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("preset", ["S", "L-256", "B-long"])
def test_encoder_of_the_paper(preset):
    c = CONFIGS[preset]
    assert (c.resolution, c.num_tokens) == ((256, 160) if "256" in preset else (128, 128))
    assert c.num_frames == (128 if "long" in preset else 16)
    with torch.device("meta"):
        model = VAE(c, encoder_config(preset, c)).eval()
        video = torch.empty(1, c.num_frames, 3, c.resolution, c.resolution)
        encoder = model.encoder
        assert len(encoder.blocks) == 18 and {block.attention.heads for block in encoder.blocks} == {14}
        assert encoder.query.shape == (c.num_tokens, 896) and encoder.position.shape == (4096, 896)
        assert model.encode(video)[0].shape == (1, c.num_tokens, 128)
        assert model.decode(torch.empty(1, c.num_tokens, 128), torch.empty(2)).shape == (1, 2, 3, c.resolution, c.resolution)


def test_psnr_closed_form():
    clips, other = torch.zeros(2, 4, 3, 8, 8), torch.zeros(2, 4, 3, 8, 8)
    other[0] += 0.2  # mse 0.04, a range of 2
    other[1] += 0.02
    expected = (10 * math.log10(4 / 0.04) + 10 * math.log10(4 / 0.0004)) / 2  # a mean over clips, not of the errors
    assert psnr(clips, other) == pytest.approx(expected, abs=1e-3) and math.isfinite(psnr(clips, clips))


@torch.no_grad()
def test_a_checkpoint_gives_the_same_videos_in_any_batches(tmp_path):
    model, video = tiny(), torch.rand(5, 4, 3, 32, 32)
    model.train().encode(video)  # moves the running statistics of the batch norm, which belong to the model
    configs = {f"{name}_config": dataclasses.asdict(getattr(model, f"{name}_config")) for name in ("nerv", "encoder")}
    content = dict(stage="vae", decoder="NeRV", ema=model.eval().state_dict(), config={"extras": []}, **configs)
    checkpoints.save(tmp_path / "vae.pt", **content)
    again = load_vae(checkpoints.load(tmp_path / "vae.pt", "vae", ""))
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    whole = vae.reconstruct(model, video, "cpu")
    assert torch.equal(vae.reconstruct(again, video, "cpu"), whole)
    torch.testing.assert_close(vae.reconstruct(again, video, "cpu", batch_size=2), whole, rtol=1e-4, atol=1e-5)
    alone = torch.cat([model.nerv(tokens[None], torch.arange(4)) for tokens in model.encode(video)[0]])
    torch.testing.assert_close(alone, whole, rtol=1e-4, atol=1e-5)  # however many VAE.decode takes in a call
    for changed in ({"decoder": "Other"}, {"nerv_config": configs["nerv_config"] | {"width": 32}}, {"ema": {}}, {"config": {}}):
        with pytest.raises(utils.UserError, match="does not fit this code, train it again"):
            load_vae(content | changed)


def test_training_minimizes_the_squared_error_and_the_kl_to_a_standard_normal(call, few_held_out, monkeypatch):
    """The losses of a real step of vae.py, against torch.distributions and a plain mean."""
    posteriors, logged, decoded = [], [], []

    def keep(name, kept):
        original = getattr(VAE, name)

        def wrapped(self, x, *t):
            out = original(self, x, *t)
            if self.training:
                kept.append((x, *t, out))
            return out

        monkeypatch.setattr(VAE, name, wrapped)

    keep("encode", posteriors), keep("decode", decoded)
    monkeypatch.setattr(utils.RunLog, "add", lambda self, **values: logged.append(values) if "loss" in values else None)
    monkeypatch.setattr(utils.RunLog, "step", lambda self, step: False)
    assert call("vae.py", f"{SMALL} --num-frames 8 --steps 2 --batch-size 4 --kl-weight 0.01 --decode-frames 4") == 0
    assert len(logged) == len(posteriors) == len(decoded) == 2
    for values, (video, (mean, logvar)), (_, t, frames) in zip(logged, posteriors, decoded):
        kl = kl_divergence(Normal(mean.detach(), torch.exp(logvar.detach() / 2)), Normal(0.0, 1.0)).sum((1, 2)).mean()
        l2 = (frames.detach() - video[:, t]).square().mean()
        found = [values[name] for name in ("kl", "l2", "loss")]
        torch.testing.assert_close(found, [kl, l2, l2 + 0.01 * kl], rtol=1e-4, atol=1e-4)
        assert len(t) == 4 and len(set(t.tolist())) == 4 and 0 <= t.min() and t.max() < 8
