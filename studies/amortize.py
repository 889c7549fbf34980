"""Ways to bring the encoder nearer to what its decoder can hold, from one vae.pt and in equal time.

python -m studies.amortize --ckpt vae.pt                  two minutes a way, two seeds

Gradient steps on the tokens of a clip find tokens that the encoder missed (vae.refine). Each row of ROWS goes on from the same
checkpoint, with the squared error alone, and is then refined as any other. Time is that of the process, so that other
work does not count. Runs that are in runs.csv are not done again.
"""

import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn

import data
from common import checkpoints, progress, utils
from common.optim import make_optimizer
from common.tables import add_row, read_rows, table
from common.utils import option
from common.video import to_clip
from losses import LPIPS, at_least_64
from vae import Config as Stage1
from vae import EncoderBlock, load_vae, psnr

STEPS = (0, 3, 10, 80)  # of refinement
COLUMNS = ["row", "seed", "settings", "revision", "steps", "seconds"]
COLUMNS += [f"{measure}{k}" for measure in ("psnr", "lpips") for k in STEPS]
LOOKS = 3  # of a LearnedStep, one after the other


class LearnedStep(nn.Module):
    """A step on tokens that is learned: tokens [B, N, d] and the error's gradient by them -> better tokens.

    A small transformer sees both (iterative amortized inference, Marino et al. 2018). Nothing moves at the start.
    """

    def __init__(self, shape, width=128, depth=3):
        super().__init__()
        N, d = shape
        self.embed = nn.Linear(2 * d + 1, width)
        self.position = nn.Parameter(torch.randn(N, width) * 0.5)
        self.blocks = nn.ModuleList(EncoderBlock(width, 4) for _ in range(depth))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, d)
        nn.init.zeros_(self.out.weight), nn.init.zeros_(self.out.bias)

    def forward(self, tokens, gradient):
        size = gradient.square().mean((1, 2), keepdim=True).sqrt() + 1e-12  # [B, 1, 1]
        x = torch.cat([tokens, gradient / size, size.log().expand(-1, tokens.shape[1], 1)], -1)
        x = self.embed(x) + self.position
        for block in self.blocks:
            x = block(x)
        return tokens + 0.1 * self.out(self.norm(x))

    def matrices(self):
        return [self.embed.weight, *(p for p in self.blocks.parameters() if p.ndim == 2)]


def frames_of(video, count=4):
    """Positions of a few frames of clips [B, T, 3, H, W], drawn at random."""
    return torch.randperm(video.shape[1])[:count].sort().values


def error(vae, tokens, video):
    """Squared error of a few frames of each clip: [B]."""
    t = frames_of(video)
    return (vae.decode(tokens, t) - video[:, t]).square().mean((1, 2, 3, 4))


def look(vae, step, tokens, video):
    """One learned step, from the gradient of a few frames."""
    with torch.enable_grad():
        leaf = tokens.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(error(vae, leaf, video).sum(), leaf)
    return step(tokens.detach(), gradient)


def go_on(vae, step, video):
    return error(vae, vae.encode(video)[0], video).mean()


def distil(vae, step, video, steps=10):
    """The encoder learns the tokens that gradient steps find (their distance, in deviations of each number)."""
    tokens = vae.encode(video)[0]
    found = vae.refine(tokens.detach(), video, steps)
    return ((tokens - found) / (found.std(0) + 1e-3)).square().mean()


def semi_amortize(vae, step, video, steps=3):
    """The error after a few gradient steps, whose gradient goes to the encoder as if they were not there (first order)."""
    tokens = vae.encode(video)[0]
    moved = vae.refine(tokens.detach(), video, steps) - tokens.detach()
    return error(vae, tokens + moved, video).mean()


def learn_a_step(vae, step, video):
    """The error after each of a few learned steps; encoder and decoder stay as they are."""
    with torch.no_grad():
        tokens = vae.encode(video)[0]
    losses = []
    for _ in range(LOOKS):
        tokens = look(vae, step, tokens, video)
        losses.append(error(vae, tokens, video).mean())
    return sum(losses) / LOOKS


# Name -> (loss, what is trained, peak learning rate). What goes on does so at a fifth of what it began with.
ROWS = {
    "as it is": (None, None, 0.0),
    "encoder and decoder go on": (go_on, "both", 3e-4),
    "the encoder goes on": (go_on, "encoder", 3e-4),
    "distilled from refined tokens": (distil, "encoder", 3e-4),
    "semi-amortized": (semi_amortize, "both", 3e-4),
    "a learned step": (learn_a_step, "step", 1.5e-3),
}


@dataclass
class Config:
    ckpt: str = option("input", "vae.pt", "stage-1 checkpoint to go on from")
    data_dir: str = option("input", "", "where its data set is, if not where it was")
    seconds: float = option("training", 120.0, "of the process, for each run")
    batch_size: int = option("training", 16, "clips a step")
    seeds: int = option("what", 2, "runs of each row")
    only: list = option("what", [], "rows to run; all unless named", nargs="*", choices=list(ROWS))
    clips: int = option("judging", 32, "held-out clips")
    out_dir: str = option("output", "out/amortize", "runs.csv goes here")


def learning_rate(share, peak):
    """After a share of the time: a warm-up over a twentieth of it, then a cosine; a hundredth of the peak at either end."""
    return peak * max(0.01, min(1, share / 0.05) * 0.5 * (1 + math.cos(math.pi * min(1, share))))


def train(config, row, vae, step, train_set, seed):
    """Go on in the way of a row -> (steps, seconds of the process); what is trained changes in place, into its average."""
    loss, what, lr = ROWS[row]
    if loss is None:
        return 0, 0
    network = {"both": vae, "encoder": vae.encoder, "step": step}[what]
    matrices = step.matrices() if what == "step" else vae.encoder.matrices() + (vae.nerv.matrices() if what == "both" else [])
    ema = copy.deepcopy(network)
    network.requires_grad_(True).train()
    vae.encoder.norm.renorm = True  # as at the end of its training
    update = utils.FiniteStep(network, make_optimizer(network, matrices, 0.01), 1.0)
    stream = data.Stream(len(train_set), config.batch_size, seed)
    batches = data.endless(train_set, stream)
    start, done, share = time.process_time(), 0, 0.0
    with progress.bar(None, row, total=round(config.seconds), unit="s") as bar:
        while share < 1:
            value = loss(vae, step, to_clip(next(batches)[0]))
            value.backward()
            update(value, learning_rate(share, lr))
            utils.update_ema(ema, network, min(0.99, (1 + done) / (10 + done)))  # as vae.py has it, batch norm's statistics too
            done, share = done + 1, (time.process_time() - start) / config.seconds
            bar.update(min(round(config.seconds), int(share * config.seconds)) - bar.n)
    network.load_state_dict(ema.state_dict())
    network.requires_grad_(False).eval()
    return done, round(time.process_time() - start)


@torch.no_grad()
def judge(vae, step, clips, perceptual, looks):
    """PSNR in dB and LPIPS of clips after each number of refinement steps, from what the encoder gives after so many looks."""
    found, made = {}, {k: [] for k in STEPS}
    for batch in clips.split(16):
        torch.manual_seed(0)  # of the frames that are looked at
        tokens = vae.encode(batch)[0]
        for _ in range(looks):
            tokens = look(vae, step, tokens, batch)
        for k in STEPS:
            made[k].append(vae.decode(vae.refine(tokens, batch, k), torch.arange(clips.shape[1])))
    for k in STEPS:
        frames = torch.cat(made[k])
        found[f"psnr{k}"] = round(psnr(clips, frames), 2)
        found[f"lpips{k}"] = round(perceptual(at_least_64(frames), at_least_64(clips)).item(), 5)
    return found


def main():
    config = utils.parse_options(Config, __doc__)
    utils.check_positive(config, "seconds", "batch_size", "seeds", "clips")
    ckpt = checkpoints.load(config.ckpt, "vae", "python vae.py")
    source = Stage1(**ckpt["config"])  # not vae.clips_of: stage 1 goes on, with random squares where it had them
    source.data_dir = config.data_dir or source.data_dir
    train_set, test_set = (data.open_dataset(source, role, ckpt["classes"]) for role in ("train", "test"))
    clips, _ = data.fixed_clips(test_set, config.clips)
    perceptual = LPIPS("alex")
    settings = f"{utils.fingerprint(load_vae(ckpt))} {config.seconds:g} s {config.batch_size} | {config.clips} clips"
    path = Path(config.out_dir) / "runs.csv"
    utils.make_parent(path)
    rows = [row for row in read_rows(path, COLUMNS) if row["settings"] == settings]
    done = {(row["row"], int(row["seed"])) for row in rows}
    wanted = [(row, seed) for seed in range(config.seeds) for row in config.only or ROWS]
    for row, seed in [key for key in wanted if key not in done]:
        torch.manual_seed(seed)
        vae = load_vae(ckpt)
        step = LearnedStep(vae.token_shape)
        found = dict(row=row, seed=seed, settings=settings, revision=utils.git_revision())
        found["steps"], found["seconds"] = train(config, row, vae, step, train_set, seed)
        found |= judge(vae, step, clips, perceptual, LOOKS if ROWS[row][1] == "step" else 0)
        rows.append(found)
        add_row(path, COLUMNS, rows[-1])
    shown = [name for name in COLUMNS if name not in ("settings", "revision")]
    table(shown, [[row[name] for name in shown] for row in rows if (row["row"], int(row["seed"])) in wanted])


if __name__ == "__main__":
    utils.run(main)
