"""Which samples a process reads, in which order, and from where a resumed epoch goes on."""

import numpy as np
import torch

from utils.config import BadFile, UserError

ON_BAD_FILE = ("stop", "skip")


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
        self.set_position(0)

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
    """Batches of single items, on all ranks equally many and equally long, so that a loss can gather them.

    Rank r takes every world_size-th of the items 0 .. length - 1 from the r-th on; the first of the order are
    read again at the end.  The order depends on (seed, epoch) alone, so that a resumed run reads what the
    first run would have read.  weights [length], positive: draw with replacement, an item as often as its
    share of the weights says.  For DataLoader(batch_sampler=...).  UserError: no items, or a batch size
    below 1.
    """

    def __init__(self, length, batch_size, shuffle, seed, rank, world_size, weights=None):
        if length < 1:
            raise UserError("no samples to read; check --data and the split fractions")
        if batch_size < 1:
            raise UserError(f"a batch of {batch_size} images: must be 1 at least")
        self.items, self.batch_size, self.shuffle, self.seed = length, batch_size, shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.shares = None if weights is None else np.asarray(weights, np.float64)
        self.set_position(0)

    def set_position(self, epoch, start_batch=0):
        """Read ``epoch`` from this rank's batch ``start_batch`` on."""
        self.epoch, self.start_batch = epoch, start_batch

    def __iter__(self):
        order, generator = np.arange(self.items), np.random.default_rng([self.seed, self.epoch])
        if self.shares is not None:
            order = generator.choice(self.items, self.items, p=self.shares / self.shares.sum())
        elif self.shuffle:
            order = generator.permutation(self.items)
        padded = np.resize(order, -(-self.items // self.world_size) * self.world_size)       # wraps around
        own = padded[self.rank::self.world_size].tolist()
        for start in range(self.start_batch * self.batch_size, len(own), self.batch_size):
            yield own[start:start + self.batch_size]

    def length(self, epoch):
        """Batches of a rank in a whole epoch, the same for all ranks and epochs."""
        return -(-self.items // (self.world_size * self.batch_size))

    def __len__(self):
        """As ``length``, also after set_position: schedules count whole epochs."""
        return self.length(self.epoch)

    def real(self, batch):
        """Items of this rank's batch number ``batch`` that are no repeats; these stand at its end."""
        share = len(range(self.rank, self.items, self.world_size))
        return min(max(share - batch * self.batch_size, 0), self.batch_size)


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
