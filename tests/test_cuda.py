"""What only a GPU can show: NERV_TEST_GPU=1 python -m pytest tests/test_cuda.py. Everywhere else these are skipped."""

import copy

import pytest
import torch

import nerv

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or NERV_TEST_GPU is not set")


def test_the_decoder_is_that_of_the_cpu():
    torch.manual_seed(0)
    model, tokens, t = nerv.NeRV(nerv.CONFIGS["nano"]), torch.randn(3, 32, 16), torch.arange(4.0)
    theirs = copy.deepcopy(model).cuda()
    torch.set_float32_matmul_precision("highest")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # which has ten bits
        ours, frames = model(tokens, t), theirs(tokens.cuda(), t.cuda())
        torch.testing.assert_close(frames.cpu(), ours, rtol=1e-4, atol=1e-4)
        ours.square().mean().backward(), frames.square().mean().backward()
    for a, b in zip(model.parameters(), theirs.parameters()):
        if a.numel():
            torch.testing.assert_close(b.grad.cpu(), a.grad, rtol=1e-3, atol=1e-5)
