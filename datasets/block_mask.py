"""Context and target tokens of a volume for joint-embedding prediction."""

import math
from bisect import bisect_left

import numpy as np
import torch
import torch.nn.functional as F

from utils.config import UserError


class VolumeBlockMask:
    """Which foreground tokens the student sees (context) and which it predicts (target).

    One block of full depth at a random place: foreground inside is target, outside context.  Context above
    its ceiling loses a run of tokens along the depth, then each context token is dropped with ``drop_rate``;
    whatever is dropped becomes target.  So the share of targets ends at 1 - ceiling or above, also where
    ``target_share`` is lower.  Vol-JEPA, arXiv:2511.18640; blocks of I-JEPA, Assran et al. 2023,
    arXiv:2301.08243.

    target_share {"mri": s, "ct": s}: of the foreground, how much the block holds.  context_ceiling {"mri": c,
    "ct": c}: of the foreground, how much may be context.  aspect [low, high]: height / width of the block,
    uniform.  context_range [low, high]: of the foreground; context outside of it is drawn again, ``attempts``
    times in all, and then is one token.  coverage: of the target share, how much each allowed place of the
    block holds at least.  Raises UserError for values outside of their ranges.
    """

    def __init__(self, target_share, context_ceiling, aspect=(0.3, 3.0), drop_rate=0.1, coverage=0.95,
                 context_range=(0.05, 0.5), attempts=5):
        low, high = context_range
        check("CONTEXT_RANGE", context_range, 0 < low < high < 1, "two rising numbers between 0 and 1")
        for name, shares, least, most in (("TARGET_SHARE", target_share, 0, 1 - low),
                                          ("CONTEXT_CEILING", context_ceiling, low, 1)):
            check(name, shares, shares.keys() == {"mri", "ct"}, '{"mri": share, "ct": share}')
            check(name, shares, all(least < share <= most for share in shares.values()),
                  f"above {least:g} and at most {most:g}, since JEPA_CONTEXT_RANGE begins at {low:g}")
        check("ASPECT", aspect, 0 < aspect[0] <= aspect[1], "two rising numbers above 0")
        check("DROP_RATE", drop_rate, 0 <= drop_rate < 1, "from 0 to below 1")
        self.target_share, self.context_ceiling, self.aspect = target_share, context_ceiling, aspect
        self.drop_rate, self.coverage = drop_rate, coverage
        self.context_range, self.attempts = context_range, attempts

    def __call__(self, coords, foreground, mode, generator):
        """(context bool [N], target bool [N]): disjoint, together the foreground; at least one context token.

        coords int64 [N, 3]: D, H, W of each token, from any origin; foreground bool [N]: True = tissue;
        mode 0 = MRI, 1 to 3 = windows of CT; generator: torch.Generator.  Context lies within context_range
        and below its ceiling, but for fewer foreground tokens than 1 / ceiling, where one token is context
        and the others, if any, are target.  Raises ValueError where there is no foreground.
        """
        if foreground.dtype != torch.bool:
            raise TypeError(f"foreground is {foreground.dtype}; it must be torch.bool, or ~ is no negation")
        tokens = foreground.nonzero().squeeze(1)
        if len(tokens) == 0:
            raise ValueError("no foreground token, hence nothing to mask")
        kind = "mri" if mode == 0 else "ct"
        plane = coords[:, 1:] - coords[:, 1:].amin(0)                                          # [N, 2]
        low, high = (limit * len(tokens) for limit in self.context_range)
        for _ in range(self.attempts):
            corner, size = self._place(plane, tokens, self.target_share[kind], generator)
            inside = ((plane >= corner) & (plane < corner + size)).all(1)
            context = foreground & ~inside
            drop_slab_(context, coords[:, 0], int(self.context_ceiling[kind] * len(tokens)), generator)
            context &= torch.rand(len(context), generator=generator) >= self.drop_rate
            if low <= context.sum() <= high:
                break
        else:
            context = torch.zeros_like(foreground)
            context[tokens[torch.randint(len(tokens), (1,), generator=generator)]] = True
        return context, foreground & ~context

    def _place(self, plane, tokens, share, generator):
        """(corner, size), int64 [2] each, of a block that holds about ``share`` of the foreground.

        A block within the foreground has the area H * W * share * (foreground / all tokens).  A head is
        rounder than a block and shorter than the volume, so the block grows, its aspect kept, until its best
        place holds the share; among the places that hold ``coverage`` of it, one is drawn.  All places are
        looked at, so the coverage need not be lowered.  Only where the foreground is a few columns may such
        a block leave too little context; then it is the next smaller one, which may be empty.
        """
        height, width = (plane.amax(0) + 1).tolist()
        columns = torch.bincount(plane[tokens, 0] * width + plane[tokens, 1], minlength=height * width)
        table = F.pad(columns.view(height, width), (1, 0, 1, 0)).cumsum(0).cumsum(1).numpy()
        goal, most = share * len(tokens), (1 - self.context_range[0]) * len(tokens)
        low, high = self.aspect
        aspect = low + (high - low) * torch.rand(1, dtype=torch.float64, generator=generator).item()
        sizes = growing_sizes(height, width, aspect)
        smallest = bisect_left(sizes, goal, key=lambda size: box_sums(table, size).max())
        for size in (sizes[smallest], sizes[smallest - 1]):
            held = box_sums(table, size)
            allowed = (held >= self.coverage * min(goal, held.max())) & (held <= most)
            if allowed.any():
                break
        places = np.argwhere(allowed)
        place = places[torch.randint(len(places), (1,), generator=generator).item()]
        return torch.from_numpy(place), torch.tensor(size)


def growing_sizes(height, width, aspect):
    """Whole (rows, columns) with rows / columns near ``aspect``, from (0, 0) to (height, width).

    Both only grow; where one has reached its end the other goes on.
    """
    root = math.sqrt(aspect)
    scale = np.linspace(0, max(height / root, width * root), 4 * (height + width))
    sizes = np.rint(np.stack([scale * root, scale / root], axis=1)).clip(max=[height, width]).astype(int)
    return [tuple(size) for size in np.unique(sizes, axis=0).tolist()]


def box_sums(table, size):
    """Sum of each box of ``size`` = (h, w): [H - h + 1, W - w + 1], by the position of its first corner.

    table [H + 1, W + 1]: sums over all rows and columns before (a summed-area table, Crow 1984).
    """
    h, w = size
    rows = table[h:] - table[:len(table) - h]
    return rows[:, w:] - rows[:, :rows.shape[1] - w]


def drop_slab_(context, depth, keep, generator):
    """Leave at most ``keep`` True in ``context``, in place: the others form one random run along ``depth``.

    Within the first and the last slice of the run the tokens are drawn at random, so that exactly ``keep``
    stay, also where the volume is a single slice.  context bool [N], depth int64 [N].
    """
    tokens = context.nonzero().squeeze(1)
    excess = len(tokens) - keep
    if excess <= 0:
        return
    tokens = tokens[torch.randperm(len(tokens), generator=generator)]
    tokens = tokens[depth[tokens].argsort(stable=True)]
    start = torch.randint(keep + 1, (1,), generator=generator).item()
    context[tokens[start:start + excess]] = False


def mask_ratios(batch):
    """{"target_share", "context_share"}: means over the series of a ragged batch, of the foreground.

    batch: target, context, foreground bool [T]; cu_seqlens int [S + 1]: where each series begins, and T.
    Float32 tensors without dimensions, on the device of the masks.  A series without foreground counts as 0.
    """
    masks = torch.stack([batch[name] for name in ("target", "context", "foreground")])         # [3, T]
    counts = F.pad(masks.cumsum(1), (1, 0))[:, batch["cu_seqlens"].long()].diff(dim=1)         # [3, S]
    target, context = (counts[:2] / counts[2].clamp(min=1)).mean(1)
    return {"target_share": target, "context_share": context}


def check(name, value, good, allowed):
    """Raise UserError naming the constant JEPA_``name`` unless ``good``."""
    if not good:
        raise UserError(f"JEPA_{name} = {value!r}: must be {allowed}")
