"""Refinement: gradient steps on the tokens of a video after the encoder's guess (semi-amortized VAEs, Kim et al. 2018).

An encoder predicts tokens in one pass; the gradient of the squared error then gives what it missed. Shapes: 1.4 dB in ten steps
after 400 steps of training.
"""

import torch


def refine(decode, tokens, video, steps, lr=0.01, few=4, price=None):
    """Tokens [B, …] that decode to a video [B, T', 3, H, W] better than those given: `steps` of Adam on them alone.

    decode(tokens, t) -> frames [B, len(t), 3, H, W]. The video is the first T' frames of the clip, of which each step takes
    `few` at random. lr falls to a tenth. price(tokens) -> [B] is added to the error of each clip, independent of the others.
    """
    tokens, generator = tokens.detach().float(), torch.Generator().manual_seed(0)
    moment, square = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for step in range(steps):
        t = torch.randperm(video.shape[1], generator=generator)[:few].sort().values.to(video.device)
        with torch.enable_grad():
            tokens.requires_grad_()
            error = (decode(tokens, t).float() - video[:, t]).square().mean((1, 2, 3, 4))
            (gradient,) = torch.autograd.grad((error + price(tokens) if price else error).sum(), tokens)
        moment, square = moment.lerp(gradient, 0.1), square.lerp(gradient.square(), 0.01)
        change = moment / (1 - 0.9 ** (step + 1)) / ((square / (1 - 0.99 ** (step + 1))).sqrt() + 1e-12)
        tokens = tokens.detach() - lr * (1 - 0.9 * step / steps) * change
    return tokens
