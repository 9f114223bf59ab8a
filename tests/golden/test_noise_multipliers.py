"""The noise that arXiv 2403.12313 used: 22,449 rows, batch 200, 10,000 steps, δ = 1e-5, add or remove one row.

The article states 0.990 for ε = 6 (its appendix on SST-2); all three values were computed by dp-accounting 0.6 under
RDP with its default orders. Rényi orders and the conversion to (ε, δ) differ among libraries by less than 0.2%.
"""

import pytest

from treadle.privacy.plan import PrivacySettings


@pytest.mark.parametrize(("epsilon", "noise"), [(6.0, 0.9892), (3.0, 1.5135), (1.0, 3.692)])
def test_the_articles_noise(epsilon: float, noise: float) -> None:
    settings = PrivacySettings(epsilon, 1e-5, records=22449, expected_batch=200, rounds=1000, local_steps=10)
    looser = PrivacySettings(**{**vars(settings), "accountant": "rdp"})
    assert looser.plan().noise_multiplier == pytest.approx(noise, rel=2e-3)
    tight = settings.plan().noise_multiplier
    assert 0.9 * noise < tight < 0.97 * noise  # what PLD saves


def test_the_articles_own_number() -> None:
    settings = PrivacySettings(6.0, 1e-5, 22449, 200, rounds=1000, local_steps=10, accountant="rdp")
    assert settings.plan().noise_multiplier == pytest.approx(0.990, rel=2e-3)
