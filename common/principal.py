"""Principal components of weight tokens: what stage 2 diffuses where it is asked to (dit.py --principal).

Tokens of videos are far from independent numbers of one size: of Sprites, 64 directions of 2,048 hold 94 % of the variance
(docs/sharp.md). Under one scale for all, as the paper has it, noise hides small directions
until the last steps, and what the network gets wrong is as large in them as in the others: it shows as specks.
"""

import torch
import torch.nn as nn


class Principal(nn.Module):
    """Tokens [..., N, d] <-> K principal components, of zero mean and together of unit deviation, as N tokens [..., N, K / N].

    Not the paper's. The map is linear: a walk between components is a walk between tokens and between kernels. Component i is
    in token i mod N, so that every token has a share of the large ones. Each keeps the square root of its deviation: as they
    are, the largest drown the others, and all alike, a small network spends itself on those that hardly show.
    """

    def __init__(self, count, num_tokens, token_dim):
        super().__init__()
        self.num_tokens, self.token_dim = num_tokens, token_dim
        self.register_buffer("mean", torch.zeros(num_tokens * token_dim))
        self.register_buffer("directions", torch.zeros(count, num_tokens * token_dim))  # rows of length 1, large ones first
        self.register_buffer("scale", torch.ones(count))  # what a component is divided by

    def fit(self, tokens):
        """Take the components of tokens [B, N, d]; returns the share of their variance that is kept."""
        flat = tokens.float().flatten(1)
        mean = flat.mean(0)
        values, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))  # ascending
        kept = values.flip(0)[: len(self.scale)].clamp_min(1e-12)
        deviation = kept.sqrt()
        self.mean.copy_(mean), self.directions.copy_(vectors.T.flip(0)[: len(kept)])
        self.scale.copy_((deviation * deviation.mean()).sqrt())  # so that the mean of (deviation / scale)² is 1
        return (kept.sum() / values.sum()).item()

    def forward(self, tokens):
        """Tokens [..., N, d] -> components [..., N, K / N]."""
        return self.arrange((tokens.flatten(-2) - self.mean) @ self.directions.T / self.scale)

    def spread(self, deviation):
        """Deviations of independent noise on tokens [..., N, d] -> those of the components [..., N, K / N]."""
        return self.arrange((deviation.square().flatten(-2) @ self.directions.T.square()).sqrt() / self.scale)

    def arrange(self, components):
        return components.unflatten(-1, (-1, self.num_tokens)).transpose(-1, -2)

    def tokens(self, components):
        """Components [..., N, K / N] -> tokens [..., N, d]; of tokens outside the K directions, the nearest."""
        flat = components.transpose(-1, -2).flatten(-2) * self.scale
        return (flat @ self.directions + self.mean).unflatten(-1, (self.num_tokens, self.token_dim))
