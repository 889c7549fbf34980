"""The .nerv file of a video by fit.py: a network's parameters as entropy-coded integers, and frames decoded from it.

The header has method, frame size, number of frames, rate, bits, strides and channels: all that builds the network.
"""

import math
import struct

import numpy as np
import torch

from common.video import to_frames
from siblings import container, entropy, methods
from siblings.components import Plan
from siblings.frames import LARGEST
from siblings.methods import ALL, Network

MOST = 10**8  # parameters of a network


def width(x, bits):
    """Bits per number of a tensor: vectors, which are few and affect everything, always have 8."""
    return 8 if x.ndim == 1 else bits


def quantize(x, bits):
    """A tensor -> (integers int16 [n], their step): one scale for all of it, centred at 0.

    HTD quantizes as HiNeRV does, per tensor, and does not state how the scale is chosen. Here it has the least squared error
    among a few that clip up to 70 % of the range.
    """
    flat, half = x.detach().float().cpu().flatten(), 2 ** (width(x, bits) - 1)
    best, largest = (math.inf,), flat.abs().max().item()
    for share in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3):
        step = float(np.float32(max(share * largest / (half - 1), 1e-12)))  # as stored in the file
        numbers = (flat / step).round().clamp(-half, half - 1)
        error = (numbers * step - flat).double().square().sum().item()
        best = (error, numbers, step) if error < best[0] else best
    return best[1].numpy().astype(np.int16), best[2]


def order(x, k, bits):
    """The coding order of entropy.pack for a tensor: one distribution of scale 2^(k / 4), one column."""
    return entropy.coding_order([k / 4], [width(x, bits)], [True])


def packed(network, bits):
    """The chunks of a network: the first has step and scale of each tensor, the others the tensors, in their order."""
    sides, chunks = [], []
    for x in network.stored().values():
        numbers, step = quantize(x, bits)
        k = entropy.best_scale(numbers, width(x, bits))
        sides.append(struct.pack("<fb", step, k))
        chunks.append(entropy.pack(numbers[:, None], order(x, k, bits)))
    return [b"".join(sides), *chunks]


@torch.no_grad()
def unpack(network, chunks, bits):
    """Load packed chunks into a network. ValueError if they are not the output of `packed`."""
    stored = network.stored()
    if len(chunks) != 1 + len(stored) or any(chunk is None for chunk in chunks) or len(chunks[0]) != 5 * len(stored):
        raise ValueError("a part is damaged or missing")
    for x, (step, k), chunk in zip(stored.values(), struct.iter_unpack("<fb", chunks[0]), chunks[1:]):
        numbers = entropy.unpack(chunk, order(x, k, bits), (x.numel(), 1))
        x.copy_(torch.from_numpy(numbers).view(x.shape) * torch.tensor(step))


class FittedVideo:
    """A .nerv file of fit.py, ready for `decoded`. Raises BadFile if it is of another kind or damaged.

    A network is small, and one bad number spoils all frames: no part of a damaged file is decoded.
    """

    def __init__(self, path, device="cpu"):
        reader = container.Reader(path)
        header = reader.header
        try:
            (self.width, self.height), self.frames, self.rate = header["size"], header["frames"], header["rate"]
            self.method, self.bits, steps, channels = header["method"], header["bits"], header["strides"], header["channels"]
            whole = [self.width, self.height, self.frames, self.bits, *steps, *channels]
            good = header["kind"] == "fit" and all(type(n) is int and n > 0 for n in whole) and self.method in ALL
            good = good and 4 <= self.bits <= 8 and 0 < self.rate < 1e6 and max(steps) <= 8 and max(channels) <= 2**16
            good = good and 1 <= len(steps) <= 16 and len(channels) == len(steps) + 1 and self.frames <= 10**7
            plan = Plan(self.frames, self.height, self.width, steps, channels)
            good = good and self.width * self.height <= LARGEST and math.prod(plan.padded) <= 16 * LARGEST
            # Checked before allocating anything of that size; a parameter takes at least this much of a file.
            self.parameters = methods.count(ALL[self.method], plan, codes=True) if good else 0
        except (KeyError, TypeError, ValueError, RuntimeError):
            good = False
        if not good or self.parameters > min(MOST, 2**14 * reader.length):
            raise container.BadFile(path, "its header is not that of a video written by this program")
        self.path, self.length = path, reader.length
        self.network = Network(ALL[self.method], plan).to(device).eval().requires_grad_(False)
        try:
            unpack(self.network, [reader[i] for i in range(len(reader))], self.bits)
        except ValueError:
            raise container.BadFile(path, "it is damaged, or from another version of this program") from None


@torch.no_grad()
def decoded(network, places):
    """Frames at real-valued times, uint8 [H, W, 3] each; one at a time, so that the result does not depend on the batch."""
    device = next(network.parameters()).device
    for place in places:
        yield to_frames(network(torch.tensor([float(place)], device=device)))[0]
