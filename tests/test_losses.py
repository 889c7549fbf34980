"""LPIPS against published values; the adversarial losses against closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_weights import needs

from losses import LPIPS, Discriminator, discriminator_loss, generator_loss


@pytest.mark.parametrize("size, scale", [(16, 2), (32, 2), (64, 1)])
def test_frames_below_64_pixels_are_doubled(size, scale):
    lpips, pair = LPIPS("alex", pretrained=False), torch.rand(2, 2, 3, 3, size, size) * 2 - 1
    doubled = (F.interpolate(clips.flatten(0, 1), scale_factor=scale, mode="bilinear") for clips in pair)
    layers = zip(*map(lpips.features, doubled), lpips.heads)
    expected = sum((head * (a - b).square().mean((0, 2, 3))).sum() for a, b, head in layers)
    torch.testing.assert_close(lpips(*pair), expected)


def test_lpips_teaches_the_frames_and_not_itself_and_is_zero_where_there_is_no_feature():
    lpips = LPIPS("alex", pretrained=False)
    frames = torch.zeros(1, 1, 3, 64, 64, requires_grad=True)
    lpips(frames, torch.ones(1, 1, 3, 64, 64)).backward()
    assert frames.grad.abs().sum() > 0 and not any(p.requires_grad for p in lpips.parameters())
    for conv in lpips.convs:
        conv.bias.data.fill_(-100)
    distance = lpips(frames, torch.ones(1, 1, 3, 64, 64))
    distance.backward()
    assert distance == 0 and torch.isfinite(frames.grad).all()


def test_lpips_compiled_and_in_bfloat16_is_the_same():
    torch.manual_seed(1)
    lpips, (frames, real) = LPIPS("alex", pretrained=False), torch.rand(2, 2, 3, 3, 40, 40) * 2 - 1
    expected = lpips(frames, real)
    compiled = torch.compile(lpips, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(frames, real), expected)
    with torch.autocast("cpu", torch.bfloat16):
        found = lpips(frames.requires_grad_(), real)
    found.backward()
    assert found.dtype == torch.float32 and torch.isfinite(frames.grad).all()
    assert found.item() == pytest.approx(expected.item(), rel=0.05)  # bfloat16 has 8 bits


@needs("lpips-vgg")
def test_lpips_of_the_published_weights():
    """What the lpips package gives of these numbers with v0.1 of its weights."""
    for seed, expected in ((123, {"vgg": 0.3485, "alex": 0.1486}), (42, {"vgg": 0.3498, "alex": 0.1469})):
        torch.manual_seed(seed)
        frames, real = (torch.rand(1, 10, 3, 100, 100) * 2 - 1 for _ in range(2))
        for backbone, value in expected.items():
            lpips = LPIPS(backbone)
            assert lpips(frames, real).item() == pytest.approx(value, abs=1e-4) and lpips(real, real) == 0


def test_discriminator_has_the_papers_widths_and_a_logit_of_each_clip_which_depends_on_the_order_of_frames():
    with torch.device("meta"):
        discriminator = Discriminator()
    assert [block.conv1.in_channels for block in discriminator.blocks] == [64, 128, 256, 512, 1024]
    assert discriminator(torch.empty(2, 16, 3, 128, 128, device="meta")).shape == (2,)
    torch.manual_seed(0)
    for frames, size in ((1, 32), (3, 64)):
        discriminator, video = Discriminator(2), torch.randn(4, frames, 3, size, size)
        logits = discriminator(video)
        torch.testing.assert_close(discriminator(video[1:2]), logits[1:2])
    assert (discriminator(video.flip(1)) - logits).abs().max() > 1e-3


def test_adversarial_losses_closed_form():
    def brightness(video):
        return video.mean((1, 2, 3, 4))

    brightness.requires_grad_ = lambda needed: brightness
    real, frames = torch.full((2, 4, 3, 8, 8), 0.5), torch.full((2, 4, 3, 8, 8), -1.0)
    assert generator_loss(brightness, frames) == pytest.approx(math.log(1 + math.e))
    expected = math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(-1))
    loss, margin = discriminator_loss(brightness, real, frames)
    assert loss.item() == pytest.approx(expected) and margin == 1.5
    # The gradient of a mean over n pixels is 1 / n at each of them: its squared norm is 1 / n.
    loss, _ = discriminator_loss(brightness, real, frames, r1_weight=10 * 4 * 3 * 8 * 8)
    assert loss.item() == pytest.approx(expected + 5, rel=1e-5)


def test_the_penalty_teaches_the_discriminator_and_its_step_gives_the_decoder_no_gradient(monkeypatch):
    monkeypatch.setattr(F, "leaky_relu", lambda x, slope: F.softplus(x))  # R1 jumps where a ReLU has its kink
    torch.manual_seed(0)
    discriminator = Discriminator(2).double()
    real, frames = (torch.randn(2, 2, 3, 32, 32, dtype=torch.double, requires_grad=True) for _ in range(2))

    def loss(weight):  # which gradcheck changes in place
        return discriminator_loss(discriminator, real, frames, r1_weight=100.0)[0]

    assert torch.autograd.gradcheck(loss, discriminator.blocks[0].conv1.weight, fast_mode=True)
    loss(None).backward()
    assert frames.grad is None
    generator_loss(discriminator, frames).backward()
    assert frames.grad.abs().sum() > 0


def test_under_autocast_a_cpu_computes_the_adversarial_losses_in_float32():
    # At a depth of two frames the bfloat16 weight gradient of conv3d is garbage.
    torch.manual_seed(0)
    discriminator = Discriminator(8)
    real, frames = torch.randn(2, 4, 2, 3, 32, 32).unbind()
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses = [generator_loss(discriminator, frames), *discriminator_loss(discriminator, real, frames, r1_weight=10.0)]
        results.append([*losses, *torch.autograd.grad(losses[1], list(discriminator.parameters()))])
    assert all(x.dtype == torch.float32 for x in results[1])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
