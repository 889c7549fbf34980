"""What the paper compares its choices with (Tables 2 and 3), and the two trainings with them.

python -m studies.variants vae --modulation fmm --steps 600      vae.py with another decoder; all options of vae.py go
python -m studies.variants dit --denoiser gpt                    dit.py with another denoiser; the decoder is the checkpoint's

--modulation fmm | repeat            ModulatedConv: how generated numbers become a kernel        Table 2a
--reuse direct | none                ModulatedConv: which numbers a layer gets of the tokens     Table 2b
--upsampling pixelshuffle | bilinear ModulatedConv: from one level to the next                   Table 2d
--side skip | none                   Block and NeRV: how maps of different sizes come together   Table 2e
--denoiser gpt | latte               DiT: the transformer of stage 2                             Table 3a

The paper names these and gives no details. What was chosen for each is in its docstring. Position codes (2c), tokens (2f) and
the training of stage 2 (3b) are numbers, options of vae.py and dit.py. A checkpoint says which decoder and denoiser it holds;
those of a variant are read by load_vae and load_dit below, and by no other script.
"""

import argparse
import math
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

import dit
import vae
from common import utils
from nerv import GELU_GAIN, Block, ModulatedConv, NeRV

# ------------------------------------------------------------------------------------------------------ modulation, Table 2a


class FMM:
    """Factorized multiplicative modulation of INR-GAN (Skorokhodov et al. 2021), as in DIGAN and StyleGAN-V.

    The tokens give A [out, r] and B [r, in], r = 10 as there. The kernel is sigmoid(A B) at all k × k times a shared one.
    """

    rank = 10

    def __init__(self, config, in_ch, out_ch, kernel_size, *args, **kw):
        super().__init__(config, in_ch, out_ch, kernel_size, *args, **kw)
        self.add_head(config, self.rank * (in_ch + out_ch), self.rank**-0.25)  # entries of A B start at about unit scale
        self.shared = nn.Parameter(torch.randn(self.kernel_shape) / math.sqrt(in_ch * kernel_size**2))

    def weight(self, tokens):
        a, b = self.generate(tokens).split([self.out_ch * self.rank, self.rank * self.in_ch], 1)
        gate = torch.sigmoid(a.unflatten(1, (self.out_ch, self.rank)) @ b.unflatten(1, (self.rank, self.in_ch)))
        return gate[..., None, None] * self.shared  # [B, out, in, k, k]


class Repeat:
    """FastNeRV (Chen et al. 2024): generated numbers [out, N], repeated along the inputs, times a shared kernel.

    Each token gives one number for every output channel. Products start at one, so that training starts at the shared kernel.
    """

    def __init__(self, config, in_ch, out_ch, kernel_size, *args, **kw):
        super().__init__(config, in_ch, out_ch, kernel_size, *args, **kw)
        self.add_head(config, config.num_tokens * out_ch, 0.5)
        nn.init.ones_(self.offset)
        self.shared = nn.Parameter(torch.randn(self.kernel_shape) / math.sqrt(in_ch * kernel_size**2))

    def weight(self, tokens):
        inputs = self.shared[0].numel()  # in * k * k
        factors = self.generate(tokens).unflatten(1, (-1, self.out_ch)).transpose(1, 2)  # [B, out, N]
        factors = factors.repeat(1, 1, math.ceil(inputs / factors.shape[2]))[..., :inputs]
        return factors.view(-1, *self.kernel_shape) * self.shared


# ----------------------------------------------------------------------------------------------------------- reuse, Table 2b


class DirectReuse:
    """The same numbers in every layer: all N × d of the tokens, repeated or cut to the size of the layer's block."""

    def add_head(self, config, entries, std):
        self.std = std  # tokens are of about unit scale
        self.offset = nn.Parameter(torch.randn(entries) * std)

    def generate(self, tokens):
        numbers = tokens.flatten(1)
        times = math.ceil(len(self.offset) / numbers.shape[1])
        return self.std * numbers.repeat(1, times)[:, : len(self.offset)] + self.offset


class NoReuse:
    """Every number of the tokens is one entry of one kernel: each layer has its share, and a block of as many channels."""

    side = "residual"  # of the decoder, which decides how many layers there are

    def __init__(self, config, in_ch, out_ch, kernel_size, block_in, block_out, **kw):
        levels = int(math.log2(config.resolution // config.pos_size))
        layers = 3 * levels + 1 + {"residual": config.last_factor > 1, "skip": levels - 1, "none": 0}[self.side]
        share = config.num_tokens * config.token_dim // layers
        channels = math.isqrt(share // kernel_size**2)
        if not channels:
            raise ValueError(f"reuse none: the {share} numbers of a layer are no kernel of {kernel_size} x {kernel_size}")
        super().__init__(config, in_ch, out_ch, kernel_size, min(channels, block_in), min(channels, block_out), **kw)

    def add_head(self, config, entries, std):
        self.std, self.start = std, 0  # start is set once all layers are there
        self.offset = nn.Parameter(torch.randn(entries) * std)

    def generate(self, tokens):
        return self.std * tokens.flatten(1)[:, self.start : self.start + len(self.offset)] + self.offset


# ------------------------------------------------------------------------------------------------------ upsampling, Table 2d


class PixelShuffle:
    """A 3×3 convolution to four times the channels, which become 2 × 2 pixels (NeRV); block and kernel grow fourfold."""

    def __init__(self, config, in_ch, out_ch, kernel_size, block_in, block_out, upsample=False, gain=1.0):
        if upsample:
            out_ch, kernel_size, block_out, gain = 4 * out_ch, 3, 4 * block_out, GELU_GAIN
        super().__init__(config, in_ch, out_ch, kernel_size, block_in, block_out, gain=gain)
        self.doubles = upsample

    def forward(self, x, tokens):
        x = super().forward(x, tokens)
        return F.pixel_shuffle(x, 2) if self.doubles else x


class Bilinear:
    """Bilinear interpolation to twice the size, then a 3×3 convolution."""

    def __init__(self, config, in_ch, out_ch, kernel_size, block_in, block_out, upsample=False, gain=1.0):
        kernel_size, gain = (3, GELU_GAIN) if upsample else (kernel_size, gain)
        super().__init__(config, in_ch, out_ch, kernel_size, block_in, block_out, gain=gain)
        self.doubles = upsample

    def forward(self, x, tokens):
        return super().forward(F.interpolate(x, scale_factor=2, mode="bilinear") if self.doubles else x, tokens)


# ------------------------------------------------------------------------------------------------- side connections, Table 2e


class PlainBlock(Block):
    """A level without a side connection."""

    def __init__(self, up, convs, side=None):
        super().__init__(up, convs)

    def forward(self, x, tokens):
        h = self.up(x, tokens)
        for conv in self.convs:
            h = conv(F.gelu(h), tokens)
        return GELU_GAIN * F.gelu(h)


class PlainNeRV(NeRV):
    Level = PlainBlock


class SkipNeRV(PlainNeRV):
    """toRGB skips of StyleGAN2 (Karras et al. 2020): each level has its own 1×1 toRGB, and their sum is the frame."""

    def __init__(self, config):
        super().__init__(config)
        convs = [block.convs[-1].out_ch for block in self.blocks[:-1]]
        self.skips = nn.ModuleList(self.Conv(config, ch, 3, 1, min(config.block, ch), 3) for ch in convs)

    def rgb(self, x, tokens):
        image = None
        for block, to_rgb in zip(self.blocks, [*self.skips, self.to_rgb]):
            x = block(x, tokens)
            part = to_rgb(x, tokens)
            image = part if image is None else part + F.interpolate(image, scale_factor=2, mode="bilinear")
        return image


DEFAULTS = {"modulation": "channel", "reuse": "multihead", "upsampling": "transposed", "side": "residual"}
CONVS = {
    "fmm": FMM,
    "repeat": Repeat,
    "direct": DirectReuse,
    "none": NoReuse,
    "pixelshuffle": PixelShuffle,
    "bilinear": Bilinear,
}
NETWORKS = {"residual": NeRV, "none": PlainNeRV, "skip": SkipNeRV}


def decoder(**choices):
    """The class of a decoder in which some of DEFAULTS are chosen otherwise; its name, "NeRV side=skip", says what."""
    c = DEFAULTS | choices
    if c["reuse"] == "none" and c["modulation"] != "channel":
        raise utils.UserError(f"reuse none has too few numbers for modulation {c['modulation']}: use direct or multihead")
    parts = [CONVS[c[name]] for name in ("upsampling", "modulation", "reuse") if c[name] != DEFAULTS[name]]
    name = " ".join(["NeRV", *(f"{name}={c[name]}" for name in DEFAULTS if c[name] != DEFAULTS[name])])
    if name == "NeRV":
        return NeRV
    conv = type("ModulatedConv", (*parts, ModulatedConv), {"side": c["side"]})

    class Variant(NETWORKS[c["side"]]):
        Conv = conv

        def __init__(self, config):
            super().__init__(config)
            start = 0
            for layer in self.modules():
                if isinstance(layer, NoReuse):
                    layer.start, start = start, start + len(layer.offset)

    Variant.__name__ = name
    return Variant


# ------------------------------------------------------------------------------------------------------- denoisers, Table 3a


class GPT(dit.DiT):
    """G.pt (Peebles et al. 2022): a pre-norm transformer, without a mask; step and class are two tokens in front."""

    def __init__(self, config):
        super().__init__(config)
        layer = nn.TransformerEncoderLayer(
            config.width, config.heads, 4 * config.width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, config.depth, enable_nested_tensor=False)  # copies of one start
        for parameter in self.blocks.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        self.norm, self.adaln = nn.LayerNorm(config.width), None

    def forward(self, tokens, step, label, given=None):
        x, step_code, label = self.embed_all(tokens, step, label, given)
        x = self.blocks(torch.cat([step_code[:, None], label[:, None], x], 1))[:, 2:]
        return self.out(self.norm(x))

    def matrices(self):
        return [p for p in self.blocks.parameters() if p.ndim == 2]


class LatteBlock(dit.DiTBlock):
    """A DiT block within each row of tokens, or within each column; rows is how many there are, or 0 for a near square."""

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
    """Latte (Ma et al. 2024): blocks within a frame and blocks across frames take turns.

    Weight tokens have no frames: they are cut, as they come, into rows as many as the largest divisor of N up to its root.
    """

    def __init__(self, config):
        super().__init__(config)
        self.blocks = nn.ModuleList(LatteBlock(config, columns=i % 2 == 1) for i in range(config.depth))


DENOISERS = {"dit": dit.DiT, "gpt": GPT, "latte": Latte}


# -------------------------------------------------------------------------------------------- checkpoints, and the trainings


def load_vae(ckpt):
    """vae.load_vae with the decoder that the checkpoint names."""
    return vae.load_vae(ckpt, decoder(**dict(part.split("=") for part in ckpt["decoder"].split()[1:])))


def load_dit(ckpt):
    """dit.load_dit with the denoiser and the decoder that the checkpoint names."""
    return dit.load_dit(ckpt, next(cls for cls in DENOISERS.values() if cls.__name__ == ckpt["denoiser"]), load_vae)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True, metavar="vae | dit")
    first, second = stages.add_parser("vae", add_help=False), stages.add_parser("dit", add_help=False)
    first.add_argument("--modulation", choices=["channel", "fmm", "repeat"])
    first.add_argument("--reuse", choices=["multihead", "direct", "none"])
    first.add_argument("--upsampling", choices=["transposed", "pixelshuffle", "bilinear"])
    first.add_argument("--side", choices=["residual", "skip", "none"])
    second.add_argument("--denoiser", choices=list(DENOISERS), default="dit")
    chosen, rest = parser.parse_known_args(argv)
    if chosen.stage == "vae":
        vae.main(rest, decoder(**{name: value for name in DEFAULTS if (value := getattr(chosen, name))}))
    else:
        dit.main(rest, DENOISERS[chosen.denoiser], load_vae)


if __name__ == "__main__":
    utils.run(main)
