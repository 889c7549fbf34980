"""Repeated edges, and a filter after upsampling, for the decoder's convolutions.

Edges: zeros beyond the border of a map show as a dark rim; the border itself repeated does not. Worth 0.5 dB on the shapes.
Filter: a transposed convolution leaves a mesh of period two. [1, 2, 1] / 4 removes it (StyleGAN2, Karras et al. 2020), and
blurs what is sharp: 0.2 dB better on the shapes, 2 dB worse on Sprites.
"""

import torch
import torch.nn.functional as F


def repeated(decoder, smooth=False):
    """A subclass of a decoder class (nerv.NeRV) whose convolutions repeat the edge, and filter after upsampling if `smooth`."""

    class Conv(decoder.Conv):
        def convolve(self, x, weight, bias, groups):
            if self.upsample:  # `padding` of a transposed convolution is what is cut off
                x = F.conv_transpose2d(pad(x, 1), weight, bias, stride=2, padding=3, groups=groups)
                return blur(x) if smooth else x
            return F.conv2d(pad(x, weight.shape[-1] // 2), weight, bias, groups=groups)

    return type(decoder.__name__, (decoder,), {"Conv": Conv})


def pad(x, size):
    """The edge of x [..., H, W] repeated, once or not at all."""
    if size and torch.compiler.is_compiling():  # the backward of replicate does not compile for channels-last maps
        x = torch.cat([x[..., :1, :], x, x[..., -1:, :]], -2)
        return torch.cat([x[..., :1], x, x[..., -1:]], -1)
    return F.pad(x, (size,) * 4, mode="replicate") if size else x


def blur(x):
    """[1, 2, 1] / 4 along height and width: [..., H, W] -> [..., H, W]."""
    x = pad(x, 1)
    x = (x[..., :-2] + x[..., 2:]) / 4 + x[..., 1:-1] / 2
    return (x[..., :-2, :] + x[..., 2:, :]) / 4 + x[..., 1:-1, :] / 2
