"""What only a GPU can show: NERV_TEST_GPU=1 python -m pytest tests/test_cuda.py. Everywhere else these are skipped."""

import copy

import pytest
import torch

import nerv
import vae
from common import checkpoints

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or NERV_TEST_GPU is not set")


@pytest.fixture(autouse=True)
def exact():
    """No TF32, which has ten bits."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        torch.set_float32_matmul_precision("highest")
        yield


def test_the_decoder_is_that_of_the_cpu():
    torch.manual_seed(0)
    model, tokens, t = nerv.NeRV(nerv.CONFIGS["nano"]), torch.randn(3, 32, 16), torch.arange(4.0)
    theirs = copy.deepcopy(model).cuda()
    ours, frames = model(tokens, t), theirs(tokens.cuda(), t.cuda())
    torch.testing.assert_close(frames.cpu(), ours, rtol=1e-4, atol=1e-4)
    ours.square().mean().backward(), frames.square().mean().backward()
    for a, b in zip(model.parameters(), theirs.parameters()):
        if a.numel():
            torch.testing.assert_close(b.grad.cpu(), a.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mode", ["--bf16 on --compile on", "--bf16 on --compile off", "--bf16 off --compile on"])
def test_a_training_with_a_discriminator_goes_through(call, tmp_path, mode):
    options = f"--batch-size 4 {mode}"
    assert call("vae.py", f"--steps 6 --gan-weight 0.1 {options}") == 0
    assert call("vae.py", f"--steps 8 --gan-weight 0.1 {options} --resume") == 0
    assert call("dit.py", f"--steps 4 --num-latents 300 {options}") == 0
    assert call("sample.py", "--classes 0 --steps 4") == 0
    ckpt = checkpoints.load(tmp_path / "vae.pt", "vae", "")
    assert ckpt["step"] == 8
    assert all(x.isfinite().all() for x in vae.load_vae(ckpt).state_dict().values())
