"""Signs of collapse against plain formulas and clouds whose answer is known."""

import math

import pytest
import torch

from utils.collapse import feature_statistics


def gaussian(tokens, width, seed=0):
    """Isotropic features [tokens, width]."""
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def test_equals_the_formulas_one_number_at_a_time():
    """Loops over tokens, dimensions and singular values."""
    features = gaussian(40, 6) @ gaussian(6, 6, seed=1) + 0.3
    unit = [[value / math.sqrt(sum(v * v for v in row)) for value in row] for row in features.tolist()]
    deviations = []
    for column in zip(*unit, strict=True):
        mean = sum(column) / len(column)
        deviations.append(math.sqrt(sum((value - mean) ** 2 for value in column) / len(column)))
    singular = torch.linalg.svd(features.double())[1].tolist()
    shares = [value / sum(singular) for value in singular]
    statistics = feature_statistics(features)
    assert statistics["std"] == pytest.approx(sum(deviations) / 6 * math.sqrt(6))
    assert statistics["effective_rank"] == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))


def test_an_isotropic_cloud_has_both_near_their_greatest():
    """1, and the number of dimensions."""
    statistics = feature_statistics(gaussian(3000, 32))
    assert statistics["std"] == pytest.approx(1, abs=0.01)
    assert statistics["effective_rank"] == pytest.approx(32, rel=0.01)


def test_one_answer_for_all_tokens_has_both_at_their_least():
    """Complete collapse; also when the answer is zero."""
    for features in (gaussian(1, 16).expand(200, 16), torch.zeros(200, 16), gaussian(1, 16)):
        statistics = feature_statistics(features)
        assert statistics["std"] == pytest.approx(0, abs=1e-6)
        assert statistics["effective_rank"] == pytest.approx(1, abs=1e-3)


def test_a_collapse_onto_few_dimensions_shows_in_the_rank():
    """The deviation alone would not tell: the tokens still differ."""
    features = gaussian(500, 3) @ gaussian(3, 64, seed=1)
    statistics = feature_statistics(features)
    assert statistics["std"] > 0.5
    assert 1 < statistics["effective_rank"] <= 3 + 1e-6


def test_neither_scale_nor_rotation_nor_order_matters():
    """Half precision and large values too, since the computation is in float64."""
    features = gaussian(100, 8) @ gaussian(8, 8, seed=1)
    rotation = torch.linalg.qr(gaussian(8, 8, seed=2))[0]
    expected = feature_statistics(features)
    assert feature_statistics(1e4 * features.flip(0)) == pytest.approx(expected)
    turned = feature_statistics(features @ rotation)
    assert turned["effective_rank"] == pytest.approx(expected["effective_rank"], rel=1e-5)
    halves = feature_statistics((1000 * features).half())
    assert halves == pytest.approx(expected, rel=1e-2)


def test_broken_features_are_seen():
    """nan stays nan in the curves; no features at all are the caller's mistake."""
    features = gaussian(10, 4)
    features[3, 2] = float("inf")
    assert all(math.isnan(value) for value in feature_statistics(features).values())
    with pytest.raises(ValueError, match="no features"):
        feature_statistics(torch.zeros(0, 4))
