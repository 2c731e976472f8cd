"""Probes of frozen features against loops, and on features whose answer is known."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from utils.config import UserError
from utils.probe import knn_accuracy, linear_probe

NAN = float("nan")


@pytest.fixture(autouse=True)
def no_warnings():
    """A probe inside a training must not fill its log."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def clouds(rows, classes=3, width=6, distance=1.0, seed=0):
    """(x [rows, width], y [rows]): one Gaussian cloud per class."""
    rng = np.random.default_rng(seed)
    y = np.arange(rows) % classes
    centres = np.random.default_rng(99).standard_normal((classes, width))
    return distance * centres[y] + rng.standard_normal((rows, width)), y


def test_knn_equals_a_loop():
    """Votes of the nearest by cosine, weighted by exp(cosine / temperature)."""
    (train_x, train_y), (test_x, test_y) = clouds(60), clouds(45, seed=1)
    right = 0
    for x, y in zip(test_x, test_y, strict=True):
        cosines = train_x @ x / np.linalg.norm(train_x, axis=1) / np.linalg.norm(x)
        votes = np.zeros(3)
        for i in np.argsort(-cosines)[:7]:
            votes[train_y[i]] += np.exp(cosines[i] / 0.07)
        right += votes.argmax() == y
    assert knn_accuracy(train_x, train_y, test_x, test_y, k=7) == right / 45
    assert knn_accuracy(torch.tensor(train_x), torch.tensor(train_y), test_x, test_y, k=7) == right / 45


def test_knn_with_few_rows_lets_all_vote_and_leaves_missing_labels_out():
    """A demo has fewer studies than k."""
    x = np.array([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.0], [-1.0, 0.1]])
    assert knn_accuracy(x, [0, 0, 1, NAN], x, [0, 0, 1, 1], k=20) == 1.0
    assert knn_accuracy(x, [0, 0, 1, 1], x, [0, NAN, NAN, 0], k=20) == 0.5


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_features_that_hold_the_answer_score_near_one_and_noise_near_chance(kind):
    """The ends of the scale."""
    (train_x, train_y), (test_x, test_y) = clouds(150, distance=4), clouds(150, distance=4, seed=1)
    noise = np.random.default_rng(2).standard_normal((300, 6))
    chance = {"auroc": 0.5, "balanced_accuracy": 1 / 3, "accuracy": 1 / 3}
    if kind == "multilabel":
        train_y, test_y = np.eye(3)[train_y], np.eye(3)[test_y]
        chance = {"auroc": 0.5, "balanced_accuracy": 0.5, "accuracy": 0.5}
    good = linear_probe(train_x, train_y, test_x, test_y, kind)
    bad = linear_probe(noise[:150], train_y, noise[150:], test_y, kind)
    for name, value in chance.items():
        assert good[name] > 0.95
        assert bad[name] == pytest.approx(value, abs=0.12)


def test_a_label_equals_logistic_regression_by_hand():
    """Standardised by the training rows alone, classes weighted, missing labels left out label by label."""
    (train_x, first), (test_x, second) = clouds(80, 2), clouds(70, 2, seed=1)
    train_y, test_y = (np.stack([y, y[::-1]], 1).astype(float) for y in (first, second))
    train_y[:9, 0], test_y[5:20, 1] = NAN, NAN
    aurocs, balanced, accuracies = [], [], []
    for label in range(2):
        a, b = ~np.isnan(train_y[:, label]), ~np.isnan(test_y[:, label])
        mean, std = train_x[a].mean(0), train_x[a].std(0)
        model = LogisticRegression(class_weight="balanced").fit((train_x[a] - mean) / std, train_y[a, label])
        scores, truth = model.decision_function((test_x[b] - mean) / std), test_y[b, label]
        hit = (scores > 0) == truth
        aurocs.append(roc_auc_score(truth, scores))
        balanced.append((hit[truth == 1].mean() + hit[truth == 0].mean()) / 2)
        accuracies.append(hit.mean())
    assert linear_probe(train_x, train_y, test_x, test_y, "multilabel") == pytest.approx({
        "auroc": np.mean(aurocs), "balanced_accuracy": np.mean(balanced), "accuracy": np.mean(accuracies),
        "labels": 2, "left_out": 0})


def test_labels_of_one_class_are_left_out_and_counted():
    """No curve can be drawn of them; without any label the figures are nan rather than chance."""
    (train_x, y), (test_x, _) = clouds(40, 2), clouds(40, 2, seed=1)
    absent, rare = np.zeros(40), np.where(np.arange(40) == 0, 1.0, NAN)
    figures = linear_probe(train_x, np.stack([y, absent, y, rare], 1), test_x, np.stack([y, y, absent, y], 1),
                           "multilabel")
    alone = linear_probe(train_x, y, test_x, y, "multiclass")
    assert figures == {**alone, "labels": 1, "left_out": 3}
    nothing = linear_probe(train_x, absent, test_x, y, "multiclass")
    assert np.isnan(nothing["auroc"]) and (nothing["labels"], nothing["left_out"]) == (0, 1)


def test_classes_on_one_side_only_have_no_auroc_but_count_as_missed():
    """Few studies may put a class into the training or the test rows alone."""
    (train_x, train_y), (test_x, test_y) = clouds(90, distance=6), clouds(90, distance=6, seed=1)
    seen = train_y < 2
    figures = linear_probe(train_x[seen], train_y[seen], test_x, test_y, "multiclass")
    assert figures["balanced_accuracy"] == pytest.approx(2 / 3, abs=0.05)
    assert figures["auroc"] > 0.6
    asked = test_y < 2
    figures = linear_probe(train_x, train_y, test_x[asked], test_y[asked], "multiclass")
    assert figures["balanced_accuracy"] > 0.9 and figures["auroc"] > 0.95


def test_the_same_call_gives_the_same_figures():
    """A curve of probes shows the features' change alone."""
    (train_x, train_y), (test_x, test_y) = clouds(60), clouds(60, seed=1)
    first, second = (linear_probe(train_x, train_y, test_x, test_y, "multiclass") for _ in range(2))
    assert first == second


@pytest.mark.parametrize("x, y, kind, message", [
    (np.full((4, 2), NAN), [0, 1, 0, 1], "multiclass", "finite"),
    (np.zeros(4), [0, 1, 0, 1], "multiclass", "shape"), (np.zeros((4, 2)), [0, 1, 0], "multiclass", "4 rows"),
    (np.zeros((4, 2)), [0, 1, 0, 1], "multilabel", "4 rows"),
    (np.zeros((4, 2)), [[0], [2], [0], [1]], "multilabel", "0, 1 or nan"),
    (np.zeros((4, 2)), [0, 1, 0, 1], "binary", "binary.*multiclass, multilabel")])
def test_mistakes_are_named(x, y, kind, message):
    """In one line."""
    with pytest.raises(UserError, match=message):
        linear_probe(x, y, x, y, kind)


def test_labels_must_fit_and_knn_needs_some():
    """The remaining mistakes."""
    x = np.zeros((4, 2))
    with pytest.raises(UserError, match="2 training labels but 1 test"):
        linear_probe(x, np.zeros((4, 2)), x, np.zeros((4, 1)), "multilabel")
    with pytest.raises(UserError, match="no labelled rows"):
        knn_accuracy(x, [NAN] * 4, x, [0, 1, 0, 1])
