"""What frozen features know: nearest neighbours and linear classifiers on labels that they never saw."""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, recall_score, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from utils.config import UserError

KINDS = ("multiclass", "multilabel")


def knn_accuracy(train_x, train_y, test_x, test_y, k=20, temperature=0.07):
    """Accuracy in [0, 1] of the vote of the ``k`` nearest training features, weighted by exp(cosine / T).

    x: features [n, E]; y: one class per row [n], NaN = missing, left out.  With fewer than ``k`` training
    rows all of them vote.  Wu et al. 2018, arXiv:1805.01978, section 3.4; DINO, Caron et al. 2021,
    arXiv:2104.14294.  Raises UserError for features or labels that do not fit, or none.
    """
    train_x, test_x = _features(train_x), _features(test_x)
    train_x, train_y = _labelled(train_x, *_tasks(train_x, train_y, "multiclass"))
    test_x, test_y = _labelled(test_x, *_tasks(test_x, test_y, "multiclass"))
    if len(train_y) == 0 or len(test_y) == 0:
        raise UserError("kNN probe: no labelled rows to learn from or none to test on; check the labels")
    knn = KNeighborsClassifier(min(k, len(train_y)), metric="cosine", algorithm="brute",
                               weights=lambda distance: np.exp(-distance / temperature))
    return float(knn.fit(train_x, train_y).score(test_x, test_y))


def linear_probe(train_x, train_y, test_x, test_y, kind):
    """Logistic regression on standardised features: its figures on the test rows.

    x: features [n, E].  kind "multiclass": y [n], any numbers as classes; "multilabel": y [n, L] of 0 and 1.
    NaN = missing: the row is left out for that label.  Classes are weighted so that rare ones count the same.

    Returns {"auroc", "balanced_accuracy", "accuracy", "labels", "left_out"}: of a multilabel task the means
    over labels.  auroc: mean over the classes that both sides hold, each against the rest.  labels, left_out:
    labels that count, and labels of which the training or the test rows hold one class; where none counts the
    figures are nan.  Raises UserError for features or labels that do not fit.
    """
    train_x, test_x = _features(train_x), _features(test_x)
    train_tasks, test_tasks, results = _tasks(train_x, train_y, kind), _tasks(test_x, test_y, kind), []
    if len(train_tasks) != len(test_tasks):
        raise UserError(f"probe: {len(train_tasks)} training labels but {len(test_tasks)} test labels")
    for train, test in zip(train_tasks, test_tasks, strict=True):
        (known_x, known), (asked_x, asked) = _labelled(train_x, train), _labelled(test_x, test)
        if len(np.unique(known)) < 2 or len(np.unique(asked)) < 2:
            continue
        model = _classifier().fit(known_x, known)
        results.append(_figures(asked, model.predict_proba(asked_x), model.classes_))
    return _mean(results, len(train_tasks))


def _classifier():
    return make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000))


def _figures(y, probabilities, classes):
    """[auroc, balanced accuracy, accuracy] of y [n], two or more classes, and probabilities [n, C]."""
    predicted = classes[probabilities.argmax(1)]
    aurocs = [roc_auc_score(y == label, scores)                              # a class absent from y has none
              for label, scores in zip(classes, probabilities.T, strict=True) if label in y]
    return [np.mean(aurocs) if aurocs else np.nan,
            recall_score(y, predicted, labels=np.unique(y), average="macro"), accuracy_score(y, predicted)]


def _mean(results, tasks):
    auroc, balanced, accuracy = np.mean(results, axis=0).tolist() if results else [np.nan] * 3
    return {"auroc": auroc, "balanced_accuracy": balanced, "accuracy": accuracy,
            "labels": len(results), "left_out": tasks - len(results)}


def _features(x):
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or not np.isfinite(x).all():
        raise UserError(f"probe: features of shape {x.shape} must be finite and of shape [rows, dimensions]")
    return x


def _labelled(x, y):
    """(features, labels) of the rows whose label is not missing."""
    return x[~np.isnan(y)], y[~np.isnan(y)]


def _tasks(x, y, kind):
    """Labels as a list of float64 [n], one for each task."""
    if kind not in KINDS:
        raise UserError(f"probe: kind {kind!r} is unknown; use one of {', '.join(KINDS)}")
    y = np.asarray(y, dtype=np.float64)
    if len(y) != len(x) or y.ndim != KINDS.index(kind) + 1:
        raise UserError(f"probe: {len(x)} rows but {kind} labels of shape {y.shape}; "
                        'give [rows] for "multiclass" and [rows, labels] for "multilabel"')
    if kind == "multiclass":
        return [y]
    if not np.isin(y[~np.isnan(y)], (0, 1)).all():
        raise UserError("probe: multilabel labels must be 0, 1 or nan (missing)")
    return list(y.T)
