"""Principal components of weight tokens: what stage 2 diffuses where it is asked to (dit.py --principal).

Numbers of a video's tokens are far from independent: of Sprites, 64 directions of 2,048 hold 94 % of the variance
(docs/sharp.md). Along these directions they are uncorrelated, and each can be told by itself how large it is (dit.DiT).
"""

import torch
import torch.nn as nn


class Principal(nn.Module):
    """Tokens [..., N, d] <-> K principal components of zero mean, large ones first, as N tokens [..., N, K / N].

    Not the paper's. The map is linear and keeps distances: a walk between components is a walk between tokens and between
    kernels, and with all K = N d components nothing is lost. Component i is in token i mod N, so that every token has a share
    of the large ones.
    """

    def __init__(self, count, num_tokens, token_dim):
        super().__init__()
        self.num_tokens, self.token_dim = num_tokens, token_dim
        self.register_buffer("mean", torch.zeros(num_tokens * token_dim))
        self.register_buffer("directions", torch.zeros(count, num_tokens * token_dim))  # rows of length 1

    def fit(self, tokens):
        """Take the components of tokens [B, N, d]; returns the share of their variance that is kept."""
        flat = tokens.float().flatten(1)
        mean = flat.mean(0)
        values, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))  # ascending
        count = len(self.directions)
        self.mean.copy_(mean), self.directions.copy_(vectors.T.flip(0)[:count])
        return (values.flip(0)[:count].sum() / values.sum()).item()

    def forward(self, tokens):
        """Tokens [..., N, d] -> components [..., N, K / N]."""
        return self.arrange((tokens.flatten(-2) - self.mean) @ self.directions.T)

    def spread(self, deviation):
        """Deviations of independent noise on tokens [..., N, d] -> those of the components [..., N, K / N]."""
        return self.arrange((deviation.square().flatten(-2) @ self.directions.T.square()).sqrt())

    def arrange(self, components):
        return components.unflatten(-1, (-1, self.num_tokens)).transpose(-1, -2)

    def tokens(self, components):
        """Components [..., N, K / N] -> tokens [..., N, d]; of tokens outside the K directions, the nearest."""
        flat = components.transpose(-1, -2).flatten(-2)
        return (flat @ self.directions + self.mean).unflatten(-1, (self.num_tokens, self.token_dim))
