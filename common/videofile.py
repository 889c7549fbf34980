"""The .nerv file of a video by codec.py: numbers of each chunk of frames in common/container.py's file, and frames from it.

A codec is here what has `config` (resolution and num_frames of a tile, tokens) and `decoder`, codec.py's NeRVDec.
"""

import math
import sys

import numpy as np
import torch

from common import container, entropy, utils
from common.video import join, printable, to_frames


def model_name(codec):
    """What files call a model: 16 hexadecimal digits of the fingerprint of its decoder, all that decoding depends on."""
    return utils.fingerprint(codec.decoder)[:16]


def coding_order(decoder, bits, keep):
    """How the kept codes are written: entropy.coding_order of what the decoder knows of them."""
    sources, widths = decoder.sources(keep).cpu(), decoder.config.per_code(bits).numpy()
    scales = decoder.log_scale.detach().cpu().double().numpy() / math.log(2)
    steps = decoder.steps(bits).cpu().double().log2().numpy()
    return entropy.coding_order(scales - steps, widths, sources == torch.arange(len(sources)))


def packed(numbers, order):
    """Whole numbers [tiles, P] -> a chunk. It has a bit per tile or more, so that a short file cannot ask for much memory."""
    return entropy.pack(numbers, order).ljust(math.ceil(len(numbers) / 8), b"\0")


class VideoFile:
    """A .nerv file and what is needed to decode it: codes(chunk) -> [tiles, P]. Raises BadFile for what is not its codec's."""

    LARGEST = 2**25  # pixels of a frame

    def __init__(self, path):
        self.path, self.reader = path, container.Reader(path)
        header = self.reader.header
        try:
            (self.width, self.height), self.frames, self.rate = header["size"], header["frames"], header["rate"]
            self.bits, self.keep, self.model = header["bits"], header["keep"], header["model"]
            whole = [self.width, self.height, self.frames, *self.bits]
            good = header["kind"] == "codec" and all(type(n) is int and n > 0 for n in whole) and type(self.model) is str
            good = good and all(4 <= b <= 8 for b in self.bits) and 0 < self.keep <= 1 and 0 < self.rate < 1e6
        except (KeyError, TypeError, ValueError):
            good = False
        if not good or self.width * self.height > self.LARGEST:
            raise container.BadFile(path, "its header is not that of a video by this program")

    def fit(self, codec, name):
        """Make ready to decode by this codec, of the checkpoint `name`. BadFile where it is another's."""
        c, self.decoder = codec.config, codec.decoder
        if self.model != model_name(codec):
            raise container.BadFile(self.path, f"it was encoded by another model than {name}")
        if len(self.bits) not in (1, len(c.tokens)) or len(self.reader) != math.ceil(self.frames / c.num_frames):
            raise container.BadFile(self.path, "its header is not that of a video by this model")
        self.tiles = math.ceil(self.width / c.resolution) * math.ceil(self.height / c.resolution)
        self.order = coding_order(codec.decoder, self.bits, self.keep)
        self.sources = codec.decoder.sources(self.keep)
        return self

    def numbers(self, chunk):
        """int8 [tiles, P], or None where the chunk is damaged."""
        data = self.reader[chunk]
        if data is None or 8 * len(data) < self.tiles:
            return None
        try:
            return entropy.unpack(data, self.order, (self.tiles, len(self.sources)))
        except ValueError:
            return None

    def codes(self, numbers):
        """int8 [tiles, P] -> codes [tiles, P] on the decoder's device."""
        numbers = torch.from_numpy(numbers).to(self.sources.device)
        return self.decoder.dequantize(numbers.float(), self.bits)[:, self.sources]

    def print(self):
        """What the file says of itself, and which of its chunks are damaged."""
        reader, pixels = self.reader, self.frames * self.width * self.height
        damaged = [i for i in range(len(reader)) if reader[i] is None]
        print(f"{self.frames} frames of {self.width} x {self.height}, {self.rate:g} a second, by model {self.model}")
        head = reader.length - sum(length for _, length, _ in reader.entries)
        print(
            f"{reader.length} bytes, {8 * reader.length / pixels:.4f} bits per pixel; {max(0, head)} of them header and index"
        )
        print(f"{len(reader)} chunks, codes of {' '.join(map(str, self.bits))} bits, {100 * self.keep:g} % of the tokens")
        more = f"; {reader.tail} bytes follow" if reader.tail > 0 else ""
        print(f"damaged chunks: {' '.join(map(str, damaged)) or 'none'}{more}")


@torch.no_grad()
def decode_frames(file, codec, first, last, time_scale=1.0, salvage=False):
    """Frames of a fitted VideoFile from number `first` up to `last`, in parts, each uint8 [n, H, W, 3]; needed chunks only.

    Without salvage, BadFile for a chunk that is damaged; with it, damaged ones are named on stderr.
    """
    T, good = codec.config.num_frames, None
    places = np.arange(math.ceil(first * time_scale), math.ceil(last * time_scale)) / time_scale
    places = np.minimum(places, file.frames - 1)  # in frames; what is after the last one nobody has seen
    for chunk in range(first // T, math.ceil(last / T)):
        t = places[(places >= chunk * T) & (places < (chunk + 1) * T)] - chunk * T
        if not len(t):
            continue
        if (numbers := file.numbers(chunk)) is None:
            about = f"chunk {chunk}, frames {chunk * T} to {min((chunk + 1) * T, file.frames) - 1}, is damaged"
            if not salvage:
                raise container.BadFile(file.path, f"{about}: --salvage decodes the others")
            print(f"{printable(file.path)}: {about}", file=sys.stderr)
            still = np.full((file.height, file.width, 3), 128, np.uint8) if good is None else good
            yield np.broadcast_to(still, (len(t), *still.shape))
            continue
        codes = file.codes(numbers)
        for few in torch.from_numpy(t).to(codes).split(T):
            frames = to_frames(join(codec.decoder(codes, few), file.height, file.width))
            yield frames
            good = frames[-1]
