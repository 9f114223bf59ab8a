import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from treadle.ranks.correlation import spearman

values = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=12)


@given(values)
def test_it_is_scipys(pairs: list[tuple[int, int]]) -> None:
    a, b = [first for first, _ in pairs], [second for _, second in pairs]
    found = spearman(a, b)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)


def test_equal_values_share_their_places() -> None:
    # places 1, 2½, 2½, 4 against 1, 2, 3, 4: covariance 4.5 over √(4.5·5)
    assert spearman([1, 5, 5, 9], [1, 2, 3, 4]) == pytest.approx(0.9486832980)
    assert spearman([1, 2, 3], [3, 2, 1]) == -1.0
