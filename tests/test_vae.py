import dataclasses
import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import data
import vae
from common import checkpoints, utils
from nerv import CONFIGS, NeRVConfig
from vae import ENCODERS, VAE, EncoderConfig, grid_position, load_vae, psnr

TINY = NeRVConfig(resolution=32, num_frames=4, num_tokens=6, token_dim=5, width=16, block=8)


def tiny(patch=(2, 8, 4)):
    torch.manual_seed(0)
    return VAE(TINY, EncoderConfig(width=24, depth=2, heads=2, patch=patch)).eval()


@torch.no_grad()
def test_shapes():
    model, video = tiny(), torch.rand(3, 4, 3, 32, 32)
    mean, logvar = model.encode(video)
    assert mean.shape == logvar.shape == (3, 6, 5)
    assert model.decode(mean, torch.arange(4)).shape == video.shape
    assert model.decode(mean, torch.tensor([0.5])).shape == (3, 1, 3, 32, 32)


@torch.no_grad()
def test_patches_are_cut_out_in_order_of_time_height_and_width():
    pt, ph, pw = patch = (2, 8, 4)
    model, video = tiny(patch), torch.rand(2, 4, 3, 32, 32)
    seen = []
    model.encoder.embed.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    model.encode(video)
    patches = []
    for t in range(0, 4, pt):
        for h in range(0, 32, ph):
            for w in range(0, 32, pw):
                patches.append(video[:, t : t + pt, :, h : h + ph, w : w + pw].flatten(1))
    assert torch.equal(seen[0], torch.stack(patches, 1))


@torch.no_grad()
def test_encoder_hears_order_in_time_and_space():
    model, video = tiny(), torch.rand(1, 4, 3, 32, 32)
    mean = model.encode(video)[0]
    for axis in (1, 3, 4):
        assert (model.encode(video.roll(16 if axis > 1 else 2, axis))[0] - mean).abs().max() > 1e-4


def test_the_last_block_computes_the_queries_only_and_they_are_as_ever():
    torch.manual_seed(0)
    block = vae.EncoderBlock(24, 2).double()
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    torch.testing.assert_close(block(x, last=4), block(x)[:, -4:], rtol=0, atol=1e-12)
    model, lengths = tiny(), []
    for layer in model.encoder.blocks:
        layer.mlp.register_forward_pre_hook(lambda layer, args: lengths.append(args[0].shape[1]))
    model.encode(torch.rand(2, 4, 3, 32, 32))
    assert lengths == [2 * 4 * 8 + 6, 6]


@torch.no_grad()
def test_mixing_adds_a_fixed_sum_of_patches_to_each_query():
    torch.manual_seed(0)
    vit = vae.ViT(EncoderConfig(width=24, depth=2, heads=2, patch=(2, 8, 8), mixing=3), TINY).double().eval()
    plain = vae.ViT(EncoderConfig(width=24, depth=2, heads=2, patch=(2, 8, 8)), TINY).double().eval()
    assert vit.mix.shape == (6 * 3, 2 * 4 * 4) and any(p is vit.mix for p in vit.matrices())
    plain.load_state_dict({name: value for name, value in vit.state_dict().items() if name != "mix"})
    video, patches = torch.rand(2, 4, 3, 32, 32, dtype=torch.float64), []
    plain.blocks[-1].register_forward_pre_hook(lambda layer, args: patches.append(args[0][:, :-6]))  # [2, 32, 24]
    wanted = plain(video)
    for n in range(6):
        for head in range(3):
            own = slice(8 * head, 8 * head + 8)
            read = sum(vit.mix[3 * n + head, patch] * patches[0][:, patch, own] for patch in range(32))
            wanted[:, n, own] += read / math.sqrt(1 + vit.norm.eps)  # what a fresh batch norm makes of it
    torch.testing.assert_close(vit(video), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", ["--mixing 3", "--mixing -1"])
def test_mixing_that_cannot_be(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(utils.UserError, match=options.split()[0].strip("-")):
        vae.main(options.split())


@torch.no_grad()
def test_pictures_read_tokens_and_the_transformer_adds_to_them():
    torch.manual_seed(0)
    model = VAE(dataclasses.replace(TINY, pictures=3), EncoderConfig(width=24, depth=2, heads=2, patch=(2, 8, 8))).eval()
    video = torch.rand(8, 4, 3, 32, 32)
    model.nerv.pictures.fit(video.flatten(0, 1), 4)
    mean, logvar = model.encode(video)
    assert torch.equal(mean, model.nerv.read(video)) and 0.1 < mean.abs().max() < 10 and torch.all(logvar == -12)
    torch.nn.init.normal_(model.encoder.to_latent.weight)
    beyond = model.encoder(video)[0]
    torch.testing.assert_close(model.encode(video)[0], mean + model.BEYOND * beyond, rtol=0, atol=1e-5)


def test_a_training_starts_from_the_principal_components_of_its_clips(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for pictures in (16, 64):
        vae.main(f"--pictures {pictures} --steps 1 --batch-size 4 --lr 1e-6 --out {pictures}.pt --run-dir run".split())
    ours = [load_vae(checkpoints.load(f"{pictures}.pt", "vae", "")) for pictures in (16, 64)]
    shapes = data.open_dataset(vae.Config(**checkpoints.load("16.pt", "vae", "")["config"]), "test")
    clips, _ = data.fixed_clips(shapes, 16)
    few, many = (psnr(clips, model.nerv.pictures(model.nerv.pictures.read(clips), torch.arange(16), 16)) for model in ours)
    still = psnr(clips, clips.mean(1, keepdim=True).expand_as(clips))
    assert many > few + 1 and many > still  # clips that it never saw


def test_places_of_patches_are_distinct():
    code = grid_position((4, 8, 8), 128)
    assert code.shape == (256, 128) and torch.pdist(code).min() > 1e-2


@pytest.mark.parametrize("frames, resolution, patch", [(15, 32, (2, 8, 8)), (16, 32, (1, 5, 5))])
def test_video_must_divide_into_patches(frames, resolution, patch):
    config = dataclasses.replace(TINY, num_frames=frames, resolution=resolution)
    with pytest.raises(ValueError, match="patches"):
        VAE(config, EncoderConfig(width=24, depth=1, heads=2, patch=patch))


@pytest.mark.parametrize("preset", ["S", "B", "L"])
def test_encoder_of_the_paper(preset):
    with torch.device("meta"):
        encoder = VAE(CONFIGS[preset], ENCODERS[preset]).encoder
    assert len(encoder.blocks) == 18
    assert {block.attention.heads for block in encoder.blocks} == {14}
    assert encoder.query.shape == (128, 896) and encoder.position.shape == (16 * 16 * 16, 896)
    assert encoder.embed.weight.shape == (896, 3 * 8 * 8)
    assert encoder.to_latent.weight.shape == (2 * 128, 896)
    mean, logvar = encoder(torch.empty(2, 16, 3, 128, 128, device="meta"))
    assert mean.shape == logvar.shape == (2, 128, 128)


@torch.no_grad()
@pytest.mark.parametrize("preset", [name for name in CONFIGS if name != "nano"])
def test_larger_and_longer_presets_have_as_many_patches(preset):
    c = CONFIGS[preset]
    assert (c.resolution, c.num_tokens) == ((256, 160) if "256" in preset else (128, 128))
    assert c.num_frames == (128 if "long" in preset else 16)
    with torch.device("meta"):
        model = VAE(c, ENCODERS[preset])
        video = torch.empty(1, c.num_frames, 3, c.resolution, c.resolution)
        assert model.encoder.position.shape == (4096, 896)
        assert model.eval().encode(video)[0].shape == (1, c.num_tokens, 128)
        assert model.decode(torch.empty(1, c.num_tokens, 128), torch.empty(2)).shape == (1, 2, 3, c.resolution, c.resolution)


def test_psnr_closed_form():
    clips = torch.zeros(2, 4, 3, 8, 8)
    other = clips.clone()
    other[0] += 0.2  # mse 0.04, a range of 2
    other[1] += 0.02
    expected = (10 * math.log10(4 / 0.04) + 10 * math.log10(4 / 0.0004)) / 2  # a mean over clips, not of the errors
    assert psnr(clips, other) == pytest.approx(expected, abs=1e-3)
    assert math.isfinite(psnr(clips, clips))


def checkpoint(model):
    return dict(
        stage="vae", nerv_config=dataclasses.asdict(model.nerv_config), ema=model.state_dict(),
        encoder_config=dataclasses.asdict(model.encoder_config),
        decoder="NeRV",
    )  # fmt: skip


@torch.no_grad()
def test_checkpoint_reproduces_outputs(tmp_path):
    model, video = tiny(), torch.rand(2, 4, 3, 32, 32)
    model.train().encode(video)  # moves the running statistics of the batch norm, which belong to the model
    model.eval()
    checkpoints.save(tmp_path / "a" / "vae.pt", **checkpoint(model))
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["vae.pt"]  # no half-written file beside it
    again = load_vae(checkpoints.load(tmp_path / "a" / "vae.pt", "vae", ""))
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    for a, b in zip(model.encode(video), again.encode(video)):
        assert torch.equal(a, b)
    tokens, t = model.encode(video)[0], torch.arange(4)
    assert torch.equal(model.decode(tokens, t), again.decode(tokens, t))


def test_fine_power_is_that_of_noise_and_not_of_slow_waves():
    torch.manual_seed(0)
    noise, x = torch.randn(4, 3, 32, 32), torch.arange(32.0)
    assert vae.fine_power(noise).shape == (4,)
    assert vae.fine_power(noise).mean().item() == pytest.approx(1, rel=0.05)  # white noise has the same power everywhere
    for cycles, fine in ((4, False), (7, False), (9, True), (14, True)):
        wave = torch.cos(2 * math.pi * cycles / 32 * x).expand(3, 32, 32)
        assert (vae.fine_power(wave) > 1e-3) == fine
    blurred = torch.nn.functional.avg_pool2d(noise, 3, 1, 1)
    assert vae.fine_power(blurred).max() < 0.1


@torch.no_grad()
def test_reconstruct_is_the_same_in_any_batches():
    model, clips = tiny(), torch.rand(5, 4, 3, 32, 32)
    whole = vae.reconstruct(model, clips, "cpu")
    assert whole.shape == clips.shape
    torch.testing.assert_close(vae.reconstruct(model, clips, "cpu", batch_size=2), whole, rtol=1e-4, atol=1e-5)


def test_training_minimizes_the_squared_error_and_the_kl_to_a_standard_normal(tmp_path, monkeypatch):
    # The losses of a real step of vae.py, against torch.distributions and a plain mean.
    posteriors, logged, decoded = [], [], []
    encode, decode = VAE.encode, VAE.decode

    def keep_posterior(self, video, *refinement):
        out = encode(self, video, *refinement)
        if self.training:
            posteriors.append((video, *(x.detach().float().clone() for x in out)))
        return out

    def keep_frames(self, tokens, t):
        frames = decode(self, tokens, t)
        if self.training:
            decoded.append((t, frames.detach().float()))
        return frames

    monkeypatch.setattr(VAE, "encode", keep_posterior)
    monkeypatch.setattr(VAE, "decode", keep_frames)
    monkeypatch.setattr(utils.RunLog, "add", lambda self, **values: logged.append(values))
    monkeypatch.setattr(utils.RunLog, "step", lambda self, step: False)
    options = "--steps 2 --batch-size 4 --kl-weight 0.01 --decode-frames 4 --bf16 off --out vae.pt --run-dir run"
    options += " --mixing 4"
    monkeypatch.setattr("sys.argv", ["vae.py", *options.split()])
    monkeypatch.chdir(tmp_path)
    vae.main()
    assert len(logged) == len(posteriors) == len(decoded) == 2
    for values, (video, mean, logvar), (t, frames) in zip(logged, posteriors, decoded):
        kl = kl_divergence(Normal(mean, torch.exp(logvar / 2)), Normal(0.0, 1.0)).sum((1, 2)).mean()
        l2 = (frames - video[:, t]).square().mean()
        torch.testing.assert_close(values["kl"].detach(), kl, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(values["l2"].detach(), l2, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(values["loss"].detach(), l2 + 0.01 * kl, rtol=1e-4, atol=1e-5)
        assert len(t) == 4 and len(set(t.tolist())) == 4 and 0 <= t.min() and t.max() < 16


def test_learning_rate_warms_up_and_decays():
    rates = [utils.learning_rate(step, 100, 2.0, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(2) and max(rates) == pytest.approx(2)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:])) and rates[55] == pytest.approx(1) and rates[99] < 0.01


def test_attention_is_that_of_torch():
    torch.manual_seed(0)
    ours, theirs = vae.Attention(24, 4), torch.nn.MultiheadAttention(24, 4, batch_first=True)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data
    theirs.out_proj.weight.data, theirs.out_proj.bias.data = ours.out.weight.data, ours.out.bias.data
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0], rtol=1e-4, atol=1e-5)
