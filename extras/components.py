"""Principal components of weight tokens, which stage 2 may diffuse instead of the tokens themselves.

The entries of a video's tokens are strongly correlated: on Sprites, 64 of 2,048 directions hold 94 % of the variance.
Sprites: gFVD is 173 with components, Muon and larger batches, 612 without them.
"""

import math

import torch
import torch.nn as nn

from common.utils import UserError


class LatentScale(nn.Module):
    """Tokens <-> latents of unit standard deviation, by a scalar factor (Rombach et al. 2022)."""

    def __init__(self, token_shape):
        super().__init__()
        self.shape = tuple(token_shape)  # N and d of the latents
        self.register_buffer("scale", torch.ones(()))

    def fit(self, mean, deviation):
        """Fit to posterior means and deviations of many videos, both [videos, N, d]: samples get unit standard deviation."""
        self.scale.copy_((mean.var() + deviation.square().mean()).rsqrt())

    def forward(self, tokens):
        return self.scale * tokens

    deviation = forward  # standard deviations of tokens -> those of latents

    def inverse(self, latents):
        return latents / self.scale


class Components(nn.Module):
    """Tokens [..., N, d] <-> their largest principal components, scaled to unit standard deviation, as tokens [..., M, k].

    It has the methods of LatentScale, and is affine: interpolating components interpolates tokens.
    """

    def __init__(self, shape, token_shape):
        """shape: (M, k) of the components; token_shape: (N, d). UserError if M * k exceeds N * d."""
        super().__init__()
        self.shape, self.token_shape, size = tuple(shape), tuple(token_shape), math.prod(token_shape)
        if len(shape) != 2 or min(shape) < 1 or math.prod(shape) > size:
            raise UserError(f"--extras components={'x'.join(map(str, shape))}: use MxK, 1 to {size} (the latent size) in all")
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("directions", torch.zeros(*shape, size))  # [M, k, N * d], each of length 1
        self.register_buffer("scale", torch.ones(()))

    def fit(self, mean, deviation):
        """Fit components to posterior means, and the scale to these and deviations, of many videos, both [videos, N, d]."""
        flat = mean.flatten(1)
        centre, (M, k) = flat.mean(0), self.shape
        _, vectors = torch.linalg.eigh((flat - centre).T @ (flat - centre) / len(flat))  # ascending
        self.mean.copy_(centre), self.directions.copy_(vectors.T.flip(0)[: M * k].unflatten(0, (M, k)))
        self.scale.fill_(1.0)
        self.scale.copy_((self(mean).var() + self.deviation(deviation).square().mean()).rsqrt())

    def forward(self, tokens):
        """Tokens [..., N, d] -> components [..., M, k]."""
        return self.scale * torch.einsum("...i,mki->...mk", tokens.flatten(-2) - self.mean, self.directions)

    def deviation(self, deviation):
        """Standard deviations of independent noise on tokens [..., N, d] -> those on components [..., M, k]."""
        return self.scale * torch.einsum("...i,mki->...mk", deviation.square().flatten(-2), self.directions.square()).sqrt()

    def inverse(self, components):
        """Components [..., M, k] -> tokens [..., N, d]."""
        flat = torch.einsum("...mk,mki->...i", components / self.scale, self.directions)
        return (flat + self.mean).unflatten(-1, self.token_shape)
