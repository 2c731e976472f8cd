"""Windows over a volume: nothing left out, blended as defined, the same bits for every share of the depth."""

from itertools import pairwise, product

import numpy as np
import pytest
import torch
from monai.data.utils import compute_importance_map
from monai.inferers import sliding_window_inference

from utils.config import UserError
from utils.sliding_window import Blend, importance, predict_slabs, window_starts, windows

PATCH, STRIDE, CLASSES = (6, 12, 10), (3, 6, 5), 3
KERNEL = torch.randn(CLASSES, 1, 3, 3, 3, generator=torch.Generator().manual_seed(0))


def network(images):
    """Probabilities that depend on the neighbours of a voxel, so on where a window ends."""
    return torch.conv3d(images, KERNEL, padding=1).softmax(1)


def volume(shape, seed=0):
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def whole(array, predict=network, patch=PATCH, stride=STRIDE, channels=CLASSES, **options):
    """All slabs of a call as one tensor."""
    slabs = predict_slabs(array, predict, patch, stride, channels=channels, **options)
    return torch.cat([slab.clone() for _, _, slab in slabs], 1)


class Reads:
    """A volume that remembers which sections were read."""

    def __init__(self, array):
        self.array, self.shape, self.sections = array, array.shape, []

    def __getitem__(self, place):
        self.sections += range(place[0].start, place[0].stop)
        return self.array[place]


def test_windows_cover_every_length():
    """Brute force over small sizes: a remainder without a window would be left without a label."""
    for patch in range(1, 8):
        for stride, length in product(range(1, patch + 1), range(1, 25)):
            starts = window_starts(length, patch, stride)
            covered = {voxel for start in starts for voxel in range(start, start + patch)}
            assert covered >= set(range(length)), (length, patch, stride)
            assert starts[0] == 0 and all(0 < b - a <= stride for a, b in pairwise(starts))
            assert starts[-1] == max(length - patch, 0)


@pytest.mark.parametrize("sizes", [(10, 4, 5), (10, 4, 0), (10, 0, 0), (0, 4, 2)])
def test_strides_that_leave_voxels_out_are_refused(sizes):
    """They would pass silently and give holes."""
    with pytest.raises(UserError):
        window_starts(*sizes)


def test_importance_is_monais_and_never_zero():
    """A weight of zero at a corner that one window alone covers would divide by zero."""
    for patch in ((8, 16, 12), (1, 32, 32), (64, 7, 3)):
        expected = compute_importance_map(patch, mode="gaussian", sigma_scale=0.125)
        torch.testing.assert_close(importance(patch, "gaussian"), expected, rtol=1e-6, atol=1e-7)
        assert importance(patch, "gaussian").min() >= 1e-3
        assert (importance(patch, "average") == 1).all()
    with pytest.raises(UserError, match="gaussian, average, max"):
        importance((4, 4, 4), "mean")


@pytest.mark.parametrize("aggregation", ["gaussian", "average", "max"])
@pytest.mark.parametrize("shape, stride", [
    ((12, 24, 20), STRIDE), ((13, 25, 23), STRIDE), ((7, 13, 10), (2, 4, 3)), ((14, 31, 22), (5, 7, 10)),
    ((6, 12, 21), STRIDE)])
def test_blending_equals_its_definition(aggregation, shape, stride):
    """The sums are never whole in memory; they must still be the weighted mean, or the maximum."""
    array = volume(shape)
    total = torch.zeros(shape, dtype=torch.float64)
    expected = torch.zeros(CLASSES, *shape, dtype=torch.float64)
    weight = importance(PATCH, aggregation).double()
    for corner in product(*windows(shape, PATCH, stride)):
        here = tuple(slice(start, start + size) for start, size in zip(corner, PATCH, strict=True))
        probabilities = network(torch.from_numpy(array[here])[None, None])[0].double()
        if aggregation == "max":
            expected[:, *here] = torch.maximum(expected[:, *here], probabilities)
        else:
            expected[:, *here] += weight * probabilities
            total[here] += weight
    expected /= expected.sum(0) if aggregation == "max" else total
    blended = whole(array, stride=stride, aggregation=aggregation)
    torch.testing.assert_close(blended.double(), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("shape", [(12, 24, 20), (13, 29, 34)])
def test_blending_equals_monais(shape):
    """The peer that users would otherwise take."""
    array = volume(shape)
    expected = sliding_window_inference(torch.from_numpy(array)[None, None], PATCH, 4, network, overlap=0.5,
                                        mode="gaussian")[0]
    torch.testing.assert_close(whole(array), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("aggregation", ["gaussian", "max"])
def test_every_share_of_the_depth_gives_the_same_bits(aggregation):
    """Ranks share sections and a run goes on at any slab.

    This network mixes the windows of a batch, so the batches must be the same ones too.
    """
    def mixing(images):
        return (network(images) + 0.1 * len(images) + images.mean()).softmax(1)

    array = volume((13, 16, 13))
    expected = whole(array, mixing, aggregation=aggregation)
    for cut in range(1, 13):
        parts = [whole(array, mixing, aggregation=aggregation, z_range=z) for z in ((0, cut), (cut, 13))]
        assert torch.equal(torch.cat(parts, 1), expected), cut
    singles = [whole(array, mixing, aggregation=aggregation, z_range=(z, z + 1)) for z in range(13)]
    assert torch.equal(torch.cat(singles, 1), expected)


def test_slabs_come_in_order_and_fill_the_range():
    """The writer appends them; a slab is no deeper than the stride where windows are regular."""
    for depth, z_range in ((16, (0, 16)), (17, (0, 17)), (16, (4, 11)), (4, (0, 4)), (6, (1, 2))):
        edges = [z_range[0]]
        for z0, z1, slab in predict_slabs(volume((depth, 12, 10)), network, PATCH, STRIDE, channels=CLASSES,
                                          z_range=z_range):
            assert z0 == edges[-1] and slab.shape == (CLASSES, z1 - z0, 12, 10)
            assert z1 - z0 <= (3 if depth > 6 else depth)
            edges.append(z1)
        assert edges[-1] == z_range[1]


def test_no_sections_need_no_network():
    """A rank beyond the sections."""
    assert not list(predict_slabs(volume((8, 8, 8)), None, PATCH, STRIDE, channels=2, z_range=(8, 8)))
    with pytest.raises(ValueError, match="not within"):
        next(predict_slabs(volume((8, 8, 8)), None, PATCH, STRIDE, channels=2, z_range=(0, 9)))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 30, 30), (30, 5, 30), (3, 4, 3), (5, 11, 9)])
def test_a_volume_below_the_window_is_reflected_and_cut_back(shape):
    """The network always sees windows of the size it was trained on, and no black border."""
    seen = []

    def predict(images):
        seen.append(images)
        return torch.cat([images, 1 - images], 1)

    array = volume(shape) + 0.5
    blended = whole(array, predict, channels=2)
    torch.testing.assert_close(blended[0], torch.from_numpy(array), rtol=1e-5, atol=0)
    assert all(images.shape[2:] == PATCH and images.min() >= 0.5 for images in seen)


def test_each_window_is_handed_out_once_over_all_ranges():
    """Instances are found from what a window alone gave: its own outputs, cut to the volume."""
    array = volume((14, 10, 23))
    found = {}

    def keep(index, start, outputs):
        assert index not in found
        found[index] = start, [part.clone() for part in outputs]

    def predict(images):
        return network(images), images.repeat(1, 5, 1, 1, 1)

    for z_range in ((0, 4), (4, 5), (5, 14)):
        whole(array, predict, on_window=keep, batch_size=2, z_range=z_range)
    starts = windows(array.shape, PATCH, STRIDE)
    assert sorted(found) == list(product(*(range(len(axis)) for axis in starts)))
    for index, (start, (probabilities, embedding)) in found.items():
        assert start == tuple(axis[i] for axis, i in zip(starts, index, strict=True))
        here = array[tuple(slice(s, s + size) for s, size in zip(start, PATCH, strict=True))]
        assert probabilities.shape[1:] == embedding.shape[1:] == here.shape
        assert (embedding.numpy() == here).all()


def test_windows_of_finished_slabs_have_all_been_handed_out():
    """A run that goes on behind a slab must find the instances of that slab's windows on disk."""
    done = []
    slabs = predict_slabs(volume((16, 12, 10)), network, PATCH, STRIDE, channels=CLASSES,
                          on_window=lambda index, start, outputs: done.append(start[0]))
    starts = window_starts(16, 6, 3)
    for _, z1, _ in slabs:
        assert done == [z for z in starts if z < z1]


def test_each_section_is_read_once_and_as_it_is_stored():
    """Compressed files are slow to read; an 8-bit volume must not become four times larger in memory."""
    array = (255 * volume((17, 25, 23))).astype(np.uint8)
    before, dtypes = array.copy(), set()

    def scale(window):
        dtypes.add(window.dtype)
        return window / np.float32(255)

    reads = Reads(array)
    scaled = whole(reads, scale=scale)
    assert reads.sections == list(range(17)) and dtypes == {np.dtype(np.uint8)}
    assert (array == before).all()
    assert torch.equal(scaled, whole(array / np.float32(255)))


def test_what_is_kept_does_not_grow_with_the_depth():
    """Every tensor that outlives a window: the same bytes for 64 and for 6400 sections."""
    def kept(depth):
        shape = (depth, 60, 50)
        starts = windows(shape, PATCH, STRIDE)
        blend = Blend(shape, PATCH, starts, CLASSES, "gaussian", (0, depth), None, "cpu")
        blend.add((0, 0, 0), torch.rand(CLASSES, *PATCH))
        return sum(tensor.nbytes for tensor in (*blend.carries, blend.window, blend.weight, blend.slab))

    assert kept(63) == kept(6300) <= 4 * 1.4 * CLASSES * PATCH[0] * 60 * 50


def test_slices_are_windows_of_one_section():
    """2D networks: no section may know of its neighbours."""
    def flat(images):
        assert images.shape[1:] == (1, 1, 12, 10)
        return torch.conv2d(images[:, :, 0], KERNEL[:, :, 1], padding=1).softmax(1)[:, :, None]

    array = volume((5, 25, 23))
    together = whole(array, flat, patch=(1, 12, 10), stride=(1, 6, 5))
    alone = [whole(array[z:z + 1], flat, patch=(1, 12, 10), stride=(1, 6, 5)) for z in range(5)]
    assert torch.equal(together, torch.cat(alone, 1))


@pytest.mark.parametrize("shape", [(16, 25, 23), (17, 25, 23), (4, 5, 6)])
def test_a_finished_part_may_be_reduced_at_once(shape):
    """Labels take a sixteenth of the memory of probabilities of 4 classes; they must be the same labels."""
    labels = whole(volume(shape), finish=lambda part: part.argmax(0, keepdim=True).to(torch.uint8))
    assert labels.dtype == torch.uint8 and labels.shape == (1, *shape)
    assert torch.equal(labels[0], whole(volume(shape)).argmax(0).to(torch.uint8))


def test_half_precision_and_inference_tensors_are_summed_in_float32():
    """What a predict under autocast and inference_mode gives."""
    @torch.inference_mode()
    def predict(images):
        return network(images).bfloat16()

    array = volume((9, 25, 23))
    blended = whole(array, predict)
    assert blended.dtype == torch.float32
    torch.testing.assert_close(blended, whole(array), rtol=0, atol=4e-3)
    torch.testing.assert_close(blended, whole(array, lambda images: network(images).bfloat16().float()),
                               rtol=0, atol=1e-6)


def test_no_graph_is_kept():
    """A predict without no_grad would otherwise hold every window's activations."""
    weight = KERNEL.clone().requires_grad_()
    for aggregation in ("gaussian", "max"):
        slabs = predict_slabs(volume((9, 12, 10)), lambda x: torch.conv3d(x, weight, padding=1).softmax(1),
                              PATCH, STRIDE, channels=CLASSES, aggregation=aggregation)
        assert not any(slab.requires_grad for _, _, slab in slabs)
    assert torch.is_grad_enabled()


def test_wrong_outputs_and_batches_are_named():
    """Too few channels would be broadcast silently."""
    with pytest.raises(ValueError, match="probabilities"):
        whole(volume((9, 12, 10)), channels=1)
    with pytest.raises(UserError, match="batch of 0"):
        whole(volume((9, 12, 10)), batch_size=0)
