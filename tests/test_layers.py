"""Places of the coordinates between coupling layers; `test_flows.py` tests the layers themselves."""

import numpy as np
import pytest

from pushforward.learned._layers import _places


@pytest.mark.parametrize("d", [3, 4, 5, 6, 8, 15])
@pytest.mark.parametrize("layers", [4, 5])
def test_every_coordinate_moves_and_is_seen(d, layers):
    at, first = np.arange(d), np.zeros(d, int)
    for order in _places(layers, d):
        assert sorted(order) == list(range(d))
        first[at[: d // 2]] += 1
        at = at[order]
    assert first.min() >= 1
    assert first.max() < layers
