"""Degraded clips for a restoration to learn from (FastNeRV, §3.1, Fig. 8; sizes are ours), and what undoes it without learning.

    kind     what is left of a clip                                                  what undoes it without learning
    down4    every pixel the mean of a square of 4 × 4 pixels                        bicubic interpolation between the squares
    blur     a Gaussian of σ = 2 pixels                                              a Wiener filter that knows the Gaussian
    mask     holes in a quarter of the cells of an 8 × 8 grid, in all frames         the holes fill up from their edges

A degraded clip is one that a file could hold: rounded to 8 bits.
"""

import math

import torch
import torch.nn.functional as F

from common import rd
from common.tables import table

KINDS = ["none", "down4", "blur", "mask"]
FACTOR, SIGMA, CELLS, SHARE = 4, 2.0, 8, 0.25
NOISE = 3e-4  # what a Wiener filter takes for noise, in power: the best for a few clips of the GRID corpus at 64 × 64


def draw(count, generator):
    """The random numbers of `count` clips, [count, 8, 8] in [0, 1): those below a quarter are holes of "mask"."""
    return torch.rand(count, CELLS, CELLS, generator=generator, device=generator.device)


def holes(draws, size):
    """draws [B, 8, 8] -> True where a pixel is in a hole, [B, 1, 1, size, size]."""
    return F.interpolate((draws < SHARE).float()[:, None], size, mode="nearest").bool()[:, None]


def gaussian(size, sigma, device):
    """The weights of a Gaussian about the first of `size` places on a ring, with the sum of one."""
    place = torch.arange(size, device=device)
    place = torch.minimum(place, size - place)
    weights = torch.exp(-(place**2) / (2 * sigma**2))
    return weights / weights.sum()


def filtered(x, response):
    """x [..., R, R], mirrored at its edges, through the filter response(spectrum of the Gaussian)."""
    size = x.shape[-1]
    x = torch.cat([x, x.flip(-1)], -1)
    x = torch.cat([x, x.flip(-2)], -2)
    spectrum = torch.fft.fft(gaussian(2 * size, SIGMA, x.device)).real
    x = torch.fft.ifft2(torch.fft.fft2(x) * response(spectrum[:, None] * spectrum[None])).real
    return x[..., :size, :size]


def degrade(clips, kind, draws):
    """Clips [B, T, 3, R, R] in [-1, 1] as they come to a restoration, of the same shape; holes are where draws say so."""
    if kind == "none":
        return clips
    x, size = clips.flatten(0, 1), clips.shape[-1]
    if kind == "down4":
        x = F.interpolate(F.avg_pool2d(x, FACTOR), size, mode="nearest")
    elif kind == "blur":
        x = filtered(x, lambda spectrum: spectrum)
    x = x.view_as(clips)
    if kind == "mask":
        x = x.masked_fill(holes(draws, size).to(x.device), 0.0)
    return ((x + 1) * 127.5).round() / 127.5 - 1


def classic(clips, kind, draws):
    """(name, clips) of a restoration without learning: degraded clips [B, T, 3, R, R] -> [B, T, 3, R, R]."""
    x, size = clips.flatten(0, 1), clips.shape[-1]
    if kind == "down4":
        x = F.interpolate(x[..., ::FACTOR, ::FACTOR], size, mode="bicubic")
        return "bicubic", x.clamp(-1, 1).view_as(clips)
    if kind == "blur":
        x = filtered(x, lambda spectrum: spectrum / (spectrum**2 + NOISE))
        return "Wiener", x.clamp(-1, 1).view_as(clips)
    known = ~holes(draws, size).to(clips.device).expand(-1, clips.shape[1], -1, -1, -1).flatten(0, 1)
    return "filled from the edges", fill(x, known.float()).view_as(clips)


def fill(x, known):
    """x [N, 3, R, R] where known [N, 1, R, R] is 1; elsewhere what is known around it, from coarser levels (pull-push)."""
    if x.shape[-1] == 1 or known.min() == 1:
        return x
    share = F.avg_pool2d(known, 2)
    coarse = fill(F.avg_pool2d(x * known, 2) / share.clamp_min(0.25), (share > 0).float())
    return torch.where(known > 0, x, F.interpolate(coarse, scale_factor=2, mode="bilinear"))


def report(real, kind, draws, degraded, restored):
    """Print the table of held-out clips: PSNR, the mean over clips, and MS-SSIM, over frames, of three ways to see them."""
    rows = []
    for name, clips in (("degraded input", degraded), classic(degraded, kind, draws), ("ours", restored)):
        mse = (clips - real).square().mean((1, 2, 3, 4)).clamp_min(1e-10)
        likeness = rd.ms_ssim(clips.flatten(0, 1).clamp(-1, 1), real.flatten(0, 1)).mean().item()
        shown = "" if math.isnan(likeness) else f"{likeness:.4f}"
        rows.append([name, f"{(10 * torch.log10(4 / mse)).mean():.2f}", shown])
    table([f"{kind}, {len(real)} held-out clips", "PSNR in dB", "MS-SSIM"], rows)
