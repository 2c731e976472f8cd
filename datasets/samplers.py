"""Which samples a process reads, in which order, and from where a resumed epoch goes on."""

import numpy as np

from utils.config import UserError


class ShardedSampler:
    """Indices 0 .. length - 1, shared between ``world_size`` ranks: rank r takes every world_size-th of them.

    The order depends on (seed, epoch) alone, so that a resumed run reads what the first run would have read.
    pad True: all ranks get the same number, the first indices of the order being read again at the end, for
    collectives need every rank.  pad False: each index once over all ranks, whose shares may differ by one.
    Raises UserError for an empty data set.
    """

    def __init__(self, length, shuffle, seed, rank, world_size, pad=True):
        if length < 1:
            raise UserError("no samples to read; check --data and the split fractions")
        self.length, self.shuffle, self.seed = length, shuffle, seed
        self.rank, self.world_size, self.pad = rank, world_size, pad
        self.epoch, self.skip = 0, 0

    def set_position(self, epoch, start_batch=0, batch_size=1):
        """Read ``epoch`` from batch ``start_batch`` on, in batches of ``batch_size`` samples of this rank."""
        self.epoch, self.skip = epoch, start_batch * batch_size

    def __iter__(self):
        order = np.arange(self.length)
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        if self.pad:
            order = np.resize(order, -(-self.length // self.world_size) * self.world_size)   # wraps around
        return iter(order[self.rank::self.world_size][self.skip:].tolist())

    def __len__(self):
        """Samples of this rank in a whole epoch, also after set_position: schedules count whole epochs."""
        if self.pad:
            return -(-self.length // self.world_size)
        return len(range(self.rank, self.length, self.world_size))


def count_real(batch, batch_size, length, rank, world_size):
    """How many samples of batch number ``batch`` are no repeats, in a padded order of ``length`` samples.

    The repeats stand at the end of this rank's share, hence at the end of the batch.
    """
    share = len(range(rank, length, world_size))
    return min(max(share - batch * batch_size, 0), batch_size)
