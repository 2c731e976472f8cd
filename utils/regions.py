"""Regions that touch: what is summed over the faces between them, and their merging, cheapest pair first."""

import heapq

import numpy as np
import torch

CHUNK = 2 ** 16              # faces handled at once


class Regions:
    """Regions 1..K and their neighbours, to be merged.

    pairs: {(a, b): float64 [N]} of touching ids a < b, as face_sums gives them: the sums of a pair of merged
    regions are the sums of their pairs.  The first ``signed`` of the numbers point from a to b and change
    sign with the order; the last grows with every face.  cost: function of such sums [N], from the side of
    either region; pairs merge while it is below 1.
    owner: int [K + 1], the id that each id has become, the lowest or the last merged of its kind.
    """

    def __init__(self, pairs, count, signed, cost):
        self.around, self.owner = [{} for _ in range(count + 1)], np.arange(count + 1)
        self.signed, self.cost, self.queue = signed, cost, []
        for (a, b), sums in pairs.items():
            self.touch(a, b, sums)

    def touch(self, a, b, sums):
        """Set the sums of a pair, seen from a, and queue it if it may merge."""
        turned = sums.copy()
        turned[:self.signed] *= -1
        self.around[a][b], self.around[b][a] = sums, turned
        cost = self.cost(sums)
        if cost < 1:
            heapq.heappush(self.queue, (cost, min(a, b), max(a, b), sums[-1]))

    def join(self, a, b):
        """b becomes a; they touch."""
        self.owner[self.owner == b] = a
        del self.around[a][b], self.around[b][a]
        for c, sums in self.around[b].items():
            del self.around[c][b]
            self.touch(a, c, sums + self.around[a].get(c, 0))
        self.around[b] = {}

    def merge(self):
        """Merge pairs, cheapest first, until none is below 1; a merge changes the costs around it."""
        while self.queue:
            _, a, b, faces = heapq.heappop(self.queue)
            if b in self.around[a] and self.around[a][b][-1] == faces:  # else one has grown meanwhile
                self.join(a, b)

    def absorb(self, sizes, least):
        """Join what is smaller than ``least`` to its cheapest neighbour, smallest first.  sizes: [K + 1]."""
        sizes = np.bincount(self.owner, sizes, len(sizes))
        for small in np.argsort(sizes, kind="stable").tolist():
            if 0 < sizes[small] < least and self.owner[small] == small and self.around[small]:
                nearest = min(self.around[small], key=lambda b: (self.cost(self.around[small][b]), b))
                self.join(nearest, small)
                sizes[nearest] += sizes[small]


def vectors_at(embedding, places):
    """Embeddings float32 [N, E] on the CPU at places int64 [3, N] of a tensor [E, D, H, W]."""
    z, y, x = torch.from_numpy(places).to(embedding.device)
    return embedding[:, z, y, x].T.float().cpu()


def face_sums(ids, embedding, reach, boundary=None, inside=None):
    """{(a, b): float64 [E + 3]} of touching ids a < b > 0 of ids int [D, H, W]: sums over their faces of

    the step of the embedding from a to b, ``reach`` voxels (per axis) to either side of the face: [E]; the
    number of faces where that could be measured, both ends in a and b, and not both out of ``inside``, bool
    [D, H, W]; the larger ``boundary`` probability of the two voxels, 0 without one; and 1.
    embedding: tensor [E, D, H, W].
    """
    total, count = {}, int(ids.max()) + 1
    for axis in range(3):
        part = np.moveaxis(ids, axis, 0)
        touch = np.moveaxis((part[1:] != part[:-1]) & (part[1:] > 0) & (part[:-1] > 0), 0, axis)
        at = np.flatnonzero(touch)
        for start in range(0, len(at), CHUNK):
            low = np.stack(np.unravel_index(at[start:start + CHUNK], touch.shape))
            high = low.copy()
            high[axis] += 1
            a, b = ids[tuple(low)].astype(np.int64), ids[tuple(high)].astype(np.int64)
            edge = np.zeros(len(a))
            if boundary is not None:
                edge = np.maximum(boundary[tuple(low)], boundary[tuple(high)])
            low[axis] = np.maximum(low[axis] - reach[axis] + 1, 0)
            high[axis] = np.minimum(high[axis] + reach[axis] - 1, ids.shape[axis] - 1)
            whole = (ids[tuple(low)] == a) & (ids[tuple(high)] == b)
            if inside is not None:
                whole &= inside[tuple(low)] | inside[tuple(high)]
            step = (vectors_at(embedding, high) - vectors_at(embedding, low)).numpy()             # [N, E]
            step *= np.where(a < b, whole, -1.0 * whole)[:, None]
            rows = np.column_stack([step, whole, edge, np.ones(len(a))])
            keys, back = np.unique(np.minimum(a, b) * count + np.maximum(a, b), return_inverse=True)
            sums = np.stack([np.bincount(back, row, len(keys)) for row in rows.T], 1)
            for key, values in zip(keys.tolist(), sums, strict=True):
                pair = divmod(key, count)
                total[pair] = total[pair] + values if pair in total else values
    return total
