"""Count, mean and spread of many values, kept so that two samples merge into the moments of both together."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of many values a column; two of them merge exactly.

    Reference: Chan, Golub, LeVeque 1983, the pairwise update.
    """

    count: int
    mean: Float[Tensor, " columns"]
    deviations: Float[Tensor, " columns"]

    @staticmethod
    def of(values: Float[Tensor, "rows columns"]) -> "Moments":
        """The moments of the rows, in float64."""
        exact = values.double()
        mean = exact.mean(0)
        return Moments(values.shape[0], mean, (exact - mean).square().sum(0))

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both samples together."""
        count = self.count + other.count
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        deviations = self.deviations + other.deviations + shift.square() * (self.count * other.count / count)
        return Moments(count, mean, deviations)

    @property
    def std(self) -> Float[Tensor, " columns"]:
        """The population standard deviation."""
        return (self.deviations / self.count).sqrt()


@dataclass(frozen=True)
class LatentMoments:
    """Count, mean and scatter (the sum of the outer products of deviations) of vectors; two of them merge exactly.

    Reference: Chan, Golub, LeVeque 1983, with outer products in place of squares.
    """

    count: int
    mean: Float[Tensor, " rank"]
    scatter: Float[Tensor, "rank rank"]

    @staticmethod
    def of(z: Float[Tensor, "tokens rank"]) -> "LatentMoments":
        """The moments of the rows, in float64."""
        exact = z.double()
        mean = exact.mean(0)
        centred = exact - mean
        return LatentMoments(z.shape[0], mean, centred.T @ centred)

    def merge(self, other: "LatentMoments") -> "LatentMoments":
        """The moments of both samples together."""
        count = self.count + other.count
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        between = torch.outer(shift, shift) * (self.count * other.count / count)
        return LatentMoments(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Float[Tensor, "rank rank"]:
        """The population covariance."""
        return self.scatter / self.count
