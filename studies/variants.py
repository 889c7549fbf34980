"""The alternatives that the paper compares its choices with (Tables 2 and 3): trained, sampled and measured alike.

python -m studies.variants vae --modulation fmm --steps 600      vae.py with another decoder; takes all options of vae.py
python -m studies.variants dit --denoiser gpt                    dit.py with another denoiser; the checkpoint sets the decoder
python -m studies.variants sample --classes 0                    sample.py for such checkpoints, which name their variants
python -m studies.variants evaluate --ckpt vae.pt                evaluate.py for such checkpoints

--modulation fmm | repeat            how generated numbers modulate a kernel      Table 2a
--reuse direct | none                which token numbers a layer gets             Table 2b
--pos-size 1 | 2 | 4 | 16            height and width of the position code        Table 2c
--upsampling pixelshuffle | bilinear from one level to the next                   Table 2d
--side skip | none                   how maps of different sizes are combined     Table 2e
--denoiser gpt | latte               the transformer of stage 2                   Table 3a

The paper names these without details: the docstrings state our choices. The number of tokens (2f) and the training of
stage 2 (3b) are options of vae.py and dit.py.
"""

import argparse
import dataclasses
import math
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

import dit
import evaluate
import sample
import vae
from common import utils
from nerv import GELU_GAIN, Block, ModulatedConv, NeRV, double


class Multiplied:
    """2a, base of both: a shared kernel [out, in, k, k], each entry multiplied by a factor that depends on the video."""

    def __init__(self, config, in_ch, out_ch, kernel_size, *args, **kw):
        super().__init__(config, in_ch, out_ch, kernel_size, *args, **kw)
        del self.beside, self.below
        self.shared = nn.Parameter(torch.randn(self.kernel_shape) / math.sqrt(in_ch * kernel_size**2))


class FMM(Multiplied):
    """2a, factorized multiplicative modulation of INR-GAN (Skorokhodov et al. 2021), as in DIGAN and StyleGAN-V.

    The tokens give A [out, r] and B [r, in], r = 10 as there. The kernel is sigmoid(A B), at all k × k, times a shared one.
    """

    rank = 10

    def add_head(self, config, entries, std):  # entries of A B start near unit scale
        super().add_head(config, self.rank * sum(self.kernel_shape[:2]), self.rank**-0.25)

    def weight(self, tokens):
        out_ch, in_ch, *_ = self.kernel_shape
        a, b = self.generate(tokens).split([out_ch * self.rank, self.rank * in_ch], 1)
        gate = torch.sigmoid(a.unflatten(1, (out_ch, self.rank)) @ b.unflatten(1, (self.rank, in_ch)))
        return gate[..., None, None] * self.shared  # [B, out, in, k, k]


class Repeat(Multiplied):
    """2a, FastNeRV (Chen et al. 2024): generated numbers [out, N], repeated along the inputs, times a shared kernel.

    Each token gives one number per output channel. They start near one, so that training starts at the shared kernel.
    """

    def add_head(self, config, entries, std):
        super().add_head(config, config.num_tokens * self.kernel_shape[0], 0.5)
        nn.init.ones_(self.offset)

    def weight(self, tokens):
        inputs = self.shared[0].numel()  # in * k * k
        factors = self.generate(tokens).unflatten(1, (-1, len(self.shared))).transpose(1, 2)  # [B, out, N]
        factors = factors.repeat(1, 1, math.ceil(inputs / factors.shape[2]))[..., :inputs]
        return factors.view(-1, *self.kernel_shape) * self.shared


class DirectReuse:
    """2b: the same numbers in every layer, all N × d of the tokens, repeated or truncated to the size of the layer's block."""

    def add_head(self, config, entries, std):
        self.std = std  # tokens have about unit scale
        self.offset = nn.Parameter(torch.randn(entries) * std)

    def generate(self, tokens):
        numbers = tokens.flatten(1)
        times = math.ceil(len(self.offset) / numbers.shape[1])
        return self.std * numbers.repeat(1, times)[:, : len(self.offset)] + self.offset


class NoReuse(DirectReuse):
    """2b: every number of the tokens is one entry of one kernel. Each layer has its share, and a block of as many channels."""

    side, start = "residual", 0  # the decoder's, which sets the number of layers; start of the share, set by the decoder

    def __init__(self, config, in_ch, out_ch, kernel_size, block_in, block_out, **kw):
        levels = (config.resolution // config.pos_size).bit_length() - 1
        layers = 3 * levels + 1 + {"residual": config.last_factor > 1, "skip": levels - 1, "none": 0}[self.side]
        share = config.num_tokens * config.token_dim // layers
        channels = math.isqrt(share // kernel_size**2)
        if not channels:
            raise ValueError(f"reuse none: the {share} numbers of a layer cannot fill a {kernel_size} x {kernel_size} kernel")
        super().__init__(config, in_ch, out_ch, kernel_size, min(channels, block_in), min(channels, block_out), **kw)

    def generate(self, tokens):
        return self.std * tokens.flatten(1)[:, self.start : self.start + len(self.offset)] + self.offset


class PixelShuffle:
    """2d: a 3×3 convolution to four times the channels, which become 2 × 2 pixels (NeRV); the block grows fourfold, too."""

    def __init__(self, config, in_ch, out_ch, kernel_size, block_in, block_out, upsample=False, gain=1.0):
        if upsample:
            out_ch, kernel_size, block_out, gain = 4 * out_ch, 3, 4 * block_out, GELU_GAIN
        super().__init__(config, in_ch, out_ch, kernel_size, block_in, block_out, gain=gain)
        self.doubles = upsample

    def forward(self, x, tokens):
        x = super().forward(x, tokens)
        return F.pixel_shuffle(x, 2) if self.doubles else x


class Bilinear:
    """2d: bilinear interpolation to twice the size, then a 3×3 convolution."""

    def __init__(self, config, in_ch, out_ch, kernel_size, block_in, block_out, upsample=False, gain=1.0):
        kernel_size, gain = (3, GELU_GAIN) if upsample else (kernel_size, gain)
        super().__init__(config, in_ch, out_ch, kernel_size, block_in, block_out, gain=gain)
        self.doubles = upsample

    def forward(self, x, tokens):
        return super().forward(double(x) if self.doubles else x, tokens)


class PlainBlock(Block):
    """2e: a level without a side connection."""

    def __init__(self, up, convs, side=None):
        super().__init__(up, convs)

    def forward(self, x, tokens):
        x = self.up(x, tokens)
        for conv in self.convs:
            x = conv(F.gelu(x), tokens)
        return GELU_GAIN * F.gelu(x)


class PlainNeRV(NeRV):
    Level = PlainBlock


class SkipNeRV(PlainNeRV):
    """2e, toRGB skips of StyleGAN2 (Karras et al. 2020): each level has its own 1×1 toRGB, and their sum is the frame."""

    def __init__(self, config):
        super().__init__(config)
        channels = [block.convs[-1].kernel_shape[0] for block in self.blocks[:-1]]
        self.skips = nn.ModuleList(self.Conv(config, ch, 3, 1, min(config.block, ch), 3) for ch in channels)

    def blocks_to_rgb(self, x, tokens):
        image = None
        for block, to_rgb in zip(self.blocks, [*self.skips, self.to_rgb]):
            x = block(x, tokens)
            part = to_rgb(x, tokens)
            image = part if image is None else part + double(image)
        return image


CHOICES = {  # option -> its values, the paper's first
    "modulation": {"channel": None, "fmm": FMM, "repeat": Repeat},
    "reuse": {"multihead": None, "direct": DirectReuse, "none": NoReuse},
    "pos_size": dict.fromkeys(("8", "1", "2", "4", "16")),
    "upsampling": {"transposed": None, "pixelshuffle": PixelShuffle, "bilinear": Bilinear},
    "side": {"residual": NeRV, "skip": SkipNeRV, "none": PlainNeRV},
}


def decoder(**choices):
    """The class of a decoder with CHOICES other than the paper's; its name lists them, as in "NeRV side=skip"."""
    other = {name: choices[name] for name, (first, *_) in CHOICES.items() if choices.get(name, first) != first}
    if not other:
        return NeRV
    if other.get("reuse") == "none" and "modulation" in other:
        raise utils.UserError(f"reuse none has too few numbers for modulation {other['modulation']}: use direct or multihead")
    parts = [CHOICES[name][other[name]] for name in ("upsampling", "modulation", "reuse") if name in other]
    side, size = other.get("side", "residual"), {"pos_size": int(other["pos_size"])} if "pos_size" in other else {}

    class Variant(CHOICES["side"][side]):
        Conv = type("ModulatedConv", (*parts, ModulatedConv), {"side": side})

        def __init__(self, config):
            super().__init__(dataclasses.replace(config, **size))
            start = 0
            for layer in self.modules():
                if isinstance(layer, NoReuse):
                    layer.start, start = start, start + len(layer.offset)

    Variant.__name__ = " ".join(["NeRV", *(f"{name}={value}" for name, value in other.items())])
    return Variant


class GPT(dit.DiT):
    """3a, G.pt (Peebles et al. 2022): a pre-norm transformer without a mask; timestep and class are two tokens in front."""

    def __init__(self, config):
        super().__init__(config)
        kw = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(config.width, config.heads, 4 * config.width, **kw)
        self.blocks = nn.TransformerEncoder(layer, config.depth, enable_nested_tensor=False)  # identical copies
        for parameter in self.blocks.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        self.norm, self.adaln = nn.LayerNorm(config.width), None

    def forward(self, latents, timestep, label, given=None):
        x, code, label = self.embed_all(latents, timestep, label, given)
        x = self.blocks(torch.cat([code[:, None], label[:, None], x], 1))[:, 2:]
        return self.out(self.norm(x))


class LatteBlock(dit.DiTBlock):
    """A DiT block within each row of tokens, or within each column; rows: their number, or 0 for a near square."""

    def __init__(self, config, columns, rows=0):
        super().__init__(config.width, config.heads)
        N, self.columns = config.num_tokens, columns
        self.rows = rows or max(n for n in range(1, math.isqrt(N) + 1) if N % n == 0)

    def forward(self, x, condition):
        x = x.unflatten(1, (self.rows, -1))  # [B, rows, N / rows, width]
        x = x.transpose(1, 2) if self.columns else x
        parts = x.shape[1]
        x = super().forward(x.flatten(0, 1), condition.repeat_interleave(parts, 0)).unflatten(0, (-1, parts))
        return (x.transpose(1, 2) if self.columns else x).flatten(1, 2)


class Latte(dit.DiT):
    """3a, Latte (Ma et al. 2024): blocks alternate between within a frame and across frames.

    Weight tokens have no frames: they are split in order into rows, as many as the largest divisor of N up to its root.
    """

    rows = 0

    def __init__(self, config):
        super().__init__(config)
        self.blocks = nn.ModuleList(LatteBlock(config, i % 2 == 1, self.rows) for i in range(config.depth))


DENOISERS = {"dit": dit.DiT, "gpt": GPT, "latte": Latte}


def load_vae(ckpt):
    """vae.load_vae with the checkpoint's decoder."""
    return vae.load_vae(ckpt, decoder(**dict(part.split("=") for part in ckpt["decoder"].split()[1:])))


def load_dit(ckpt):
    """dit.load_dit with the checkpoint's denoiser and decoder."""
    return dit.load_dit(ckpt, next((cls for cls in DENOISERS.values() if cls.__name__ == ckpt["denoiser"]), dit.DiT), load_vae)


def main(argv=None):
    script, *argv = (sys.argv[1:] if argv is None else argv) or [""]
    if script in ("-h", "--help"):
        return print(__doc__)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, values in {"vae": CHOICES, "dit": {"denoiser": DENOISERS}}.get(script, {}).items():
        parser.add_argument(f"--{name.replace('_', '-')}", choices=values, default=next(iter(values)))
    chosen, rest = parser.parse_known_args(argv)
    if script == "vae":
        vae.main(rest, decoder(**vars(chosen)))
    elif script == "dit":
        dit.main(rest, DENOISERS[chosen.denoiser], load_vae)
    elif script == "sample":
        sample.main(rest, load_dit, load_vae)
    elif script == "evaluate":
        evaluate.main(rest, load_dit, load_vae)
    else:
        raise utils.UserError("give a script first: vae, dit, sample or evaluate")


if __name__ == "__main__":
    utils.run(main)
