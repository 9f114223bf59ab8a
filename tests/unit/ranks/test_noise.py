import pytest
import torch

from treadle.errors import InputError
from treadle.ranks.noise import drawn, noisy, noisy_at_rank


def test_full_noise_has_the_tensors_own_deviation() -> None:
    tensor = 3.0 * torch.randn(200, 300) + 1.0
    noise = torch.stack([noisy(tensor, 0.5, drawn(seed)) - tensor for seed in range(4)])
    # 240,000 draws: the standard error of the deviation is 0.14%
    assert float(noise.std()) == pytest.approx(0.5 * float(tensor.std()), rel=0.01)
    assert abs(noise.mean()) < 5 * noise.std() / noise.numel() ** 0.5
    assert not torch.equal(noise[0], noise[1])


@pytest.mark.parametrize("rank", [1, 8])
def test_noise_of_low_rank_has_its_rank_and_the_size_of_full_noise(rank: int) -> None:
    tensor = 0.2 * torch.randn(120, 160) + 0.1
    noises = [noisy_at_rank(tensor, 2.0, rank, drawn(seed)) - tensor for seed in range(200)]
    assert torch.linalg.matrix_rank(noises[0], rtol=1e-4) == rank  # what is left of the sum's rounding is below
    squares = torch.stack([noise.double().square().sum() for noise in noises])
    expected = float((2.0 * tensor.std(correction=0)) ** 2 * tensor.numel())
    # ‖BA‖² at rank 1 is a product of two χ², relative deviation √(2/120 + 2/160) = 0.17, over √200: 1.2%
    assert float(squares.mean()) == pytest.approx(expected, rel=0.05)


def test_a_draw_is_a_function_of_its_whole_key() -> None:
    draws = {key: torch.randn(3, generator=drawn(*key)) for key in [(0, "a", 1), (0, "a", 2), (0, "b", 1), (1, "a", 1)]}
    assert len({tuple(draw.tolist()) for draw in draws.values()}) == 4
    assert torch.equal(torch.randn(3, generator=drawn(0, "a", 1)), draws[0, "a", 1])


def test_noise_that_single_precision_would_round_away_is_refused() -> None:
    tensor = torch.randn(8, 8)
    with pytest.raises(
        InputError, match=r"noise of scale 1e-05 drowns in the rounding of float32; probe with a scale of"
    ):
        noisy(tensor, 1e-5, drawn(0))
    assert not torch.equal(noisy(tensor, 1e-4, drawn(0)), tensor)
    assert not torch.equal(noisy(tensor.double(), 1e-5, drawn(0)), tensor.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_noise_that_half_precision_would_round_away_is_refused(dtype: torch.dtype) -> None:
    tensor = torch.randn(8, 8).to(dtype)
    with pytest.raises(InputError, match=r"noise of scale 0\.01 drowns in the rounding of b?float16; probe in float32"):
        noisy(tensor, 0.01, drawn(0))
    with pytest.raises(InputError, match="drowns"):
        noisy_at_rank(tensor, 0.01, 2, drawn(0))
    assert not torch.equal(noisy(tensor, 0.1, drawn(0)), tensor)
    assert not torch.equal(noisy(tensor.float(), 0.01, drawn(0)), tensor.float())
