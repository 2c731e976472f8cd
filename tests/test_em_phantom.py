"""Synthetic neuropil: truth that is consistent, and an image that a threshold does not solve."""

import cc3d
import numpy as np
import pytest
from scipy import ndimage
from skimage.metrics import adapted_rand_error

from datasets.em_phantom import MIN_VOXELS, expose, noise, pieces, spline, stamp, tissue, tube_scores

SHAPE, SPACING = (20, 80, 80), (30.0, 8.0, 8.0)


@pytest.fixture(scope="module")
def block():
    return tissue(SHAPE, SPACING, 4)


def ids(labels):
    return np.unique(labels[labels > 0])


def filled(labels):
    """Every voxel that has no label gets the nearest one of its section."""
    for section in labels:
        if section.any():
            section[:] = section[tuple(ndimage.distance_transform_edt(section == 0, return_distances=False,
                                                                      return_indices=True))]
    return labels


def test_every_array_has_its_type_and_every_class_occurs(block):
    """What files and losses rely on."""
    types = {"raw": "uint8", "neurons": "uint32", "mitochondria": "uint32", "clefts": "uint32",
             "membranes": "bool"}
    assert {name: str(array.dtype) for name, array in block.items()} == types
    assert all(array.shape == SHAPE and array.any() for array in block.values())
    for name in ("neurons", "mitochondria", "clefts"):
        assert np.array_equal(ids(block[name]), np.arange(1, block[name].max() + 1))
    assert len(ids(block["neurons"])) > 10 and len(ids(block["mitochondria"])) > 2
    assert 0 < (block["neurons"] == 0).mean() < 0.1
    assert 0.1 < block["membranes"].mean() < 0.5


@pytest.mark.parametrize("name", ["neurons", "mitochondria", "clefts"])
def test_each_id_is_one_piece(block, name):
    """Instances are found by connectivity: an id in two places would be an error of the truth."""
    for instance in ids(block[name]):
        mask = block[name] == instance
        assert ndimage.label(mask)[1] == 1 and mask.sum() >= MIN_VOXELS


def test_each_mitochondrion_lies_in_one_neuron_and_off_its_membrane(block):
    """A class inside another: both labels must agree."""
    for instance in ids(block["mitochondria"]):
        mask = block["mitochondria"] == instance
        hosts = np.unique(block["neurons"][mask])
        assert len(hosts) == 1 and hosts[0] > 0
    assert not (block["membranes"] & (block["mitochondria"] > 0)).any()


def test_each_cleft_lies_where_two_neurons_meet(block):
    """A synapse joins two cells."""
    two = np.ones((3, 3, 3), bool)
    for instance in ids(block["clefts"]):
        mask = block["clefts"] == instance
        assert (block["membranes"] & mask).sum() > 0.6 * mask.sum()
        assert len(ids(block["neurons"][ndimage.binary_dilation(mask, two)])) >= 2


def test_membranes_part_the_neurons(block):
    """Without a membrane between them, two neurons could not be told apart by anyone."""
    for axis in (1, 2):
        first = [slice(None)] * 3
        first[axis] = slice(1, None)
        second = [slice(None)] * 3
        second[axis] = slice(None, -1)
        here, there = block["neurons"][tuple(first)], block["neurons"][tuple(second)]
        border = (here != there) & (here > 0) & (there > 0)
        assert (block["membranes"][tuple(first)] | block["membranes"][tuple(second)])[border].mean() > 0.99


def test_membranes_and_mitochondria_are_dark_and_alike(block):
    """Darkness alone must not tell a membrane from a mitochondrion, as in real images."""
    raw, inside = block["raw"].astype(float), ~block["membranes"] & (block["mitochondria"] == 0)
    cytoplasm = raw[inside & (block["neurons"] > 0)]
    membrane, mitochondrion = raw[block["membranes"]].mean(), raw[block["mitochondria"] > 0].mean()
    assert max(membrane, mitochondrion) < cytoplasm.mean() - 1.5 * cytoplasm.std()
    assert abs(membrane - mitochondrion) < 25


def test_some_membranes_are_faint(block):
    """Membranes that lie flat in a section, and badly stained ones, leave gaps; most have none."""
    core = np.zeros(SHAPE, bool)
    core[:, :, 1:] = block["neurons"][:, :, 1:] != block["neurons"][:, :, :-1]
    grey = ndimage.gaussian_filter(block["raw"].astype(float), (0, 0.7, 0.7))
    cytoplasm = grey[~block["membranes"] & (block["mitochondria"] == 0)]
    faint = (grey[core] > np.median(cytoplasm) - cytoplasm.std()).mean()
    assert 0.01 < faint < 0.25


def test_a_threshold_is_not_enough(block):
    """Adapted Rand error of the components of any threshold, in 3D and section by section, is bad, though
    membranes that were known would part the sections well."""
    truth, errors = block["neurons"], []
    for sigma in (0, 1):
        image = ndimage.gaussian_filter(block["raw"].astype(float), (0, sigma, sigma))
        for threshold in np.percentile(image, (10, 20, 30, 40, 50)):
            bright = image > threshold
            errors.append(adapted_rand_error(truth, cc3d.connected_components(bright, connectivity=6),
                                             ignore_labels=(0,))[0])
            errors.append(by_section(truth, bright))
    assert min(errors) > 0.3
    assert by_section(truth, ~block["membranes"]) < 0.5 * min(errors)


def by_section(truth, inside):
    """Mean adapted Rand error of the 4-connected components of each section, grown until they meet."""
    parts = np.stack([cc3d.connected_components(section, connectivity=4) for section in inside])
    return np.mean([adapted_rand_error(true, part, ignore_labels=(0,))[0]
                    for true, part in zip(truth, filled(parts), strict=True)])


def test_neurites_go_through_many_sections(block):
    """Whole neurites: each section shows about the cells of the one before it, somewhat moved."""
    truth = block["neurons"]
    kept = [(above == below).mean() for above, below in zip(truth[1:], truth[:-1], strict=True)]
    assert min(kept) > 0.6
    depths = [np.ptp(np.nonzero((truth == instance).any((1, 2)))[0]) + 1 for instance in ids(truth)]
    assert np.mean(depths) > 0.4 * SHAPE[0]


def test_sections_are_images_of_their_own():
    """One grey everywhere gets brightness that jumps between sections, and noise that differs everywhere."""
    grey = np.full((40, 48, 48), 128, np.float32)
    raw = expose(np.random.default_rng(0), grey, np.array(SPACING)).astype(float)
    means = raw.mean((1, 2))
    assert 4.5 < means.std() < 12 and abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.5
    grain = raw - means[:, None, None]
    assert 7 < grain.std() < 14
    assert abs((grain[1:] * grain[:-1]).mean()) < 0.1 * grain.var()


def test_the_seed_decides():
    """The same on every machine and in every process; another seed is another block."""
    first, again, other = (tissue((6, 40, 40), SPACING, seed) for seed in ([3, 1], [3, 1], [3, 2]))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["neurons"], other["neurons"])


def test_the_global_generator_is_neither_used_nor_touched():
    """A training run's own random numbers must not depend on whether demo data were made."""
    np.random.seed(0)
    expected = np.random.random()
    np.random.seed(0)
    tissue((4, 32, 32), SPACING, 0)
    assert np.random.random() == expected


def test_more_neurites_are_thinner():
    """The number of neurites sets their calibre."""
    counts = [tissue((8, 64, 64), SPACING, 0, neurites=count)["neurons"].max() for count in (20, 90)]
    assert counts[1] > 1.5 * counts[0]


@pytest.mark.parametrize("shape,spacing,settings", [
    ((1, 32, 32), SPACING, {}), ((5, 1, 9), SPACING, {}), ((12, 24, 24), (8.0, 8.0, 8.0), {}),
    ((4, 20, 50), SPACING, {"neurites": 1, "mitochondria": 0, "synapses": 0})])
def test_odd_blocks_are_made_too(shape, spacing, settings):
    """One section, one row, isotropic voxels, nothing in it."""
    block = tissue(shape, spacing, 0, **settings)
    assert {array.shape for array in block.values()} == {shape}
    for name in ("mitochondria", "clefts") if settings else ():
        assert not block[name].any()


def test_tube_scores_are_distance_minus_radius():
    """Against a naive loop over all points, on an undisturbed lattice."""
    rng = np.random.default_rng(0)
    points, radii, owner = rng.uniform(0, 250, (21, 3)), rng.uniform(20, 60, 21), np.arange(21) // 11
    scores = tube_scores(points, radii, owner, 2, np.zeros((3, 16, 14, 15)))
    axes = [(np.arange(n) - 3) * 24.0 for n in scores.shape[1:]]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    for number in range(2):
        naive = np.min([np.linalg.norm(grid - point, axis=-1) - radius for point, radius, mine
                        in zip(points, radii, owner, strict=True) if mine == number], axis=0)
        assert np.abs(scores[number] - np.minimum(naive, 120)).max() < 0.05


def test_spline_is_scipys():
    """Cubic B-spline without prefilter, as scipy.ndimage has it, but for the weights' rounding."""
    values = np.random.default_rng(0).normal(size=20)
    at = np.array([0.0, 3.3, 100.0, 250.1])
    expected = ndimage.map_coordinates(values, [at / 20 + 3], order=3, prefilter=False)
    assert np.abs(spline(at, 20, 20.0) @ values - expected).max() < 5e-3


def test_noise_is_standard_and_as_wide_as_asked():
    """Textures keep their strength and size in nm whatever the voxels."""
    for spacing in ((30.0, 8.0, 8.0), (10.0, 10.0, 10.0)):
        field = noise(np.random.default_rng(0), (40, 96, 96), np.array(spacing), 40.0)
        assert abs(field.std() - 1) < 0.15 and abs(field.mean()) < 0.1
        far = round(40 / spacing[2])
        assert 0.3 < (field[..., far:] * field[..., :-far]).mean() < 0.9
        assert abs((field[..., 5 * far:] * field[..., :-5 * far]).mean()) < 0.1


def test_small_pieces_get_no_id():
    """Also not when the label is large elsewhere, and ids stay dense."""
    labels = np.zeros((6, 12, 12), int)
    labels[:, :4, :4], labels[0, 8, 8], labels[2:5, 7:, :3], labels[2:5, 7:, 8:] = 7, 7, 3, 3
    found = pieces(labels)
    assert np.array_equal(found > 0, (labels > 0) & ~((labels == 7) & (np.indices(labels.shape)[1] == 8)))
    assert found.max() == 3 and len(np.unique(found)) == 4


def test_stamps_lie_where_they_should_and_may_cross_the_border():
    """Nothing wraps around to the other side; sections above and below fade."""
    image = stamp((5, 20, 20), np.array([30.0, 8.0, 8.0]), np.array([[60.0, 80.0, 40.0], [0.0, 0.0, 152.0]]),
                  lambda far: np.exp(-(far / 10) ** 2), 20)
    assert np.unravel_index(image.argmax(), image.shape) in ((2, 10, 5), (0, 0, 19))
    assert image[0, 0, 19] == pytest.approx(image[2, 10, 5]) and image[0, 0, 0] == image[4].max() == 0
    assert 0 < image[1, 10, 5] < image[2, 10, 5] and image[2, 10, 9] == 0
