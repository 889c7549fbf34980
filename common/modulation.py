"""What codec.py's decoder is made of: its sizes, convolutions whose kernels are shared times the codes of a video.

codes [B, P] are the numbers of all tokens of a clip, layer after layer, and those of the pictures at the end. Sections and
figures are those of FastNeRV (Chen et al. 2024).
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class CodecConfig:
    """Sizes of the decoder and its tokens. The defaults are FastNeRV's (§4.1; token sizes from HyperNeRV, §7.2)."""

    resolution: int = 256  # R = H = W in pixels of a tile, a power of two
    num_frames: int = 8  # T of a chunk
    width: int = 16  # channels between the blocks
    pos_dim: int = 16  # of the time embedding, which is all the input
    tokens: tuple[int, ...] = (4, 64, 16, 0)  # weight tokens of each layer
    token_dims: tuple[int, ...] = (256, 288, 288, 0)  # numbers of each token
    pictures: int = 0  # K that all videos share (nerv.Pictures; not the papers'), whose tokens come after those of the layers

    def __post_init__(self):
        self.tokens, self.token_dims = tuple(self.tokens), tuple(self.token_dims)
        if self.resolution < 4 or self.resolution & (self.resolution - 1):
            raise ValueError(f"resolution {self.resolution} is no power of two from 4 on")
        wanted = len(self.strides) + (self.pictures > 0)
        if not len(self.tokens) == len(self.token_dims) == wanted:
            about = "one per layer" + (", then the pictures'" if self.pictures else "")
            raise ValueError(f"resolution {self.resolution} takes {wanted} --tokens and --token-dims, {about}")
        for shape, tokens, dim in zip(self.shapes, self.tokens, self.token_dims):
            if min(tokens, dim) < 0 or tokens * dim > math.prod(shape) or (tokens > 0) != (dim > 0):
                raise ValueError(f"{tokens} tokens of {dim} numbers do not fit a kernel of {math.prod(shape)}")
        if not self.num_codes:
            raise ValueError("some layer has to have tokens")
        if self.pictures and (not self.codes[-1] or self.codes[-1] % self.pictures):
            raise ValueError(f"{self.codes[-1]} numbers are not the same number for each of {self.pictures} pictures")

    @property
    def strides(self):
        """Factors of the pixel shuffles: fours, and a two at the end where it takes one."""
        levels = self.resolution.bit_length() - 1
        return (4,) * (levels // 2) + (2,) * (levels % 2)

    @property
    def shapes(self):
        """Of the kernels: the first is 1 × 1, since its input is a single pixel, the others 3 × 3."""
        ins = (self.pos_dim, *(self.width for _ in self.strides[1:]))
        outs = (*(self.width for _ in self.strides[1:]), 3)
        sizes = (1, *(3 for _ in self.strides[1:]))
        return [(out * stride**2, in_, k, k) for in_, out, k, stride in zip(ins, outs, sizes, self.strides)]

    @property
    def num_tokens(self):
        return sum(self.tokens)

    @property
    def codes(self):
        """The numbers that the tokens of each layer are."""
        return [n * d for n, d in zip(self.tokens, self.token_dims)]

    @property
    def num_codes(self):
        """P, the numbers of one clip: what a file holds of it, before any are left out."""
        return sum(self.codes)

    def per_code(self, values):
        """One number, or one for each layer -> [P], that of each code's layer."""
        values = list(values) * (len(self.codes) if len(values) == 1 else 1)
        return torch.repeat_interleave(torch.tensor(values), torch.tensor(self.codes))


# Where the tokens go, per preset (Table 4): layer-adaptive, the same number in each layer (TransINR), all in one (GINR).
ALLOCATIONS = {
    "fastnerv": {
        "adaptive": ((4, 64, 16, 0), (256, 288, 288, 0)),
        "uniform": ((64, 64, 64, 64), (64, 144, 144, 108)),
        "specific": ((0, 64, 0, 0), (0, 576, 0, 0)),
    },
    "nano": {
        "adaptive": ((8, 32, 8), (32, 32, 32)),
        "uniform": ((16, 16, 16), (32, 32, 32)),
        "specific": ((0, 32, 0), (0, 48, 0)),
    },
}


class Layer(nn.Module):
    """A convolution and a pixel shuffle. Its kernel is shared, times what the tokens of a video say (§3.2, Fig. 4b)."""

    def __init__(self, shape, stride, tokens, dim, last):
        super().__init__()
        self.stride, self.tokens, self.dim, self.last = stride, tokens, dim, last
        std = (0.1 if last else 1) / math.sqrt(math.prod(shape[1:]))  # frames are grey at first
        self.shared = nn.Parameter(torch.randn(shape) * std)
        self.bias = nn.Parameter(torch.zeros(shape[0]))
        if tokens:
            self.strength = nn.Parameter(torch.ones(1))  # of what a code of one does: the grid of codes is fixed

    def kernel(self, codes):
        """codes [B, tokens * dim] -> kernels [B, out, in, k, k].

        The entries are in equal parts, one for each token, which is repeated to fill it. Then each output channel has its norm
        (HyperNeRV, §9), but for the last layer's, whose amplitude is that of the colours.
        """
        span = math.ceil(self.shared.numel() / self.tokens)
        factors = codes.unflatten(1, (self.tokens, self.dim)).repeat(1, 1, math.ceil(span / self.dim))[:, :, :span]
        factors = 1 + self.strength * factors.flatten(1)[:, : self.shared.numel()].view(-1, *self.shared.shape)
        kernel = self.shared * factors
        return kernel if self.last else kernel * torch.rsqrt(kernel.square().sum((2, 3, 4), keepdim=True) + 1e-8)

    def forward(self, x, codes):
        """x [T, B * in, h, w], codes [B, tokens * dim] -> [T, B * out, h * stride, w * stride]."""
        B, (_, in_, k, _) = len(codes), self.shared.shape
        if self.tokens:  # videos are the groups (Fig. 5)
            kernel, bias = self.kernel(codes).flatten(0, 1).to(x.dtype), self.bias.to(x.dtype).repeat(B)
            if B == 1 and not torch.is_grad_enabled():  # channels last: half the time on a CPU
                x, kernel = (part.contiguous(memory_format=torch.channels_last) for part in (x, kernel))
            return F.pixel_shuffle(F.conv2d(x, kernel, bias, padding=k // 2, groups=B), self.stride)
        T, x = len(x), x.reshape(-1, in_, *x.shape[2:])  # nothing is their own here, and frames are frames
        x = F.conv2d(x, self.shared.to(x.dtype), self.bias.to(x.dtype), padding=k // 2)
        return F.pixel_shuffle(x, self.stride).unflatten(0, (T, B)).flatten(1, 2)


@functools.lru_cache(1024)
def fallbacks(tokens, dims, kept):
    """NeRVDec.sources, of so many kept tokens in each layer.

    Token i falls back on token i less its leading bit, until it comes to one that is kept: of half of 2^k tokens, the first
    half are used twice, as in HyperNeRV (§3.2).
    """
    sources, first = [], 0
    for n, dim, few in zip(tokens, dims, kept):
        places = list(range(n))
        for i in range(few, n):
            places[i] = places[i - (1 << i.bit_length() - 1)]
        sources.append(first + (torch.tensor(places, dtype=torch.long)[:, None] * dim + torch.arange(dim)).flatten())
        first += n * dim
    return torch.cat(sources)
