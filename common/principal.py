"""Principal components of weight tokens: what stage 2 diffuses where it is asked to (dit.py --principal).

Numbers of a video's tokens are far from independent: of Sprites, 64 directions of 2,048 hold 94 % of the variance
(docs/sharp.md). Along these directions they are uncorrelated, and a few of them, in few tokens, do for all.
"""

import torch
import torch.nn as nn


class Principal(nn.Module):
    """Tokens [..., N, d] <-> the largest principal components, of zero mean, as other tokens [..., M, k].

    Not the paper's. The map is linear and keeps distances: a walk between components is a walk between tokens and between
    kernels, and with M k = N d nothing is lost. The first token has the k largest, which the others can read by attention.
    """

    def __init__(self, shape, token_shape):
        """shape: (M, k) of the components; token_shape: (N, d)."""
        super().__init__()
        self.token_shape, size = token_shape, token_shape[0] * token_shape[1]
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("directions", torch.zeros(*shape, size))  # [M, k, N * d], each of length 1

    @property
    def shape(self):
        return self.directions.shape[:2]

    def fit(self, tokens):
        """Take the components of tokens [B, N, d]; returns the share of their variance that is kept."""
        flat = tokens.float().flatten(1)
        mean, (M, k) = flat.mean(0), self.shape
        values, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))  # ascending
        self.mean.copy_(mean), self.directions.copy_(vectors.T.flip(0)[: M * k].unflatten(0, (M, k)))
        return (values.flip(0)[: M * k].sum() / values.sum()).item()

    def forward(self, tokens):
        """Tokens [..., N, d] -> components [..., M, k]."""
        return torch.einsum("...i,mki->...mk", tokens.flatten(-2) - self.mean, self.directions)

    def spread(self, deviation):
        """Deviations of independent noise on tokens [..., N, d] -> those of the components [..., M, k]."""
        return torch.einsum("...i,mki->...mk", deviation.square().flatten(-2), self.directions.square()).sqrt()

    def tokens(self, components):
        """Components [..., M, k] -> tokens [..., N, d]; of tokens outside these directions, the nearest."""
        return (torch.einsum("...mk,mki->...i", components, self.directions) + self.mean).unflatten(-1, self.token_shape)
