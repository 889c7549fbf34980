"""The losses of stage 1 besides L2 and KL (Eq. 1): perceptual (LPIPS) and adversarial, with its discriminator."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.weights import weights

# Stages of the backbones; LPIPS compares their outputs. Each: max pooling (window, stride), then convolutions with ReLU
# (channels, kernel, stride, padding).
STAGES = {
    "vgg": [
        (None, [(64, 3, 1, 1)] * 2), ((2, 2), [(128, 3, 1, 1)] * 2), ((2, 2), [(256, 3, 1, 1)] * 3),
        ((2, 2), [(512, 3, 1, 1)] * 3), ((2, 2), [(512, 3, 1, 1)] * 3),
    ],
    "alex": [
        (None, [(64, 11, 4, 2)]), ((3, 2), [(192, 5, 1, 2)]), ((3, 2), [(384, 3, 1, 1)]), (None, [(256, 3, 1, 1)]),
        (None, [(256, 3, 1, 1)]),
    ],
}  # fmt: skip


class LPIPS(nn.Module):
    """Perceptual distance of frames (Zhang et al. 2018, v0.1), averaged over a batch; backbone "vgg" or "alex".

    Squared differences between unit feature vectors of five layers of a frozen backbone, trained on ImageNet by torchvision,
    are weighted by the heads and averaged. pretrained=False: random weights (for tests). UserError if they are unavailable.
    """

    def __init__(self, backbone="vgg", pretrained=True):
        super().__init__()
        self.stages, self.convs, channels = STAGES[backbone], nn.ModuleList(), 3
        for conv in (conv for _, convs in self.stages for conv in convs):
            self.convs.append(nn.Conv2d(channels, *conv))
            channels = conv[0]
        self.heads = nn.ParameterList(torch.rand(convs[-1][0]) for _, convs in self.stages)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)
        if pretrained:
            self.load_state_dict(weights(f"lpips-{backbone}"))
        self.requires_grad_(False)

    def features(self, x):
        """x [B, 3, H, W] in [-1, 1] -> unit vectors at each position after the five stages, [float32 [B, C, h, w], …]."""
        x, layers, found = (x - self.shift) / self.scale, iter(self.convs), []
        for pool, convs in self.stages:
            x = F.max_pool2d(x, *pool) if pool else x
            for _ in convs:
                x = F.relu(next(layers)(x))
            y = x.float()  # a sum of squares needs more precision than bfloat16
            found.append(y * (y.square().sum(1, keepdim=True) + 1e-20).rsqrt())  # finite gradient at 0
        return found

    def forward(self, frames, real):
        """frames, real [B, T, 3, H, W] in [-1, 1], 16 pixels wide or more -> the mean distance, 0-d."""
        frames, real = frames.flatten(0, 1), real.flatten(0, 1)  # [B * T, 3, H, W]
        if real.shape[-1] < 64:  # doubled once, as AlexNet starts with stride 4
            frames, real = (F.interpolate(x, scale_factor=2, mode="bilinear") for x in (frames, real))
        pairs = zip(self.heads, self.features(frames), self.features(real))
        return sum(((a - b).square() * head.view(-1, 1, 1)).sum(1).mean() for head, a, b in pairs)


class DiscriminatorBlock(nn.Module):
    """A residual block of StyleGAN2's discriminator in 3D; it halves height, width and, if above 1, the number of frames."""

    def __init__(self, in_ch, out_ch):
        super().__init__()
        self.conv1 = nn.Conv3d(in_ch, in_ch, 3, padding=1)
        self.conv2 = nn.Conv3d(in_ch, out_ch, 3, padding=1)
        self.skip = nn.Conv3d(in_ch, out_ch, 1, bias=False)

    def forward(self, x):
        halve = (min(2, x.shape[2]), 2, 2)  # a box filter against aliasing
        h = F.leaky_relu(self.conv1(x), 0.2)
        h = F.leaky_relu(F.avg_pool3d(self.conv2(h), halve), 0.2)
        return (h + self.skip(F.avg_pool3d(x, halve))) / 2**0.5


class Discriminator(nn.Module):
    """Tells real from decoded clips: 3D convolutions as in StyleGAN2. A transformer "introduces flickering artifacts"
    (§3.1; sizes: §A.1). Without statistics over the batch: a clip's logit does not depend on other clips.
    """

    def __init__(self, width=64, blocks=5):
        super().__init__()
        self.smallest = 2**blocks  # minimum height and width of a clip
        widths = [width * 2 ** min(i, blocks - 1) for i in range(blocks + 1)]
        self.from_rgb = nn.Conv3d(3, width, 1)
        self.blocks = nn.ModuleList(DiscriminatorBlock(i, o) for i, o in zip(widths[:-1], widths[1:]))
        self.conv = nn.Conv3d(widths[-1], widths[-1], 3, padding=1)
        self.out = nn.Linear(widths[-1], 1)
        for conv in (module for module in self.modules() if isinstance(module, nn.Conv3d)):
            nn.init.kaiming_normal_(conv.weight, 0.2)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def forward(self, video):
        """video [B, T, 3, H, W] in [-1, 1], T consecutive frames -> logits [B], float32, positive: real."""
        # float32 on CPUs, where the bfloat16 weight gradient of conv3d is wrong for clips of two frames.
        dtype = self.out.weight.dtype
        with torch.autocast("cpu", enabled=False):
            x = F.leaky_relu(self.from_rgb(video.to(dtype).transpose(1, 2)), 0.2)  # [B, width, T, H, W]
            for block in self.blocks:
                x = block(x)
            x = F.leaky_relu(self.conv(x), 0.2).to(dtype).mean((2, 3, 4))  # [B, 16 * width]
        return (x * self.out.weight).sum(1) + self.out.bias  # self.out(x), without autocast's rounding


def generator_loss(discriminator, frames):
    """Non-saturating logistic loss (Goodfellow et al. 2014) of the decoder, for decoded frames [B, T, 3, H, W]."""
    discriminator.requires_grad_(False)  # discriminator_loss enables it again
    return F.softplus(-discriminator(frames)).mean()


def discriminator_loss(discriminator, real, frames, r1_weight=0.0):
    """Logistic loss of real clips and decoded frames, both [B, T, 3, H, W], plus R1 (Mescheder et al. 2018) on the real ones,
    r1_weight / 2 * E[|dD/dx|²], in float32. Returns (loss, mean logit of real clips minus that of decoded ones)."""
    on_decoded = discriminator.requires_grad_(True)(frames.detach())
    if r1_weight > 0:
        real = real.detach().requires_grad_()
        with torch.autocast(real.device.type, enabled=False):
            on_real = discriminator(real)
            (grad,) = torch.autograd.grad(on_real.sum(), real, create_graph=True)  # per clip: logits are independent
            r1 = 0.5 * r1_weight * grad.square().sum((1, 2, 3, 4)).mean()
    else:
        on_real, r1 = discriminator(real.detach()), 0.0
    loss = F.softplus(-on_real).mean() + F.softplus(on_decoded).mean() + r1
    return loss, (on_real.mean() - on_decoded.mean()).detach()
