"""Which samples a process reads, in which order, and from where a resumed epoch goes on."""

import numpy as np
import torch

from utils.config import BadFile, UserError

ON_BAD_FILE = ("stop", "skip")


class ShardedSampler:
    """Indices 0 .. length - 1, shared between ``world_size`` ranks: rank r takes every world_size-th of them.

    The order depends on (seed, epoch) alone, so that a resumed run reads what the first run would have read.
    pad True: all ranks get the same number, the first indices of the order being read again at the end, for
    collectives need every rank.  pad False: each index once over all ranks, whose shares may differ by one.
    weights [length], positive: draw with replacement, an index as often as its share of the weights says.
    Raises UserError for an empty data set.
    """

    def __init__(self, length, shuffle, seed, rank, world_size, pad=True, weights=None):
        if length < 1:
            raise UserError("no samples to read; check --data and the split fractions")
        self.length, self.shuffle, self.seed = length, shuffle, seed
        self.rank, self.world_size, self.pad = rank, world_size, pad
        self.shares = None if weights is None else np.asarray(weights, np.float64)
        self.epoch, self.skip = 0, 0

    def set_position(self, epoch, start_batch=0, batch_size=1):
        """Read ``epoch`` from batch ``start_batch`` on, in batches of ``batch_size`` samples of this rank."""
        self.epoch, self.skip = epoch, start_batch * batch_size

    def __iter__(self):
        order, generator = np.arange(self.length), np.random.default_rng([self.seed, self.epoch])
        if self.shares is not None:
            order = generator.choice(self.length, self.length, p=self.shares / self.shares.sum())
        elif self.shuffle:
            order = generator.permutation(self.length)
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


class StudyAwareBatchSampler:
    """Batches of whole studies: ``batch_size`` counts images, and a study is never divided.

    groups: item indices of each study, list of lists, as ``StudyDataset.groups`` gives them; with groups of
    one index this is plain batching.  Studies are taken in the order of (seed, epoch) and packed until the
    next one would not fit; one with more than batch_size images is a batch of its own.  Rank r reads every
    world_size-th batch from the r-th on, the first ones again at the end, so all ranks read equally many.
    For DataLoader(batch_sampler=...).  UserError: no groups, or a batch size below 1.
    """

    def __init__(self, groups, batch_size, shuffle, seed, rank, world_size):
        if not groups or not all(groups):
            raise UserError("no studies to read, or one without images; check --data and the split fractions")
        if batch_size < 1:
            raise UserError(f"a batch of {batch_size} images: must be 1 at least")
        self.groups, self.batch_size, self.shuffle, self.seed = groups, batch_size, shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.set_epoch(0)

    def set_epoch(self, epoch):
        """Read ``epoch`` from its first batch on."""
        self.set_position(epoch)

    def set_position(self, epoch, start_batch=0):
        """Read ``epoch`` from this rank's batch ``start_batch`` on."""
        self.batches, self.start_batch = self.pack(epoch), start_batch

    def pack(self, epoch):
        """All batches of an epoch over all ranks, without repeats: lists of numbers of groups."""
        order = np.arange(len(self.groups))
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(order))
        batches, room = [], 0
        for group in order.tolist():
            if not batches or len(self.groups[group]) > room:
                batches.append([])
                room = self.batch_size
            batches[-1].append(group)
            room -= len(self.groups[group])
        return batches

    def __iter__(self):
        for number in range(self.start_batch, len(self)):
            batch = self.batches[(number * self.world_size + self.rank) % len(self.batches)]    # wraps around
            yield [index for group in batch for index in self.groups[group]]

    def length(self, epoch):
        """Batches of a rank in a whole epoch, the same for all ranks; it can differ between epochs."""
        return -(-len(self.pack(epoch)) // self.world_size)

    def __len__(self):
        """Batches of this rank in the whole current epoch, also after set_position."""
        return -(-len(self.batches) // self.world_size)

    def real(self, batch):
        """Images of this rank's batch number ``batch`` of the current epoch: 0 when it is a repeat."""
        number = batch * self.world_size + self.rank
        return sum(len(self.groups[group]) for group in self.batches[number]) \
            if number < len(self.batches) else 0


class ItemBatchSampler:
    """Batches of single items in ShardedSampler's padded order: on all ranks equally many and equally long.

    So a loss can gather them over the ranks.  Arguments: of ShardedSampler.
    For DataLoader(batch_sampler=...).  UserError: no items, or a batch size below 1.
    """

    def __init__(self, length, batch_size, shuffle, seed, rank, world_size, weights=None):
        if batch_size < 1:
            raise UserError(f"a batch of {batch_size} images: must be 1 at least")
        self.order = ShardedSampler(length, shuffle, seed, rank, world_size, weights=weights)
        self.batch_size, self.start_batch = batch_size, 0

    def set_position(self, epoch, start_batch=0):
        """Read ``epoch`` from this rank's batch ``start_batch`` on."""
        self.start_batch = start_batch
        self.order.set_position(epoch, start_batch, self.batch_size)

    def __iter__(self):
        indices = list(self.order)
        yield from (indices[start:start + self.batch_size]
                    for start in range(0, len(indices), self.batch_size))

    def length(self, epoch):
        """Batches of a rank in a whole epoch, the same for all ranks and epochs."""
        return len(self)

    def __len__(self):
        """Batches of this rank in a whole epoch, also after set_position."""
        return -(-len(self.order) // self.batch_size)

    def real(self, batch):
        """Items of this rank's batch number ``batch`` that are no repeats; these stand at its end."""
        order = self.order
        return count_real(batch, self.batch_size, order.length, order.rank, order.world_size)


def item_generator(seed, epoch, index):
    """torch.Generator for one item: equal for equal arguments, unrelated for any others."""
    state = np.random.SeedSequence([seed, epoch, index]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def check_on_bad_file(word):
    """The word itself.  Raises UserError when it is not one of ON_BAD_FILE."""
    if word not in ON_BAD_FILE:
        raise UserError(f'ON_BAD_FILE = "{word}": must be one of {", ".join(ON_BAD_FILE)}')
    return word


def first_readable(read, candidates, on_bad_file, kind):
    """(what ``read`` makes of the first of ``candidates`` that can be read, messages of those before it).

    on_bad_file: with "stop" the first BadFile is raised.  kind: the plural word for them.  UserError when
    none can be read.
    """
    bad_files = []
    for candidate in candidates:
        try:
            return read(candidate), bad_files
        except BadFile as error:
            if on_bad_file == "stop":
                raise
            bad_files.append(str(error))
    raise UserError(f"none of the {len(bad_files)} {kind} can be read: {bad_files[0]}")
