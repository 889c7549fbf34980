"""The generative NeRV decoder: a convolutional network whose kernels *are* the video (NeRV-Diffusion, Ren et al., ICLR 2026).

A NeRV (neural representation for videos) takes a frame index and returns that frame. Here a part of every kernel is generated
from N weight tokens of width d, which differ from video to video; the rest is shared by all videos. One call, top to bottom:

    tokens [B, N, d]  --multi-head affine-->  a part of each layer's kernel, for each video        (ModulatedConv.kernel)
    t [T]             --position code----->   [T, 48, 8, 8], the only input of the network         (position_code)
    both              --convolutions------>   frames [B, T, 3, H, W]                               (NeRV.forward)

§3.1 has the weights, §3.2 and Table A1 the layers. "Not in the paper" marks what fills the paper's gaps.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

GELU_GAIN = 1.5336  # keeps a unit second moment: E[gelu(x)²] = 0.425 for x ~ N(0, 1) (not in the paper)


@dataclass
class NeRVConfig:
    """Sizes of the decoder. The defaults are NeRV-Diffusion-S at 128 x 128 (Table A1). ValueError for sizes that do not fit."""

    resolution: int = 128  # H = W in pixels; pos_size times a power of two
    num_frames: int = 16  # T of the training clips; frame positions 0 ... T-1 are inside the clip
    num_tokens: int = 128  # N, weight tokens per video
    token_dim: int = 128  # d, width of a token
    width: int = 128  # D, channels of all blocks but the last
    last_factor: int = 2  # the last block has 2D channels (§3.2, "Scaling up Blocks")
    block: int = 64  # m: of a kernel [out, in] the part [m * out / in, m] is generated; of to_rgb's [3, in] half
    stem_fraction: int = 1  # f: of the stem's [D, 48] the part [D/f, 48/f] is generated; f = 1 in S, 2 in B and L
    pos_dim: int = 16  # sinusoidal dimensions each for time, height and width
    pos_size: int = 8  # h = w of the position code (Table 2c)

    def __post_init__(self):
        least = 2 if self.last_factor > 1 else 1  # a last block, and before it one in which the channels grow
        sizes = [self.pos_size * 2**level for level in range(least, 9)]
        if self.resolution not in sizes:
            raise ValueError(f"resolution {self.resolution}: use one of {', '.join(map(str, sizes))}")


CONFIGS = {
    "nano": NeRVConfig(resolution=32, num_tokens=32, token_dim=16, width=32, last_factor=1, block=32),
    "S": NeRVConfig(width=128),
    "B": NeRVConfig(width=256, stem_fraction=2),
    "L": NeRVConfig(width=512, stem_fraction=2),
}
CONFIGS |= {f"{name}-256": replace(CONFIGS[name], resolution=256, num_tokens=160) for name in "SBL"}  # one more block
CONFIGS |= {f"{name}-long": replace(c, num_frames=128) for name, c in CONFIGS.items() if name != "nano"}


def sinusoid(position, dim, length):
    """Sine and cosine features of real positions (§A.1: "sinusoidal").

    position [...], in cells or frames -> [..., dim], dim even. Angular frequencies are evenly spaced (not in the paper): the
    lowest is a quarter period over the length, so that no two positions share a code, the highest at most 0.9 π (no aliasing).
    """
    count = dim // 2
    highest = min((count - 0.5) * math.pi / length, 0.9 * math.pi)
    freq = torch.linspace(math.pi / 2 / length, highest, count, device=position.device)
    angle = position[..., None] * freq
    return math.sqrt(2) * torch.cat([angle.sin(), angle.cos()], -1)  # unit second moment


def position_code(t, config):
    """Spatiotemporal input of the network (§3.2): t [T], real-valued, in frames -> [T, 3 * pos_dim, h, w]."""
    size, dim = config.pos_size, config.pos_dim
    cell = sinusoid(torch.arange(size, device=t.device, dtype=torch.float32), dim, size).T  # [16, 8]
    time = sinusoid(t.float(), dim, config.num_frames)[:, :, None, None].expand(-1, -1, size, size)
    height = cell[None, :, :, None].expand(len(t), -1, -1, size)
    width = cell[None, :, None, :].expand(len(t), -1, size, -1)
    return torch.cat([time, height, width], 1)


class ModulatedConv(nn.Module):
    """A convolution with one kernel per video, partly generated and partly shared (§3.1, channel-wise parameterization).

    The generated block *is* W[:block_out, :block_in], an affine map of the tokens. All other entries are shared by all videos.
    """

    def __init__(self, config, in_ch, out_ch, kernel_size, block_in, block_out, upsample=False, gain=1.0):
        super().__init__()
        k, std, self.upsample, self.gain = kernel_size, 1 / math.sqrt(in_ch * kernel_size**2), upsample, gain
        self.kernel_shape, self.block_shape = (out_ch, in_ch, k, k), (block_out, block_in, k, k)
        self.add_head(config, math.prod(self.block_shape), std)
        self.beside = nn.Parameter(torch.randn(block_out, in_ch - block_in, k, k) * std)  # shared: W[:block_out, block_in:]
        self.below = nn.Parameter(torch.randn(out_ch - block_out, in_ch, k, k) * std)  # shared: W[block_out:]
        self.bias = nn.Parameter(torch.zeros(out_ch))

    def add_head(self, config, entries, std):
        """The multi-head affine: one map [d -> per_token] for all tokens; its outputs and the offset start with std `std`."""
        per_token = math.ceil(entries / config.num_tokens)  # where N does not divide the block, the surplus is cut off
        self.head = nn.Linear(config.token_dim, per_token, bias=False)
        nn.init.normal_(self.head.weight, std=std / math.sqrt(config.token_dim))
        # One offset per entry (not in the paper): a bias of the head would repeat with every token.
        self.offset = nn.Parameter(torch.randn(entries) * std)

    def generate(self, tokens):
        """The entries of this layer's block, per_token of each token in turn: tokens [B, N, d] -> [B, entries]."""
        return self.head(tokens).flatten(1)[:, : len(self.offset)] + self.offset

    def weight(self, tokens):
        """The kernels before demodulation, which are affine in the tokens: [B, N, d] -> [B, out, in, k, k]."""
        B, (out, into, k, _) = len(tokens), self.block_shape
        # A token's outputs run along the input channels (upsampling: output channels), then the taps (docs/differences.md).
        order = (into, k, k, out) if self.upsample else (out, k, k, into)
        block = self.generate(tokens).view(B, *order).movedim(4, 1 if self.upsample else 2)  # [B, block_out, block_in, k, k]
        top = torch.cat([block, self.beside.expand(B, -1, -1, -1, -1)], 2)
        return torch.cat([top, self.below.expand(B, -1, -1, -1, -1)], 1)

    def kernel(self, tokens):
        """The kernels of B videos: tokens [B, N, d] -> [B, out, in, k, k], of norm `gain` per output channel."""
        weight = self.weight(tokens)
        # Demodulation (§3.1; Karras et al. 2020), over generated and shared entries: outputs get the variance of the inputs.
        return weight * (self.gain * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-8))

    def forward(self, x, tokens):
        """x [T, B * in, H, W], tokens [B, N, d] -> [T, B * out, H, W], or 2H x 2W if upsampling.

        Frames are the batch, videos the groups of a group convolution (Chen et al. 2024, Fig. 5): B networks run in one call.
        """
        weight = self.kernel(tokens).to(x.dtype)
        weight = weight.transpose(1, 2) if self.upsample else weight  # [B, in, out, 4, 4], as transposed convolutions take it
        return self.convolve(x, weight.flatten(0, 1), self.bias.to(x.dtype).repeat(len(tokens)), len(tokens))

    def convolve(self, x, weight, bias, groups):
        """x [T, B * in, H, W], weight [B * out, in, k, k] or [B * in, out, 4, 4], bias [B * out] -> [T, B * out, H', W']."""
        if self.upsample:
            return F.conv_transpose2d(x, weight, bias, stride=2, padding=1, groups=groups)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=groups)


def double(x):
    """Bilinear upsampling with half-pixel centres: [..., H, W] -> [..., 2H, 2W]."""
    if not x.is_cuda:
        return F.interpolate(x, scale_factor=2, mode="bilinear")
    # The same in slices: on a GPU, F.interpolate is slow for many channels, and its backward fails beyond 2^31 elements.
    for dim in (-2, -1):
        last = x.shape[dim] - 1
        before = torch.cat([x.narrow(dim, 0, 1), x.narrow(dim, 0, last)], dim)
        after = torch.cat([x.narrow(dim, 1, last), x.narrow(dim, last, 1)], dim)
        x = torch.stack([torch.lerp(x, before, 0.25), torch.lerp(x, after, 0.25)], dim).flatten(dim - 1, dim)
    return x


class Block(nn.Module):
    """One ×2 level: a transposed convolution, two 3×3 convolutions (the last block: one), and a residual side connection."""

    def __init__(self, up, convs, side=None):
        super().__init__()
        self.up, self.convs, self.side = up, nn.ModuleList(convs), side

    def forward(self, x, tokens):
        h = F.gelu(self.up(x, tokens))  # [T, B * C, 2H, 2W]
        for conv in self.convs:
            h = F.gelu(conv(h, tokens))  # the gain of each GELU is in the next kernel, or in the sum below
        if self.side is not None:  # only where the number of channels changes
            x = self.side(x, tokens)  # 1×1, so it commutes with the upsampling
        return torch.add(double(x / math.sqrt(2)), h, alpha=GELU_GAIN / math.sqrt(2))  # both halves of equal variance


class NeRV(nn.Module):
    """B videos' weight tokens and T frame positions in, B videos out (Table A1)."""

    Conv, Level = ModulatedConv, Block  # a layer and a ×2 level; subclasses replace them (studies/variants.py)

    def __init__(self, config):
        super().__init__()
        self.config, D, f = config, config.width, config.stem_fraction
        last, m, pos = config.last_factor * D, min(config.block, D), 3 * config.pos_dim

        def conv(in_ch, out_ch, k=3, gain=GELU_GAIN, **kw):
            return self.Conv(config, in_ch, out_ch, k, m, m * out_ch // in_ch, gain=gain, **kw)

        def up(ch):  # each output pixel gets only 4 of the 16 taps, a quarter of the variance, hence gain 2
            return conv(ch, ch, 4, gain=2.0, upsample=True)

        levels = (config.resolution // config.pos_size).bit_length() - 1
        self.stem = self.Conv(config, pos, D, 3, pos // f, D // f)
        blocks = [self.Level(up(D), [conv(D, D), conv(D, D)]) for _ in range(levels - 2)]
        if levels > 1:  # the last but one grows D -> 2D at its end; its 1×1 side connection is modulated too (§3.2)
            blocks.append(self.Level(up(D), [conv(D, D), conv(D, last)], conv(D, last, 1, gain=1.0) if last != D else None))
        self.blocks = nn.ModuleList([*blocks, self.Level(up(last), [conv(last, last)])])
        self.to_rgb = self.Conv(config, last, 3, 3, max(1, last // 2), 3)

    def table_layers(self):
        """The layers of Table A1 in order, [(name, ModulatedConv)], which leaves side connections out."""
        layers = [("stem", self.stem)]
        for i, block in enumerate(self.blocks, 1):
            layers += [(f"block{i}.up", block.up), *((f"block{i}.conv{j}", conv) for j, conv in enumerate(block.convs, 1))]
        return layers + [("to_rgb", self.to_rgb)]

    def num_kernel_weights(self):
        """Entries of one video's kernels, without side connections: the "#Params detokenizer" of Table 1."""
        return sum(math.prod(layer.kernel_shape) for _, layer in self.table_layers())

    def forward(self, tokens, t):
        """tokens [B, N, d], t [T] real-valued frame positions -> frames [B, T, 3, H, W] in [-1, 1], independent of each other.

        Positions 0 ... num_frames-1 are the training clip; fractions interpolate, positions outside extrapolate (§4.5.1).
        """
        c, B = self.config, len(tokens)
        if tokens.shape[1:] != (c.num_tokens, c.token_dim):
            raise ValueError(f"tokens are {list(tokens.shape)}, expected [B, {c.num_tokens}, {c.token_dim}]")
        x = position_code(t, c).to(tokens.dtype).repeat(1, B, 1, 1)  # [T, 48, 8, 8] -> [T, B * 48, 8, 8]
        if not x.is_cuda:
            x = x.contiguous(memory_format=torch.channels_last)  # in which CPUs convolve up to twice as fast
        x = self.blocks_to_rgb(GELU_GAIN * F.gelu(self.stem(x, tokens)), tokens)  # [T, B * 3, H, W]
        x = x.unflatten(1, (B, 3)).transpose(0, 1)  # [B, T, 3, H, W]
        # The value is tanh(x). Its gradient gets 0.01 more (not in the paper): in float32 it is exactly zero beyond about ±9.
        return torch.tanh(x) + 0.01 * (x - x.detach())

    def blocks_to_rgb(self, x, tokens):
        """The stem's map [T, B * D, h, w] -> [T, B * 3, H, W]."""
        for block in self.blocks:
            x = block(x, tokens)
        return self.to_rgb(x, tokens)
