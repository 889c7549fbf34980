"""The losses of stage 1 beyond L2 and KL (Eq. 1): a perceptual one, LPIPS, and an adversarial one, with its discriminator."""

import re
import sys
import warnings
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.utils import UserError

# ------------------------------------------------------------------------------------------------------------- perceptual


DECLARED = []  # declarations last as long as these objects


def import_lpips():
    """The lpips package; UserError, in one line, where it cannot be imported.

    lpips imports torchvision, and torchvision's wheel from the package index is built for CUDA: beside a CPU build of torch
    its compiled operators do not load, and its import stops at the first one that it wants to describe ("operator
    torchvision::nms does not exist"). lpips uses none of these operators: they are declared, without code, and it goes on.
    """
    try:
        for _ in range(10):
            try:
                import torchvision  # noqa: F401

                break
            except RuntimeError as error:
                missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
                if not missing:
                    raise
                for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                    del sys.modules[name]  # half imported
                DECLARED.append(torch.library.Library("torchvision", "FRAGMENT"))
                DECLARED[-1].define(f"{missing[1]}() -> ()")
        import lpips
    except (ImportError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"LPIPS is not available here ({reason}): install lpips, or train without it with --lpips none"
        ) from None
    return lpips


class LPIPS(nn.Module):
    """Perceptual distance of frames (Zhang et al. 2018), the mean over a batch; backbone "vgg", "alex" or "squeeze".

    The backbone's weights are downloaded at first use, into the cache of torch.hub. pretrained False leaves them random
    (for tests). UserError where they cannot be had.
    """

    def __init__(self, backbone="vgg", pretrained=True):
        super().__init__()
        lpips = import_lpips()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # lpips names its weights in a way that torchvision has since renamed
                distance = lpips.LPIPS(net=backbone, pnet_rand=not pretrained, verbose=False)
        except OSError as error:  # URLError and HTTPError are OSErrors
            reason = " ".join(str(error).split())
            raise UserError(
                f"the weights of LPIPS's backbone {backbone} could not be downloaded ({reason}): go online once, or train "
                f"without it with --lpips none"
            ) from None

        self.distance = distance.eval().requires_grad_(False)

    def forward(self, frames, real):
        """frames, real [B, T, 3, H, W] in [-1, 1] -> the mean distance, 0-d."""
        return self.distance(frames.flatten(0, 1), real.flatten(0, 1)).mean()


# ------------------------------------------------------------------------------------------------------------ adversarial


@dataclass
class DiscriminatorConfig:
    """Sizes of the discriminator. The defaults are the paper's (§A.1): 5 blocks, 64 wide, twice that from block to block."""

    width: int = 64
    blocks: int = 5


class DiscriminatorBlock(nn.Module):
    """A residual block of StyleGAN2's discriminator in 3D; it halves height and width, and time while there is time."""

    def __init__(self, in_ch, out_ch):
        super().__init__()
        self.conv1 = nn.Conv3d(in_ch, in_ch, 3, padding=1)
        self.conv2 = nn.Conv3d(in_ch, out_ch, 3, padding=1)
        self.skip = nn.Conv3d(in_ch, out_ch, 1, bias=False)

    def forward(self, x):
        def halve(x):  # [B, C, T, H, W] -> [B, C, T / 2, H / 2, W / 2], a box filter against aliasing
            return F.avg_pool3d(x, (min(2, x.shape[2]), 2, 2))

        h = F.leaky_relu(self.conv1(x), 0.2)
        h = F.leaky_relu(halve(self.conv2(h)), 0.2)
        return (h + self.skip(halve(x))) / 2**0.5


class Discriminator(nn.Module):
    """Tells real from decoded clips: a 3D convolutional network in the manner of StyleGAN2 (§3.1, §A.1).

    Convolutions, because a transformer in its place "introduces flickering artifacts" (§3.1). It has no statistics over the
    batch, so that one clip's answer does not depend on the others, nor on how they are spread over processes.
    """

    def __init__(self, config):
        super().__init__()
        widths = [config.width * 2**i for i in range(config.blocks)]
        widths.append(widths[-1])
        self.from_rgb = nn.Conv3d(3, widths[0], 1)
        self.blocks = nn.ModuleList(DiscriminatorBlock(i, o) for i, o in zip(widths[:-1], widths[1:]))
        self.conv = nn.Conv3d(widths[-1], widths[-1], 3, padding=1)
        self.out = nn.Linear(widths[-1], 1)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, 0.2)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, video):
        """video [B, T, 3, H, W] in [-1, 1], T consecutive frames, H = W at least 2**blocks -> logits [B], positive: real.

        Under autocast the convolutions are in bfloat16 on GPUs, and the logits in float32: a bfloat16 has eight bits. On CPUs
        all of it is in float32, where the bfloat16 weight gradient of conv3d is wrong for clips of two frames.
        """
        exact = self.out.weight.dtype
        with torch.autocast("cpu", enabled=False):
            x = F.leaky_relu(self.from_rgb(video.to(exact).transpose(1, 2)), 0.2)  # [B, width, T, H, W]
            for block in self.blocks:
                x = block(x)
            x = F.leaky_relu(self.conv(x), 0.2).to(exact).mean((2, 3, 4))  # [B, 16 * width]
        return (x * self.out.weight).sum(1) + self.out.bias  # as self.out does, which autocast would round


def generator_loss(discriminator, frames):
    """Non-saturating logistic loss (Goodfellow et al. 2014): the decoder wants its frames to be taken for real."""
    return F.softplus(-discriminator(frames)).mean()


def discriminator_loss(discriminator, real, frames, r1_weight=0.0):
    """Logistic loss of real clips and decoded frames, both [B, T, 3, H, W], plus R1 (Mescheder et al. 2018) on the real ones.

    r1_weight / 2 * E[|dD/dx|²], in float32. Returns (loss, mean logit of real clips minus that of decoded ones).
    """
    on_decoded = discriminator(frames.detach())
    if r1_weight > 0:
        real = real.detach().requires_grad_()
        with torch.autocast(real.device.type, enabled=False):
            on_real = discriminator.forward(real)  # not the compiled call: what torch.compile makes has no second derivative
            # No clip's answer depends on another clip, so the gradient of the sum holds the gradient of each.
            (grad,) = torch.autograd.grad(on_real.sum(), real, create_graph=True)
            r1 = 0.5 * r1_weight * grad.square().sum((1, 2, 3, 4)).mean()
    else:
        on_real, r1 = discriminator(real.detach()), 0.0
    loss = F.softplus(-on_real).mean() + F.softplus(on_decoded).mean() + r1
    return loss, (on_real.mean() - on_decoded.mean()).detach()
