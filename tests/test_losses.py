import sys

import pytest
import torch
import torch.nn.functional as F

import losses
from common.utils import UserError
from losses import LPIPS, Discriminator, DiscriminatorConfig, discriminator_loss, generator_loss

# ----------------------------------------------------------------------------------------------------------------- perceptual


@pytest.fixture(scope="module")
def lpips():
    try:
        torch.manual_seed(0)
        return LPIPS("alex", pretrained=False)  # a random backbone: nothing is downloaded
    except UserError as error:
        pytest.skip(str(error))


def test_lpips_against_a_direct_computation(lpips):
    torch.manual_seed(1)
    frames, real = (torch.rand(2, 3, 3, 64, 64) * 2 - 1 for _ in range(2))
    distance = lpips.distance

    def features(x):
        x = (x.flatten(0, 1) - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(
            3, 1, 1
        )
        found = []
        for i in range(1, 6):
            x = getattr(distance.net, f"slice{i}")(x)
            found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    expected = 0
    for i, (a, b) in enumerate(zip(features(frames), features(real))):
        weight = getattr(distance, f"lin{i}").model[-1].weight  # [1, C, 1, 1]
        expected = expected + (weight * (a - b).square()).sum(1).mean((1, 2))
    torch.testing.assert_close(lpips(frames, real), expected.mean(), rtol=1e-4, atol=1e-6)
    assert lpips(real, real) == 0


def test_lpips_teaches_the_frames_and_not_itself(lpips):
    frames = torch.zeros(1, 1, 3, 64, 64, requires_grad=True)
    lpips(frames, torch.ones(1, 1, 3, 64, 64)).backward()
    assert frames.grad.abs().sum() > 0 and not any(p.requires_grad for p in lpips.parameters())
    assert not lpips.distance.training


def test_a_backbone_that_cannot_be_downloaded_is_an_error_that_names_the_way_on(lpips, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("<urlopen error no network>")

    monkeypatch.setattr(losses.import_lpips(), "LPIPS", offline)
    with pytest.raises(UserError, match="backbone vgg could not be downloaded.*no network.*--lpips none"):
        LPIPS("vgg")


def test_a_missing_package_is_an_error_that_names_the_way_on(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match="LPIPS is not available.*--lpips none"):
        LPIPS("vgg")


# ---------------------------------------------------------------------------------------------------------------- adversarial


@pytest.mark.parametrize("frames, size", [(1, 32), (3, 32), (16, 64)])
def test_discriminator_takes_any_number_of_frames(frames, size):
    discriminator = Discriminator(DiscriminatorConfig(width=2))
    assert discriminator(torch.randn(3, frames, 3, size, size)).shape == (3,)


def test_discriminator_of_the_paper():
    with torch.device("meta"):
        discriminator = Discriminator(DiscriminatorConfig())
    widths = [block.conv1.in_channels for block in discriminator.blocks]
    assert widths == [64, 128, 256, 512, 1024]
    assert discriminator(torch.empty(2, 16, 3, 128, 128, device="meta")).shape == (2,)


def test_discriminator_judges_each_clip_by_itself_and_hears_order_in_time():
    torch.manual_seed(0)
    discriminator, video = Discriminator(DiscriminatorConfig(width=2)), torch.randn(4, 8, 3, 32, 32)
    logits = discriminator(video)
    torch.testing.assert_close(discriminator(video[1:2]), logits[1:2])
    assert (discriminator(video.flip(1)) - logits).abs().max() > 1e-3


def test_adversarial_losses_closed_form():
    class Brightness(torch.nn.Module):
        def forward(self, video):
            return video.mean((1, 2, 3, 4))

    mean_brightness = Brightness()
    real, frames = torch.full((2, 4, 3, 8, 8), 0.5), torch.full((2, 4, 3, 8, 8), -1.0)
    softplus = F.softplus
    assert generator_loss(mean_brightness, frames) == pytest.approx(softplus(torch.tensor(1.0)).item())
    loss, margin = discriminator_loss(mean_brightness, real, frames)
    expected = softplus(torch.tensor(-0.5)) + softplus(torch.tensor(-1.0))
    assert loss.item() == pytest.approx(expected.item()) and margin == 1.5
    # The gradient of a mean over n pixels is 1 / n at each of them: its squared norm is 1 / n.
    n = 4 * 3 * 8 * 8
    loss, _ = discriminator_loss(mean_brightness, real, frames, r1_weight=10 * n)
    assert loss.item() == pytest.approx(expected.item() + 5, rel=1e-5)


def test_r1_has_the_gradient_of_finite_differences(monkeypatch):
    monkeypatch.setattr(F, "leaky_relu", lambda x, slope: F.softplus(x))  # R1 jumps where a ReLU has its kink
    torch.manual_seed(0)
    discriminator = Discriminator(DiscriminatorConfig(width=2)).double()
    real, frames = (torch.randn(2, 2, 3, 32, 32, dtype=torch.double) for _ in range(2))
    weight = discriminator.blocks[0].conv1.weight
    loss, _ = discriminator_loss(discriminator, real, frames, r1_weight=100.0)
    (grad,) = torch.autograd.grad(loss, weight)
    direction = torch.randn_like(weight)
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            weight += sign * 1e-5 * direction
            with torch.enable_grad():
                ends.append(discriminator_loss(discriminator, real, frames, r1_weight=100.0)[0].item())
            weight -= sign * 1e-5 * direction
    assert (grad * direction).sum().item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3)


def test_the_decoder_gets_a_gradient_and_the_discriminators_step_gives_it_none():
    discriminator = Discriminator(DiscriminatorConfig(width=2))
    frames = torch.randn(2, 2, 3, 32, 32, requires_grad=True)
    discriminator_loss(discriminator, torch.randn(2, 2, 3, 32, 32), frames, r1_weight=1.0)[0].backward()
    assert frames.grad is None and all(p.grad is not None for p in discriminator.parameters())
    generator_loss(discriminator, frames).backward()
    assert frames.grad.abs().sum() > 0


def test_r1_goes_through_a_compiled_discriminator():
    torch.manual_seed(0)
    discriminator = Discriminator(DiscriminatorConfig(width=2))
    real, frames = torch.randn(2, 2, 2, 3, 32, 32).unbind()
    plain, _ = discriminator_loss(discriminator, real, frames, r1_weight=10.0)
    expected = torch.autograd.grad(plain, list(discriminator.parameters()))
    discriminator.compile(backend="aot_eager")  # what torch.compile does on any machine, short of making code
    loss, _ = discriminator_loss(discriminator, real, frames, r1_weight=10.0)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(torch.autograd.grad(loss, list(discriminator.parameters())), expected)


@pytest.mark.parametrize("r1_weight", [0.0, 10.0])
def test_under_autocast_a_cpu_computes_the_adversarial_losses_in_float32(r1_weight):
    # At a depth of two frames the bfloat16 weight gradient of conv3d is garbage.
    torch.manual_seed(0)
    discriminator = Discriminator(DiscriminatorConfig(width=8)).to(memory_format=torch.channels_last_3d)
    real, frames = torch.randn(2, 4, 2, 3, 32, 32).unbind()
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses = [generator_loss(discriminator, frames), *discriminator_loss(discriminator, real, frames, r1_weight)]
        results.append([*losses, *torch.autograd.grad(losses[1], list(discriminator.parameters()))])
    assert all(x.dtype == torch.float32 for x in results[1])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_logits_are_float32_whatever_the_convolutions_are():
    discriminator, video = Discriminator(DiscriminatorConfig(width=2)), torch.randn(2, 2, 3, 32, 32)
    expected = discriminator(video)
    discriminator.conv.register_forward_hook(lambda layer, inputs, out: out.bfloat16())  # as on a GPU
    logits = discriminator(video)
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())
    torch.testing.assert_close(logits, expected, rtol=1e-2, atol=1e-2)
