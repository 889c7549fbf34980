"""How good generated clips are, for studies of many small models: class agreement and distances to training clips."""

import functools

import torch

import data
import dit
import fvd
from common import video
from evaluate import agreement, train_classifier
from vae import decode, reconstruct


class Scorer:
    """Generated clips against up to `count` training clips, of whose `labels` they are: what studies compare small models by.

    scorer(clips [B, T, 3, H, W], *features) -> (class agreement in %, Fréchet distance to the real clips, … to each of these
    features); reconstructed(vae) gives those of the real clips after stage 1, whose blur then counts in both.
    """

    def __init__(self, train_set, num_classes, count, judge_clips=4096, device="cpu", features="random"):
        self.train_judge = functools.partial(train_classifier, train_set, num_classes, judge_clips, device)
        self.detector = fvd.load_detector(features, device=device)
        self.clips, labels = data.clips(train_set, data.spread(train_set, count))
        self.real, self.labels = self.detector(video.to_frames(self.clips)), labels.to(device)

    @functools.cached_property
    def judge(self):
        return self.train_judge()

    def __call__(self, clips, *references):
        features = self.detector(video.to_frames(clips))
        distances = [fvd.frechet_distance_of(reference, features) for reference in (self.real, *references)]
        return 100 * agreement(self.judge, clips, self.labels), *distances

    def reconstructed(self, vae):
        return self.detector(video.to_frames(reconstruct(vae, self.clips, self.labels.device)))

    def generate(self, model, vae, latent_map, seed, **sampling):
        """(clips [B, T, 3, H, W] of the labels, their latents [B, N, d]), on the CPU."""
        latents = dit.generate(model, self.labels, seed=seed, **sampling)
        return decode(vae, latent_map.inverse(latents), torch.arange(vae.nerv_config.num_frames)), latents.cpu()
