"""The generative NeRV decoder: a convolutional network whose kernels *are* the video.

A NeRV (neural representation for videos) takes a frame index and returns that frame. Here most of what it knows about one
video sits in N weight tokens of width d. Follow one call from top to bottom:

    tokens [B, N, d]  --multi-head affine-->  one block of kernel entries per layer and video     (ModulatedConv.kernel)
    t [T]             --position code----->   [T, 48, 8, 8], the only input of the network         (position_code)
    both              --convolutions------>   frames [B, T, 3, H, W]                               (NeRV.forward)

Everything is NeRV-Diffusion (Ren et al., ICLR 2026): §3.1 for the weights, §3.2 and Table A1 for the layers.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

PADDINGS = ("zeros", "replicate")  # what is beyond the edge of a map


@dataclass
class NeRVConfig:
    """Sizes of the decoder. The defaults are NeRV-Diffusion-S at 128 x 128 (Table A1)."""

    resolution: int = 128  # H = W in pixels; pos_size times a power of two
    num_frames: int = 16  # T of the training clips; frame positions 0 ... T-1 are inside the clip
    num_tokens: int = 128  # N, weight tokens per video
    token_dim: int = 128  # d, width of a token
    width: int = 128  # D, channels of all blocks but the last
    last_factor: int = 2  # the last block has 2D channels (§3.2, "Scaling up Blocks")
    block: int = 64  # generated channels of a layer (twice that on the way from D to 2D)
    stem_fraction: int = 1  # the first layer's generated block is [48/f, D/f]: f = 1 in S, 2 in B and L
    pos_dim: int = 16  # sinusoidal dimensions each for time, height and width
    pos_size: int = 8  # h = w of the position code (Table 2c)
    padding: str = "zeros"  # one of PADDINGS; "replicate" is more of the same: not the paper's, against dark rims
    antialias: bool = False  # a filter after each upsampling: not the paper's, against a mesh; what is sharp it blurs
    pictures: int = 0  # K pictures that all videos share (Pictures, below): not the paper's, for videos of one scene

    def __post_init__(self):
        levels = math.log2(self.resolution / self.pos_size) if min(self.resolution, self.pos_size) > 0 else 0
        least = 2 if self.last_factor > 1 else 1  # a last block, and before it one in which the channels grow
        if levels < least or levels != int(levels):
            *sizes, largest = (self.pos_size * 2**level for level in range(least, least + 4))
            raise ValueError(
                f"resolution {self.resolution} is not {self.pos_size} x {2**least}, {2 * 2**least}, {4 * 2**least}, …: "
                f"use {', '.join(map(str, sizes))} or {largest}"
            )
        if self.num_frames < 1 or self.num_tokens < 1 or self.token_dim < 1:
            raise ValueError("num_frames, num_tokens and token_dim must be positive")
        if self.padding not in PADDINGS:
            raise ValueError(f"padding {self.padding}: use {' or '.join(PADDINGS)}")
        if not 0 <= self.pictures <= self.num_tokens * self.token_dim:
            raise ValueError(
                f"pictures {self.pictures}: each takes a number or more, and tokens are {self.num_tokens} x {self.token_dim}"
            )

    @property
    def waves(self):
        """In time, of the factor of each picture (Pictures, below): as many as tokens have numbers for, and frames at most."""
        return min(self.num_tokens * self.token_dim // self.pictures, self.num_frames)


CONFIGS = {
    "nano": NeRVConfig(resolution=32, num_tokens=32, token_dim=16, width=32, last_factor=1, block=32, padding="replicate"),
    "S": NeRVConfig(width=128),
    "B": NeRVConfig(width=256, stem_fraction=2),
    "L": NeRVConfig(width=512, stem_fraction=2),
}
for name in "SBL":
    CONFIGS[f"{name}-long"] = replace(CONFIGS[name], num_frames=128)
    CONFIGS[f"{name}-256"] = replace(CONFIGS[name], resolution=256, num_tokens=160)  # one more block
    CONFIGS[f"{name}-256-long"] = replace(CONFIGS[f"{name}-256"], num_frames=128)


def sinusoid(position, dim, length):
    """Sine and cosine features of real positions (§A.1: "sinusoidal", in the index, not exponential).

    position [...], in cells or frames -> [..., dim], dim even. Angular frequencies are evenly spaced, from a quarter of a
    wave over the length, which tells all positions apart, up to where a step of one would alias (π, kept 10 % below), or as
    far as dim reaches. What lies *between* steps then decodes to something in between.
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

    The generated block *is* W[:block_out, :block_in]; nothing is multiplied or added. All other entries are shared between
    videos and learned. `head` is this layer's part of the multi-head affine mapping: all N tokens go through it, each gives
    per_token consecutive entries of the block.
    """

    def __init__(self, config, in_ch, out_ch, kernel_size, block_in, block_out, upsample=False, gain=1.0):
        super().__init__()
        k = kernel_size
        self.in_ch, self.out_ch, self.upsample = in_ch, out_ch, upsample
        self.repeats, self.antialias = config.padding == "replicate", config.antialias
        self.kernel_shape = (out_ch, in_ch, k, k)
        self.block_shape = (block_out, block_in, k, k)
        entries = math.prod(self.block_shape)
        std = 1 / math.sqrt(in_ch * k * k)
        self.add_head(config, entries, std)
        self.shared = nn.Parameter(torch.randn(math.prod(self.kernel_shape) - entries) * std)
        self.bias = nn.Parameter(torch.zeros(out_ch))
        self.gain = gain

    def add_head(self, config, entries, std):
        """The multi-head affine mapping to this layer's block, of so many entries, which start at deviation std."""
        per_token = math.ceil(entries / config.num_tokens)  # N that does not divide the block: the surplus is cut off below
        self.head = nn.Linear(config.token_dim, per_token, bias=False)
        nn.init.normal_(self.head.weight, std=std / math.sqrt(config.token_dim))
        self.offset = nn.Parameter(torch.randn(entries) * std)

    def generate(self, tokens):
        """The entries of this layer's block: tokens [B, N, d] -> [B, entries]."""
        return self.head(tokens).flatten(1)[:, : len(self.offset)] + self.offset  # [B, N, per_token] -> [B, entries]

    def weight(self, tokens):
        """The kernels [B, out, in, k, k] before their norm: the generated block, and the shared entries around it."""
        # Entries are in the order [B, out, k, k, in], or [B, in, k, k, out] where it upsamples: as the convolutions read
        # them, so that no kernel is copied.
        (rows, columns, k, _), (block_rows, block_columns, _, _) = self.kernel_shape, self.block_shape
        if self.upsample:
            rows, columns, block_rows, block_columns = columns, rows, block_columns, block_rows
        weight = self.generate(tokens).view(-1, block_rows, k, k, block_columns)
        if len(self.shared):  # what is beside and below the block; in the nano preset there is almost nothing
            sizes = [block_rows * k * k * (columns - block_columns), (rows - block_rows) * k * k * columns]
            beside, below = self.shared.split(sizes)
            beside = beside.view(1, block_rows, k, k, columns - block_columns).expand(len(weight), -1, -1, -1, -1)
            below = below.view(1, rows - block_rows, k, k, columns).expand(len(weight), -1, -1, -1, -1)
            weight = torch.cat([torch.cat([weight, beside], 4), below], 1)  # [B, rows, k, k, columns]
        return weight.permute(0, 4, 1, 2, 3) if self.upsample else weight.permute(0, 1, 4, 2, 3)

    def kernel(self, tokens):
        """The kernels of B videos: tokens [B, N, d] -> [B, out, in, k, k], of norm `gain` per output channel."""
        weight = self.weight(tokens)
        # Demodulation (Karras et al. 2019), over generated and shared entries together: "all dimensions except the output
        # channels". Independent inputs of unit variance then give outputs of unit variance.
        return weight * (self.gain * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-8))

    def forward(self, x, tokens):
        """x [T, B * in, H, W], tokens [B, N, d] -> [T, B * out, H, W], or 2H x 2W if upsampling.

        Frames are the batch and videos the groups (FastNeRV, Fig. 5), so that B networks run in one call.
        """
        B = len(tokens)
        weight, bias = self.kernel(tokens).to(x.dtype), self.bias.to(x.dtype).expand(B, -1).flatten()
        # [B, out, in, k, k] -> [B * out, in, k, k], or [B * in, out, 4, 4], as transposed convolutions have it
        weight = (weight.transpose(1, 2) if self.upsample else weight).flatten(0, 1)
        if x.is_cuda:
            weight = weight.contiguous()  # or cuDNN would take it for a wish to have every map channels-last
        padding = 1 if self.upsample else weight.shape[-1] // 2
        if self.repeats and padding:  # beyond the edge is more of the same and not zero, which shows as a dark rim
            x = F.pad(x, (padding,) * 4, mode="replicate")
            padding = 3 if self.upsample else 0  # of a transposed convolution it is what is cut off
        if self.upsample:
            x = F.conv_transpose2d(x, weight, bias, stride=2, padding=padding, groups=B)
            return smooth(x) if self.antialias else x
        return F.conv2d(x, weight, bias, padding=padding, groups=B)


def smooth(x):
    """Filter [1, 2, 1] / 4 along height and width, the edge repeated: [..., H, W] -> [..., H, W].

    A transposed convolution of stride 2 makes pixels of even and odd place by different taps; what differs between them is a
    mesh of period two, which this filter takes out (as after those of StyleGAN2, Karras et al. 2020).
    """
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    x = (x[..., :-2] + x[..., 2:]) / 4 + x[..., 1:-1] / 2
    return (x[..., :-2, :] + x[..., 2:, :]) / 4 + x[..., 1:-1, :] / 2


def double(x):
    """Twice the height and width, bilinear with half-pixel centres: [..., H, W] -> [..., 2H, 2W].

    Pixel 2i is 0.75 x[i] + 0.25 x[i - 1], pixel 2i + 1 is 0.75 x[i] + 0.25 x[i + 1], the edge repeated. F.interpolate gives the
    same and is five times as fast on a CPU; on a GPU its forward has few threads for many maps, and its backward adds with
    atomics, whose 32-bit indices do not reach the end of the largest maps.
    """
    if not x.is_cuda:
        return F.interpolate(x, scale_factor=2, mode="bilinear")
    return double_by_slices(x)


def double_by_slices(x):
    """double(x) on a GPU: sums of neighbours, one dimension after the other."""
    for dim in (-2, -1):
        last = x.shape[dim] - 1
        before = torch.cat([x.narrow(dim, 0, 1), x.narrow(dim, 0, last)], dim)
        after = torch.cat([x.narrow(dim, 1, last), x.narrow(dim, last, 1)], dim)
        x = torch.stack([torch.lerp(x, before, 0.25), torch.lerp(x, after, 0.25)], dim).flatten(dim - 1, dim)
    return x


GELU_GAIN = 1.5336  # keeps a unit second moment: E[gelu(x)²] = 0.425 for x ~ N(0, 1)


class Block(nn.Module):
    """One ×2 level: a transposed convolution, one or two 3×3 convolutions, and a residual side connection (Table A1)."""

    def __init__(self, up, convs, side=None):
        super().__init__()
        self.up, self.convs, self.side = up, nn.ModuleList(convs), side

    def forward(self, x, tokens):
        h = F.gelu(self.up(x, tokens))
        for conv in self.convs:
            h = F.gelu(conv(h, tokens))  # the gain of each GELU is in the kernels that come next, or in the sum
        if self.side is not None:  # only where the channels change
            x = self.side(x, tokens)  # 1×1: before the upsampling it gives the same as after it
        x = double(x / math.sqrt(2))  # the earlier map, at the new size (§A.1)
        return torch.add(x, h, alpha=GELU_GAIN / math.sqrt(2))


def bounded(x):
    """tanh(x), with a gradient that is 0.01 larger than tanh's, which is exactly zero from about ±9 on.

    Frames that are mostly black want -1, which tanh has at minus infinity. Kernels of norm one reach thousands where all their
    inputs agree, and a decoder that has once gone there would stay black for ever (docs/ablations.md, "Black frames").
    """
    return torch.tanh(x) + 0.01 * (x - x.detach())


class Pictures(nn.Module):
    """K pictures that all videos share: a frame is their mean and their sum, each times what a video says of it.

    Not the paper's. Convolutions that begin with an 8 × 8 code are slow to learn the detail of a scene, and a linear map from
    tokens to pixels has it at once (docs/sharp.md). This is that map, of low rank: the pictures start as the principal
    components of training frames, and training goes on from there. The factor of a picture is a cosine series in time, so
    that t stays a real number; beyond either end, such a series plays the clip backwards. `gain` is how much faster the
    pictures learn than kernels do.
    """

    def __init__(self, count, size, waves, gain):
        super().__init__()
        self.size, self.gain = size, gain
        self.shared = nn.Parameter(torch.zeros(count, 3 * size * size))  # a matrix, as Muon takes it
        self.mean = nn.Parameter(torch.zeros(3 * size * size))
        self.strength = nn.Parameter(1 / torch.arange(1.0, waves + 1))  # slow waves first

    def waves(self, t, length):
        """The waves at positions t [T] in a clip of `length` frames, each times its strength: [T, waves]."""
        frequency = torch.arange(len(self.strength), device=t.device) * (math.pi / length)
        return self.strength * torch.cos((t.float()[:, None] + 0.5) * frequency)

    def forward(self, codes, t, length):
        """codes [B, K * waves], positions t [T] in a clip of `length` frames -> [B, T, 3, size, size]."""
        codes = codes.unflatten(1, (len(self.shared), -1))
        factors = torch.einsum("bkw,tw->btk", codes, self.waves(t, length).to(codes.dtype))
        return self.gain * (factors @ self.shared + self.mean).unflatten(2, (3, self.size, self.size))

    def read(self, video):
        """Clips [B, T, 3, size, size] -> codes [B, K * waves]: how much of each picture and wave is in them.

        Where both are orthogonal, as they start, no other codes make a clip with a smaller squared error.
        """
        rows = self.gain * self.shared
        rows = rows / rows.square().sum(1, keepdim=True).clamp_min(1e-8)
        factors = (video.flatten(2) - self.gain * self.mean) @ rows.T  # [B, T, K]
        T = video.shape[1]
        waves = self.waves(torch.arange(T, device=video.device), T)
        waves = waves / waves.square().sum(0).clamp_min(1e-8)
        waves[:, T:] = 0  # T frames have no faster ones
        return torch.einsum("btk,tw->bkw", factors, waves.to(factors.dtype)).flatten(1)

    @torch.no_grad()
    def fit(self, frames, length):
        """Become the principal components of frames [n, 3, size, size], of a size at which no code of a clip of `length`
        frames has a deviation above 1."""
        pixels = frames.flatten(1)
        mean, count = pixels.mean(0), min(*pixels.shape, len(self.shared))
        _, values, components = torch.pca_lowrank(pixels - mean, count, center=False)
        scale = values[0] * math.sqrt(length / len(frames))
        self.mean.copy_(mean / self.gain)
        self.shared[:count] = components.T * (scale / self.gain)


class NeRV(nn.Module):
    """B videos' worth of weight tokens and T frame positions in, B videos out (Table A1)."""

    MOST = {True: 2**31 - 1, False: 2**28}  # elements of a map, with and without gradients
    Conv, Level = ModulatedConv, Block  # the ablations put others in their place (studies/variants.py)

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, last, f = config.width, config.last_factor * config.width, config.stem_fraction
        m = min(config.block, D, last)
        pos = 3 * config.pos_dim

        def conv(in_ch, out_ch, k=3, gain=GELU_GAIN, **kw):
            return self.Conv(config, in_ch, out_ch, k, m, m * out_ch // in_ch, gain=gain, **kw)

        def up(ch):  # an output pixel of a stride-2 4×4 transposed convolution meets only 4 of the 16 taps
            return conv(ch, ch, 4, gain=2.0, upsample=True)

        levels = int(math.log2(config.resolution // config.pos_size))
        self.stem = self.Conv(config, pos, D, 3, pos // f, D // f)
        blocks = [self.Level(up(D), [conv(D, D), conv(D, D)]) for _ in range(levels - 2)]
        if levels > 1:
            # The last conv of the last but one block grows D -> 2D; its 1×1 side connection is modulated too (§3.2).
            side = conv(D, last, 1, gain=1.0) if last != D else None
            blocks.append(self.Level(up(D), [conv(D, D), conv(D, last)], side))
        blocks.append(self.Level(up(last), [conv(last, last)]))
        self.blocks = nn.ModuleList(blocks)
        self.to_rgb = self.Conv(config, last, 3, 3, max(1, last // 2), 3)
        self.pictures = None
        if config.pictures:
            self.pictures = Pictures(config.pictures, config.resolution, config.waves, gain=0.6)
            # An orthonormal basis (DCT-II), so that all numbers of a video count alike. It and the mean stay as they are.
            strength = torch.full((config.waves,), math.sqrt(2 / config.num_frames))
            strength[0] /= math.sqrt(2)
            self.pictures.strength = nn.Parameter(strength, requires_grad=False)
            self.pictures.mean.requires_grad_(False)
            codes = math.ceil(config.pictures * config.waves / config.num_tokens)
            self.picture_head = nn.Linear(config.token_dim, codes, bias=False)
            nn.init.eye_(self.picture_head.weight)
            self.amplitude = nn.Parameter(torch.full((1,), 0.05))  # of what the convolutions make, beside pictures that fit

    def matrices(self):
        """What Muon is for: the pictures and their factors, of which it learns all directions alike."""
        return [] if self.pictures is None else [self.pictures.shared, self.picture_head.weight]

    def table_layers(self):
        """The layers of Table A1 in order, [(name, ModulatedConv)]; side connections, which it omits, left out."""
        layers = [("stem", self.stem)]
        for i, block in enumerate(self.blocks, 1):
            layers += [(f"block{i}.up", block.up)]
            layers += [(f"block{i}.conv{j}", conv) for j, conv in enumerate(block.convs, 1)]
        return layers + [("to_rgb", self.to_rgb)]

    def num_kernel_weights(self):
        """Entries of one video's kernels, generated and shared together: the "#Params detokenizer" of Table 1."""
        return sum(math.prod(layer.kernel_shape) for _, layer in self.table_layers())

    def forward(self, tokens, t):
        """tokens [B, N, d], t [T] real-valued frame positions -> [B, T, 3, H, W] in [-1, 1]; with pictures, about so.

        Positions 0 ... num_frames-1 are the training clip; fractions interpolate, positions outside extrapolate (§4.5.1).
        Frames do not see each other: any subset of positions gives the same frames as decoding all of them. That is what
        bounds memory: maps have fewer than 2³¹ elements, the most that every kernel can index, and 2²⁸, 1 GiB of float32,
        where no gradient is wanted.
        """
        c = self.config
        if tokens.shape[1:] != (c.num_tokens, c.token_dim):
            raise ValueError(f"tokens are {list(tokens.shape)}, expected [B, {c.num_tokens}, {c.token_dim}]")
        B, frame = len(tokens), self.to_rgb.in_ch * c.resolution**2  # elements of the largest map of a frame
        most = self.MOST[torch.is_grad_enabled()] * c.resolution**2 // (c.resolution + 2) ** 2  # a map may be padded
        if len(t) > 1 and len(t) * frame > most:
            return torch.cat([self(tokens, part) for part in t.split(max(1, most // frame))], 1)
        if tokens.device.type == "cpu":
            most = min(most, 2**19)  # 2 MiB, which stay in the cache
        few = max(1, most // (len(t) * frame))  # videos at a time
        if B > few:
            return torch.cat([self(part, t) for part in tokens.split(few)])
        x = position_code(t, c).to(tokens.dtype).repeat(1, B, 1, 1)  # [T, 48, 8, 8] -> [T, B * 48, 8, 8]
        if x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)  # every map from here on
        x = self.rgb(GELU_GAIN * F.gelu(self.stem(x, tokens)), tokens)  # [T, B * 3, H, W]
        x = x.unflatten(1, (B, 3)).transpose(0, 1)
        if self.pictures is None:
            return bounded(x)
        # Their numbers are the tokens' as kernel entries are: in order, from one linear map.
        codes = self.picture_head(tokens).flatten(1)[:, : c.pictures * c.waves]
        return self.amplitude * bounded(x) + self.pictures(codes, t, c.num_frames)

    def read(self, video):
        """Tokens [B, N, d] with which the pictures alone come nearest to clips [B, T, 3, H, W], as they start."""
        codes, c, head = self.pictures.read(video), self.config, self.picture_head.weight
        codes = F.pad(codes, (0, c.num_tokens * len(head) - codes.shape[1]))
        return codes.unflatten(1, (c.num_tokens, -1)) @ head

    def rgb(self, x, tokens):
        """The stem's map [T, B * D, h, w] -> [T, B * 3, H, W]."""
        for block in self.blocks:
            x = block(x, tokens)
        return self.to_rgb(x, tokens)
