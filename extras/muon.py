"""Muon (Jordan et al. 2024) for the matrices of transformers, AdamW for the rest.

It updates a matrix by the orthogonal matrix nearest to the momentum, so all directions learn at the same rate. Updates are
scaled to the size of AdamW's (Liu et al. 2025, "Muon is scalable for LLM training", Eq. 4), so both use the same learning
rate. Shapes: 0.8 dB after 400 steps of stage 1.
"""

import re

import torch

# Neither the DiT's modulations, which start at zero, nor the multi-head affine maps.
MATRICES = (
    r"attention.*weight$|blocks\..*(self_attn|mlp|linear\d).*weight$|\.mix$|encoder\.embed\.weight$"
    r"|basis\.components$|^nerv\.head\.weight$"
)


def make_optimizer(network, weight_decay=0.01, muon=False):
    """AdamW (§A.1; its β and weight decay are not in the paper), or Muon for the matrices. Each step sets the learning rate."""
    matrices = {name: p for name, p in network.named_parameters() if muon and p.ndim == 2 and re.search(MATRICES, name)}
    others = [p for name, p in network.named_parameters() if name not in matrices]
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    return Muon(list(matrices.values()), adamw, weight_decay) if muon else adamw


def orthogonalize(x):
    """Approximately the orthogonal matrix nearest to x [rows, columns]: singular values of 0.7 to 1.2, by five iterations.

    Newton-Schulz: x <- (a + b G + c G²) x with G = x xᵀ, in bfloat16 on GPUs. That (like torch.optim.Muon) takes CPUs without
    native bfloat16 up to thirty times as long; on CPUs, steps are therefore in float32 and on G, which is small.
    """
    if x.shape[0] > x.shape[1]:
        return orthogonalize(x.T).T
    x = x / (x.norm() + 1e-7)
    if x.is_cuda:
        x = x.bfloat16()
        for _ in range(5):
            square = x @ x.T  # [rows, rows]
            x = torch.addmm(x, torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
        return x.float()
    square, eye = x @ x.T, torch.eye(len(x), dtype=x.dtype)
    product = eye
    for _ in range(5):
        step = 3.4445 * eye + torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315)
        product, square = step @ product, step @ square @ step
    return product @ x


class Muon:
    """Muon for `matrices` and AdamW for the rest, as one optimizer. If found_inf is 1, a step changes nothing."""

    grad_scale = found_inf = None

    def __init__(self, matrices, adamw, weight_decay, momentum=0.95):
        self.adamw, self.weight_decay, self.momentum = adamw, weight_decay, momentum
        self.averages = [torch.zeros_like(matrix) for matrix in matrices]
        self.own = {"params": matrices, "lr": 0.0}

    @property
    def param_groups(self):
        return [self.own, *self.adamw.param_groups]

    @torch.no_grad()
    def step(self):
        self.adamw.grad_scale, self.adamw.found_inf = self.grad_scale, self.found_inf
        self.adamw.step()
        lr, keep = self.own["lr"], self.found_inf > 0  # a tensor, to avoid synchronizing with the GPU
        for matrix, average in zip(self.own["params"], self.averages):
            if matrix.grad is None:
                continue
            new = average.lerp(matrix.grad, 1 - self.momentum)
            update = 0.2 * max(matrix.shape) ** 0.5 * orthogonalize(matrix.grad.lerp(new, self.momentum))  # Nesterov's
            average.copy_(torch.where(keep, average, new))
            matrix.copy_(torch.where(keep, matrix, matrix * (1 - lr * self.weight_decay) - lr * update))

    def zero_grad(self, set_to_none=True):
        self.adamw.zero_grad(set_to_none)
        for matrix in self.own["params"]:
            matrix.grad = None

    def state_dict(self):
        return {"averages": self.averages, "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state):
        self.adamw.load_state_dict(state["adamw"])
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.copy_(saved)
