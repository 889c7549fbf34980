"""What a training step will take of a GPU's memory, from shapes alone: networks of fake tensors go through it, here and now.

It follows the eager step, in which all that the backward pass reads is kept until then; compiled code keeps less. On fake
CPU tensors, so that it runs anywhere, with what autocast does on CUDA.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import weakref

LARGEST_MAP = 2**31  # elements: on a GPU the decoder takes as many videos at a time as stay below (nerv.NeRV.forward)
USABLE = 0.9  # of a card; the rest goes to CUDA itself, cuDNN's workspaces and gaps between blocks


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors that are made while it is on and not yet freed."""

    def __init__(self):
        super().__init__()
        self.bytes, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):  # what was there before does not count, and no view of it
            if isinstance(tensor, torch.Tensor):
                self.note(tensor.untyped_storage(), 0)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.note(storage, storage.nbytes())
        return out

    def note(self, storage, size):
        key = storage._cdata
        if key not in self.known:
            self.known.add(key)
            weakref.finalize(storage, self.forget, key, size)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)

    def forget(self, key, size):
        self.known.discard(key)
        self.bytes -= size

    def top(self):
        """The most bytes at a time since the last call."""
        peak, self.peak = self.peak, self.bytes
        return peak


class Autocast(TorchFunctionMode):
    """What autocast to bfloat16 does on CUDA; that of CPUs leaves norms and squares in bfloat16, and keeps a quarter less."""

    LOW = {F.linear, F.conv2d, F.conv3d, F.conv_transpose2d, F.scaled_dot_product_attention, torch.matmul}
    T = torch.Tensor
    FULL = {F.layer_norm, F.softplus, torch.exp, torch.rsqrt, T.exp, T.rsqrt, T.pow, T.__pow__, T.square, T.sum}

    def __init__(self, enabled=True):
        super().__init__()
        self.enabled, self.copies = enabled, {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if self.enabled and func in self.LOW | self.FULL:
            args = tree_map_only(torch.Tensor, self.low if func in self.LOW else torch.Tensor.float, args)
        return func(*args, **(kwargs or {}))

    def low(self, x):
        """x in bfloat16; of a parameter one copy, as long as autocast is on."""
        if not isinstance(x, torch.nn.Parameter):
            return x.bfloat16()
        if x not in self.copies:
            self.copies[x] = x.bfloat16()
        return self.copies[x]


def backward(loss):
    """loss.backward() within Autocast, where checkpointed blocks compute again; Tensor.backward leaves function modes."""
    _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)


def weights(network, copies):
    """Bytes of so many copies of the parameters; gradients are there at once, so that no step is the one that makes them."""
    for p in network.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    return copies * sum(p.nbytes for p in network.parameters())


def stage1(make, frames, bf16=True, gan=True, r1=True):
    """What a step of vae.py takes in one process: a function of the clips that go through at a time -> {part: bytes}.

    make() -> (VAE, Discriminator or None, LPIPS or None), called under FakeTensorMode; frames: decoded of each clip. The parts
    add up to the peak. The discriminator's own step comes after the decoder's: the larger of their peaks counts.
    """
    with FakeTensorMode():
        vae, discriminator, perceptual = make()
        c, t = vae.nerv_config, torch.arange(frames)
        gan = gan and discriminator is not None
        # With gradients and AdamW's two moments; the autoencoder's average too.
        size = weights(vae, 5) + (weights(discriminator, 4) if gan else 0) + (weights(perceptual, 1) if perceptual else 0)

        def generator(clips):
            """What the four keep, the most until the frames have their gradient, and the most after that."""
            with Alive() as alive, Autocast(bf16):
                video = torch.empty(clips, c.num_frames, 3, c.resolution, c.resolution)
                mean, logvar = vae.encode(video)
                marks = [0, alive.bytes]
                decoded, real = vae.decode(mean + logvar, t), video[:, t]
                marks.append(alive.bytes)
                loss = (decoded.float() - real).square().mean()
                if perceptual:
                    pair = (decoded, real)
                    if c.resolution < 64:  # as losses.at_least_64 has them
                        pair = (F.interpolate(x.flatten(0, 1), scale_factor=2)[None] for x in pair)
                    loss = loss + perceptual(*pair)
                marks.append(alive.bytes)
                if gan:
                    discriminator.requires_grad_(False)
                    loss = loss + F.softplus(-discriminator(decoded)).mean()
                    discriminator.requires_grad_(True)
                marks.append(alive.bytes)
                before = []
                decoded.register_hook(lambda gradient: before.append(alive.top()))
                backward(loss)
                return [*(b - a for a, b in zip(marks, marks[1:])), *before, alive.top()]

        def judge(clips):
            """The discriminator's own step, with R1, whose gradient of a gradient keeps everything again, in float32."""
            with Alive() as alive:
                real = torch.empty(clips, frames, 3, c.resolution, c.resolution, requires_grad=r1)
                with Autocast(bf16):
                    on_decoded = discriminator(torch.empty_like(real))
                with Autocast(bf16 and not r1):
                    on_real = discriminator(real)
                    loss = F.softplus(-on_real).mean() + F.softplus(on_decoded).mean()
                    if r1:
                        (gradient,) = torch.autograd.grad(on_real.sum(), real, create_graph=True)
                        loss = loss + gradient.square().sum()
                    backward(loss)
                return [alive.top()]

        def decode_one():
            """What the backward pass of the decoder takes for one video, beyond what was kept."""
            with Alive() as alive, Autocast(bf16):
                decoded = vae.decode(torch.empty(1, c.num_tokens, c.token_dim, requires_grad=True), t)
                kept = alive.bytes
                backward(decoded.sum())
                return alive.top() - kept

        measured = [generator(clips) + (judge(clips) if gan else [0]) for clips in (2, 8)]
        one, largest = decode_one(), frames * vae.nerv.to_rgb.in_ch * c.resolution**2

    def predict(rows):
        *kept, before, after, own = [a + (b - a) * (rows - 2) / 6 for a, b in zip(*measured)]
        # Fake tensors are the CPU's, on which the decoder takes few videos at a time; a GPU takes more.
        peak = max(sum(kept), before, after + (min(rows, max(1, (LARGEST_MAP - 1) // largest)) - 1) * one)
        if own > peak:
            return {"weights": size, "discriminator": own}
        parts = dict(zip(("encoder", "decoder", "LPIPS", "discriminator"), kept))
        return {"weights": size, **parts, "backward": peak - sum(kept)}

    return predict


def stage2(make, bf16=True):
    """What a step of dit.py takes in one process: a function of the clips that go through at a time -> {part: bytes}.

    make() -> (DiT, VAE), called under FakeTensorMode. With the second pass of scheduled sampling, and with clips that are
    encoded in the step, as they are without --cache-latents.
    """
    with (mode := FakeTensorMode()):
        denoiser, vae = make()
        c, size = vae.nerv_config, weights(denoiser, 5) + weights(vae.requires_grad_(False), 1)

    def predict(rows):
        with mode, Alive() as alive, Autocast(bf16):
            with torch.no_grad():
                vae.encode(torch.empty(rows, c.num_frames, 3, c.resolution, c.resolution))
            encoded = alive.top()
            tokens, label = torch.empty(rows, c.num_tokens, c.token_dim), torch.zeros(rows, dtype=torch.long)
            loss = sum(denoiser(tokens, label, label).float().square().mean() for _ in range(2))
            kept = alive.bytes
            backward(loss)
            peak = alive.top()
        if encoded > peak:
            return {"weights": size, "encoder": encoded}
        return {"weights": size, "denoiser": kept, "backward": peak - kept}

    return predict


def plan(predicts, rows, card, world=1):
    """How one process takes `rows` clips a step on a card of so many bytes: (parts that they go through in, which of predicts).

    predicts: functions of stage1 or stage2, the preferred one first. As few parts as can be, since batch norm compares the
    clips of one, of all of `world` processes: two or more. None where not even that fits.
    """
    for parts in (n for n in range(1, rows + 1) if rows % n == 0 and rows // n * world > 1):
        for i, predict in enumerate(predicts):
            if sum(predict(rows // parts).values()) <= USABLE * card:
                return parts, i
    return None


def choose_stage1(config, make, rows, world, card):
    """What --recompute is on a GPU of `card` bytes, and a line of advice, or "", for a step of `rows` clips at a time.

    make() -> (VAE, Discriminator or None, LPIPS or None). --accumulate is left to the user: batch norm compares the clips that
    go through together, so that another number of parts is another training.
    """
    choices = {"auto": [False, True], "on": [True], "off": [False]}[config.recompute]

    def networks(recompute):
        autoencoder, discriminator, perceptual = make()
        autoencoder.encoder.recompute = recompute
        return autoencoder, discriminator, perceptual

    frames, bf16 = min(config.decode_frames, config.num_frames), config.bf16 != "off"
    predicts = [stage1(partial(networks, recompute), frames, bf16) for recompute in choices]
    parts, choice = plan(predicts, rows, card, world) or (None, -1)
    if parts == 1:
        return choices[choice], ""
    taken, way = sum(predicts[-1](rows).values()) / 2**30, "no number of parts (--accumulate) fits either"
    if parts:
        way, choice = f"--accumulate {parts * config.accumulate} would fit", -1
    warning = f"warning: {rows} clips at a time take about {taken:.0f} GiB, this GPU has {card / 2**30:.0f}; {way}"
    return choices[choice], warning
