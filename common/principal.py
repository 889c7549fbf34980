"""What is linear about weight tokens: their principal components, and what given frames tell of them.

Numbers of a video's tokens are far from independent: of Sprites, 64 directions of 2,048 hold 94 % of the variance
(docs/sharp.md). Along these directions they are uncorrelated, so that each can be told by itself how large it is (dit.DiT),
and a few of them, in few tokens, do for all: what stage 2 diffuses where it is asked to (dit.py --principal).
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


class LinearGuess(nn.Module):
    """The best linear guess of tokens [B, N, d] of a clip from those of its given frames (dit.encode_given); not the paper's.

    A person whom the training never saw is a guess away where a network would take the nearest of those whom it saw.
    """

    def __init__(self, size):
        """size: N d, how many numbers there are of a video."""
        super().__init__()
        self.register_buffer("given", torch.zeros(size))  # mean of what is given
        self.register_buffer("guess", torch.zeros(size))  # mean of what is guessed
        self.register_buffer("slope", torch.zeros(size, size))

    def fit(self, given, tokens, ridge=0.1):
        """Take the map of given [B, N, d] to tokens [B, N, d] with least squared error, both float.

        ridge: of the mean variance of given, added to that of each number, so that it holds for videos that are not here.
        """
        x, y = given.double().flatten(1), tokens.double().flatten(1)
        self.given.copy_(x.mean(0)), self.guess.copy_(y.mean(0))
        x, y = x - x.mean(0), y - y.mean(0)
        power = x.T @ x / len(x)
        power.diagonal().add_(ridge * power.diagonal().mean().clamp_min(1e-12))
        self.slope.copy_(torch.linalg.solve(power, x.T @ y / len(x)))

    def forward(self, given):
        """Given [B, N, d] -> guesses [B, N, d]."""
        return ((given.flatten(1) - self.given) @ self.slope + self.guess).view_as(given)
