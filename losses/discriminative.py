"""Discriminative loss of embeddings (De Brabandere, Neven, Van Gool 2017, arXiv:1708.02551, eqs. 1-4).

The voxels of an instance are pulled to their common centre, the centres of a class are pushed apart.  Nothing
loops over instances: sums over the voxels of each are one scatter.
"""

import torch
from torch.autograd.function import once_differentiable

TINY = torch.finfo(torch.float32).tiny


def discriminative_loss(embedding, instances, weight=None, classes=None, delta_v=0.5, delta_d=1.5,
                        count=None):
    """{"pull", "push", "norm"} of a batch: unweighted 0-dim float32 tensors.

    embedding: [B, E, D, H, W] or [B, E, H, W], any float type; computed in float32.
    instances: integers [B, ...], compact ids 1..K in each sample; 0 and less is no instance and has no say.
    weight: float [B, ...] >= 0, None for ones; gets no gradient.  Zero weights alone make no instance.
    classes: integers [B, ...], the class > 0 of each voxel's instance; None: all are of one class.
    count: the largest id of the batch; larger ones are no instance.  None reads it: a GPU is waited for.

    With e_n the embedding and w_n the weight of voxel n, and sums over the voxels n of instance i:

        c_i     = sum_n w_n e_n / sum_n w_n
        pull_i  = sum_n w_n relu(|e_n - c_i| - delta_v)^2 / sum_n w_n
        push_ij = relu(2 delta_d - |c_i - c_j|)^2
        norm_i  = |c_i|

    pull and norm are means over the instances of a class, push over its pairs i < j, 0 without a pair; then
    the mean over the classes in a sample, then over the samples with an instance.  So the instances of a
    class count alike whatever their size, and weights matter by their ratios within an instance alone.
    Without instances terms and gradients are 0; where a root is 0 (c_i = c_j, c_i = 0) so is its gradient.
    """
    count = max(int(instances.max()) if count is None else count, 1)
    centre, pull, mass, kind = instance_sums(embedding, instances, weight, classes, delta_v, count)
    present = (mass > 0) & (kind > 0)                                                    # [B, K]
    alike = (kind[:, :, None] == kind[:, None]) & present[:, :, None] & present[:, None]  # [B, K, K]
    number = alike.sum(2)                              # of the present instances of its class, with itself

    share = present / number.clamp(min=1)              # sums to the number of classes in each sample
    share = share / share.sum(1, keepdim=True).clamp(min=1) / present.any(1).sum().clamp(min=1)
    pairs = alike & ~torch.eye(count, dtype=torch.bool, device=alike.device)
    distance = torch.cdist(centre, centre, compute_mode="donot_use_mm_for_euclid_dist")
    push = ((2 * delta_d - distance).relu().square() * pairs).sum(2) / (number - 1).clamp(min=1)
    norm = torch.linalg.vector_norm(centre, dim=2)
    return {"pull": (share * pull).sum(), "push": (share * push).sum(), "norm": (share * norm).sum()}


def instance_sums(embedding, instances, weight, classes, delta_v, count):
    """(c_i [B, K, E], pull_i, sums of weights, classes, all [B, K]) of the ids 1..K = count."""
    ids = instances.flatten(1)[:, None]
    ids = torch.where((ids > 0) & (ids <= count), ids, 0).long()                         # [B, 1, N]
    weight = torch.ones_like(ids, dtype=torch.float) if weight is None else weight.flatten(1)[:, None].float()
    centre, pull, mass = CentreAndPull.apply(embedding.flatten(2), ids, weight, count + 1, delta_v)
    kind = torch.ones_like(mass)
    if classes is not None:
        kind = torch.zeros_like(mass).scatter_reduce(2, ids, classes.flatten(1)[:, None].float(), "amax")
    return centre[:, :, 1:].transpose(1, 2), pull[:, 0, 1:], mass[:, 0, 1:], kind[:, 0, 1:]


class CentreAndPull(torch.autograd.Function):
    """(c_i [B, E, R], pull_i [B, 1, R], m_i = sum_n w_n [B, 1, R]) of the ids 0..R-1, float32.

    From embedding [B, E, N], ids int64 [B, 1, N], weight float32 [B, 1, N].  Written out because autograd
    keeps several copies of the embedding, and because a CPU is several times faster when all that is to be
    done to a block of voxels is done while the cache holds it.  As c_i moves with each e_n,

        dL/de_n = p_i k_n (e_n - c_i) + w_n (dL/dc_i - p_i t_i) / m_i            p_i = 2 dL/dpull_i / m_i
        k_n = w_n relu(d_n - delta_v) / d_n       d_n = |e_n - c_i|       t_i = sum_n k_n (e_n - c_i)
    """

    @staticmethod
    def forward(ctx, embedding, ids, weight, size, delta_v):
        samples, features, count = embedding.shape
        step, lanes = work_sizes(embedding)
        places = ids * lanes + torch.arange(count, device=ids.device) % lanes            # [B, 1, N]
        sums = torch.zeros(samples, features, size * lanes, device=embedding.device)
        mass, pull = (sums.new_zeros(samples, 1, size * lanes) for _ in range(2))
        for e, place, w in blocks(step, embedding, places, weight):
            add(sums, place, e * w)
            add(mass, place, w)
        mass = total(mass, size)                                                         # [B, 1, R]
        centre = total(sums, size) / mass.clamp(min=TINY)                                # [B, E, R]

        t, k = sums.zero_(), torch.empty_like(weight)
        for e, i, place, w, k_block in blocks(step, embedding, ids, places, weight, k):
            offset = e - take(centre, i)
            square = offset.square().sum(1, keepdim=True)
            inverse = square.clamp(min=TINY).rsqrt()         # 1 / d_n; sqrt would take several CPU threads
            excess = (square * inverse - delta_v).relu()
            weighted = w * excess
            torch.mul(weighted, inverse, out=k_block)
            add(pull, place, weighted * excess)
            add(t, place, offset * k_block)
        ctx.save_for_backward(embedding, ids, weight, k, centre, mass, total(t, size))
        ctx.mark_non_differentiable(mass)
        return centre, total(pull, size) / mass.clamp(min=TINY), mass

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_centre, grad_pull, _):
        embedding, ids, weight, k, centre, mass, t = ctx.saved_tensors
        p = 2 * grad_pull / mass.clamp(min=TINY)                                         # [B, 1, R]
        common = (grad_centre - p * t) / mass.clamp(min=TINY)                            # [B, E, R]
        grad, (step, _) = torch.empty_like(embedding), work_sizes(embedding)
        for e, i, w, k_block, g in blocks(step, embedding, ids, weight, k, grad):
            own = (e - take(centre, i)) * (take(p, i) * k_block)
            g.copy_(own.addcmul_(take(common, i), w))
        return grad, None, None, None, None


def work_sizes(embedding):
    """(voxels that are worked on at once, sums of each instance) for embedding [B, E, N].

    CPU: 32000 values, which the cache holds and one thread works on; torch takes more threads from 32768 on,
    and to wait for them at each step gains little, but costs much where loader workers hold the cores.
    GPU: all voxels, and several sums, so that its threads do not add to one place.
    """
    samples, features, voxels = embedding.shape
    if embedding.device.type == "cpu":
        return max(32000 // (samples * features), 1), 1
    return voxels, 64


def blocks(step, embedding, *others):
    """Yield blocks of `step` voxels: embedding [B, E, N] as contiguous float32 [B, E, M], others as views."""
    for start in range(0, embedding.shape[2], step):
        e, *rest = (x[:, :, start:start + step] for x in (embedding, *others))
        yield e.float().contiguous(), *rest


def add(sums, place, values):
    """sums [B, E, S] += values [B, E, M] at place [B, 1, M]; first the block alone, to lose fewer digits."""
    sums += torch.zeros_like(sums).scatter_add_(2, place.expand_as(values), values)


def total(sums, size):
    """[B, E, R * lanes] -> [B, E, R = size]."""
    return sums.unflatten(2, (size, -1)).sum(3)


def take(rows, ids):
    """rows [B, E, R] at ids [B, 1, M] -> [B, E, M]."""
    return rows.gather(2, ids.expand(-1, rows.shape[1], -1))
