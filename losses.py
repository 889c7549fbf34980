"""The losses of stage 1 beyond L2 and KL (Eq. 1): a perceptual one, LPIPS, and an adversarial one, with its discriminator."""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import nerv
from common.weights import weights

# ------------------------------------------------------------------------------------------------------------- perceptual


# The backbones: convolutions with their ReLU, (channels, kernel, stride, padding); pooling; "tap": what is compared.
VGG_POOL, ALEX_POOL = ("pool", 2, 2), ("pool", 3, 2)
BACKBONES = {
    "vgg": [
        *[(64, 3, 1, 1)] * 2, "tap", VGG_POOL, *[(128, 3, 1, 1)] * 2, "tap", VGG_POOL, *[(256, 3, 1, 1)] * 3, "tap", VGG_POOL,
        *[(512, 3, 1, 1)] * 3, "tap", VGG_POOL, *[(512, 3, 1, 1)] * 3, "tap",
    ],
    "alex": [
        (64, 11, 4, 2), "tap", ALEX_POOL, (192, 5, 1, 2), "tap", ALEX_POOL, (384, 3, 1, 1), "tap", (256, 3, 1, 1), "tap",
        (256, 3, 1, 1), "tap",
    ],
}  # fmt: skip


class LPIPS(nn.Module):
    """Perceptual distance of frames (Zhang et al. 2018, v0.1), the mean over a batch; backbone "vgg" or "alex".

    Unit vectors of five of the backbone's layers are subtracted, squared, weighted by the heads and averaged over places. The
    backbone is torchvision's of ImageNet, and fixed; both come from common/weights.py. pretrained False leaves them random (for
    tests). UserError where they cannot be had.
    """

    def __init__(self, backbone="vgg", pretrained=True):
        super().__init__()
        self.layers, self.convs, self.heads, channels = BACKBONES[backbone], nn.ModuleList(), nn.ParameterList(), 3
        for layer in self.layers:
            if layer == "tap":
                self.heads.append(torch.rand(channels))
            elif layer[0] != "pool":
                self.convs.append(nn.Conv2d(channels, *layer))
                channels = layer[0]
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)
        if pretrained:
            self.load_state_dict(weights(f"lpips-{backbone}"))
        self.requires_grad_(False)

    def features(self, x):
        """x [B, 3, H, W] in [-1, 1] -> unit vectors at each place of the five taps, [float32 [B, C, h, w], …]."""
        x, convs, found = (x - self.shift) / self.scale, iter(self.convs), []
        for layer in self.layers:
            if layer == "tap":
                y = x.float()  # a sum of squares takes more digits than bfloat16 has
                found.append(y * (y.square().sum(1, keepdim=True) + 1e-20).rsqrt())  # the root of 0 would have no gradient
            elif layer[0] == "pool":
                x = F.max_pool2d(x, *layer[1:])
            else:
                x = F.relu(next(convs)(x))
        return found

    def forward(self, frames, real):
        """frames, real [B, T, 3, H, W] in [-1, 1], 32 pixels wide or more -> the mean distance, 0-d."""
        pairs = zip(self.heads, self.features(frames.flatten(0, 1)), self.features(real.flatten(0, 1)))
        return sum(((a - b).square() * head.view(-1, 1, 1)).sum(1).mean() for head, a, b in pairs)


def at_least_64(clips):
    """Clips [B, T, 3, H, W] as LPIPS is to see them: doubled below 64 pixels, [1, B * T, 3, 2H, 2W].

    AlexNet begins with strides of 4, and would see too little of an edge.
    """
    return nerv.double(clips.flatten(0, 1))[None] if clips.shape[-1] < 64 else clips


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
            on_real = discriminator(real)
            # No clip's answer depends on another clip, so the gradient of the sum holds the gradient of each.
            (grad,) = torch.autograd.grad(on_real.sum(), real, create_graph=True)
            r1 = 0.5 * r1_weight * grad.square().sum((1, 2, 3, 4)).mean()
    else:
        on_real, r1 = discriminator(real.detach()), 0.0
    loss = F.softplus(-on_real).mean() + F.softplus(on_decoded).mean() + r1
    return loss, (on_real.mean() - on_decoded.mean()).detach()
