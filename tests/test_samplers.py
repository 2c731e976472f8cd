"""Who reads what, and where a resumed epoch goes on."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from datasets.samplers import (
    ItemBatchSampler,
    StudyAwareBatchSampler,
    first_readable,
    item_generator,
)
from utils.config import BadFile, UserError


def share(rank, world_size, length=11, shuffle=True, seed=0, epoch=1):
    sampler = ItemBatchSampler(length, 1, shuffle, seed, rank, world_size)
    sampler.set_position(epoch)
    assert len(sampler) == len(list(sampler))
    return [index for index, in sampler]


@pytest.mark.parametrize("length, world_size", [(11, 3), (12, 3), (2, 4), (5, 1)])
def test_ranks_read_equally_many_and_together_all(length, world_size):
    """A rank that ran out of batches early would leave the others waiting for its gradients."""
    shares = [share(rank, world_size, length) for rank in range(world_size)]
    assert len({len(part) for part in shares}) == 1
    assert set().union(*shares) == set(range(length))


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
    sampler = ItemBatchSampler(11, 2, True, 0, 0, 2)
    loader = DataLoader(range(11), batch_sampler=sampler)
    sampler.set_position(3)
    whole = [batch.tolist() for batch in loader]
    sampler.set_position(3, start_batch=2)
    assert [batch.tolist() for batch in loader] == whole[2:]
    assert len(loader) == len(whole)
    sampler.set_position(4)
    assert len(list(loader)) == len(whole)


def test_an_empty_data_set_is_an_error():
    """Training on nothing must not look like training; nor a batch without room."""
    with pytest.raises(UserError, match="no samples"):
        ItemBatchSampler(0, 1, True, 0, 0, 1)
    with pytest.raises(UserError, match="a batch of 0"):
        ItemBatchSampler(1, 0, True, 0, 0, 1)


def studies(num_studies=37, most=9, seed=0):
    """Item indices of studies with 1 to ``most`` images each."""
    bounds = np.cumsum(np.random.default_rng(seed).integers(1, most + 1, num_studies))
    return [indices.tolist() for indices in np.split(np.arange(bounds[-1]), bounds[:-1])]


def batches_of(groups, rank=0, world_size=1, epoch=1, start_batch=0, batch_size=8, shuffle=True, seed=0):
    sampler = StudyAwareBatchSampler(groups, batch_size, shuffle, seed, rank, world_size)
    sampler.set_position(epoch, start_batch)
    return list(sampler)


@pytest.mark.parametrize("world_size", [1, 2, 3, 50])
@pytest.mark.parametrize("batch_size", [1, 4, 8, 100])
def test_every_study_is_whole_in_one_batch_and_read_once(world_size, batch_size):
    """Half a study has half its findings; over all ranks only the marked repeats come twice."""
    groups = studies()
    seen = []
    for rank in range(world_size):
        sampler = StudyAwareBatchSampler(groups, batch_size, True, 0, rank, world_size)
        for number, batch in enumerate(sampler):
            members = [group for group in groups if group[0] in batch]
            assert sorted(batch) == sorted(index for group in members for index in group)
            assert len(batch) <= batch_size or len(members) == 1
            seen += members if sampler.real(number) else []
    assert sorted(seen) == groups


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world_size", [1, 3])
def test_lengths_are_exact_in_every_epoch(world_size, shuffle):
    """Schedules end with the last step; a rank with one batch more would wait for the others for ever."""
    groups, lengths = studies(), set()
    samplers = [StudyAwareBatchSampler(groups, 8, shuffle, 0, rank, world_size) for rank in range(world_size)]
    announced = sum(samplers[0].length(epoch) for epoch in range(20))
    iterated = 0
    for epoch in range(20):
        for sampler in samplers:
            sampler.set_position(epoch)
        counts = {len(list(sampler)) for sampler in samplers}
        assert counts == {len(samplers[0])}
        lengths |= counts
        iterated += counts.pop()
    assert iterated == announced and (len(lengths) > 1) == shuffle


def test_studies_are_packed_in_order_until_the_next_does_not_fit():
    """Against packing by hand; the study of six images has a batch to itself."""
    groups = [[0, 1], [2], [3, 4], [5, 6, 7, 8, 9, 10], [11], [12, 13, 14]]
    assert batches_of(groups, shuffle=False, batch_size=4) == \
        [[0, 1, 2], [3, 4], [5, 6, 7, 8, 9, 10], [11, 12, 13, 14]]


def test_groups_of_one_image_are_plain_batches():
    """One sampler serves pretraining on single images too."""
    groups = [[i] for i in range(11)]
    assert batches_of(groups, shuffle=False, batch_size=4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert [index for batch in batches_of(groups, batch_size=4) for index in batch] == share(0, 1)


def test_study_batches_depend_on_seed_and_epoch_alone():
    """Not on the number of ranks: they deal out the same batches."""
    groups, one = studies(), batches_of(studies())
    assert one == batches_of(groups)
    assert one != batches_of(groups, epoch=2) and one != batches_of(groups, seed=1)
    dealt = [batches_of(groups, rank, 3) for rank in range(3)]
    assert [dealt[i % 3][i // 3] for i in range(len(one))] == one
    assert [dealt[i % 3][i // 3] for i in range(len(one), 3 * len(dealt[0]))] == one[:-len(one) % 3]


def test_a_resumed_epoch_of_studies_goes_on_with_the_next_batch():
    """The rest is that of an epoch that was never stopped, through a loader; the length stays the epoch's."""
    groups = studies()
    whole = batches_of(groups, rank=1, world_size=2, epoch=3)
    sampler = StudyAwareBatchSampler(groups, 8, True, 0, 1, 2)
    loader = DataLoader(range(1000), batch_sampler=sampler)
    sampler.set_position(3, start_batch=5)
    assert [batch.tolist() for batch in loader] == whole[5:]
    assert len(loader) == len(whole)
    sampler.set_position(4)
    assert [batch.tolist() for batch in loader] == batches_of(groups, rank=1, world_size=2, epoch=4)


def test_study_batches_of_nothing_are_an_error():
    """Neither an empty data set, nor a study without images, nor a batch without room."""
    for groups, batch_size, message in ([], 4, "no studies"), ([[0], []], 4, "without"), ([[0]], 0, "batch"):
        with pytest.raises(UserError, match=message):
            StudyAwareBatchSampler(groups, batch_size, True, 0, 0, 1)


def test_generators_are_equal_for_equal_arguments_alone():
    """An item's draws must not repeat those of another item, epoch or seed."""
    draws = {tuple(torch.rand(2, generator=item_generator(seed, epoch, index)).tolist())
             for seed in range(5) for epoch in range(5) for index in range(5)}
    assert len(draws) == 125
    assert torch.equal(torch.rand(9, generator=item_generator(1, 2, 3)),
                       torch.rand(9, generator=item_generator(1, 2, 3)))


@pytest.mark.parametrize("length, world_size, batch_size", [(10, 1, 4), (10, 3, 2), (7, 2, 4), (2, 4, 1)])
def test_item_batches_are_equally_long_on_all_ranks(length, world_size, batch_size):
    """A loss that gathers projections needs as many on every rank; repeats are told, and stand at the end."""
    ranks = [ItemBatchSampler(length, batch_size, True, 3, rank, world_size) for rank in range(world_size)]
    seen = []
    for sampler in ranks:
        sampler.set_position(2)
        batches = list(sampler)
        assert len(batches) == len(sampler) == sampler.length(5)
        seen += [index for number, batch in enumerate(batches) for index in batch[:sampler.real(number)]]
    assert sorted(seen) == list(range(length))
    assert len({tuple(map(len, sampler)) for sampler in ranks}) == 1
    ranks[0].set_position(2, 1)
    again = list(ranks[0])
    ranks[0].set_position(2)
    assert again == list(ranks[0])[1:]


def test_weighted_items_come_as_often_as_their_weights_say():
    """Drawn with replacement from (seed, epoch) alone."""
    weights = torch.tensor([3.0, 1.0] * 2000)
    sampler, other = (ItemBatchSampler(4000, 50, True, 0, 0, 1, weights) for _ in range(2))
    for each in (sampler, other):
        each.set_position(4)
    drawn = [index for batch in sampler for index in batch]
    assert drawn == [index for batch in other for index in batch]
    assert sum(index % 2 == 0 for index in drawn) == pytest.approx(3000, abs=110)        # four deviations


def test_unreadable_candidates_are_named_and_the_first_readable_one_is_used():
    """A bad file must be reported, never be silently replaced, and never end a run that may skip it."""
    def read(name):
        if name.startswith("bad"):
            raise BadFile(f"{name}: no image")
        return name.upper()

    assert first_readable(read, ["bad1", "bad2", "good", "bad3"], "skip", "photographs") == (
        "GOOD", ["bad1: no image", "bad2: no image"])
    with pytest.raises(BadFile, match="bad1"):
        first_readable(read, ["bad1", "good"], "stop", "photographs")
    with pytest.raises(UserError, match="none of the 2 photographs can be read: bad1"):
        first_readable(read, ["bad1", "bad2"], "skip", "photographs")
