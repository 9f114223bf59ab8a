"""Moments: what merges is what was seen."""

import torch

from treadle.routing.calibration import LatentMoments, Moments


def test_moments_merge_exactly() -> None:
    values = torch.randn(100, 5).double() * 3 + 1e4
    parts = [Moments.of(values[:1]), Moments.of(values[1:40]), Moments.of(values[40:])]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert merged.count == 100
    assert torch.allclose(merged.mean, values.mean(0), rtol=1e-14)
    assert torch.allclose(merged.std, values.std(0, correction=0), rtol=1e-10)


def test_latent_moments_merge_exactly() -> None:
    z = torch.randn(100, 3).double() @ torch.randn(3, 3).double() + 1e3
    parts = [LatentMoments.of(z[:1]), LatentMoments.of(z[1:40]), LatentMoments.of(z[40:])]
    for merged in (parts[0].merge(parts[1]).merge(parts[2]), parts[2].merge(parts[0].merge(parts[1]))):
        assert merged.count == 100
        assert torch.allclose(merged.mean, z.mean(0), rtol=1e-14)
        # Deviations of order 1 from a mean of 1e3, in float64: 1e-16 · 1e3² of them is lost at most.
        assert torch.allclose(merged.covariance, torch.cov(z.T, correction=0), rtol=0, atol=1e-9)
