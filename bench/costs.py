"""Costs of the networks, computed from tensor shapes without allocating weights: `python -m bench.costs costs | long`.

costs    per preset, for one clip: parameters, latent size, FLOPs of a forward pass and memory kept for the backward pass
long     FLOPs of the denoiser on long videos: independent chunks, with the interface of siblings/vin.py, with full attention
"""

import itertools
import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import dit
import nerv
import vae
from common import utils
from common.utils import option
from siblings import vin
from siblings.results import table


def forward_costs(run):
    """FLOPs of run(), and bytes kept for the backward pass, without parameters. Works with fake tensors."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes(), tensor  # kept alive: unique ids
        return tensor

    # The counter lacks the CPU's fused attention of q [B, heads, L, d] and k [B, heads, K, d], two matrix products.
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    attention = {fused: lambda q, k, *args, out_shape=None, **kw: 4 * math.prod(q) * k[2]}
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run()
    return counter.get_total_flops(), sum(size for size, _ in kept.values())


def denoiser(preset):
    """The DiT that dit.py trains on a preset's tokens (nano: on their 4 × 64 principal components)."""
    c = nerv.CONFIGS[preset]
    sizes = (4, 64, 9, 0, 96, 6, 3) if preset == "nano" else (c.num_tokens, c.token_dim)
    return dit.DiT(dit.DiTConfig(*sizes))


def row(name):
    """The table row of a preset."""
    c = nerv.CONFIGS[name]
    with FakeTensorMode():
        model, model2 = vae.VAE(c, vae.encoder_sizes(name, c)), denoiser(name)
        video, label = torch.empty(2, c.num_frames, 3, c.resolution, c.resolution), torch.zeros(1, dtype=torch.long)
        latents = torch.empty(1, model2.config.num_tokens, model2.config.token_dim)
        encode, encode_kept = forward_costs(partial(model.encode, video))  # two clips, for the batch norm
        denoise, _ = forward_costs(partial(model2, latents, label + 1, label))
    with torch.device("meta"):
        tokens, t = torch.empty(1, c.num_tokens, c.token_dim), torch.empty(c.num_frames)
        decode, decode_kept = forward_costs(partial(nerv.NeRV(c), tokens, t))
    numbers = 3 * c.num_frames * c.resolution**2 / (c.num_tokens * c.token_dim)
    return [
        name, f"{c.num_frames} × {c.resolution}²", f"{model.nerv.num_kernel_weights() / 1e6:.2f} M",
        f"{utils.millions(model.nerv):.2f} M", f"{utils.millions(model.encoder):.1f} M", f"{utils.millions(model2):.1f} M",
        f"{c.num_tokens} × {c.token_dim}", f"{numbers:.0f} : 1", f"{encode / 2e9:.1f}", f"{decode / 1e9:.1f}",
        f"{denoise / 1e9:.1f}", f"{encode_kept / 2**31:.2f}", f"{decode_kept / 2**30:.2f}",
    ]  # fmt: skip


@dataclass
class Config:
    presets: list = option("what", list(nerv.CONFIGS), "presets in the table of costs", nargs="+", choices=list(nerv.CONFIGS))
    chunks: list = option("what", [4, 8, 16, 32], "chunks per video, for long", nargs="+", type=int)
    tokens: list = option("what", [128], "tokens per chunk, for long; S has 128", nargs="+", type=int)


def costs(config):
    header = ["preset", "clip", "kernels", "decoder", "encoder", "denoiser", "tokens", "clip : latent", "encode", "decode"]
    header += ["denoise once", "encode keeps", "decode keeps"]
    table(header, [row(name) for name in config.presets])
    print("\nkernels: kernel entries of one video; decoder: learned parameters, with the heads of the multi-head affine;")
    print("encode, decode, denoise once: GFLOP of one clip's forward pass; keeps: GiB for its backward pass, in float32")


def long_costs(c, config, C):
    """FLOPs for C chunks: independent, with the interface, with interface and neighbours, and with full attention."""
    with FakeTensorMode():
        x, step = torch.empty(C, c.num_tokens, c.token_dim), torch.ones(C, dtype=torch.long)
        nets = [partial(vin.VIN(c, replace(config, neighbours=near)), chunks=C) for near in (False, True)]
        runs = [partial(net, x, step, step) for net in (dit.DiT(c), *nets)]
        runs.append(partial(dit.DiT(replace(c, num_tokens=C * c.num_tokens)), x.flatten(0, 1)[None], step[:1], step[:1]))
        return [forward_costs(run)[0] for run in runs]


def long_videos(config):
    """GFLOP of one evaluation of S's denoiser on a video of C chunks; in brackets, the difference from full attention."""
    rows = []
    for tokens, chunks in itertools.product(config.tokens, config.chunks):
        costs = long_costs(replace(dit.DiTConfig(), num_tokens=tokens), vin.VINConfig(), chunks)
        rows.append([tokens, chunks, *(f"{cost / 1e9:.0f} ({100 * (cost / costs[-1] - 1):+.0f} %)" for cost in costs)])
    table(["tokens a chunk", "chunks", "by themselves", "interface, --no-neighbours", "interface", "full attention"], rows)


def main():
    topic, config = utils.parse_options(Config, __doc__, topics={"costs": costs, "long": long_videos})
    topic(config)


if __name__ == "__main__":
    utils.run(main)
