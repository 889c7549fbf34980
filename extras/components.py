"""Principal components of weight tokens: what stage 2 may diffuse in the place of the tokens themselves.

The numbers of a video's tokens are far from independent: of Sprites, 64 directions of 2,048 hold 94 % of the variance.
Sprites: FVD of generated clips 173 with components, Muon and larger batches, 612 without.
"""

import math

import torch
import torch.nn as nn

from common.utils import UserError


class LatentScale(nn.Module):
    """Tokens <-> latents of unit deviation, by one number (Rombach et al. 2022)."""

    def __init__(self, token_shape):
        super().__init__()
        self.shape = tuple(token_shape)  # N and d of the latents
        self.register_buffer("scale", torch.ones(()))

    def fit(self, mean, deviation):
        """Posterior means and deviations of many videos, both [videos, N, d]: draws from them get unit deviation."""
        self.scale.copy_((mean.var() + deviation.square().mean()).rsqrt())

    def forward(self, tokens):
        return self.scale * tokens

    spread = forward  # standard deviations of tokens -> those of latents

    def inverse(self, latents):
        return latents / self.scale


class Components(nn.Module):
    """Tokens [..., N, d] <-> their largest principal components at unit deviation, as tokens [..., M, k].

    In the place of LatentScale, with the same methods. The map is linear and keeps distances, but for its scale: a walk between
    components is one between tokens.
    """

    def __init__(self, shape, token_shape):
        """shape: (M, k) of the components; token_shape: (N, d). UserError where there are more components than numbers."""
        super().__init__()
        self.shape, self.token_shape, size = tuple(shape), tuple(token_shape), math.prod(token_shape)
        if len(shape) != 2 or min(shape) < 1 or math.prod(shape) > size:
            raise UserError(f"--extras components={'x'.join(map(str, shape))}: use MxK, 1 to {size} in all, as a video has")
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("directions", torch.zeros(*shape, size))  # [M, k, N * d], each of length 1
        self.register_buffer("scale", torch.ones(()))

    def fit(self, mean, deviation):
        """Posterior means and deviations of many videos, both [videos, N, d] -> the components of the means; unit deviation."""
        flat = mean.float().flatten(1)
        centre, (M, k) = flat.mean(0), self.shape
        _, vectors = torch.linalg.eigh((flat - centre).T @ (flat - centre) / len(flat))  # ascending
        self.mean.copy_(centre), self.directions.copy_(vectors.T.flip(0)[: M * k].unflatten(0, (M, k)))
        self.scale.fill_(1.0)
        self.scale.copy_((self(mean.float()).var() + self.spread(deviation.float()).square().mean()).rsqrt())

    def forward(self, tokens):
        """Tokens [..., N, d] -> components [..., M, k]."""
        return self.scale * torch.einsum("...i,mki->...mk", tokens.flatten(-2) - self.mean, self.directions)

    def spread(self, deviation):
        """Deviations of independent noise on tokens [..., N, d] -> those of the components [..., M, k]."""
        return self.scale * torch.einsum("...i,mki->...mk", deviation.square().flatten(-2), self.directions.square()).sqrt()

    def inverse(self, components):
        """Components [..., M, k] -> tokens [..., N, d]."""
        flat = torch.einsum("...mk,mki->...i", components / self.scale, self.directions)
        return (flat + self.mean).unflatten(-1, self.token_shape)
