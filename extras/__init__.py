"""Additions to the paper's method that help small models, one per module, each with its gain and source.

    --extras of vae.py     mixing=8 (heads) renorm=0.3 (share of the steps before it) edges filter basis=512 (frames) muon
    --extras of dit.py     components=4x64 (tokens x width) muon

`--extras` with no value switches all off; presets S, B and L have none. docs/differences.md has what else is ours.
"""

import itertools

import torch

from common import utils
from common.video import to_clip
from extras.basis import BasisDecoder, BasisEncoder
from extras.components import Components, LatentScale
from extras.edges import repeated
from extras.mixing import Mixing
from extras.renorm import BatchRenorm
from nerv import ModulatedConv

VAE = {"mixing": int, "renorm": float, "edges": None, "filter": None, "basis": int, "muon": None}
DIT = {"components": lambda text: tuple(int(n) for n in text.split("x")), "muon": None}


def parse(names, known):
    """["mixing=8", "edges"] -> {"mixing": 8, "edges": None}. UserError for a name that is not in `known` or a bad value."""
    found = {}
    for text in names:
        name, _, value = text.partition("=")
        if name not in known:
            raise utils.UserError(f"--extras {name}: choose from {', '.join(known)}")
        try:
            found[name] = known[name](value) if known[name] else None
        except ValueError:
            raise utils.UserError(f"--extras {text}: {name}= takes a number") from None
    return found


def build_vae(VAE_class, nerv_config, encoder_config, decoder, names, steps=0):
    """The paper's VAE with the extras `names`. steps: its forward passes in training. ValueError if sizes do not fit."""
    chosen = parse(names, VAE)
    if {"edges", "filter"} & chosen.keys():
        if getattr(getattr(decoder, "Conv", None), "convolve", None) is not ModulatedConv.convolve:
            raise ValueError(f"edges, filter: the layers of {decoder.__name__} must convolve as nerv.ModulatedConv does")
        decoder = repeated(decoder, smooth="filter" in chosen)
    vae = VAE_class(nerv_config, encoder_config, decoder)
    if (heads := chosen.get("mixing")) is not None:
        if heads < 1 or encoder_config.width % heads:
            raise ValueError(f"mixing={heads}: heads must divide the encoder's width of {encoder_config.width}")
        vae.encoder.blocks[-1] = Mixing(vae.encoder.blocks[-1], nerv_config.num_tokens, len(vae.encoder.position), heads)
    if "renorm" in chosen:
        vae.encoder.norm = BatchRenorm(vae.encoder.norm, chosen["renorm"] * steps)
    if "basis" in chosen:
        vae.nerv = BasisDecoder(vae.nerv, chosen["basis"])
        vae.encoder = BasisEncoder(vae.encoder, vae.nerv)
    return vae


def start(vae, ema, batches, seed, count=4096):
    """Before the first step, fit a shared basis, if any, to `count` frames: two from each clip of `batches`, of four clips."""
    if not isinstance(vae.nerv, BasisDecoder):
        return
    generator = torch.Generator().manual_seed(seed)
    clips = (to_clip(video) for video, _ in itertools.islice(batches, count // 8))
    frames = [clip[:, torch.randperm(clip.shape[1], generator=generator)[:2]].flatten(0, 1) for clip in clips]
    vae.nerv.basis.fit(torch.cat(frames).to(vae.nerv.head.weight.device), vae.nerv.config.num_frames)
    utils.from_first_rank(vae)
    ema.load_state_dict(vae.state_dict())


def latent_map(names, token_shape):
    """The map from tokens to the latents that stage 2 diffuses: a scale or, with the extra, principal components."""
    chosen = parse(names, DIT)
    return Components(chosen["components"], token_shape) if "components" in chosen else LatentScale(token_shape)
