"""The .nerv file of a video by codec.py: the integers of each chunk of frames, in the format of container.py.

A codec here is anything with `config` (resolution and num_frames of a tile, tokens) and `decoder`, codec.py's NeRVDec.
"""

import math

import numpy as np
import torch

from common import utils
from common.video import to_frames
from siblings import container, entropy
from siblings.frames import LARGEST, join


def model_name(codec):
    """The identifier of a model in files: 16 hex digits of a fingerprint of its decoder, all that decoding depends on."""
    return utils.fingerprint(codec.decoder)[:16]


def coding_order(decoder, bits, keep):
    """The coding order of the kept codes: entropy.coding_order of the decoder's distributions."""
    sources, scales = decoder.config.sources(keep), decoder.log_scale.detach().cpu().double().numpy() / math.log(2)
    widths = np.full(len(sources), bits)
    return entropy.coding_order(scales + bits - 3, widths, sources == torch.arange(len(sources)))  # a step is 2^(3 - bits)


def packed(numbers, order):
    """Integers [tiles, P] -> a chunk, of at least one bit per tile, so that a short file cannot demand much memory."""
    return entropy.pack(numbers, order).ljust(math.ceil(len(numbers) / 8), b"\0")


class VideoFile:
    """A .nerv file and the codec, of checkpoint `name`, that decodes it. BadFile if it needs another model or is damaged."""

    def __init__(self, path, codec, name):
        self.path, self.reader, self.decoder, c = path, container.Reader(path), codec.decoder, codec.config
        header = self.reader.header
        try:
            (self.width, self.height), self.frames, self.rate = header["size"], header["frames"], header["rate"]
            (self.bits,), keep = header["bits"], header["keep"]
            good = all(type(n) is int and n > 0 for n in (self.width, self.height, self.frames, self.bits))
            good = good and header["kind"] == "codec" and header["model"] == model_name(codec) and 4 <= self.bits <= 8
            good = good and 0 < keep <= 1 and 0 < self.rate < 1e6 and self.width * self.height <= LARGEST
            good = good and len(self.reader) == math.ceil(self.frames / c.num_frames)
        except (KeyError, TypeError, ValueError):
            good = False
        if not good:
            raise container.BadFile(path, f"it is not a video, or was encoded by another model than {name}")
        self.tiles = math.ceil(self.width / c.resolution) * math.ceil(self.height / c.resolution)
        self.order, self.sources = coding_order(self.decoder, self.bits, keep), c.sources(keep)

    def numbers(self, chunk):
        """The integers of a chunk, int8 [tiles, P]. BadFile if it is damaged."""
        data = self.reader[chunk]
        try:
            if data is None or 8 * len(data) < self.tiles:
                raise ValueError
            return entropy.unpack(data, self.order, (self.tiles, len(self.sources)))
        except ValueError:
            T = self.decoder.config.num_frames
            about = f"chunk {chunk}, frames {chunk * T} to {min((chunk + 1) * T, self.frames) - 1}, is damaged"
            raise container.BadFile(self.path, f"{about}: use --frames to decode others") from None

    def codes(self, numbers):
        """int8 [tiles, P] -> codes [tiles, P] on the decoder's device."""
        numbers = torch.from_numpy(numbers).to(self.decoder.mean.device)
        return self.decoder.dequantize(numbers.float(), self.bits)[:, self.sources]


@torch.no_grad()
def decode_frames(file, codec, first, last, time_scale=1.0):
    """Frames of a VideoFile from `first` up to `last`, in parts, each uint8 [n, H, W, 3]; reads only the chunks it needs."""
    T = codec.config.num_frames
    places = np.arange(math.ceil(first * time_scale), math.ceil(last * time_scale)) / time_scale
    places = np.minimum(places, file.frames - 1)  # in frames; nothing to interpolate after the last one
    for chunk in range(first // T, math.ceil(last / T)):
        t = places[(places >= chunk * T) & (places < (chunk + 1) * T)] - chunk * T
        if len(t):
            codes = file.codes(file.numbers(chunk))
            for few in torch.from_numpy(t).to(codes).split(T):
                yield to_frames(join(codec.decoder(codes, few), file.height, file.width))
