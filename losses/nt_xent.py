"""Contrastive loss of SimCLR over the pairs of all ranks."""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

from utils.config import UserError
from utils.distributed import rank, world_size


def nt_xent_loss(first, second, temperature):
    """Mean over 2B anchors of -log softmax(cosine similarity to the other view); float32, collective.

    Chen et al. 2020, arXiv:2002.05709, eq. 1.  first, second [B, E], any float type and length of the rows:
    projections of two views of the same images, row i with row i.  An anchor is compared with both views of
    all images of all ranks, itself left out.  A row of zeros has the similarity 0 with every other.

    Ranks: each computes the mean of its own anchors.  Backward adds up, over the ranks, what their losses
    say about a row; the mean over ranks that "ddp", "zero2" and "fsdp" take of the parameters' gradients then
    makes it the gradient of the mean loss, which is the loss of one process on the whole batch: no factor is
    needed.  To log that loss, average it over the ranks.  All ranks must hold equally many pairs, as
    ItemBatchSampler gives them, and all must go backward, or none.

    Negatives come from one micro-batch: accumulation does not add any.  A single pair has none; its loss and
    its gradient are zero.
    Raises UserError for a temperature that is not above 0, ValueError for other shapes.
    """
    if not 0 < temperature < math.inf:
        raise UserError(f"SIMCLR_TEMPERATURE = {temperature}: must be above 0")
    if first.shape != second.shape or first.dim() != 2 or not len(first):
        raise ValueError(f"projections {tuple(first.shape)} and {tuple(second.shape)}: not both [B, E]")
    with torch.autocast(first.device.type, enabled=False):             # it would make the product bfloat16
        z = torch.cat([first, second]).float()                                           # [2B, E]
        length = torch.linalg.vector_norm(z, dim=1, keepdim=True)
        z = z / torch.where(length > 0, length, 1.0)
        columns = z if world_size() == 1 else GatherRows.apply(z)                        # [2B * ranks, E]
        similarity = z @ columns.T / temperature                                         # [2B, 2B * ranks]
    own = rank() * len(z)                                               # column of this rank's first row
    similarity.diagonal(own).fill_(-math.inf)                           # an anchor itself
    positive = own + torch.arange(len(z), device=z.device).roll(len(first))
    return F.cross_entropy(similarity, positive)


class GatherRows(torch.autograd.Function):
    """Collective: rows of all ranks, rank 0's first; backward sums over the ranks the gradient of a row.

    x [N, E], N the same on all ranks -> [N * ranks, E].  torch.distributed.nn.functional.all_gather does the
    same and is deprecated; what replaces it is private and is named differently in the releases supported.
    """

    @staticmethod
    def forward(ctx, x):
        """x [N, E] -> [N * ranks, E]."""
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        """gradient [N * ranks, E] of this rank's loss -> [N, E], summed over the losses of all ranks."""
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]
