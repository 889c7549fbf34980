"""Entropy coding of integers by an ANS coder (constriction) with logistic distributions.

Each number has a width in bits, which bounds it to -2^(bits - 1) … 2^(bits - 1) - 1, and a distribution centred at 0. Sender
and receiver know both; numbers with about the same distribution are coded together.
"""

import functools

import constriction
import numpy as np

LEAST, MOST = -16, 24  # of k: a distribution's scale is 2^(k / 4)


@functools.cache
def probabilities(bits, k):
    """Of the integers of this width, in ascending order: logistic, of scale 2^(k / 4); the ends include the tails."""
    number = np.arange(2**bits) - 2 ** (bits - 1)
    edges = 1 / (1 + np.exp(-np.clip((np.append(number, number[-1] + 1) - 0.5) / 2 ** (k / 4), -40, 40)))
    edges[0], edges[-1] = 0, 1
    return np.diff(edges)


def best_scale(numbers, bits):
    """The k whose distribution codes integers [n] in the fewest bits."""
    counts = np.bincount(numbers.astype(int) + 2 ** (bits - 1), minlength=2**bits)
    costs = [-(counts * np.log2(np.maximum(probabilities(bits, k), 2.0**-24))).sum() for k in range(LEAST, MOST + 1)]
    return LEAST + int(np.argmin(costs))


def coding_order(log2_scales, bits, kept):
    """[(bits, distribution, its columns)] in coding order, over the columns of [P] that are `kept`."""
    k = np.clip(np.rint(4 * np.asarray(log2_scales, np.float64)), LEAST, MOST).astype(int)
    groups = {}
    for column in np.flatnonzero(kept).tolist():
        groups.setdefault((int(bits[column]), int(k[column])), []).append(column)
    model = functools.partial(constriction.stream.model.Categorical, perfect=False)
    return [(key[0], model(probabilities(*key)), np.array(groups[key])) for key in sorted(groups)]


def pack(numbers, order):
    """Integers [rows, P] -> the bytes of the columns of `order`."""
    coder = constriction.stream.stack.AnsCoder()  # last in, first out
    for bits, model, columns in reversed(order):
        coder.encode_reverse((numbers[:, columns] + 2 ** (bits - 1)).ravel().astype(np.int32), model)
    return coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")


def unpack(chunk, order, shape):
    """Bytes of pack, with or without trailing zeros -> int8 [rows, P], 0 in columns that `order` lacks.

    ValueError if they are not the output of pack.
    """
    chunk = chunk.rstrip(b"\0")
    words = np.frombuffer(chunk + bytes(-len(chunk) % 4), "<u4").astype(np.uint32)
    coder, numbers = constriction.stream.stack.AnsCoder(words), np.zeros(shape, np.int8)
    for bits, model, columns in order:
        numbers[:, columns] = coder.decode(model, shape[0] * len(columns)).reshape(shape[0], -1) - 2 ** (bits - 1)
    if not coder.is_empty():
        raise ValueError("bytes are left over")
    return numbers
