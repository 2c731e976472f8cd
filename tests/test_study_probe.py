"""Probes of frozen features on studies."""

import math

import pytest
import torch

from utils.study_probe import probe_studies, study_features

CPU = torch.device("cpu")


def batches(studies):
    """One batch of series of 3 tokens: dict study -> list of numbers, one for each series."""
    tokens = [torch.full((3, 4), float(value)) + torch.arange(3.0)[:, None]
              for values in studies.values() for value in values]
    ends = torch.tensor([0, *(3 * len(values) for values in studies.values())]).cumsum(0)
    return [{"tokens": torch.cat(tokens), "coords": torch.zeros(3 * len(tokens), 3, dtype=torch.int64),
             "cu_seqlens": 3 * torch.arange(len(tokens) + 1), "study_cu_seqlens": ends.int(),
             "study": list(studies)}]


def encoder(tokens, coords, cu_seqlens):
    """Features that are the values themselves."""
    return tokens


def test_a_studys_feature_is_the_mean_over_the_tokens_of_all_its_series():
    """Series of one study are taken together, others are not."""
    features = study_features(encoder, batches({"a": [1, 3], "b": [10]}), CPU)
    assert features["a"].tolist() == [3.0] * 4 and features["b"].tolist() == [11.0] * 4


def test_a_label_that_the_features_hold_is_found_and_missing_ones_are_left_out():
    """The sign of the values is the label; a study without labels takes no part."""
    train = {f"t{i}": [i - 4.5] for i in range(10)}
    val = {f"v{i}": [i - 2.5] for i in range(6)} | {"unknown": [0]}
    labels = {name: torch.tensor([float(values[0] > 0), math.nan]) for name, values in (train | val).items()
              if name != "unknown"}
    for i in range(3):
        labels[f"t{i}"][1] = labels[f"v{i}"][1] = float(i > 0)
    figures = probe_studies(encoder, batches(train), batches(val), labels, CPU)
    assert figures["probe_auroc"] >= 0.75 and 0 <= figures["probe_knn"] <= 1
    del labels["t1"], labels["t2"], labels["v1"], labels["v2"]
    figures = probe_studies(encoder, batches(train), batches(val), labels, CPU)
    assert figures["probe_auroc"] == pytest.approx(1.0)


def test_without_labels_on_both_sides_there_is_nothing_to_tell():
    """No figures at all without labelled studies; nan where each label has one class alone."""
    train, val = {"a": [1], "b": [2]}, {"c": [1], "d": [2]}
    assert probe_studies(encoder, batches(train), batches(val), {"a": torch.tensor([1.0])}, CPU) == {}
    labels = {name: torch.tensor([1.0]) for name in "abcd"}
    figures = probe_studies(encoder, batches(train), batches(val), labels, CPU)
    assert all(math.isnan(value) for value in figures.values()) and len(figures) == 3
