"""Long videos: many networks that know of each other, after Video Interface Networks (Dedhia et al. 2025).

A long video is C chunks of T frames. Each has a network of its own, so that a video is tokens θ [B, C, N, d] of stage 1.
The denoiser of dit.py takes all chunks at once, as a batch, and at every diffusion step an interface tells them of each other:

    θ_t of all chunks [B, C * N, d]  --one cross-attention of M learned queries, self-attention-->  global tokens [B, M, width]
    each chunk's tokens, in every block of the DiT, attend to these M tokens beside their own, and to its neighbours'

Cost is linear in C, and sampling may ask for more chunks than training had. What is added starts at zero: the first step is
that of dit.pt.

python vin.py --ckpt dit.pt --chunks 4
python sample.py --ckpt vin.pt --chunks 12
"""

import copy
import dataclasses
import functools
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import dit
import nerv
from common import checkpoints, utils
from common.optim import make_optimizer
from common.utils import UserError, option
from common.video import tile, to_clip, to_frames, write_sheet
from vae import clips_of

# ------------------------------------------------------------------------------------------------------------------ model


@dataclass
class VINConfig:
    """Sizes of the interface, and how chunks lie in a video. The paper's text that is public has no sizes."""

    chunks: int = 4  # C of the training videos
    overlap: int = 0  # frames that neighbouring chunks share
    global_tokens: int = 64  # M
    neighbours: bool = True  # tokens of the chunks before and after are attended to beside the global ones
    places: int = 16  # of a chunk in a video that training sees
    depth: int = 2  # blocks of self-attention among the global tokens
    heads: int = 4  # of the attention that is added to each block of the DiT, as wide as the DiT's; more would cost more


SIZES = {name: {} for name in dit.SIZES}
SIZES["nano"] = {"global_tokens": 8, "heads": 2}  # it diffuses four tokens a clip (dit.py --principal)


def normalize(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class CrossAttention(nn.Module):
    """Queries x [B, L, width] look at a memory [B, K, width], of which `kv` makes keys and values -> [B, L, width]."""

    def __init__(self, width, heads, head_width, zero=False):
        super().__init__()
        self.heads, inner = heads, heads * head_width
        self.q, self.kv = nn.Linear(width, inner), nn.Linear(width, 2 * inner)
        self.out = nn.Linear(inner, width)
        nn.init.orthogonal_(self.q.weight)  # keys begin as queries: what is alike is looked at from the first step
        self.kv.weight.data[:inner] = self.q.weight.data
        if zero:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, x, kv, mask=None):
        """kv = self.kv(memory) [B, K, 2 * inner]; mask [B, heads, K] is True where there is something to look at."""
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, L, head_width]
        k, v = kv.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, :, None])
        return self.out(x.transpose(1, 2).flatten(2))


class VIN(nn.Module):
    """The DiT, and the interface beside it."""

    def __init__(self, dit_config, config):
        super().__init__()
        self.config, width, head_width = config, dit_config.width, dit_config.width // dit_config.heads
        self.dit = dit.DiT(dit_config)
        self.offset = nn.Parameter(torch.randn(config.global_tokens, width) * 0.1)  # of each query from a token's position
        self.read = CrossAttention(width, dit_config.heads, head_width)
        self.blocks = nn.ModuleList(dit.DiTBlock(width, dit_config.heads) for _ in range(config.depth))
        self.write = nn.ModuleList(CrossAttention(width, config.heads, head_width, zero=True) for _ in range(dit_config.depth))
        if config.neighbours:
            self.side = nn.Parameter(torch.randn(2, width) * 0.5)  # the chunk before, the chunk after

    def forward(self, tokens, step, label, given=None, place=None):
        """Noised tokens [B, C, N, d], diffusion steps and labels [B, C] -> ε [B, C, N, d].

        given [B, C, N, d]: clean tokens of the chunks that are known, zeros for the others. They are seen as they are, at
        diffusion step 0, and the noise that comes out for them is that which leads to them. place [B, C]: of each chunk in
        its video, whole numbers in any order; by default 0 … C-1.
        """
        B, C, N, _ = tokens.shape
        seen, seen_step = tokens, step
        if given is not None:
            known = given.flatten(2).any(2)[..., None, None]  # [B, C, 1, 1]
            seen, seen_step = torch.where(known, given, tokens), torch.where(known[..., 0, 0], 0, step)
        place = torch.arange(C, device=tokens.device).expand(B, C) if place is None else place
        seen, seen_step = seen.flatten(0, 1), seen_step.flatten()
        x, step_code, label = self.dit.embed_all(seen, seen_step, label.flatten(), None)
        condition = step_code + label  # [B * C, width]
        code = nerv.sinusoid(place.float(), x.shape[-1], self.config.places).flatten(0, 1)[:, None]  # [B * C, 1, width]

        memory = normalize(x) + code + step_code[:, None]
        memory = memory.unflatten(0, (B, C)).flatten(1, 2)  # [B, C * N, width]
        g = (self.dit.position[self.reads()] + self.offset).expand(B, -1, -1)
        g = g + self.read(normalize(g), self.read.kv(memory))  # [B, M, width]
        for block in self.blocks:
            g = block(g, condition.unflatten(0, (B, C)).mean(1))
        g = normalize(g)

        near, mask = self.near(place, N) if self.config.neighbours else (None, None)
        for block, write in zip(self.dit.blocks, self.write):
            kv = write.kv(g)[:, None].expand(-1, C, -1, -1)  # [B, C, M, 2 * inner]
            h = normalize(x)
            if near is not None:
                sides = [write.kv(h + side).unflatten(0, (B, C)) for side in self.side]  # as the chunk before or after
                rows = torch.arange(B, device=x.device)[:, None]
                kv = torch.cat([kv, *(kv_side[rows, index] for kv_side, index in zip(sides, near))], 2)  # [B, C, M + 2N, …]
            x = block(x + write(h + code, kv.flatten(0, 1), mask), condition)
        eps = self.dit.read_out(x, condition).unflatten(0, (B, C))
        if given is not None:
            alpha, sigma = (schedule[step][..., None, None] for schedule in dit.noise_schedule(x.device))
            eps = torch.where(known, (tokens - alpha * given) / sigma, eps)
        return eps

    def reads(self):
        """Which of a chunk's N tokens each query begins at the position of, so that it reads that one of every chunk: [M].

        Queries that begin anywhere look at all tokens alike, and take thousands of steps to learn not to (docs/long.md).
        """
        M, N = len(self.offset), self.dit.config.num_tokens
        return torch.arange(M, device=self.offset.device) * N // M

    def matrices(self):
        """What Muon is for: the DiT's matrices, and the interface's of the same kinds."""
        parts = nn.ModuleList([self.read, self.blocks, self.write]).named_parameters()
        return self.dit.matrices() + [p for name, p in parts if p.ndim == 2 and "adaln" not in name]

    def near(self, place, N):
        """For places [B, C]: indices of the chunk before and of the one after, each [B, C], and which of the M global tokens
        and of the 2N tokens of these two each head of each chunk looks at, [B * C, heads, M + 2N].

        Half of the heads look back and half ahead. Where a head sees both, what moves cancels in the mean of the two.
        """
        found = [place[:, None] == place[..., None] + way for way in (-1, 1)]  # [B, C, C]
        there = torch.stack([match.any(2) for match in found], 2).flatten(0, 1)  # [B * C, 2]
        head, way = torch.arange(self.config.heads, device=place.device), torch.arange(2, device=place.device)
        looks = (head[:, None] % 2 == way) | (len(head) < 2)  # [heads, 2]
        mask = (there[:, None] & looks).repeat_interleave(N, 2)  # [B * C, heads, 2N]
        return [match.int().argmax(2) for match in found], F.pad(mask, (self.config.global_tokens, 0), value=True)


def folded(model, chunks, place=None):
    """A VIN as the functions of dit.py take a denoiser: rows are the chunks of one video after another, [B * C, N, d]."""

    def denoiser(x, step, label, given=None):
        unfold = (None if y is None else y.unflatten(0, (-1, chunks)) for y in (x, step, label, given))
        return model(*unfold, place).flatten(0, 1)

    denoiser.config = model.dit.config
    return denoiser


def generate(model, labels, chunks, steps=20, guidance=2.0, sampler="dpm", seed=None, first=None):
    """Tokens [B, C, N, d] at unit deviation of videos of any number C of chunks; labels [B], the rest as in dit.generate.

    first: the tokens [B, N, d] of chunk 0 where it is known. Guidance is then on it too.
    """
    given = None
    if first is not None:
        given = F.pad(first[:, None], (0, 0, 0, 0, 0, chunks - 1)).flatten(0, 1)  # [B * C, N, d], zeros after chunk 0
    how = {"steps": steps, "guidance": guidance, "sampler": sampler, "seed": seed, "given": given}
    tokens = dit.generate(folded(model, chunks), labels.repeat_interleave(chunks), **how).unflatten(0, (-1, chunks))
    if first is not None:
        tokens[:, 0] = first
    return tokens


@torch.no_grad()
def error_in_company(model, tokens, label, step=400):
    """Mean squared error of ε at a diffusion step: (of videos, of the same chunks, each in the company of others').

    tokens [B, C, N, d] at unit deviation, label [B, C]. All else is the same in both, noise too, and most of the others are of
    the same class. So the two are equal where chunks do not hear of each other.
    """
    (B, C), order = label.shape, label[:, 0].argsort(stable=True)
    noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0)).to(tokens)
    alpha, sigma = (schedule[step].item() for schedule in dit.noise_schedule())
    row, chunk = torch.arange(B, device=order.device)[:, None], torch.arange(C, device=order.device)
    errors = []
    for apart in (0, 1):  # chunk c is of the video c further on
        x, eps, kind = (part[order[(row + apart * chunk) % B], chunk] for part in (tokens, noise, label))  # [B, C, …]
        made = model(alpha * x + sigma * eps, torch.full_like(kind, step), kind)
        errors.append((made - eps).square().mean().item())
    return errors


def load_vin(ckpt, denoiser=VIN):
    """A checkpoint of vin.py -> (VIN with its averaged weights, VAE, latent scale), in evaluation mode."""
    with checkpoints.fitting(ckpt, denoiser=denoiser):
        model = denoiser(dit.DiTConfig(**ckpt["dit_config"]), VINConfig(**ckpt["vin_config"]))
        model.load_state_dict(ckpt["ema"])
    return model.eval().requires_grad_(False), dit.load_vae(ckpt["vae"]), ckpt["latent_scale"]


def dit_flops(c, tokens):
    """FLOPs of the matrix products of one evaluation of a DiT of sizes c on one sequence of so many tokens."""
    w = c.width
    return 2 * tokens * c.token_dim * w * 2 + 2 * (256 + w) * w + 4 * w * w + c.depth * block_flops(w, tokens)


def block_flops(w, tokens):
    """Of one DiTBlock: maps of 12 w² a token, attention, and the six vectors of the condition."""
    return 24 * tokens * w * w + 4 * tokens * tokens * w + 12 * w * w


def flops(c, config, chunks):
    """FLOPs of the matrix products of one evaluation of a VIN on one video: linear in the number of chunks.

    Independent chunks take chunks * dit_flops(c, N), full attention over all tokens dit_flops(c, chunks * N).
    """
    w, inner, M, L = c.width, config.heads * c.width // c.heads, config.global_tokens, chunks * c.num_tokens
    interface = 4 * M * w * w + 4 * L * w * w + 4 * M * L * w + config.depth * block_flops(w, M)
    looked_at = M + (2 * c.num_tokens if config.neighbours else 0)
    write = 4 * L * w * inner + 4 * M * w * inner + 4 * L * looked_at * inner
    write += 2 * 4 * L * w * inner if config.neighbours else 0
    return chunks * dit_flops(c, c.num_tokens) + interface + c.depth * write


# ------------------------------------------------------------------------------------------------------------------ seams


def video_frames(chunks, frames, overlap):
    """Frames of a video of so many chunks, which have `frames` each."""
    return chunks * (frames - overlap) + overlap


def play(decode, tokens, t, frames, overlap):
    """Frames of a long video, chunk by chunk: yields clips [n, 3, H, W] at the frame positions t, sorted, one after the other.

    decode(tokens [1, N, d], positions [n]) -> [1, n, 3, H, W]; tokens [C, N, d]; frames are T. Where chunks share frames, one
    fades into the next, and so they do between frames: from the last frame that is of one alone to the first of the other.
    """
    stride = frames - overlap
    owners = (((t + 1) / stride).ceil().long() - 1).clamp(0, len(tokens) - 1)  # the latest chunk that has begun
    owners, counts = owners.unique_consecutive(return_counts=True)
    for c, mine in zip(owners.tolist(), t.split(counts.tolist())):
        local = mine - c * stride
        clip, weight = decode(tokens[c : c + 1], local)[0], (local + 1) / (overlap + 1)
        fading = weight < 1
        if c and fading.any():
            before = decode(tokens[c - 1 : c], local[fading] + stride)[0]
            clip[fading] = torch.lerp(before, clip[fading], weight[fading].to(clip)[:, None, None, None])
        yield clip


def seam(clips, frames, overlap):
    """How much a seam shows: the jump between chunks over the mean step within, both root mean squares over pixels.

    clips [B, F, 3, H, W] of chunks of so many frames -> one number; 1 is no more than frames differ anyhow. Where chunks share
    frames, the jump is the largest of the steps that they fade in. NaN for one chunk, or where nothing moves.
    """
    steps = clips.diff(dim=1).square().mean((2, 3, 4)).sqrt()  # [B, F - 1]
    first = torch.arange(frames - overlap, clips.shape[1] - overlap, frames - overlap) - 1  # the step into each next chunk
    across = first[:, None] + torch.arange(overlap + 1)  # [C - 1, overlap + 1]
    within = torch.ones(steps.shape[1], dtype=torch.bool).index_fill(0, across.flatten(), False)
    return (steps[:, across].amax(2).mean() / steps[:, within].mean()).item()


def seam_error(vae, made, real, overlap):
    """Squared difference between the jump at each seam and the true one, mean over seams: tokens [B, C, N, d], twice -> [B].

    The jump is that from the last frame of a chunk to the first of the next; of shared frames, that between their two versions.
    """
    n = max(1, overlap)
    first = torch.arange(n, device=made.device)
    last = first + vae.nerv_config.num_frames - n

    def jump(tokens):
        after, before = tokens[:, 1:].flatten(0, 1), tokens[:, :-1].flatten(0, 1)
        return vae.decode(after, first).float() - vae.decode(before, last).float()  # [B * (C - 1), n, 3, H, W]

    with torch.no_grad():
        true = jump(real)
    return (jump(made) - true).square().mean((1, 2, 3, 4)).unflatten(0, (len(made), -1)).mean(1)


# --------------------------------------------------------------------------------------------------------------- training


class Chunks:
    """The chunks of a data set of long clips as clips of their own: those of clip 0 first, in order."""

    def __init__(self, dataset, chunks, frames, overlap):
        self.chunks, self.frames, self.stride = chunks, frames, frames - overlap
        self.clip = functools.lru_cache(1)(dataset.__getitem__)  # its chunks are asked for one after the other

    def __getitem__(self, i):
        frames, label = self.clip(i // self.chunks)
        return frames[i % self.chunks * self.stride :][: self.frames], label


@dataclass
class Config:
    ckpt: str = option("data", "dit.pt", "checkpoint of dit.py to start from; it carries stage 1 too")
    dataset: str = option("data", "", "default: the one the checkpoint was trained on", choices=["", *data.DATASETS])
    data_dir: str = option("data", "", "default: the one the checkpoint was trained on")
    cache_latents: bool = option("data", False, "encode videos once, into a cache on disk beside --out, not at every step")
    refine: int = option("data", 0, "gradient steps on the tokens of a chunk; default: as many as the denoiser learned from")
    num_latents: int = option("data", 0, "videos in the cache; 0: ten of every video")
    cache_dir: str = option("data", "data/cache", "directory of the caches of decoded frames")
    workers: int = option("data", -1, "threads that decode where there is no cache; -1 is all cores")
    chunks: int = option("model", 4, "C, networks of a training video, one after the other; sampling takes any number")
    overlap: int = option("model", 0, "frames that neighbouring chunks share, and fade over")
    global_tokens: int = option("model", VINConfig.global_tokens, "M, tokens of the interface")
    neighbours: bool = option(
        "model", VINConfig.neighbours, "chunks see the tokens of the ones before and after too, in every block"
    )
    places: int = option("model", VINConfig.places, "the first chunk is anywhere in so many; 0: always at the first")
    steps: int = option("training", 100_000, "optimizer steps")
    batch_size: int = option("training", 16, "videos per step, of all processes together")
    accumulate: int = option("training", 1, "parts of the batch that go through one after another, to save memory")
    optimizer: str = option(
        "training", "adamw", "muon: for the matrices of attention and MLPs, AdamW for the rest", choices=["adamw", "muon"]
    )
    lr: float = option("training", 1e-4, "peak learning rate, reached after the warm-up, then cosine decay")
    warmup: int = option("training", 1000, "steps of linear warm-up")
    weight_decay: float = option("training", 0.01, "of the optimizer")
    grad_clip: float = option("training", 1.0, "largest norm of the gradient")
    min_snr_gamma: float = option("training", 5.0, "γ of the Min-SNR loss weight; 0 weights all steps alike")
    scheduled_sampling: float = option("training", 0.25, "share of steps that train on the model's own prediction too")
    drop_condition: float = option("training", 0.1, "share of videos without class and known chunk, for guidance")
    known: float = option("training", 0.1, "share of videos whose chunk 0 is given, for sample.py --predict")
    seam_weight: float = option("training", 0.0, "weight of the jump between decoded chunks, against the true one")
    ema: float = option("training", 0.9999, "decay of the averaged weights that sampling uses")
    seed: int = option("training", 0, "of weights, data order and noise")
    device: str = option("machine", "auto", "cpu, cuda, cuda:1, …; auto: CUDA where there is one")
    bf16: str = option("machine", "auto", "bfloat16 autocast; auto: with CUDA", choices=["auto", "on", "off"])
    compile: str = option("machine", "auto", "torch.compile; auto: with CUDA", choices=["auto", "on", "off"])
    out: str = option("output", "vin.pt", "the checkpoint; it carries stage 1 too")
    resume: bool = option("output", False, "go on from the checkpoint --out where it exists, exactly as if never stopped")
    run_dir: str = option("output", "runs/vin", "losses.csv, losses.png and sample sheets go here")
    log_every: int = option("output", 50, "steps between rows of losses.csv")
    save_every: int = option("output", 500, "steps between checkpoints and sample sheets")


def preset_defaults(args):
    """The defaults that the checkpoint of dit.py implies."""
    try:
        ckpt = checkpoints.load(args.ckpt, "dit", "python dit.py")
    except UserError:
        return {}
    defaults = {"refine": dit.refine_steps(ckpt)}
    if ckpt["config"]["preset"] == "nano":
        defaults.update(steps=1500, batch_size=64, optimizer="muon", lr=4e-3, warmup=50, ema=0.99)
        defaults.update(global_tokens=SIZES["nano"]["global_tokens"], cache_latents=True)
        defaults.update(num_latents=max(64, 4096 // max(1, args.chunks)))
    return defaults


def main(argv=None, denoiser=VIN):
    config = utils.parse_options(Config, __doc__, preset_defaults, argv)
    utils.check_positive(config, "chunks", "global_tokens", "steps", "batch_size", "accumulate")
    utils.check_positive(config, "log_every", "save_every", "grad_clip")
    device, rank, world = utils.start_processes(config.device)
    rows = utils.rows_per_process(config.batch_size, config.accumulate, world)  # videos that this process takes at a time
    utils.make_parent(config.out)
    ckpt = checkpoints.load(config.ckpt, "dit", "python dit.py")
    start_model, vae, latent_scale = dit.load_dit(ckpt)
    if start_model.config.cond_frames:
        raise UserError(f"{config.ckpt} predicts frames: start from a denoiser that generates, --known learns prediction here")
    vae.to(device)
    c, classes = vae.nerv_config, ckpt["classes"]
    C, T, (N, d) = config.chunks, c.num_frames, vae.token_shape
    if not 0 <= config.overlap <= (T - 1) // 2:
        raise UserError(f"--overlap {config.overlap}: chunks of {T} frames can share 0 to {(T - 1) // 2}")
    F_all = video_frames(C, T, config.overlap)  # frames of a video
    own = {name: getattr(config, name) or ckpt["config"].get(name) for name in ("dataset", "data_dir")}
    source = clips_of(ckpt["vae"], cache_dir=config.cache_dir, num_frames=F_all, **own)
    config.dataset, config.data_dir = source.dataset, source.data_dir
    train_set = data.open_dataset(source, "train", classes)
    if list(train_set.classes) != classes:
        raise UserError(f"{config.ckpt} was trained on the classes {classes}, and {config.dataset} has {train_set.classes}")
    torch.manual_seed(config.seed)
    sizes = {name: getattr(config, name) for name in ("chunks", "overlap", "global_tokens", "neighbours")}
    sizes = SIZES[ckpt["config"]["preset"]] | sizes | {"places": max(config.places, C)}
    vin_config = VINConfig(**sizes)
    model = denoiser(start_model.config, vin_config).to(device)
    model.dit.load_state_dict(start_model.state_dict())
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = make_optimizer(model, model.matrices() if config.optimizer == "muon" else [], config.weight_decay)
    parts = {"model": model, "step": utils.FiniteStep(model, optimizer, config.grad_clip)}  # what goes on, beside ema
    start = 0
    if resumed := checkpoints.resume(config, "vin", denoiser=denoiser):
        ema.load_state_dict(resumed["ema"])
        for name, part in parts.items():
            part.load_state_dict(resumed["training"][name])
        start = resumed["step"]
    alpha, sigma = dit.noise_schedule(device)

    count = (config.num_latents or 10 * len(train_set)) if config.cache_latents else len(train_set)
    stream = data.Stream(count, config.batch_size, config.seed, start, config.accumulate, rank, world)
    if config.cache_latents:
        names = ("dataset", "data_dir", "split", "stride", "fps", "flip", "crop_scale", "num_frames")
        key = {name: getattr(source, name) for name in names} | {"vae": utils.fingerprint(vae), "videos": len(train_set)}
        key |= {"count": count, "chunks": C, "overlap": config.overlap, "refine": config.refine}
        directory, chunks = Path(config.out).with_suffix(".latents"), Chunks(train_set, C, T, config.overlap)
        latents, labels = dit.cached_latents(
            directory, key, vae, chunks, count * C, 0, device, rank, world, refine=config.refine
        )
        latents, labels = latents.unflatten(0, (count, C)), labels[::C]  # [count, C, 2, N, d]
    else:
        batches = data.endless(train_set, stream, config.workers, device)
    log = utils.RunLog(config.run_dir, config.steps, config.log_every, start, rank)
    number, all_numbers = (sum(p.numel() for p in network.parameters()) / 1e6 for network in (start_model, model))
    log.print(
        f"{all_numbers:.2f} M parameters, {all_numbers - number:.2f} M of them new; videos of {C} chunks, {F_all} frames"
        + (f"; going on after step {start}" if start else "")
    )
    if utils.wants_compile(device, config.compile):
        model.compile()
        vae.encoder.compile()

    saver = checkpoints.Saver(config.out)

    def save(step, final=False):
        training = {name: part.state_dict() for name, part in parts.items()}
        saver(
            final, stage="vin", step=step, config=dataclasses.asdict(config), classes=classes,
            dit_config=dataclasses.asdict(start_model.config), vin_config=dataclasses.asdict(vin_config),
            denoiser=denoiser.__name__, latent_scale=latent_scale, ema=ema.state_dict(), training=training, vae=ckpt["vae"],
        )  # fmt: skip
        log.write()

    shown = torch.linspace(0, len(classes) - 1, min(4, len(classes)), device=device).round().long()

    @torch.no_grad()
    def preview(step):
        """A sheet of a few classes, of each chunk the first and the last frame; returns how much the seams show."""
        tokens, t = generate(ema, shown, C, seed=config.seed) / latent_scale, torch.arange(F_all, device=device)
        videos = torch.stack([torch.cat(list(play(vae.decode, video, t, T, config.overlap))).cpu() for video in tokens])
        ends = [frame for k in range(min(C, 8)) for frame in (k * (T - config.overlap), k * (T - config.overlap) + T - 1)]
        write_sheet(f"{config.run_dir}/step{step:07d}.png", videos[:, ends], [classes[i] for i in shown], len(ends))
        log.video(step, "samples", to_frames(tile(videos)))
        return seam(videos, T, config.overlap)

    every = max(1, config.batch_size // 8)  # one video in so many has its seams decoded, which costs more than all else

    def true_seams(theta0, first, made, step):
        """The weighted error of the jumps, mean over videos: where noise is all there is, the network cannot know them.

        theta0, made, step: of the `rows` videos from the batch's number `first` on.
        """
        few = slice(-first % every, None, every)
        tokens = [x.unflatten(0, (-1, C))[few] / latent_scale for x in (made, theta0)]
        weight = alpha[step.unflatten(0, (-1, C))[few, 0]].square()
        if not len(weight):
            return 0.0
        return config.seam_weight * every / rows * (weight * seam_error(vae, *tokens, config.overlap)).sum()

    done = start  # finished steps
    with utils.Interrupt() as interrupt:
        for step in range(start, config.steps):
            lr = utils.learning_rate(step, config.steps, config.lr, config.warmup)
            # The random numbers of the whole batch, of which this process uses its rows.
            coin = torch.rand((), generator=utils.step_generator("cpu", config.seed - 1, step)).item()  # no wait for a GPU
            scheduled = coin < config.scheduled_sampling
            random = utils.step_generator(device, config.seed, step)
            B = config.batch_size
            posterior_noise, noise = torch.randn(2, B, C, N, d, generator=random, device=device)
            t = torch.randint(1 if scheduled else 0, dit.NUM_STEPS, (B, 1), generator=random, device=device).expand(-1, C)
            drop, known = torch.rand(2, B, generator=random, device=device)
            place = torch.randint(max(config.places - C, 0) + 1, (B, 1), generator=random, device=device)
            place = place + torch.arange(C, device=device)
            if config.cache_latents:
                chosen = torch.tensor(stream.batch(step)) % len(latents)

            for turn in range(config.accumulate):
                first = (turn * world + rank) * rows
                mine = slice(first, first + rows)  # this process's videos in the batch
                with utils.autocast(device, config.bf16):
                    if config.cache_latents:
                        encoded, label = latents[chosen[mine]].float(), labels[chosen[mine]]
                        encoded, label = encoded.to(device, non_blocking=True), label.to(device, non_blocking=True)
                    else:
                        frames, label = (x.to(device, non_blocking=True) for x in next(batches))
                        clips = to_clip(frames).unfold(1, T, T - config.overlap).movedim(-1, 2)  # [B, C, T, 3, H, W]
                        encoded = dit.encode_batch(vae, clips.flatten(0, 1), 0, config.refine).unflatten(0, (-1, C))
                    mean, deviation = (latent_scale * encoded).unbind(2)  # each [B, C, N, d]
                    theta0 = mean + deviation * posterior_noise[mine]
                    # As in dit.py: guidance needs the model without a condition; prediction, with chunks of unknown class.
                    no_class = drop[mine] < config.drop_condition * (2 if config.known else 1)
                    label = torch.where(no_class, len(classes), label)[:, None].expand(-1, C)
                    given = torch.zeros_like(theta0)
                    first_known = (known[mine] < config.known) & (drop[mine] >= config.drop_condition)
                    given[:, 0] = theta0[:, 0] * first_known[:, None, None]
                    theta0, label, given, now, eps = (x.flatten(0, 1) for x in (theta0, label, given, t[mine], noise[mine]))
                    loss = dit.diffusion_loss(
                        folded(model, C, place[mine]), theta0, label, given, now, eps, alpha, sigma,
                        config.min_snr_gamma, scheduled,
                        functools.partial(true_seams, theta0, first) if config.seam_weight and C > 1 else None,
                    )  # fmt: skip
                (loss / config.accumulate).backward()
                log.add(loss=loss / 2 if scheduled else loss)

            parts["step"](loss, lr)
            utils.update_ema(ema, model, min(config.ema, (1 + step) / (10 + step)))
            done = step + 1
            if log.step(step):
                parts["step"].check(step, train_set, stream)
            if done % config.save_every == 0 and done < config.steps and rank == 0:
                save(done)
                preview(done)
            if interrupt.stop():
                log.print(f"interrupted after {done} steps")
                break
        if rank == 0:
            save(done, final=True)
    if rank == 0:
        if done > start and len(label) > C > 1:  # of the last batch
            alike, mixed = error_in_company(ema, *(x.unflatten(0, (-1, C)) for x in (theta0, label)))
            log.print(
                f"error of the noise at diffusion step 400: {alike:.4f}, with each chunk in the company of others {mixed:.4f}"
            )
        log.print(f"seams of samples {preview(done):.2f}, where 1 is as frames differ within chunks")
        log.print(f"wrote {config.out} after {done} steps, {time.time() - log.start:.0f} s; sheets are in {config.run_dir}")
        log.print(f"peak memory {utils.peak_memory(device):.2f} GiB")
    log.close()


if __name__ == "__main__":
    utils.run(main)
