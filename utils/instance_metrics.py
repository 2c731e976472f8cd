"""Metrics of instances and of classes, summed block by block and exact whatever the blocks.

What is split and what is merged: a true instance in several predicted ones is split, H(pred | true) > 0; one
predicted instance over several true ones merges them, H(true | pred) > 0.
"""

import math

import numpy as np
import torch
from scipy import sparse
from scipy.special import gammaln, xlogy

from utils.distributed import all_reduce_sum

CHUNK = 2 ** 18              # voxels handled at once: their temporaries stay in the processor's cache
SERIES_FROM = 100.0          # expected overlap in voxels from which a series stands for the exact sum


class Contingency:
    """How many voxels each pair of a predicted and a true id shares, as a table of the pairs that occur.

    Blocks may come in any order and size.  Memory: 24 bytes for each pair that occurs, and a few MB.
    """

    def __init__(self):
        none = np.zeros(0, np.uint64)
        self.pairs = none, none, np.zeros(0, np.int64)            # pred, true, voxels: each pair once
        self.pending, self.waiting = [], 0

    def add(self, pred, true):
        """Add a block: pred, true arrays of one shape, of any integer type (or bool), ids >= 0.

        Raises ValueError for two shapes, other types or negative ids; the block is then not counted.
        """
        pred, true = np.asarray(pred), np.asarray(true)
        if pred.shape != true.shape:
            raise ValueError(f"pred {pred.shape} and true {true.shape} are not of one shape")
        for name, block in (("pred", pred), ("true", true)):
            if block.dtype.kind not in "iub":
                raise ValueError(f"{name} is {block.dtype}: ids are integers")
            if block.dtype.kind == "i" and block.size and block.min() < 0:
                raise ValueError(f"{name} holds negative ids")
        # Sections one by one, since to flatten a cut-out block is to copy it.
        whole = pred.flags.c_contiguous and true.flags.c_contiguous or pred.ndim < 2
        for p, t in [(pred, true)] if whole else zip(pred, true, strict=True):
            p, t = p.reshape(-1), t.reshape(-1)
            for start in range(0, len(p), CHUNK):
                self.add_run(p[start:start + CHUNK], t[start:start + CHUNK])

    def add_run(self, pred, true):
        """Add [N] voxels in a row: of ids that repeat along it, only the lengths of the runs are sorted."""
        change = pred[1:] != pred[:-1]
        change |= true[1:] != true[:-1]
        start = np.concatenate([[0], np.flatnonzero(change) + 1])
        runs = np.diff(start, append=len(pred))
        self.pending.append(sum_pairs(pred[start].astype(np.uint64), true[start].astype(np.uint64), runs))
        self.waiting += len(self.pending[-1][0])
        if self.waiting > max(CHUNK, len(self.pairs[0])):
            self.table()

    def table(self):
        """(pred uint64 [M], true uint64 [M], voxels int64 [M]) of the pairs that occur, each once."""
        if self.pending:
            columns = zip(self.pairs, *self.pending, strict=True)
            self.pairs = sum_pairs(*(np.concatenate(column) for column in columns))
            self.pending, self.waiting = [], 0
        return self.pairs

    def scores(self, ignore_true_zero=True, thresholds=(0.5,)):
        """Dict of floats.

        With ignore_true_zero (the default) voxels of true id 0 count in nothing but the F1 figures; else
        0 is an id like another.  A predicted 0 inside a true instance is an id like another too, as in
        scikit-image, so all that is missed counts as one predicted object.

        adapted_rand_error, rand_precision, rand_recall (Arganda-Carreras et al. 2015, Front. Neuroanat. 9):
        of the pairs of voxels together in the prediction, the share together in truth, and the reverse; nan
        where there is no pair.  As skimage.metrics.adapted_rand_error, which documents the last two so too
        but returns them in the other order (0.26): merges lower the precision.
        voi_split = H(pred | true), voi_merge = H(true | pred), voi their sum, in bits (Meila 2007).
        ari, ami: adjusted Rand index and adjusted mutual information (arithmetic mean), 1 = equal and
        0 = chance; axi = sqrt(max(ari, 0) * max(ami, 0)).
        ted: splits + merges of ids > 0: over true ids, the predicted ids that they touch beyond one, and
        the reverse; an overlap of one voxel counts.
        instance_f1, instance_precision, instance_recall: a predicted id > 0 is right where its IoU with a
        true one is at least the threshold, one to one, true 0 in the union too; means over thresholds.
        true_objects, pred_objects: numbers of ids > 0.
        """
        pred, true, count = self.table()
        figures = match_figures(pred, true, count, thresholds)
        both = (pred > 0) & (true > 0)
        touching = both.sum() * 2 - len(np.unique(pred[both])) - len(np.unique(true[both]))
        kept = true > 0 if ignore_true_zero else np.ones(len(true), bool)
        pred, true = (np.unique(ids[kept], return_inverse=True)[1] for ids in (pred, true))
        return partition_figures(pred, true, count[kept]) | {"ted": float(touching)} | figures


def sum_pairs(pred, true, count):
    """Each pair once: pred, true uint64 [N], count int64 [N] -> the same of the M pairs that differ."""
    if not len(pred):
        return pred, true, count
    if max(pred.max(), true.max()) < 2 ** 32:
        key = pred << np.uint64(32) | true
    else:                                                        # wide ids: by their ranks instead
        rank, inverse = np.unique(true, return_inverse=True)
        key = np.unique(pred, return_inverse=True)[1] * len(rank) + inverse
    order = np.argsort(key)
    key = key[order]
    first = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
    return pred[order[first]], true[order[first]], np.add.reduceat(count[order], first)


def partition_figures(pred, true, count):
    """Rand, VOI, ARI and AMI of a table: pred, true int [M] compact, count [M], each pair once."""
    n = float(count.sum())
    p, t = np.bincount(pred, weights=count), np.bincount(true, weights=count)
    joint, in_pred, in_true = (float(np.sum(x * (x - 1))) for x in (count.astype(float), p, t))
    entropy_pred, entropy_true, entropy = (entropy_bits(x, n) for x in (p, t, count))
    expected = in_pred * in_true / (n * (n - 1)) if n > 1 else 0.0
    ari = 1.0 if in_pred == in_true == joint else ratio(joint - expected, (in_pred + in_true) / 2 - expected)
    ami = 1.0
    if len(count) and not len(count) == len(p) == len(t):        # equal partitions need no correction
        chance = expected_information(p, t) / math.log(2)
        both = entropy_pred + entropy_true
        ami = ratio(both - entropy - chance, both / 2 - chance)
    if not n:
        ari = ami = entropy = math.nan
    return {"adapted_rand_error": 1 - ratio(2 * joint, in_pred + in_true),
            "rand_precision": ratio(joint, in_pred), "rand_recall": ratio(joint, in_true),
            "voi": 2 * entropy - entropy_pred - entropy_true, "voi_split": entropy - entropy_true,
            "voi_merge": entropy - entropy_pred, "ari": ari, "ami": ami,
            "axi": math.sqrt(max(ari, 0.0) * max(ami, 0.0)) if n else math.nan}


def ratio(numerator, denominator):
    """A quotient, or nan where there is nothing to divide by."""
    return numerator / denominator if denominator else math.nan


def entropy_bits(count, n):
    """Entropy in bits of counts [K] that sum to n."""
    return -float(np.sum(xlogy(count / n, count / n))) / math.log(2) if n else 0.0


def expected_information(sizes, others):
    """Mutual information in nats that chance gives two partitions of these sizes, float [P] and [T].

    The sum over the hypergeometric law of each overlap x (Vinh et al. 2010, JMLR 11, eq. 24a), within ten
    standard deviations of its mean m: of x log(x / m) / n.  Where m is large, its series in the central
    moments, m2 / (2 m) - m3 / (6 m^2) + m4 / (12 m^3), nearer than 1e-4 of itself.
    """
    n = sizes.sum()
    (a, times_a), (b, times_b) = (np.unique(x, return_counts=True) for x in (sizes, others))
    total = 0.0
    for start in range(0, len(a), rows := max(1, CHUNK // len(b))):
        x, y = (z.ravel() for z in np.meshgrid(a[start:start + rows], b, indexing="ij"))
        times = np.outer(times_a[start:start + rows], times_b).ravel()
        mean = x * y / n
        variance = mean * (1 - x / n) * (1 - y / n) * n / max(n - 1, 1)
        large = (mean >= SERIES_FROM) & (variance >= SERIES_FROM / 2)
        m, v = mean[large], variance[large]
        skew = v * (1 - 2 * x[large] / n) * (1 - 2 * y[large] / n)
        total += np.sum(times[large] * (v / (2 * m) - skew / (6 * m ** 2) + (3 * v ** 2 + v) / (12 * m ** 3)))
        total += np.sum(times[~large] * exact_terms(x[~large], y[~large], n, mean[~large], variance[~large]))
    return float(total / n)


def exact_terms(a, b, n, mean, variance):
    """E[x log(x / mean)] of hypergeometric overlaps x of a and b out of n, each [M], as a sum over x."""
    spread = 10 * np.sqrt(variance) + 20
    x = np.maximum(np.maximum(0, a + b - n), np.floor(mean - spread))
    last = np.minimum(np.minimum(a, b), np.ceil(mean + spread))
    log = (gammaln(a + 1) + gammaln(b + 1) + gammaln(n - a + 1) + gammaln(n - b + 1) - gammaln(n + 1)
           - gammaln(x + 1) - gammaln(a - x + 1) - gammaln(b - x + 1) - gammaln(n - a - b + x + 1))
    chance, total = np.exp(log), np.zeros(len(a))
    while len(a) and (x <= last).any():
        total += np.where(x <= last, chance * xlogy(x, x / mean), 0)
        chance = chance * np.maximum(a - x, 0) * np.maximum(b - x, 0) / ((x + 1) * (n - a - b + x + 1))
        x = x + 1
    return total


def match_figures(pred, true, count, thresholds):
    """Objects, and F1, precision and recall of the one-to-one matches with enough IoU; background is 0."""
    (pred_ids, p), (true_ids, t) = (np.unique(ids, return_inverse=True) for ids in (pred, true))
    union = np.bincount(p, weights=count)[p] + np.bincount(t, weights=count)[t] - count
    objects_pred, objects_true = np.count_nonzero(pred_ids), np.count_nonzero(true_ids)
    hits = []
    for threshold in thresholds:
        good = (pred > 0) & (true > 0) & (count >= threshold * union)
        graph = sparse.csr_array((np.ones(good.sum()), (p[good], t[good])),
                                 shape=(len(pred_ids), len(true_ids)))
        hits.append(np.count_nonzero(sparse.csgraph.maximum_bipartite_matching(graph) >= 0))
    hit = float(np.mean(hits))
    return {"instance_f1": ratio(2 * hit, objects_pred + objects_true),
            "instance_precision": ratio(hit, objects_pred), "instance_recall": ratio(hit, objects_true),
            "pred_objects": float(objects_pred), "true_objects": float(objects_true)}


class SemanticMetrics:
    """Running accuracy, Dice and IoU of classes, from a confusion matrix: exact for any batches and ranks.

    ``names``: of the first classes, for the figures of each; without them, their numbers.
    """

    def __init__(self, num_classes, names=None):
        self.names = [str(k) for k in range(num_classes)] if names is None else list(names)
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)             # [true, pred]

    def update(self, pred, true, meaning=None, ignore_index=-100):
        """Add voxels: pred, true int tensors or arrays [B, ...] of one shape, classes 0 to num_classes - 1.

        Voxels of true ignore_index do not count.  meaning: bool [M, M] or [B, M, M], M <= num_classes: a
        label t may in truth be class c where meaning[t, c], and such a prediction counts as t.
        Raises ValueError for other shapes or classes.
        """
        pred, true = (torch.as_tensor(x).detach().cpu().long() for x in (pred, true))
        if pred.shape != true.shape:
            raise ValueError(f"pred {tuple(pred.shape)} and true {tuple(true.shape)} are not of one shape")
        if meaning is not None:
            meaning = torch.as_tensor(meaning).cpu().bool()
        for i in range(len(true)) if meaning is not None and meaning.ndim == 3 else [...]:
            counted = true[i] != ignore_index
            table = self.count(pred[i][counted], true[i][counted])
            if meaning is not None:
                allowed = torch.zeros_like(table, dtype=torch.bool)
                own = meaning if i is ... else meaning[i]
                allowed[:len(own), :len(own)] = own
                table = table.masked_fill(allowed, 0) + torch.diag((table * allowed).sum(1))
            self.confusion += table

    def count(self, pred, true):
        """Confusion matrix int64 [C, C] of voxels pred, true [N]."""
        classes = len(self.confusion)
        for name, values in (("pred", pred), ("true", true)):
            if len(values) and not 0 <= values.min() <= values.max() < classes:
                raise ValueError(f"{name} holds classes {values.min()} to {values.max()}, of {classes}")
        return torch.bincount(true * classes + pred, minlength=classes ** 2).view(classes, classes)

    def reduce(self):
        """Collective: take the voxels of all ranks together, once."""
        self.confusion = all_reduce_sum(self.confusion)

    def compute(self):
        """Dict of floats: accuracy; dice and iou, means over the classes present in truth; dice/<name>.

        nan where there is no voxel, and for the Dice of a class that the truth does not have.
        """
        table = self.confusion.double()
        hit, pred, true = table.diag(), table.sum(0), table.sum(1)
        dice = torch.where(true > 0, 2 * hit / (pred + true), torch.nan)
        iou = torch.where(true > 0, hit / (pred + true - hit), torch.nan)
        return {"accuracy": (hit.sum() / true.sum()).item(), "dice": dice.nanmean().item(),
                "iou": iou.nanmean().item(),
                **{f"dice/{name}": value for name, value in zip(self.names, dice.tolist(), strict=False)}}
