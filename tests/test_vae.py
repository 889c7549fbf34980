"""Stage 1: the encoder's parts, the presets of the paper, the losses of a real step."""

import math

import pytest
import torch
from conftest import SMALL
from torch.distributions import Normal, kl_divergence

import vae
from common import checkpoints, utils
from nerv import CONFIGS, NeRVConfig
from vae import VAE, EncoderConfig, encoder_sizes, load_vae, psnr


@torch.no_grad()
def test_patches_are_cut_out_in_order_of_time_height_and_width():
    torch.manual_seed(0)
    pt, ph, pw = patch = (2, 8, 4)
    nerv_config = NeRVConfig(resolution=32, num_frames=4, num_tokens=6, token_dim=5, width=16, block=8)
    model = VAE(nerv_config, EncoderConfig(width=24, depth=2, heads=2, patch=patch)).eval()
    video, seen, patches = torch.rand(2, 4, 3, 32, 32), [], []
    model.encoder.embed.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    mean, logvar = model.encode(video)
    assert mean.shape == logvar.shape == (2, 6, 5)
    for t in range(0, 4, pt):
        for h in range(0, 32, ph):
            for w in range(0, 32, pw):
                patches.append(video[:, t : t + pt, :, h : h + ph, w : w + pw].flatten(1))
    assert torch.equal(seen[0], torch.stack(patches, 1))
    assert (model.encode(video.roll((2, 16, 16), (1, 3, 4)))[0] - mean).abs().max() > 1e-4  # places matter
    assert torch.pdist(vae.grid_position((4, 8, 8), 128)).min() > 1e-2  # and no two are the same


def test_attention_is_that_of_torch_and_the_last_tokens_alone_have_what_they_have_together():
    torch.manual_seed(0)
    ours, theirs = vae.Attention(24, 4), torch.nn.MultiheadAttention(24, 4, batch_first=True)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data
    theirs.out_proj.weight.data, theirs.out_proj.bias.data = ours.out.weight.data, ours.out.bias.data
    block, x = vae.EncoderBlock(24, 2), torch.randn(2, 7, 24)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(block(x, last=3), block(x)[:, -3:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("preset", ["S", "L-256", "B-long"])
def test_encoder_of_the_paper(preset):
    c = CONFIGS[preset]
    assert (c.resolution, c.num_tokens) == ((256, 160) if "256" in preset else (128, 128))
    assert c.num_frames == (128 if "long" in preset else 16)
    with torch.device("meta"):
        model = VAE(c, encoder_sizes(preset, c)).eval()
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
def test_a_checkpoint_gives_the_same_videos_in_any_batches(trained):
    ckpt, video = checkpoints.load(trained / "vae.pt", "vae", ""), torch.rand(5, 16, 3, 32, 32)
    model = load_vae(ckpt)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    t = torch.arange(4)  # of four frames VAE.decode takes four videos in a call
    whole = vae.reconstruct(model, video, "cpu", t)
    torch.testing.assert_close(vae.reconstruct(model, video, "cpu", t, batch_size=2), whole, rtol=1e-4, atol=1e-5)
    alone = torch.cat([model.nerv(tokens[None], t) for tokens in model.encode(video)[0]])
    torch.testing.assert_close(alone, whole, rtol=1e-4, atol=1e-5)
    for changed in ({"decoder": "Other"}, {"nerv_config": ckpt["nerv_config"] | {"width": 16}}, {"ema": {}}, {"config": {}}):
        with pytest.raises(utils.UserError, match="does not fit this code, train it again"):
            load_vae(ckpt | changed)


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
