"""Who reads what, and where a resumed epoch goes on."""

import pytest
from torch.utils.data import DataLoader

from datasets.samplers import ShardedSampler, count_real
from utils.config import UserError


def share(rank, world_size, length=11, shuffle=True, seed=0, epoch=1, pad=True):
    sampler = ShardedSampler(length, shuffle, seed, rank, world_size, pad)
    sampler.set_position(epoch)
    assert len(sampler) == len(list(sampler))
    return list(sampler)


@pytest.mark.parametrize("length, world_size", [(11, 3), (12, 3), (2, 4), (5, 1)])
def test_ranks_read_equally_many_and_together_all(length, world_size):
    """A rank that ran out of batches early would leave the others waiting for its gradients."""
    shares = [share(rank, world_size, length) for rank in range(world_size)]
    assert len({len(part) for part in shares}) == 1
    assert set().union(*shares) == set(range(length))


@pytest.mark.parametrize("length, world_size", [(11, 3), (12, 3), (2, 4), (5, 1)])
def test_evaluation_reads_each_sample_once(length, world_size):
    """Repeats would count twice in a metric."""
    shares = [share(rank, world_size, length, shuffle=False, pad=False) for rank in range(world_size)]
    assert sorted(index for part in shares for index in part) == list(range(length))


def test_the_order_depends_on_seed_and_epoch_alone():
    """Not on the object, the number of ranks, or what was read before."""
    one = share(0, 1)
    assert one == share(0, 1) and one != list(range(11))
    assert one != share(0, 1, epoch=2) and one != share(0, 1, seed=1)
    two = [share(rank, 2, 11) for rank in range(2)]
    assert [two[i % 2][i // 2] for i in range(11)] == one
    assert share(0, 1, shuffle=False) == list(range(11))


def test_a_resumed_epoch_goes_on_with_the_next_batch():
    """The rest is that of an epoch that was never stopped; the length stays that of the whole epoch."""
    sampler = ShardedSampler(11, True, 0, 0, 2)
    loader = DataLoader(range(11), batch_size=2, sampler=sampler)
    sampler.set_position(3)
    whole = [batch.tolist() for batch in loader]
    sampler.set_position(3, start_batch=2, batch_size=2)
    assert [batch.tolist() for batch in loader] == whole[2:]
    assert len(loader) == len(whole)
    sampler.set_position(4)
    assert len(list(loader)) == len(whole)


@pytest.mark.parametrize("length, world_size, batch_size",
                         [(11, 3, 2), (12, 3, 4), (2, 4, 1), (9, 1, 4), (10, 4, 2)])
def test_real_samples_are_counted_without_repeats(length, world_size, batch_size):
    """Metrics over a padded order leave the repeats out and miss nothing."""
    seen = []
    for rank in range(world_size):
        indices = share(rank, world_size, length, shuffle=False)
        for batch, start in enumerate(range(0, len(indices), batch_size)):
            real = count_real(batch, batch_size, length, rank, world_size)
            seen += indices[start:start + batch_size][:real]
    assert sorted(seen) == list(range(length))


def test_an_empty_data_set_is_an_error():
    """Training on nothing must not look like training."""
    with pytest.raises(UserError, match="no samples"):
        ShardedSampler(0, True, 0, 0, 1)
