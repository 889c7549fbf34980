"""Parity of our NeRV family with the published code: same weights, same frame. Run by `python -m studies.fit parity`.

Each published network is built at a released configuration, ours with the same channels, and its weights are copied into ours.
Both use our codes of time: theirs are float32, in which the highest frequencies are noise. None of their code is kept here.
"""

import argparse
import functools
import importlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
import torch.nn as nn

from common.utils import UserError, option
from siblings import methods
from siblings.components import Plan, sinusoid
from siblings.methods import METHODS, Network
from siblings.results import table

T, TIME = 132, torch.tensor([5.0])  # frames, and the time that is compared
COMMON = {"act": "gelu", "norm": "none", "bias": True, "num_blocks": 1, "conv_type": "conv", "reduction": 2, "sin_res": True}
COMMON |= {"stride_list": [5, 2, 2, 2, 2], "stem_dim_num": "512_1", "embed_length": 160, "lower_width": 96, "sigmoid": False}


@dataclass
class Config:
    peers: str = option("what", "peers", "directory with the checkouts NeRV, E-NeRV, HNeRV, FFNeRV, HiNeRV and vinrb")


def load(root, module):
    """A module of a checkout; its imports that are not installed are mocked."""
    sys.path.insert(0, str(root))
    for old in list(sys.modules):
        if old.split(".")[0] in ("configs", "data", "model", "models", "utils", "video_encoders"):  # in several checkouts
            del sys.modules[old]
    while True:
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as missing:
            sys.modules[missing.name] = MagicMock()


class Code(nn.Module):
    """Replaces their codes of positions k / count: [n] -> [n, 160]."""

    count = T

    def forward(self, place):
        return sinusoid((place.flatten() * self.count).round(), self.count)


def nerv(load, plan):
    net = load("model_nerv").Generator(**COMMON, fc_hw_dim="9_16_26", expansion=1)
    return net, "stem: stem, blocks: layers, head: head_layers", lambda clips: net(sinusoid(TIME, T))[-1]


def enerv(load, plan):
    more = {f"{name}_{k}": n for name in ("pos", "xypos") for k, n in (("b", 1.25), ("l", 80))}
    more |= {"pos_b_tm": 1.25, "pos_l_tm": 80, "stem_dim_num": "512", "mlp_dim": 128, "block_dim": 256, "sigmoid": True}
    net = load("model.E_NeRV").E_NeRV_Generator(COMMON | more | {"fc_hw_dim": "9_16_196", "expansion": 3})
    net.pe_t, net.pe_t_manipulate, net.pe_xy = Code(), Code(), Code()
    net.pe_xy.count = 9 * 16
    pairs = "stem: stem_t stem_xy trans1 trans2 toconv, blocks: layers, skips: t_layers, time: t_branch, head: head_layers"
    return net, pairs, lambda clips: net({"img_id": TIME / T})[-1]


def hnerv(load, plan, **baseline):
    args = {"embed": "", "ks": "0_1_5", "reduce": 1.2, "enc_strds": plan.strides, "dec_strds": plan.strides, "fc_hw": "8_16"}
    args |= {"num_blks": "1_1", "enc_dim": "64_16", "conv_type": ["convnext", "pshuffel"], "norm": "none", "act": "gelu"}
    args |= {"fc_dim": plan.channels[0], "lower_width": 12, "out_bias": "tanh"} | baseline
    net = load("model_all").HNeRV(SimpleNamespace(**args))
    net.stem, net.blocks, pairs = net.decoder[0], net.decoder[1:], "stem: stem, blocks: blocks, head: head_layer"
    if baseline:
        net.pe_embed = nn.Sequential(Code(), nn.Unflatten(1, (160, 1, 1)))
        return net, pairs, lambda clips: net(TIME / T)[0]
    levels = " ".join(f"encoder.downsample_layers.{i} encoder.stages.{i}" for i in range(5))
    return net, f"{pairs}, encoding.encoder: {levels}", lambda clips: net(clips[:, 1])[0]


def ffnerv(load, plan):
    more = {"stride_list": plan.strides, "conv_type": "compact", "lower_width": 24, "sin_res": False}
    net = load("model").Generator(**COMMON | more, fc_hw_dim="9_16_48", expansion=8, aggs=4, t_dim=[T // 2, T], wbit=32)
    net.own, net.weight = (nn.ParameterList(x[s] for x in net.head_layers[4].parameters()) for s in (slice(3), slice(3, 5)))
    pairs = "encoding: video_grid, blocks: layers, flow.to_flow: head_layers.2, flow.to_weight: weight, head: own"
    return net, pairs, lambda clips: net(TIME / T)[1][:, :3]


def hinerv(load, plan):
    parser, models = argparse.ArgumentParser(), load("models.hinerv")
    models.set_args(parser)
    words = (Path(models.__file__).parents[1] / "cfgs/models/bunny-hinerv-xs_1280x720.txt").read_text().split()
    size = {"video_size": (T, *plan.padded), "patch_size": (1, *plan.padded), "idx_max": (T, 1, 1)}
    net = models.build_model(parser.parse_args(words[2:]), MagicMock(), size).eval()
    net.grids = nn.ParameterList(x.weight.unflatten(0, (-1, *plan.grid)).permute(0, 3, 1, 2) for x in net.encoding.grids)
    pairs = ["encoding: grids, stem: decoder.stem, head: decoder.head"]
    for i, (b, block) in enumerate((f"decoder.blocks.{i}", block) for i, block in enumerate(net.decoder.blocks)):
        pairs.append(f"skips.{i}: {b}.1.enc.grids {b}.1.enc.linear")
        pairs.append(f"blocks.{i}: " + " ".join(f"{b}.{k}" for k in range(2, len(block))))
    return net, ", ".join(pairs), lambda clips: net(size | {"idx": torch.tensor([[int(TIME), 0, 0]])})[:, :, 0]


def rnerv(load, plan, **text):
    config = load("configs").get_base_configs([1080, 1920])["enerv"] | text  # with configs/overrides/rnerv-1_5.json:
    config |= {"fc_dim": 12, "lower_width": 20, "stem_type": "ffnerv", "wbit": 32, "t_dim": [T // 2, T]}
    encoder = object.__new__(load("video_encoders").NeRVEncoder)  # without loading its data
    encoder.positional_encoding, encoder.params = "ffnerv", config
    encoder.build_model()
    type(encoder.net.positional_encoder).pos_embed_helper = lambda self, place, bases: Code()(place)
    pairs = "encoding: positional_encoder, blocks: upsample_layers, skips: t_layers, time: t_branch, head: head_layer"
    return encoder.net, pairs, lambda clips: encoder.net({"t": TIME[None] / T})


def diffnerv(load, plan):
    config = {"dec_dim": 63, "conv_type": "conv", "diff_dec_stride": [(4, 4)], "diff_dec_padding": [1], "diff_dec_kernel": [3]}
    sizes = {"ch_in": 64, "fc_h": 0, "fc_w": 0, "fc_dim": 63, "block_dim": 63, "dec_strds": plan.strides, "ks_1": 1, "ks_2": 5}
    look = {"reduce": 1.2, "lower_width": 1, "activation": "gelu", "out_bias": "tanh", "stem_type": "diff_nerv"}
    net = load("models.nerv").NeRV(**sizes, **look, net_config=config | {"positional_encoding": "diff_nerv"})
    encodings = load("models.layers.positional_encoders")
    net.positional_encoder = net.p = encodings.PosEncodingDiffNeRV(plan.strides, plan.strides[2:], 64, 16, 63)
    gates = (net.dec_p_c, net.dec_p_d), (net.dec_s_c, net.dec_s_d)
    weight = torch.cat([torch.cat([x.weight for x in pair], 1) for pair in gates])
    net.gates = nn.ParameterList([weight, torch.cat([sum(x.bias for x in pair) for pair in gates])])
    pairs = "stem: p.enc_c2_layer, blocks: upsample_layers, head: head_layer, skips: diff_exc_layer diff_dec_layers gates, "
    pairs += "encoding.encoder: p.encoder_layers p.enc_embedding_layer, "
    pairs += "encoding.difference_encoder: p.diff_enc_layers p.diff_enc_ebd_layer"
    return net, pairs, lambda clips: net({"image": clips})


plain = functools.partial(hnerv, embed="pe_1.25_80", ks="0_3_3", enc_strds=[], reduce=2)
rnerv_text = functools.partial(rnerv, expansion=[4], reduce=1.2, use_compact_blocks=True, use_old_upconv=False)
# Row of ours -> (its peer, checkout, configuration, height, width, strides, channels).
PEERS = {
    "nerv": (nerv, "NeRV", "NeRV-S", 720, 1280, [5, 2, 2, 2, 2], [26, 26, 96, 96, 96, 96]),
    "enerv": (enerv, "E-NeRV", "E-NeRV-bunny.yaml", 720, 1280, [5, 2, 2, 2, 2], [196, 588, 294, 147, 96, 96]),
    "hnerv": (hnerv, "HNeRV", "Bunny, 1.5 M", 640, 1280, [5, 4, 4, 2, 2], [69, 58, 48, 40, 33, 28]),
    "plain": (plain, "HNeRV", "NeRV baseline, 1.5 M", 640, 1280, [5, 4, 2, 2], [54, 27, 14, 12, 12]),
    "ffnerv": (ffnerv, "FFNeRV", "compression; own frame", 1080, 1920, [5, 3, 2, 2, 2], [48, 384, 192, 96, 48, 24]),
    "hinerv": (hinerv, "HiNeRV", "bunny-hinerv-xs", 720, 1280, [5, 2, 2, 2], [196, 196, 98, 49, 24]),
    "diffnerv": (diffnerv, "vinrb", "stem diff_nerv", 960, 1920, [5, 4, 4, 3, 2], [63, 52, 43, 35, 29, 24]),
    "rnerv": (rnerv, "vinrb", "rnerv-1_5.json", 1080, 1920, [5, 3, 2, 2, 2], [12, 36, 20, 20, 20, 20]),
    "rnerv-text": (rnerv_text, "vinrb", "HTD's §4.3", 1080, 1920, [5, 3, 2, 2, 2], [12, 48, 40, 40, 40, 40]),
}


@torch.no_grad()
def compare(config):
    """Print a row per method: its reference, the difference and the parameters there; ours at 1.5 M and 3 M."""
    rows = []
    for name, (build, repository, about, height, width, strides, channels) in PEERS.items():
        root, plan = Path(config.peers) / repository, Plan(T, height, width, strides, channels)
        if not root.is_dir():
            raise UserError(f"no checkout at {root}")
        torch.manual_seed(0)
        net, pairs, run = build(functools.partial(load, root), plan)
        ours, copied, clips = Network(METHODS[name], plan), 0, torch.rand(1, 3, 3, height, width)
        for part, others in (pair.split(": ") for pair in pairs.split(", ")):
            theirs = [x for other in others.split() for x in net.get_submodule(other).parameters()]
            for x, y in zip(ours.get_submodule(part).parameters(), theirs, strict=True):
                x.copy_(y.reshape(x.shape))
                copied += x.numel() * ("encoder" not in part)
        assert copied == methods.count(METHODS[name], plan)
        difference = (run(clips) - ours.frame(ours.maps(TIME, clips)[-1]) / 2 - 0.5).abs().max().item()
        revision = subprocess.run(["git", "-C", root, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout
        row = [name, f"{repository} {revision.strip()}, {about}", f"{difference:.0e}", f"{copied:,}"]
        for size in (1.5e6, 3e6):
            plan = methods.plan(METHODS[name], size, T, 640, 1280)
            row.append(f"{methods.count(METHODS[name], plan):,}: {' '.join(map(str, plan.channels))}")
        rows.append(row)
    table(["method", "held against", "difference", "parameters", "ours at 1.5 M", "ours at 3 M"], rows)
