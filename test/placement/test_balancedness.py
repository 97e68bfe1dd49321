import math

import numpy as np
import pytest
import torch

from equipoise import EpTopology, ExpertLocationMetadata, balancedness
from equipoise.errors import LoadError
from equipoise.placement.balancedness import mean_balancedness, peak_to_average, rank_load

TOPOLOGY = EpTopology(2, 1, 2)


def test_balancedness_is_mean_over_max_of_rank_load() -> None:
    metadata = ExpertLocationMetadata.trivial(2, 4, TOPOLOGY)
    load = [[30, 10, 10, 10], [1, 1, 1, 1]]
    assert rank_load(load, metadata).tolist() == [[40, 20], [2, 2]]
    assert balancedness(load, metadata).tolist() == [0.75, 1.0]
    assert peak_to_average(load, metadata).tolist() == pytest.approx([4 / 3, 1.0])


def test_dispatch_weights_split_an_expert() -> None:
    weights = [[0.25, 1, 0.75, 1]]  # expert 0 on both ranks
    metadata = ExpertLocationMetadata.from_physical_to_logical([[0, 1, 0, 2]], 3, TOPOLOGY, dispatch_weights=weights)
    assert rank_load([[8, 4, 0]], metadata).tolist() == [[6, 6]]
    assert balancedness([[8, 4, 0]], metadata).tolist() == [1.0]


def test_a_layer_without_tokens_has_no_balancedness_and_leaves_the_mean_alone() -> None:
    metadata = ExpertLocationMetadata.trivial(2, 4, TOPOLOGY)
    values = balancedness([[30, 10, 10, 10], [0, 0, 0, 0]], metadata)
    assert math.isnan(values[1])
    assert mean_balancedness(values) == 0.75
    assert mean_balancedness([math.nan]) is None


def test_windows_are_scored_one_by_one_and_huge_counts_stay_finite() -> None:
    metadata = ExpertLocationMetadata.trivial(1, 4, TOPOLOGY)
    values = balancedness(torch.tensor([[[1, 1, 1, 1]], [[2**62, 0, 0, 0]]]), metadata)
    assert values.tolist() == [[1.0], [0.5]]
    assert balancedness([[1e308, 1e308, 0, 0]], metadata).tolist() == [0.5]


@pytest.mark.parametrize(
    ("load", "message"),
    [
        ([[1, 2, np.nan, 4]], r"load\[0, 2\] is nan"),
        ([[1, -2, 3, 4]], r"load\[0, 1\] is -2"),
        ([[1, 2, 3]], r"\(1, 4\).*got shape \(1, 3\)"),
        ([1, 2, 3, 4], r"got \(4,\)"),
        ([["a", 1, 1, 1]], "matrix of numbers"),
    ],
)
def test_bad_load_is_named(load: list, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        balancedness(load, ExpertLocationMetadata.trivial(1, 4, TOPOLOGY))
