"""Long videos: many networks that exchange information, after Video Interface Networks (Dedhia et al. 2025).

A long video is C chunks of T frames. Each has its own network, so that a video is latents θ [B, C, N, d] of stage 1. The
denoiser of dit.py processes all chunks as a batch, and an interface connects them at every timestep:

    θ_τ of all chunks [B, C * N, d]  --one cross-attention of M learned queries, self-attention-->  global tokens [B, M, width]
    before every block of the DiT, a chunk's tokens attend to these M tokens, and to those of the chunks before and after

The global tokens are the paper's. Attention to neighbours is ours (--no-neighbours), and so are all sizes, which the paper's
public text does not give. Cost is linear in C. Added outputs start at zero: training starts from the function of dit.pt.

python -m siblings.vin train --ckpt dit.pt --chunks 4 --overlap 2
python -m siblings.vin sample --ckpt vin.pt --chunks 12            more chunks than in training
python -m siblings.vin sample --interp                             interpolate two long videos; --interp a.mp4 b.mp4: two files
python -m siblings.vin sample --predict a.mp4                      continue from the first clip of a file
"""

import copy
import dataclasses
import functools
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import dit
import nerv
import vae as stage1
from common import checkpoints, utils, video
from common.utils import UserError, option
from extras.muon import make_optimizer
from sample import Sampler, interpolate

# ------------------------------------------------------------------------------------------------------------------ model


@dataclass
class VINConfig:
    """Sizes of the interface, and the layout of chunks in a video."""

    chunks: int = 4  # C in training videos
    overlap: int = 0  # frames that neighbouring chunks share
    global_tokens: int = 64  # M
    neighbours: bool = True  # attention to the tokens of the chunks before and after, in every block
    places: int = 16  # positions of a chunk in a video that training covers
    depth: int = 2  # blocks of self-attention among the global tokens
    heads: int = 4  # of the attention added to each block of the DiT, of the same width as the DiT's heads


class CrossAttention(nn.Module):
    """Queries x [B, L, width] attend to a memory [B, K, width], through keys and values by `kv` -> [B, L, width]."""

    def __init__(self, width, heads, head_width, zero=False):
        super().__init__()
        self.heads, inner = heads, heads * head_width
        self.q, self.kv = nn.Linear(width, inner), nn.Linear(width, 2 * inner)
        self.out = nn.Linear(inner, width)
        nn.init.orthogonal_(self.q.weight)  # keys start equal to queries: similar tokens attend to each other at once
        self.kv.weight.data[:inner] = self.q.weight.data
        for parameter in self.out.parameters() if zero else ():
            nn.init.zeros_(parameter)

    def forward(self, x, kv, mask=None):
        """kv = self.kv(memory) [B, K, 2 * inner]; mask [B, heads, K] is True where a head may attend."""
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, L, head_width]
        k, v = kv.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, :, None])
        return self.out(x.transpose(1, 2).flatten(2))


class VIN(nn.Module):
    """The DiT with the interface."""

    def __init__(self, dit_config, config):
        super().__init__()
        self.config, width, head_width = config, dit_config.width, dit_config.width // dit_config.heads
        self.dit, self.norm = dit.DiT(dit_config), nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.offset = nn.Parameter(torch.randn(config.global_tokens, width) * 0.1)  # of each query from a token's position
        self.read_attention = CrossAttention(width, dit_config.heads, head_width)
        self.blocks = nn.ModuleList(dit.DiTBlock(width, dit_config.heads) for _ in range(config.depth))
        self.write_attention = nn.ModuleList(CrossAttention(width, config.heads, head_width, True) for _ in self.dit.blocks)
        if config.neighbours:
            self.side = nn.Parameter(torch.randn(2, width) * 0.5)  # the chunk before, the chunk after

    def forward(self, latents, timestep, label, given=None, chunks=1, place=None, neighbours=True):
        """Noised latents [B * C, N, d], chunk after chunk of each video, timesteps and labels [B * C] -> ε [B * C, N, d].

        given [B * C, N, d]: the latents of given chunks, zeros for others. The model gets them clean, at timestep 0, and its
        ε for them is the one that leads to them. place [B, C]: of each chunk, by default 0 … C-1; neighbours: attend to them
        """
        C, N, M = chunks, latents.shape[1], len(self.offset)
        seen, seen_timestep = latents, timestep
        if given is not None:
            known = given.flatten(1).any(1)  # [B * C]
            seen, seen_timestep = torch.where(known[:, None, None], given, latents), torch.where(known, 0, timestep)
        place = torch.arange(C, device=latents.device).expand(len(latents) // C, C) if place is None else place
        x, code, label = self.dit.embed_all(seen, seen_timestep, label, None)
        condition = code + label  # [B * C, width]
        place_code = nerv.sinusoid(place.flatten().float(), x.shape[-1], self.config.places)[:, None]  # [B * C, 1, width]

        memory = (self.norm(x) + place_code + code[:, None]).unflatten(0, (-1, C)).flatten(1, 2)  # [B, C * N, width]
        # A query starts at the position of one of the N tokens, so that it attends to that token in every chunk. Random queries
        # attend to all tokens equally, and take thousands of steps to unlearn it (docs/long.md).
        g = (self.dit.position[torch.arange(M, device=x.device) * N // M] + self.offset).expand(len(memory), -1, -1)
        g = g + self.read_attention(self.norm(g), self.read_attention.kv(memory))  # [B, M, width]
        for block in self.blocks:
            g = block(g, condition.unflatten(0, (-1, C)).mean(1))
        g = self.norm(g)

        near, mask = self.near(len(memory), C, N, x.device) if neighbours and self.config.neighbours else ([], None)
        for block, write in zip(self.dit.blocks, self.write_attention):
            h = self.norm(x)
            sides = [write.kv(h + side)[rows] for side, rows in zip(self.side, near)] if near else []
            kv = torch.cat([write.kv(g).repeat_interleave(C, 0), *sides], 1)  # [B * C, M + 2N, 2 * inner]
            x = block(x + write(h + place_code, kv, mask), condition)
        eps = self.dit.read_out(x, condition)
        if given is not None:
            alpha, sigma = (schedule[timestep][:, None, None] for schedule in dit.noise_schedule(x.device))
            eps = torch.where(known[:, None, None], (latents - alpha * given) / sigma, eps)
        return eps

    def near(self, B, C, N, device):
        """Rows of the chunks before and after each of B * C, [B * C] each; a mask of which of the M global tokens and the
        2N tokens of these two each head of each chunk attends to, [B * C, heads, M + 2N].

        Half of the heads attend to the chunk before, half to the one after: motion cancels in the mean of the two.
        """
        own = torch.arange(B * C, device=device)
        rows = (own - 1).clamp(min=0), (own + 1).clamp(max=B * C - 1)
        there = torch.stack([own % C > 0, own % C < C - 1], 1)  # [B * C, 2]; of the same video
        half = torch.arange(self.config.heads, device=device)[:, None] % 2 == torch.arange(2, device=device)
        mask = (there[:, None] & half).repeat_interleave(N, 2)  # [B * C, heads, 2N]
        return rows, F.pad(mask, (self.config.global_tokens, 0), value=True)


def generate(model, labels, chunks, steps=20, guidance=2.0, seed=None, first=None):
    """Latents [B, C, N, d] of videos of any number C of chunks; labels [B], the rest as in dit.generate.

    first: the latents [B, N, d] of chunk 0 if it is given. Guidance then applies to it, too.
    """
    network = functools.partial(model, chunks=chunks)
    network.config = model.dit.config
    given = None if first is None else F.pad(first[:, None], (0, 0, 0, 0, 0, chunks - 1)).flatten(0, 1)  # zeros after chunk 0
    labels = labels.repeat_interleave(chunks)
    latents = dit.generate(network, labels, steps, guidance, seed=seed, given=given).unflatten(0, (-1, chunks))
    return latents if first is None else torch.cat([first[:, None], latents[:, 1:]], 1)


def load_vin(ckpt, network=VIN):
    """A checkpoint of `train` -> (VIN with its averaged weights, VAE, map from tokens to latents), in evaluation mode."""
    build = functools.partial(network, config=VINConfig(**ckpt["vin_config"]))
    build.__name__ = network.__name__
    return dit.load_dit(ckpt, build)


def play(vae, tokens, t, overlap):
    """Frames of a long video, chunk by chunk: yields clips [n, 3, H, W] at the sorted frame positions t.

    tokens [C, N, d]. Chunks cross-fade between the last frame of the earlier one alone and the first of the later one alone.
    """
    stride = vae.nerv_config.num_frames - overlap
    owners = (((t + 1) / stride).ceil().long() - 1).clamp(0, len(tokens) - 1)  # the latest chunk that has started
    owners, counts = owners.unique_consecutive(return_counts=True)
    for c, mine in zip(owners.tolist(), t.split(counts.tolist())):
        local = mine - c * stride
        clip, weight = stage1.decode_all(vae, tokens[c : c + 1], local)[0], (local + 1) / (overlap + 1)
        fading = weight < 1
        if c and fading.any():
            before = stage1.decode_all(vae, tokens[c - 1 : c], local[fading] + stride)[0]
            clip[fading] = torch.lerp(before, clip[fading], weight[fading, None, None, None])
        yield clip


# --------------------------------------------------------------------------------------------------------------- training


@dataclass
class Config:
    ckpt: str = option("data", "dit.pt", "checkpoint of dit.py to start from, whose training settings apply here, too")
    data_dir: str = option("data", "", "directory of its data set, or of longer videos of its classes; default: as trained")
    num_latents: int = option("data", 0, "videos to encode; 0: ten per video, up to 200,000 chunks; 4096 for nano")
    chunks: int = option("model", 4, "C, consecutive networks per training video; sampling takes any number")
    overlap: int = option("model", 0, "frames that neighbouring chunks share and cross-fade over")
    global_tokens: int = option("model", VINConfig.global_tokens, "M, tokens of the interface")
    neighbours: bool = option("model", True, "attention to the tokens of the chunks before and after, in every block")
    steps: int = option("training", 100_000, "optimizer steps")
    batch_size: int = option("training", 16, "videos per step, over all processes")
    lr: float = option("training", 1e-4, "peak learning rate, after the warm-up; then cosine decay")
    warmup: int = option("training", 1000, "steps of linear warm-up")
    seed: int = option("training", 0, "of weights, data order and noise")
    bf16: str = option("machine", "auto", "bfloat16 autocast; auto: with CUDA", choices=["auto", "on", "off"])
    compile: str = option("machine", "auto", "torch.compile; auto: with CUDA", choices=["auto", "on", "off"])
    out: str = option("output", "vin.pt", "the checkpoint, including stage 1; losses and sheets go to runs/NAME beside it")
    resume: bool = option("output", False, "continue from the checkpoint --out if it exists, exactly as if never stopped")
    save_every: int = option("output", 500, "steps between checkpoints and sample sheets")


def preset_defaults(args):
    """The defaults implied by the checkpoint of dit.py."""
    try:
        nano = checkpoints.load(args.ckpt, "dit", "python dit.py")["vae"]["config"]["preset"] == "nano"
    except UserError:
        nano = False
    return dict(global_tokens=8, steps=1500, batch_size=64, lr=4e-3, warmup=50) if nano else {}


def train(argv=None, denoiser=VIN):
    config = utils.parse_options(Config, __doc__, preset_defaults, argv)
    device, rank, world, rows = utils.start_training(config, "chunks", "global_tokens")
    mine = slice(rank * rows, (rank + 1) * rows)  # this process's videos in a batch
    dit_ckpt = checkpoints.load(config.ckpt, "dit", "python dit.py")
    start_model, vae, latent_map = (part.to(device) for part in dit.load_dit(dit_ckpt))
    how, classes, nano = dit_ckpt["config"], dit_ckpt["classes"], dit_ckpt["vae"]["config"]["preset"] == "nano"
    B, C, c, overlap = config.batch_size, config.chunks, vae.nerv_config, config.overlap
    if not 0 <= overlap <= (c.num_frames - 1) // 2:
        raise UserError(f"--overlap {overlap}: chunks of {c.num_frames} frames can share 0 to {(c.num_frames - 1) // 2}")

    vin_config = VINConfig(C, overlap, config.global_tokens, config.neighbours, max(16, C))
    model = denoiser(start_model.config, vin_config).to(device)
    model.dit.load_state_dict(start_model.state_dict())
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer_step = utils.FiniteStep(model, make_optimizer(model, muon="muon" in how["extras"]))
    trained = {"model": model, "optimizer_step": optimizer_step}
    start, start_hash = 0, utils.fingerprint(dit_ckpt["ema"])
    if ckpt := checkpoints.resume(config, "vin", denoiser=denoiser.__name__, start=start_hash):
        start = checkpoints.restore(ckpt, trained, ema)

    frames, stride = C * (c.num_frames - overlap) + overlap, c.num_frames - overlap
    source = stage1.data_settings(dit_ckpt["vae"], num_frames=frames, data_dir=config.data_dir or how["data_dir"])
    train_set = data.open_dataset(source, "train", classes)
    count = config.num_latents or max(64, min(10 * len(train_set), (4096 if nano else 200_000) // C))
    clips_of = data.spread(train_set, count) if count < len(train_set) else range(count)

    def encode(indices):
        clips, labels = data.clips(train_set, [clips_of[i] for i in indices])
        chunks = clips.unfold(1, c.num_frames, stride).movedim(-1, 2).flatten(0, 1)  # [B * C, T, 3, H, W]
        mean, logvar = vae.encode(chunks.to(device))
        return torch.stack([mean, torch.exp(0.5 * logvar)], 1).unflatten(0, (-1, C)), labels  # [B, C, 2, N, d]

    key = {"stage1": dit_ckpt["stage1"], "data": train_set.identity(), "stride": source.stride, "flip": source.flip}
    key, shape = key | {"overlap": overlap}, (C, 2, c.num_tokens, c.token_dim)
    directory, few = utils.log_directory(config.out), max(1, 64 // C)
    tokens, labels = checkpoints.cached(directory, key, count, shape, encode, rank, world, few)
    stream = data.Stream(count, B, config.seed, start)
    log, new = utils.RunLog(config.out, config.steps, start, rank), utils.millions(model) - utils.millions(start_model)
    log.print(f"{utils.millions(model):.2f} M parameters, {new:.2f} M of them new; {count} videos, from step {start}")
    if utils.wants_compile(device, config.compile):
        model.compile()
    shown = torch.linspace(0, len(classes) - 1, min(4, len(classes)), device=device).round().long()

    def save(step):
        checkpoints.save(
            config.out, stage="vin", step=step, config=dataclasses.asdict(config) | {"extras": how["extras"]},
            **{name: dit_ckpt[name] for name in ("classes", "vae", "stage1", "dit_config", "latent_map")}, start=start_hash,
            vin_config=vin_config, denoiser=denoiser.__name__, ema=ema, training=trained,
        )  # fmt: skip
        log.write()
        samples = latent_map.inverse(generate(ema, shown, C, seed=config.seed))
        ends = torch.tensor([k * stride + end for k in range(min(C, 8)) for end in (0, c.num_frames - 1)])  # of each chunk
        made = [torch.cat(list(play(vae, tokens, ends, overlap))) for tokens in samples]
        video.write_sheet(log.directory / f"step{step:07d}.png", made, [classes[i] for i in shown], len(ends))

    for step in utils.training_steps(start, config, save):
        lr = utils.learning_rate(step, config.steps, config.lr, config.warmup)
        coin = torch.rand((), generator=utils.step_generator("cpu", config.seed - 1, step)).item()
        scheduled = coin < how["scheduled_sampling"]
        random = utils.step_generator(device, config.seed, step)
        posterior_noise, noise = torch.randn(2, B, C, *latent_map.shape, generator=random, device=device)
        timestep = torch.randint(1 + scheduled, dit.NUM_STEPS + 1, (B, 1), generator=random, device=device).expand(-1, C)[mine]
        drop, known = torch.rand(2, B, generator=random, device=device)[:, mine]
        place = torch.randint(vin_config.places - C + 1, (B, 1), generator=random, device=device)[mine]  # of the first chunk

        chosen = torch.tensor(stream.batch(step)[mine]) % count
        mean, deviation = tokens[chosen].to(device).float().unbind(2)  # each [B, C, N, d]
        theta0 = latent_map(mean) + latent_map.deviation(deviation) * posterior_noise[mine]
        # Guidance trains without conditions, prediction with chunk 0 given in a tenth of the videos, some of unknown class.
        label = torch.where(drop < 2 * dit.DROP_CONDITION, len(classes), labels[chosen].to(device))[:, None].expand(-1, C)
        given = torch.zeros_like(theta0)
        given[:, 0] = theta0[:, 0] * ((known < 0.1) & (drop >= dit.DROP_CONDITION))[:, None, None]
        # Neighbours are learned faster than the global tokens, which then remain unused, and the subject drifts from chunk to
        # chunk (docs/lessons.md). So every tenth step is without neighbours.
        network = functools.partial(model, chunks=C, place=place + torch.arange(C, device=device), neighbours=step % 10 > 0)
        batch = (x.flatten(0, 1) for x in (theta0, label, given, timestep, noise[mine]))
        with utils.autocast(device, config.bf16):
            loss = dit.diffusion_loss(network, *batch, how["min_snr_gamma"], scheduled)
        loss.backward()
        log.add(loss=loss / 2 if scheduled else loss)
        log.add(skipped=optimizer_step(loss, lr))
        utils.update_ema(ema, model, 0.99 if nano else 0.9999, step)
        log.step(step)
    log.close()


# --------------------------------------------------------------------------------------------------------------- sampling


@dataclass
class SampleConfig:
    ckpt: str = option("input", "vin.pt", "checkpoint of `python -m siblings.vin train`")
    chunks: int = option("what", 8, "consecutive networks per video: as many as in training, or more")
    classes: list = option("what", [], "names or numbers; default: all, or two for --interp", nargs="+", metavar="CLASS")
    count: int = option("what", 1, "videos per class, or per FILE to predict")
    interp: list = option("what", None, "interpolate between generated videos, or between FILEs", nargs="*", metavar="FILE")
    predict: list = option("what", [], "continue the first clip of each FILE, of --classes if given", nargs="+", metavar="FILE")
    time_scale: float = option("time", 1.0, "decoded frames per frame of the training videos")
    fps: float = option("time", 12.0, "frames per second of the output")
    steps: int = option("sampling", 20, "evaluations of the denoiser, 1 to 1000")
    guidance: float = option("sampling", 2.0, "scale of classifier-free guidance; 1: none")
    seed: int = option("sampling", 0, "of the noise")
    out_dir: str = option("output", "out/samples", "directory for the videos")


class LongSampler(Sampler):
    """Videos of many chunks, generated one by one; each is decoded and written chunk by chunk."""

    def __init__(self, config):
        ckpt = checkpoints.load(config.ckpt, "vin", "python -m siblings.vin train")
        self.config, self.device, self.classes = config, utils.pick_device(), ckpt["classes"]
        self.vin, self.vae, self.latent_map = (part.to(self.device) for part in load_vin(ckpt))
        self.stride, self.chunks = ckpt["vae"]["config"]["stride"], config.chunks
        self.T, self.overlap = self.vae.nerv_config.num_frames, self.vin.config.overlap
        self.frames, self.seeds = self.chunks * (self.T - self.overlap) + self.overlap, itertools.count(config.seed)
        self.t = torch.linspace(0, self.frames - 1, max(1, round(self.frames * config.time_scale)))

    def generate(self, label, first=None):
        """A label, and the first chunk's tokens [1, N, d] if given -> tokens [C, N, d] of a new video."""
        c, first = self.config, None if first is None else self.latent_map(first)
        labels = torch.tensor([label], device=self.device)
        with utils.autocast(self.device):
            latents = generate(self.vin, labels, self.chunks, c.steps, c.guidance, next(self.seeds), first)
        return self.latent_map.inverse(latents)[0]

    def encode(self, file, count):
        """The first `count` frames of a file as a clip [count, 3, H, W], and the tokens of its chunks [C, N, d]."""
        frames = video.read_frames(file, self.vae.nerv_config.resolution, 0, (count - 1) * self.stride + 1)[:: self.stride]
        if len(frames) < count:
            raise UserError(f"{video.printable(file)} has {len(frames)} frames, but {count} are needed: use fewer --chunks")
        clip = video.to_clip(frames)
        chunks = clip.unfold(0, self.T, self.T - self.overlap).movedim(-1, 1)  # [C, T, 3, H, W]
        return clip, torch.cat([self.vae.encode(part.to(self.device))[0] for part in chunks.split(16)])

    def predict(self, file, label):
        """Clips of a video that continues the first chunk of a file, which comes first."""
        (real, first), known = self.encode(file, self.T), self.t <= self.T - 1
        yield real[self.t[known].round().long()]
        yield from play(self.vae, self.generate(label, first), self.t[~known], self.overlap)

    def write(self, name, titles, videos):
        """Write each of `videos`, iterators of clips [n, 3, H, W], as an MP4, and about 16 frames of each as one sheet."""
        folder, every, rows = Path(self.config.out_dir) / name, len(self.t) // 16 + 1, []
        for i, (clips, title) in enumerate(zip(utils.bar(videos, "writing", len(titles), unit="video"), titles)):
            few = []
            passing = (few.append(clip[::every].clone()) or clip for clip in clips)
            video.write_mp4(folder / f"{i:02d}_{utils.file_name(title)}", passing, self.config.fps)
            rows.append(torch.cat(few))
        video.write_sheet(f"{folder}.png", rows, titles, 16)
        print(f"wrote {folder}.png and {len(rows)} videos of {len(self.t)} frames, {self.chunks} chunks, in {folder}/")


@torch.no_grad()
def sample(argv=None):
    config = utils.parse_options(SampleConfig, __doc__, argv=argv)
    utils.check_positive(config, "chunks", "count", "time_scale", "fps")
    utils.make_parent(Path(config.out_dir) / "samples.png")
    sampler = LongSampler(config)
    if config.predict:
        asked = [pair for pair in zip(config.predict, sampler.labels_of_files()) for _ in range(config.count)]
        return sampler.write("predict", ["predicted"] * len(asked), itertools.starmap(sampler.predict, asked))
    if config.interp is not None:
        files = [sampler.encode(file, sampler.frames)[1] for file in config.interp]
        ends = files or map(sampler.generate, sampler.labels([0, len(sampler.classes) - 1]))
        name, (walk, titles) = "interp", interpolate(list(ends))
    else:
        labels = [k for k in sampler.labels(range(len(sampler.classes))) for _ in range(config.count)]
        name, walk, titles = "samples", map(sampler.generate, labels), [sampler.classes[k] for k in labels]
    sampler.write(name, titles, (play(sampler.vae, tokens, sampler.t, sampler.overlap) for tokens in walk))


COMMANDS = {"train": (train, Config, preset_defaults, ()), "sample": (sample, SampleConfig, None, ())}  # with their arguments


def main():
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        utils.parse_options(Config, __doc__, preset_defaults)  # those of train
    if name not in COMMANDS:
        raise UserError(f"give a command first: {', '.join(COMMANDS)}")
    COMMANDS[name][0](sys.argv[2:])


if __name__ == "__main__":
    utils.run(main)
