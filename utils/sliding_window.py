"""A network over a volume of any size: overlapping windows, blended in memory that the depth does not change.

    for z0, z1, slab in predict_slabs(volume, predict, (32, 128, 128), (16, 64, 64), channels=16):
        ...                                # probabilities [16, z1 - z0, H, W] of sections z0..z1, in order

Windows go in rows of the same z, ascending.  Along each axis the part of a window that the next one overlaps
is carried over (class Blend), the rest is settled: nothing larger than those overlaps and one slab is kept.
"""

from itertools import product

import numpy as np
import torch

from utils.config import UserError

AGGREGATIONS = ("gaussian", "average", "max")
SIGMA, LEAST = 0.125, 1e-3              # of the Gaussian in window sizes, and its least weight, as in MONAI


def window_starts(length, patch, stride):
    """Starts of windows of ``patch`` voxels that cover [0, length) at most ``stride`` apart: list of ints.

    The last window is shifted back to end at ``length``; [0] when one window holds all.
    UserError: a stride that would leave voxels out, or sizes below 1.
    """
    if min(length, patch, stride) < 1:
        raise UserError(f"length {length}, patch {patch}, stride {stride}: must be 1 at least")
    if stride > patch:
        raise UserError(f"a stride of {stride} leaves voxels out between windows of {patch}: "
                        "choose a stride no larger than the patch")
    return [*range(0, length - patch, stride), max(length - patch, 0)]


def windows(shape, patch, stride):
    """Window starts along D, H and W: a list of three lists, as window_starts gives them."""
    return [window_starts(*sizes) for sizes in zip(shape, patch, stride, strict=True)]


def importance(patch, aggregation):
    """Weights of a window's voxels in the blend: float32 [d, h, w], in (0, 1].

    "gaussian": a Gaussian about the middle of the window, its sigma an eighth of each side of the window, its
    least weight 1e-3 (nnU-Net, Isensee et al. 2021, Nature Methods 18; clamped as MONAI does).
    "average", "max": ones.
    """
    if aggregation not in AGGREGATIONS:
        raise UserError(f'aggregation "{aggregation}": use one of {", ".join(AGGREGATIONS)}')
    weight = torch.ones(tuple(patch))
    if aggregation == "gaussian":
        for axis, size in enumerate(patch):
            distance = torch.arange(size) - (size - 1) / 2
            line = torch.exp(-distance ** 2 / (2 * (SIGMA * size) ** 2))
            weight *= line.view([-1 if a == axis else 1 for a in range(3)])
    return weight.clamp(min=LEAST)


def predict_slabs(volume, predict, patch, stride, *, channels, aggregation="gaussian", batch_size=4,
                  z_range=None, scale=None, finish=None, on_window=None, device="cpu"):
    """Yield (z0, z1, slab) for finished sections in ascending order; together they are ``z_range``.

    volume: has .shape (D, H, W), and volume[z0:z1, y0:y1, x0:x1] gives a numpy array; a section is read once.
    predict: images float32 [B, 1, d, h, w] on ``device``, of size ``patch`` -> probabilities [B, C, d, h, w],
    float32 or less, or a tuple that begins with them.  An axis of the volume below the patch is reflected.
    scale: a window as it is stored -> its values for the network; None leaves them.
    finish: probabilities float32 [C, n, h, w] of a part of the slab -> what is kept of it, [K, n, h, w] of
    any dtype; None keeps the probabilities.  Memory is that of one slab, and of its overlap with the next in
    float32 [C, d - stride, H, W]: a slab of labels halves it.  ``slab`` [K, z1 - z0, H, W], on ``device``, is
    overwritten when the generator goes on.
    on_window(index (i, j, k), start (z, y, x), outputs): the tuple that ``predict`` gave for one window,
    [C, d, h, w] each, cut to the volume.  It is called for windows that start in ``z_range``, before the slab
    that begins there is given out; so ranges that divide the depth see each window once.
    Every range gives the same values to the last bit: all windows that touch it are computed, a batch holds
    windows of one z alone, and sums are taken in ascending order.
    UserError: an unknown aggregation, a stride that leaves voxels out, a batch of none.
    """
    starts = windows(volume.shape, patch, stride)
    first, last = (0, volume.shape[0]) if z_range is None else z_range
    if not 0 <= first <= last <= volume.shape[0]:
        raise ValueError(f"z_range {z_range} is not within the {volume.shape[0]} sections")
    if batch_size < 1:
        raise UserError(f"a batch of {batch_size} windows: must be 1 at least")
    if first == last:
        return
    blend = Blend(volume.shape, patch, starts, channels, aggregation, (first, last), finish, device)
    rows = [i for i, z in enumerate(starts[0]) if z < last and z + blend.size[0] > first]
    places = list(product(range(len(starts[1])), range(len(starts[2]))))
    for i, sections in zip(rows, read_rows(volume, [starts[0][i] for i in rows], patch[0]), strict=True):
        for n in range(0, len(places), batch_size):
            batch = [(j, k, starts[1][j], starts[2][k]) for j, k in places[n:n + batch_size]]
            images = np.stack([cut(sections, y, x, patch, scale) for _, _, y, x in batch])[:, None]
            outputs = run(predict, torch.from_numpy(images).to(device), channels)
            for b, (j, k, y, x) in enumerate(batch):
                window = tuple(part[b, :, :blend.size[0], :blend.size[1], :blend.size[2]] for part in outputs)
                blend.add((i, j, k), window[0])
                if on_window is not None and starts[0][i] >= first:
                    on_window((i, j, k), (starts[0][i], y, x), window)
            del outputs, window                                 # before the next batch takes the same memory
        yield from blend.finished(i)


@torch.no_grad()
def run(predict, images, channels):
    """What ``predict`` gives for images [B, 1, d, h, w], as a tuple; ValueError: not [B, C, d, h, w]."""
    outputs = predict(images)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    expected = (len(images), channels, *images.shape[2:])
    if outputs[0].shape != expected:
        raise ValueError(f"predict gave probabilities {list(outputs[0].shape)} instead of {list(expected)}")
    return outputs


def read_rows(volume, starts, depth):
    """Yield sections [z, z + depth) of ``volume`` for each z of ``starts``, none read twice."""
    sections, end = None, 0
    for z in starts:
        kept = max(end - z, 0)
        new = volume[max(z, end):min(z + depth, volume.shape[0]), 0:volume.shape[1], 0:volume.shape[2]]
        sections = np.concatenate([sections[len(sections) - kept:], new]) if kept else new
        end = z + len(sections)
        yield sections


def cut(sections, y, x, patch, scale):
    """One window of a row as float32 [d, h, w]; reflected at the far ends where the volume is smaller."""
    window = sections[:, y:y + patch[1], x:x + patch[2]]
    missing = [(0, size - here) for size, here in zip(patch, window.shape, strict=True)]
    if any(after for _, after in missing):
        window = np.pad(window, missing, mode="reflect")
    return np.asarray(window if scale is None else scale(window), dtype=np.float32)


def channels_last(channels, extent, device):
    """Zeros [C, *extent] whose channels lie side by side in memory, as channels_last networks give them."""
    return torch.zeros(*extent, channels, device=device).movedim(-1, 0)


class Blend:
    """Weighted sums of windows that come in the order of (z, y, x), and the slab that they settle.

    Of each window the part before the next start is settled along x; of that, with what the row above carried
    over, along y; and of that along z.  What is left of each goes to the carry of its axis.
    shape, patch, starts: of the volume and its windows; size: of a window cut to the volume.
    The other arguments: as predict_slabs takes them.
    """

    def __init__(self, shape, patch, starts, channels, aggregation, z_range, finish, device):
        self.starts, self.z_range, self.finish = starts, z_range, finish
        self.size = [min(window, whole) for window, whole in zip(patch, shape, strict=True)]
        weight = importance(patch, aggregation)[:self.size[0], :self.size[1], :self.size[2]]
        self.weight = None if aggregation == "max" else weight.to(device)
        self.steps = [np.diff([*places, whole]).tolist() for places, whole in zip(starts, shape, strict=True)]
        if len(starts[0]) > 1:
            self.steps[0][-1] = max(self.steps[0][:-1])           # the last slab is no larger than the others
        self.carries, extent = [], [*self.size]
        for axis in (2, 1, 0):
            extent[axis] = self.size[axis] - min(self.steps[axis])
            self.carries.insert(0, channels_last(channels, extent, device))
            extent[axis] = shape[axis]
        self.window = channels_last(channels, self.size, device)
        self.slab, self.shape, self.totals = None, shape, {}

    @torch.no_grad()
    def add(self, index, probabilities):
        """Blend in the window ``index``, probabilities [C, d, h, w]; what it settles goes to the slab."""
        if self.weight is None:
            block = self.window.copy_(probabilities)
        else:
            block = torch.mul(probabilities, self.weight, out=self.window)
        combine = torch.maximum if self.weight is None else torch.add
        place = [slice(None)] * 4
        for axis in (2, 1, 0):
            i, size, step = index[axis], self.size[axis], self.steps[axis][index[axis]]
            carry = self.carries[axis][tuple(place)]
            before = size - self.steps[axis][i - 1] if i else 0
            old = block.narrow(axis + 1, 0, before)
            combine(old, carry.narrow(axis + 1, 0, before), out=old)
            carry.narrow(axis + 1, 0, size - step).copy_(block.narrow(axis + 1, step, size - step))
            block = block.narrow(axis + 1, 0, step)
            start = self.starts[axis][i]
            place[axis + 1] = slice(start, start + step)
        self.settle(block, place[1:])

    def settle(self, block, place):
        """Normalise the sums ``block`` [C, n, h, w], which lie at ``place`` in the volume, into the slab."""
        z0, z1 = place[0].start, place[0].stop
        if z1 <= self.z_range[0] or z0 >= self.z_range[1]:
            return
        block.div_(block.sum(0) if self.weight is None else self.total(place))
        kept = block if self.finish is None else self.finish(block)
        if self.slab is None:
            self.slab = kept.new_empty(len(kept), max(self.steps[0]), *self.shape[1:])
        self.slab[:, :z1 - z0, place[1], place[2]] = kept

    def total(self, place):
        """Sum of all windows' weights at ``place``: float32 [n, h, w], kept for the places that are alike."""
        shape = [part.stop - part.start for part in place]
        offsets = tuple(tuple(start - part.start for start in starts
                              if part.start - size < start < part.stop)
                        for starts, size, part in zip(self.starts, self.size, place, strict=True))
        if (key := (*shape, offsets)) not in self.totals:
            total = self.weight.new_zeros(shape)
            for corner in product(*offsets):
                edges = list(zip(corner, self.size, shape, strict=True))
                here = tuple(slice(max(o, 0), min(o + size, n)) for o, size, n in edges)
                total[here] += self.weight[tuple(slice(max(-o, 0), min(size, n - o)) for o, size, n in edges)]
            self.totals[key] = total
        return self.totals[key]

    def finished(self, i):
        """Yield (z0, z1, slab) of the sections that row ``i`` of windows has settled, within ``z_range``."""
        z0, step = self.starts[0][i], self.steps[0][i]
        yield from self.give(z0, z0 + step)
        if i < len(self.starts[0]) - 1:
            return
        for z in range(z0 + step, self.shape[0], step):                          # what the last row carried
            z1, first = min(z + step, self.shape[0]), z - z0 - step
            for j, k in product(range(len(self.starts[1])), range(len(self.starts[2]))):
                y, x = self.starts[1][j], self.starts[2][k]
                place = (slice(z, z1), slice(y, y + self.steps[1][j]), slice(x, x + self.steps[2][k]))
                with torch.no_grad():
                    self.settle(self.carries[0][:, first:first + z1 - z, place[1], place[2]], place)
            yield from self.give(z, z1)

    def give(self, z0, z1):
        """Yield the slab of sections [z0, z1), cut to ``z_range``, unless nothing is left."""
        first, last = max(z0, self.z_range[0]), min(z1, self.z_range[1])
        if first < last:
            yield first, last, self.slab[:, first - z0:last - z0]
