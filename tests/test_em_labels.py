"""Labels of electron microscopy crops: components, boundaries, weights, and what a label may mean."""

import itertools
from pathlib import Path

import h5py
import numpy as np
import pytest
from scipy import ndimage
from skimage.measure import label

from datasets.em_labels import (
    BOUNDARY,
    CLASSES,
    IGNORE,
    INSTANCE_CLASSES,
    boundaries,
    instance_weights,
    meaning_of,
    relabel,
)
from utils.config import UserError

EM = Path(__file__).parents[2] / "shared" / "data" / "em"
ISOTROPIC, SECTIONS = (8.0, 8.0, 8.0), (40.0, 4.0, 5.0)


def blobs(shape, ids=5, seed=0, size=3):
    """int32 array of random blocks of `size` voxels a side, 0..ids - 1."""
    small = np.random.default_rng(seed).integers(0, ids, [-(-n // size) for n in shape])
    return np.kron(small, np.ones([size] * len(shape), int))[tuple(map(slice, shape))].astype(np.int32)


def naive_boundaries(instances, reach):
    """Voxels with an unequal one within `reach` steps along each axis, voxel by voxel."""
    result = np.zeros(instances.shape, bool)
    for index in np.ndindex(instances.shape):
        near = itertools.product(*(range(max(i - r, 0), min(i + r + 1, n))
                                   for i, r, n in zip(index, reach, instances.shape, strict=True)))
        result[index] = any(instances[other] != instances[index] for other in near)
    return result


def naive_weights(instances, spacing_nm, edge, bone, border):
    """Weights by one scipy distance transform for each instance."""
    weight = np.ones(instances.shape)
    for i in np.unique(instances[instances > 0]):
        mask = instances == i
        distance = ndimage.distance_transform_edt(mask, sampling=spacing_nm[-mask.ndim:])
        weight[mask] = (np.where(border, edge, 1) * (1 + (bone - 1) * distance / distance.max()))[mask]
    return weight


def test_classes_and_constants_agree():
    """Class maps, data sets and the network index by these positions."""
    assert [CLASSES[c] for c in INSTANCE_CLASSES] == ["neuron", "cleft", "mitochondrion"]
    assert CLASSES[BOUNDARY] == "boundary" and IGNORE not in range(len(CLASSES))


@pytest.mark.parametrize("shape", [(6, 9, 12), (17, 21)])
def test_relabel_finds_the_components_that_scikit_image_finds(shape):
    """Faces connect, edges and corners do not; ids are 1..K in the order of first voxels, as skimage's."""
    instances = blobs(shape, ids=4)
    found = relabel(instances)
    assert found.dtype == np.int32 and found.max() > instances.max()
    np.testing.assert_array_equal(found, label(instances, background=0, connectivity=1))


def test_diagonal_neighbours_are_two_instances():
    """A membrane of one voxel between neurites is open at corners; through them they must not be one."""
    assert relabel(np.eye(2, dtype=int)).max() == 2
    assert relabel(np.eye(2, dtype=int)[None]).max() == 2
    assert relabel(np.eye(2, dtype=int)[:, None] * np.ones((1, 3, 1), int)).max() == 2


@pytest.mark.parametrize("dtype", ["bool", "u1", "<i2", ">u2", ">i4", "<i8", "<u8", ">u8"])
def test_relabel_takes_integers_of_every_kind(dtype):
    """HDF5 and TIFF files hold big-endian and 64-bit ids."""
    instances = blobs((4, 7, 8), ids=2).astype(dtype)
    np.testing.assert_array_equal(relabel(instances), label(instances != 0, connectivity=1))


def test_relabel_tells_apart_ids_beyond_float64_and_int32():
    """Ids of proofread volumes are uint64; rounded or cut to 32 bits, neighbours would merge."""
    high = np.uint64(2 ** 63)
    instances = np.array([[[high, high + np.uint64(1), 1, 1 + 2 ** 32, 0]]], np.uint64)
    np.testing.assert_array_equal(relabel(instances), [[[1, 2, 3, 4, 0]]])


def test_relabel_reads_any_memory_layout():
    """Crops are views: transposed, reversed, strided."""
    instances = blobs((6, 8, 10), ids=4)
    for view in (instances.T, instances[:, ::-1], instances[::2, :, 1::3], np.asfortranarray(instances)):
        np.testing.assert_array_equal(relabel(view), label(view, background=0, connectivity=1))


def test_relabel_leaves_its_input_and_empty_crops_alone():
    """A crop without instances is common and stays without."""
    instances = blobs((4, 5, 6))
    before = instances.copy()
    relabel(instances)
    np.testing.assert_array_equal(instances, before)
    assert not relabel(np.zeros((3, 4, 5), np.uint64)).any()


def test_ids_that_are_no_integers_are_refused():
    """Interpolated label maps come as floats, and cc3d would take each value for an id."""
    with pytest.raises(UserError, match="float32"):
        relabel(np.ones((2, 2, 2), np.float32))


@pytest.mark.parametrize("shape, spacing_nm, reach", [
    ((5, 7, 8), ISOTROPIC, (1, 1, 1)),
    ((5, 7, 8), (10.0, 4.0, 5.0), (1, 1, 1)),             # exactly twice the larger side of a pixel
    ((5, 7, 8), SECTIONS, (0, 1, 1)),
    ((9, 11), SECTIONS, (1, 1)),
    ((1, 9, 11), ISOTROPIC, (1, 1, 1)),
])
def test_boundaries_equal_a_loop_over_voxels(shape, spacing_nm, reach):
    """Also at the faces of the crop, behind which nothing is seen."""
    instances = blobs(shape, ids=4)
    found = boundaries(instances, spacing_nm)
    np.testing.assert_array_equal(found, naive_boundaries(instances, reach))
    assert found.dtype == bool and found.any() and not found.all()


def test_a_boundary_between_sections_counts_only_where_they_are_near():
    """Two neurites one above the other: with far sections the change of section is no membrane."""
    instances = np.repeat(np.array([1, 1, 2, 2], np.int32), 9).reshape(4, 3, 3)
    assert boundaries(instances, ISOTROPIC)[:, 1, 1].tolist() == [False, True, True, False]
    assert not boundaries(instances, SECTIONS).any()


@pytest.mark.parametrize("spacing_nm", [ISOTROPIC, SECTIONS, (5.0, 4.0, 40.0), (30.0, 6.0, 6.0)])
@pytest.mark.parametrize("shape", [(12, 14, 16), (20, 25)])
def test_weights_equal_one_scipy_transform_per_instance(shape, spacing_nm):
    """The axes of the spacing are in the right order: a swap changes the distances."""
    instances = relabel(blobs(shape, ids=6, size=4))
    border = boundaries(instances, spacing_nm)
    found = instance_weights(instances, spacing_nm, edge=10.0, bone=7.0)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, naive_weights(instances, spacing_nm, 10, 7, border), rtol=3e-7)


def test_distances_are_those_of_scipy_to_the_last_bit():
    """With bone = 2 and one instance the weight is 1 + EDT / maximum, in float32."""
    mask = np.zeros((9, 12, 15), np.int32)
    mask[2:8, 3:, :11] = 1
    distance = ndimage.distance_transform_edt(mask, sampling=SECTIONS).astype(np.float32)
    weight = instance_weights(mask, SECTIONS, edge=1, bone=2)
    np.testing.assert_array_equal(weight[mask > 0], (1 + distance / distance.max())[mask > 0])


def test_weights_do_not_depend_on_memory_layout():
    """edt takes the spacing by memory order if it is let; crops come transposed and reversed."""
    instances = relabel(blobs((8, 12, 10), ids=6, size=4))
    expected = instance_weights(instances, SECTIONS)
    np.testing.assert_array_equal(instance_weights(np.asfortranarray(instances), SECTIONS), expected)
    turned = instance_weights(instances.transpose(2, 0, 1), (SECTIONS[2], *SECTIONS[:2]), edge=1)
    np.testing.assert_array_equal(turned, instance_weights(instances, SECTIONS, edge=1).transpose(2, 0, 1))


def test_the_face_of_a_crop_is_no_membrane():
    """A neurite that runs through the crop is deepest where it leaves it too, not only in the middle."""
    instances = np.zeros((9, 7, 7), np.int32)
    instances[:, 1:6, 1:6] = 1
    weight = instance_weights(instances, ISOTROPIC, edge=1, bone=10)
    assert (weight[:, 3, 3] == 10).all()


def test_weights_outside_and_switched_off_are_one():
    """edge and bone each count alone; background keeps weight 1 even beside an instance."""
    instances = relabel(blobs((9, 12, 12)))
    border = boundaries(instances, ISOTROPIC)
    both, edge, bone = (instance_weights(instances, ISOTROPIC, *x) for x in ((10, 7), (10, 1), (1, 7)))
    assert (both[instances == 0] == 1).all() and border[instances == 0].any()
    np.testing.assert_array_equal(edge, np.where(border & (instances > 0), 10, 1))
    np.testing.assert_allclose(both, edge * bone, rtol=1e-6)
    assert bone[instances > 0].min() > 1 and bone.max() == 7
    assert (instance_weights(instances, ISOTROPIC, 1, 1) == 1).all()


def test_no_distance_is_computed_without_bone_weights(monkeypatch):
    """The transform is most of the time of a sample."""
    monkeypatch.setattr("datasets.em_labels.edt.edt", None)
    instance_weights(blobs((4, 5, 6)), ISOTROPIC, bone=1)


@pytest.mark.parametrize("value", [0, 1])
def test_crops_of_one_value_have_finite_weights(value):
    """Nothing but background, or one soma that fills the crop: its distances are infinite."""
    assert (instance_weights(np.full((3, 4, 5), value, np.int32), ISOTROPIC) == 1).all()


def test_a_data_set_of_neurons_hides_mitochondria_and_clefts():
    """SNEMI3D: mitochondria lie in the neurons, clefts in membranes and between neurons."""
    expected = np.eye(5, dtype=bool)
    expected[1, 3] = expected[0, 2] = expected[4, 2] = True
    np.testing.assert_array_equal(meaning_of(["neuron"]), expected)


def test_a_data_set_of_mitochondria_hides_all_else_in_its_background():
    """MitoEM2: an unlabelled voxel may be of any other class; what is labelled is what it says."""
    expected = np.eye(5, dtype=bool)
    expected[0] = [True, True, True, False, True]
    np.testing.assert_array_equal(meaning_of(["mitochondrion"]), expected)


def test_traced_membranes_without_neurons_hide_neurons_and_clefts():
    """A membrane map says where boundary is and where not; a cleft lies in a membrane and is as dark."""
    expected = np.eye(5, dtype=bool)
    expected[0] = [True, True, True, True, False]
    expected[4, 2] = True
    np.testing.assert_array_equal(meaning_of(["boundary"]), expected)


def test_every_label_may_mean_itself_and_beyond_that_only_what_is_not_annotated():
    """A row without its own class would forbid the label; an annotated class is where its label is."""
    for words in itertools.chain.from_iterable(itertools.combinations(CLASSES[1:], n) for n in range(5)):
        meaning = meaning_of(words)
        assert meaning.shape == (5, 5) and meaning.dtype == bool and meaning.diagonal().all()
        beyond = (meaning & ~np.eye(5, dtype=bool)).any(0)
        assert not {CLASSES[c] for c in np.flatnonzero(beyond)} & {"background", *words}
        if "neuron" not in words:
            assert meaning[0, 1]
    np.testing.assert_array_equal(meaning_of(CLASSES[1:]), np.eye(5, dtype=bool))


def test_an_unknown_class_word_is_refused():
    """"mitochondria" instead of "mitochondrion" would silently count as not annotated."""
    with pytest.raises(UserError, match="mitochondria"):
        meaning_of(["neuron", "mitochondria"])


@pytest.mark.skipif(not EM.exists(), reason=f"no real data in {EM}")
def test_a_crop_of_real_neurites_agrees_with_scikit_image_and_scipy():
    """Real ids are uint16 and uint64, touch each other, and fall apart at the faces of a crop."""
    with h5py.File(EM / "fib25_sample2" / "fib25_labels.h5") as file:
        instances = file["main"][40:64, 60:124, 60:124]
    found = relabel(instances)
    np.testing.assert_array_equal(found, label(instances, background=0, connectivity=1))
    assert found.max() > len(np.unique(instances))
    border = boundaries(found, ISOTROPIC)
    weight = instance_weights(found, ISOTROPIC)
    largest = np.argsort(np.bincount(found.ravel()))[-5:]
    for i in largest:
        own = np.where(found == i, found, 0)
        expected = naive_weights(own, ISOTROPIC, 10, 10, border)
        np.testing.assert_allclose(weight[found == i], expected[found == i], rtol=3e-7)


def test_a_label_never_means_what_nobody_annotates():
    """With neurons alone in the training, "neuron or mitochondrion" would leave the choice to chance."""
    np.testing.assert_array_equal(meaning_of(["neuron"], ["neuron"]), np.eye(5, dtype=bool))
    both = meaning_of(["neuron"], ["neuron", "mitochondrion"])
    assert both[1, 3] and both.sum() == 6
