"""Degraded clips to train restoration (FastNeRV, §3.1, Fig. 8; sizes are ours)."""

import torch
import torch.nn.functional as F

KINDS = ["none", "down4", "blur", "mask"]


def degrade(clips, kind, draws):
    """Degrade clips [B, T, 3, R, R] in [-1, 1], keeping their shape; rounded to 8 bits as in a file.

    down4: every pixel is the mean of a square of 4 × 4. blur: Gaussian of σ = 2 pixels. mask: grey holes in a quarter of
    the cells of an 8 × 8 grid, the same in all frames: where draws, [B, 8, 8] in [0, 1), are below 0.25.
    """
    size = clips.shape[-1]
    if kind == "none":
        return clips
    if kind == "down4":
        x = F.interpolate(F.avg_pool2d(clips.flatten(0, 1), 4), size, mode="nearest").view_as(clips)
    elif kind == "blur":
        x = blur(clips, sigma=2.0)
    else:
        holes = F.interpolate((draws < 0.25).float()[:, None], size, mode="nearest").bool()  # [B, 1, R, R]
        x = clips.masked_fill(holes[:, None].to(clips.device), 0.0)
    return ((x + 1) * 127.5).round() / 127.5 - 1


def blur(x, sigma):
    """Gaussian blur of x [..., R, R] in the frequency domain, mirrored at its edges."""
    size = x.shape[-1]
    x = torch.cat([x, x.flip(-1)], -1)
    x = torch.cat([x, x.flip(-2)], -2)
    place = torch.arange(2 * size, device=x.device)
    weights = torch.exp(-(torch.minimum(place, 2 * size - place) ** 2) / (2 * sigma**2))  # centred at 0 on a ring
    spectrum = torch.fft.fft(weights / weights.sum()).real
    return torch.fft.ifft2(torch.fft.fft2(x) * spectrum[:, None] * spectrum).real[..., :size, :size]
