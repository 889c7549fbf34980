"""Mean and covariance of features, gathered batch by batch, kept in a file: what the Fréchet distance of fvd.py is taken of."""

import json

import numpy as np

from common import utils
from common.utils import UserError

KEPT = 4096  # videos of which the features themselves are kept, for intervals and extrapolation: 6.5 MB


class Statistics:
    """Number, mean and covariance of features, in one pass, in float64; those of several processes merge into one.

    Deviations are summed from a running mean (Chan, Golub & LeVeque 1979), which loses no digits where the mean is large. The
    features themselves are kept up to KEPT videos, beyond which memory is constant; `features` is None then.
    """

    def __init__(self, meta=None):
        self.meta, self.n, self.mean, self.scatter, self.features = dict(meta or {}), 0, None, None, []

    def add(self, features):
        """Take in features [B, d], an array."""
        x = np.asarray(features, np.float64)
        mean = x.mean(0)
        self.join(len(x), mean, (x - mean).T @ (x - mean), [np.asarray(features, np.float32)])

    def merge(self, other):
        """Take in all that another Statistics, of the same kind, has seen."""
        self.check(other.meta, "the other statistics")
        if other.n:
            self.join(other.n, other.mean, other.scatter, other.features)

    def join(self, n, mean, scatter, features):
        if self.mean is None:
            self.mean, self.scatter = np.zeros_like(mean), np.zeros_like(scatter)
        total, delta = self.n + n, mean - self.mean
        self.mean = self.mean + delta * n / total
        self.scatter = self.scatter + scatter + np.outer(delta, delta) * self.n * n / total
        self.n = total
        self.features = None if self.features is None or features is None or total > KEPT else [*self.features, *features]

    def covariance(self, ddof=0):
        """[d, d], divided by n - ddof. UserError where there are fewer than two videos."""
        if self.n < 2:
            raise UserError(f"a distribution takes two videos or more, and there {'is' if self.n == 1 else 'are'} {self.n}")
        return self.scatter / (self.n - ddof)

    def kept(self):
        """The features, float32 [n, d]. UserError where there were too many to keep them."""
        if self.features is None:
            raise UserError(f"features are kept of up to {KEPT} videos, and there are {self.n}")
        return np.concatenate(self.features)

    def check(self, meta, where):
        """UserError where the features are others than meta says."""
        for name in sorted(self.meta.keys() | meta.keys()):
            if self.meta.get(name) != meta.get(name):
                raise UserError(
                    f"{where} cannot be compared: it has {name} {meta.get(name)!r}, and {self.meta.get(name)!r} is needed; "
                    f"give the same options, or make it anew"
                )

    def save(self, path):
        """Write an .npz, whole or not at all."""
        utils.make_parent(path)
        arrays = {"n": self.n, "mean": self.mean, "scatter": self.scatter, "meta": json.dumps(self.meta)}
        if self.features is not None:
            arrays["features"] = self.kept()
        try:
            with utils.whole_file(path) as f:
                np.savez(f, **arrays)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None

    @classmethod
    def load(cls, path, protocols):
        """Read what save() wrote, of one of the protocols; nothing in it is executed. UserError for any other file."""
        try:
            with np.load(path, allow_pickle=False) as file:
                stats = cls(json.loads(str(file["meta"])))
                stats.n, stats.mean, stats.scatter = int(file["n"]), file["mean"], file["scatter"]
                stats.features = [file["features"]] if "features" in file else None
            whole = np.isfinite(stats.scatter).all() and stats.scatter.shape == (*stats.mean.shape, *stats.mean.shape)
            if not (whole and stats.meta["features"] and stats.meta["protocol"] in protocols):
                raise ValueError
        except FileNotFoundError:
            raise UserError(f"there is no file {path}") from None
        except Exception:  # what a foreign file raises depends on its first bytes
            raise UserError(f"{path} holds no statistics, or damaged ones: make it with --save-stats") from None
        return stats
