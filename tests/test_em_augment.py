"""Augmentation of EM crops: image and labels move as one, defects spare the labels, probabilities hold."""

from functools import partial
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from datasets import em_augment
from datasets.em_augment import DEFECTS, EMAugment, bending, resample, smoothing, sources
from utils.config import UserError

MOVING = ("flip", "rotate", "elastic", "shift")
OFF = dict.fromkeys((*MOVING, "gamma", "contrast", "defects", "noise", "missing"), 0)
SPACING = (30.0, 6.0, 6.0)
EM = Path(__file__).parents[2] / "shared/data/em"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def augment(image, labels, seed=0, spacing=SPACING, fill=None, **settings):
    return EMAugment(**{**OFF, **settings}, fill=fill)(image, labels, spacing, seeded(seed))


def crop(shape=(8, 48, 48), seed=0):
    """(image in [0.2, 0.8], labels): smooth blobs with ids 1 to 5, and their class, every value in use."""
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.standard_normal(shape), (0.5, 4, 4), mode="wrap")
    instances = np.digitize(field, np.quantile(field, [0.5, 0.6, 0.7, 0.8, 0.9])).astype(np.int32)
    image = (0.5 + 0.1 * np.clip(rng.standard_normal(shape), -3, 3)).astype(np.float32)
    return image, {"instances": instances, "classes": (instances > 0).astype(np.int64)}


def same(a, b):
    return np.array_equal(a[0], b[0]) and all(np.array_equal(a[1][name], b[1][name]) for name in b[1])


@pytest.mark.parametrize("shape", [(8, 48, 48), (1, 48, 40), (5, 1, 7), (1, 1, 1)])
def test_everything_off_changes_nothing(shape):
    """Bitwise, in arrays of their own: a part's constant at 0 is the same as no such part."""
    image, labels = crop(shape)
    out = augment(image, labels)
    assert same(out, (image, labels)) and not out[2].any() and out[2].shape == shape[:1]
    assert not np.shares_memory(out[0], image) and not np.shares_memory(out[1]["classes"], labels["classes"])


@pytest.mark.parametrize("part", OFF)
def test_each_part_does_something_and_alone(part):
    """A part that does nothing would pass every other test; one that moves labels must, others must not."""
    image, labels = crop()
    outs = [augment(image, labels, seed, **{part: 1.0}) for seed in range(6)]
    assert sum((out != image).any() for out, _, _ in outs) >= 5                    # no flip, once in eight
    moved = any((out["instances"] != labels["instances"]).any() for _, out, _ in outs)
    assert moved == (part in MOVING)
    assert all(lost.any() == (part == "missing") for _, _, lost in outs)


@pytest.mark.parametrize("part", [part for part in OFF if part != "missing"])
@pytest.mark.parametrize("shape", [(6, 40, 40), (1, 40, 40), (3, 40, 24), (1, 24, 40), (2, 1, 9), (1, 1, 1)])
def test_shapes_types_and_ranges_stay(part, shape):
    """Slices, oblong and tiny crops; labels of their type hold old values or the fill."""
    image, _ = crop(shape)
    image = np.clip(4 * image - 1.5, 0, 1)                                         # touches 0 and 1
    ids = np.random.default_rng(0).integers(2 ** 62, 2 ** 62 + 9, shape).astype(np.uint64)
    small = (ids % 5).astype(np.uint8)
    for seed in range(4):
        out, labels, lost = augment(image, {"ids": ids, "small": small}, seed, fill={"small": 255},
                                    **{part: 1.0}, noise_std=2.0)
        assert out.shape == shape and out.dtype == np.float32 and out.flags.c_contiguous
        assert np.isfinite(out).all() and out.min() >= 0 and out.max() <= 1
        assert labels["ids"].dtype == np.uint64 and labels["small"].dtype == np.uint8
        assert set(np.unique(labels["ids"])) <= set(np.unique(ids)) | {0}
        assert set(np.unique(labels["small"])) <= set(np.unique(small)) | {255}
        assert np.array_equal(labels["ids"] == 0, labels["small"] == 255)          # filled at the same voxels
        assert all(label.flags.c_contiguous and label.shape == shape for label in labels.values())
        torch.from_numpy(out)


@pytest.mark.parametrize("shape", [(8, 64, 64), (4, 64, 48), (1, 64, 64)])
@pytest.mark.parametrize("seed", range(4))
def test_image_and_labels_move_as_one(shape, seed):
    """The labels drawn as an image are, after moving, the moved labels: to the pixels of the borders."""
    _, labels = crop(shape, seed)
    drawn = (labels["instances"] > 0).astype(np.float32)
    out, moved, _ = augment(drawn, labels, seed, fill={"classes": -100}, flip=0.5, rotate=0.7, elastic=0.7)
    known = moved["classes"] != -100
    wrong = (out > 0.5) != (moved["instances"] > 0)
    assert known.mean() > 0.75 and wrong[known].mean() < 0.02
    shuffled = np.roll(moved["instances"], 2, axis=2) > 0                          # 2 pixels would be seen
    assert ((out > 0.5) != shuffled)[known].mean() > 0.05


def test_flips_are_numpy_flips_of_each_axis_by_itself():
    """All eight mirror images, equally often, and of image and labels alike."""
    image, labels = crop((3, 6, 5))
    images = [np.flip(image, axes) for axes in ((), 0, 1, 2, (0, 1), (0, 2), (1, 2), (0, 1, 2))]
    counts = np.zeros(8)
    for seed in range(400):
        out = augment(image, labels, seed, flip=0.5)
        (which,) = (k for k, flipped in enumerate(images) if np.array_equal(flipped, out[0]))
        axes = ((), 0, 1, 2, (0, 1), (0, 2), (1, 2), (0, 1, 2))[which]
        assert np.array_equal(out[1]["instances"], np.flip(labels["instances"], axes))
        counts[which] += 1
    assert counts.min() > 25 and counts.max() < 80                                 # 50 +- 4 deviations


@pytest.mark.parametrize("shape, spacing, turns", [((3, 8, 8), SPACING, {1, 2, 3}), ((3, 8, 6), SPACING, {2}),
                                                   ((3, 8, 8), (30, 6, 8), {2})])
def test_quarter_turns_keep_size_and_spacing(shape, spacing, turns):
    """Exact turns; a quarter turn of an oblong crop or voxel would be another size or spacing."""
    image, labels = crop(shape)
    seen = set()
    for seed in range(40):
        out = augment(image, labels, seed, spacing, rotate=1.0, max_angle=0.0)
        (turn,) = (k for k in (range(4) if shape[1] == shape[2] else (0, 2))
                   if np.array_equal(out[0], np.rot90(image, k, (1, 2))))
        assert np.array_equal(out[1]["classes"], np.rot90(labels["classes"], turn, (1, 2)))
        seen.add(turn)
    assert seen == turns


def test_a_cube_of_cubic_voxels_turns_about_every_axis():
    """Isotropic tissue has no sections: any axis may be the first.  A cube of oblong voxels keeps its own."""
    image, labels = crop((6, 6, 6))
    ways = {(order, turn): partial(lambda order, turn, array: np.rot90(array.transpose(order), turn, (1, 2)),
                                   order, turn) for order in permutations(range(3)) for turn in (1, 2, 3)}
    for spacing, expected in (((8.0, 8.0, 8.0), set(ways)),
                              ((8.0, 4.0, 4.0), {((0, 1, 2), turn) for turn in (1, 2, 3)})):
        seen = set()
        for seed in range(200):
            turned, moved, _ = augment(image, labels, seed, spacing, rotate=1.0, max_angle=0.0)
            (way,) = (way for way, turn in ways.items() if np.array_equal(turned, turn(image)))
            assert np.array_equal(moved["classes"], ways[way](labels["classes"]))
            seen.add(way)
        assert seen == expected


@pytest.mark.parametrize("mode", ["rotate", "elastic"])
def test_resampling_equals_scipy(mode):
    """Image linear and mirrored at the border, labels nearest and filled beyond it."""
    image, labels = crop((3, 30, 22))
    bent = bending(image.shape, SPACING, 200.0, 8.0, np.random.default_rng(0))
    rows, columns = sources(image.shape, SPACING, *((25.0, None) if mode == "rotate" else (0.0, bent)))
    out, moved = resample(image, labels, rows, columns, {"classes": -100})
    z = np.broadcast_to(np.arange(3)[:, None, None], image.shape)
    expected = ndimage.map_coordinates(image, [z, rows, columns], order=1, mode="mirror")
    np.testing.assert_allclose(out, expected, atol=2e-5)
    for name, fill in (("instances", 0), ("classes", -100)):
        y, x = np.rint(rows).astype(int), np.rint(columns).astype(int)
        inside = (y >= 0) & (y < 30) & (x >= 0) & (x < 22)
        values = labels[name][z, y.clip(0, 29), x.clip(0, 21)]
        np.testing.assert_array_equal(moved[name], np.where(inside, values, fill))
    assert (moved["classes"] == -100).any()


def test_a_free_angle_turns_a_circle_into_itself():
    """Angles are of the tissue: with unequal pixels the turn is in nm, or neurites would be sheared."""
    spacing, centre = (30.0, 4.0, 8.0), np.array([19.5, 9.5])
    rows, columns = sources((1, 40, 20), spacing, 30.0, None)
    y, x = np.mgrid[:40, :20]
    before = np.hypot((y - centre[0]) * 4, (x - centre[1]) * 8)
    after = np.hypot((rows[0] - centre[0]) * 4, (columns[0] - centre[1]) * 8)
    np.testing.assert_allclose(after, before, atol=1e-3)
    turned = np.arctan2((rows[0] - centre[0]) * 4, (columns[0] - centre[1]) * 8)
    angle = np.angle(np.exp(1j * (turned - np.arctan2((y - centre[0]) * 4, (x - centre[1]) * 8))), deg=True)
    np.testing.assert_allclose(np.abs(angle), 30, atol=1e-2)


def test_free_angles_lie_within_their_limit():
    """Read from the direction of a ramp; quarter turns alone would leave it along an axis."""
    ramp = np.broadcast_to(np.linspace(0.2, 0.8, 40, dtype=np.float32)[:, None], (1, 40, 30))
    angles = []
    for seed in range(40):
        out = augment(ramp, {}, seed, rotate=1.0, max_angle=12.0)[0][0, 15:25, 10:20]
        slopes = [np.diff(out, axis=axis).mean() for axis in (0, 1)]
        angles.append(np.rad2deg(np.arctan(slopes[1] / slopes[0])))
    assert -12.1 < min(angles) < -8 and 8 < max(angles) < 12.1


def test_bending_has_simards_size_and_is_as_smooth_as_asked():
    """Root mean square and correlation of uniform noise that scipy filters, at equal settings."""
    rng, alpha, sigma = np.random.default_rng(0), 80.0, 6.0
    ours = np.concatenate([bending((1, 96, 96), SPACING, alpha, sigma, rng)[:, 0] for _ in range(30)])
    simard = np.stack([alpha * ndimage.gaussian_filter(rng.uniform(-1, 1, (160, 160)), sigma)[32:-32, 32:-32]
                       for _ in range(60)])
    for fields in (ours, simard):
        assert np.sqrt((fields ** 2).mean()) == pytest.approx(alpha / np.sqrt(12 * np.pi) / sigma, rel=0.08)
        for axis in (1, 2):
            pairs = np.take(fields, range(85), axis), np.take(fields, range(11, 96), axis)
            correlation = (pairs[0] * pairs[1]).mean() / (fields ** 2).mean()
            assert correlation == pytest.approx(np.exp(-11 ** 2 / (4 * sigma ** 2)), abs=0.09)


def test_bending_respects_the_voxel_size():
    """Sections near each other bend alike, distant ones not; unequal pixels get equal lengths in nm."""
    def correlation(spacing):
        rng = np.random.default_rng(1)
        fields = np.stack([bending((2, 64, 64), spacing, 50, 6, rng) for _ in range(20)])
        return (fields[:, :, 0] * fields[:, :, 1]).mean() / (fields ** 2).mean()

    assert correlation((6.0, 6.0, 6.0)) > 0.97
    assert correlation((36.0, 6.0, 6.0)) == pytest.approx(np.exp(-0.25), abs=0.06)
    assert abs(correlation((400.0, 6.0, 6.0))) < 0.1
    fields = np.stack([bending((1, 64, 64), (30, 4, 8), 50, 6, np.random.default_rng(k)) for k in range(20)])
    rows, columns = np.sqrt((fields ** 2).mean(axis=(0, 2, 3, 4)))
    assert rows / columns == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("size, sigma", [(40, 5.0), (40, 0.05), (1, 3.0), (7, 50.0)])
def test_smoothing_has_variance_one_everywhere(size, sigma):
    """At the border too, where a filter on cut noise would bend less or more."""
    weights = smoothing(size, sigma)
    np.testing.assert_allclose((weights ** 2).sum(1), 1, rtol=1e-5)
    assert weights.shape[1] < size + 20


def test_a_step_moves_labels_and_a_slip_does_not():
    """All sections from one on, with their labels; or one section alone, whose neighbours tell its labels."""
    image, labels = crop((8, 40, 40))
    kinds = set()
    for seed in range(30):
        out, moved, _ = augment(image, labels, seed, shift=1.0, max_shift=6, fill={"classes": -100})
        changed = np.abs(out - image).max(axis=(1, 2)) > 1e-3
        first = int(changed.argmax())
        assert first > 0
        step = not np.array_equal(moved["instances"], labels["instances"])
        kinds.add(step)
        assert changed.sum() == (8 - first if step else 1) and (not step or changed[first:].all())
        shifts = [(y, x) for y in range(-6, 7) for x in range(-6, 7)
                  if np.allclose(out[first, 6:-6, 6:-6], image[first, 6 + y:34 + y, 6 + x:34 + x], atol=1e-4)]
        ((y, x),) = shifts
        if step:
            expected = labels["instances"][first:, 6 + y:34 + y, 6 + x:34 + x]
            assert np.array_equal(moved["instances"][first:, 6:-6, 6:-6], expected)
            assert (moved["classes"][first:] == -100).mean() == pytest.approx(
                1 - (1 - abs(y) / 40) * (1 - abs(x) / 40), abs=1e-6)
    assert kinds == {True, False}


def test_missing_sections_are_flagged_and_hold_nothing_of_their_own():
    """One to three in a row: black, the crop's mean, or the neighbour's copy; the others are untouched."""
    image, labels = crop((9, 16, 16))
    contents, counts = set(), set()
    for seed in range(60):
        out, _, lost = augment(image, labels, seed, missing=1.0)
        places = np.flatnonzero(lost)
        counts.add(len(places))
        assert np.array_equal(np.diff(places), np.ones(len(places) - 1))
        assert np.array_equal(out[~lost], image[~lost])
        neighbour = image[places[0] - 1] if places[0] else image[places[-1] + 1]
        known = {"black": np.zeros_like(neighbour), "mean": np.full_like(neighbour, image.mean()),
                 "copy": neighbour}
        (kind,) = (kind for kind, content in known.items() if (out[lost] == content).all())
        contents.add(kind)
    assert contents == {"black", "mean", "copy"} and counts == {1, 2, 3}


def test_a_single_section_is_never_lost_nor_shifted():
    """Nothing could be learned from it; of two sections one stays."""
    image, labels = crop((1, 16, 16))
    out = augment(image, labels, missing=1.0, shift=1.0)
    assert same(out, (image, labels)) and not out[2].any()
    for seed in range(20):
        assert augment(*crop((2, 16, 16)), seed, missing=1.0)[2].sum() == 1


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_each_defect_is_what_it_is_called(defect):
    """A fold and stains darken a part, a jump keeps the picture, blur takes its contrast."""
    image, _ = crop((1, 64, 64))
    section = image[0]
    for seed in range(20):
        out = defect(section, np.random.default_rng(seed))
        assert out.dtype == np.float32 and out.shape == section.shape
        if defect.__name__ in ("fold", "stain"):
            darker = section - out
            assert darker.min() >= -1e-6 and (darker > 0.05).mean() < 0.7
            assert (darker > 0.05).any()
        elif defect.__name__ == "jump":
            assert np.corrcoef(out.ravel(), section.ravel())[0, 1] > 0.999
            assert out.std() < 0.81 * section.std()
        else:
            assert out.std() < 0.5 * section.std() and out.mean() == pytest.approx(section.mean(), abs=0.02)


def test_defects_spoil_few_sections():
    """About one section in eight; the rest are the same bits."""
    image, labels = crop((32, 24, 24))
    outs = [augment(image, labels, seed, defects=1.0)[0] for seed in range(40)]
    counts = [(out != image).any(axis=(1, 2)).sum() for out in outs]
    assert min(counts) >= 1 and max(counts) <= 4 and len(set(counts)) > 2


def test_intensities_change_by_what_is_asked():
    """Gamma within its range, contrast and brightness and noise within their amounts, over many crops."""
    image, labels = crop((2, 32, 32))
    gammas, deviations, factors = [], [], []
    for seed in range(60):
        out = augment(image, labels, seed, gamma=1.0, gamma_range=(0.7, 1.3))[0]
        gamma = np.log(out) / np.log(image)
        assert np.ptp(gamma) < 1e-3
        gammas.append(gamma.mean())
        deviations.append((augment(image, labels, seed, noise=1.0, noise_std=0.05)[0] - image).std())
        out = augment(image, labels, seed, contrast=1.0, contrast_amount=0.1)[0]
        factors.append(out.std() / image.std())
        assert abs(out.mean() - image.mean()) < 0.1001
    for values, low, high in ((gammas, 0.7, 1.3), (deviations, 0, 0.052), (factors, 0.9, 1.1)):
        assert low - 1e-3 <= min(values) < low + 0.2 * (high - low)
        assert high - 0.2 * (high - low) < max(values) <= high + 1e-3


@pytest.mark.parametrize("part", [part for part in OFF if part != "flip"])
def test_probabilities_are_of_crops(part):
    """400 crops at 0.3: within four standard deviations."""
    image, labels = crop((4, 12, 12))
    outs = [augment(image, labels, seed, **{part: 0.3}) for seed in range(400)]
    changed = sum(not same(out, (image, labels)) for out in outs)
    assert 120 - 37 < changed < 120 + 37


def test_parts_are_drawn_apart():
    """Switching one part off leaves the draws of the others as they were, and no part follows another."""
    image, labels = crop((4, 16, 16))
    events = np.zeros((300, 3), bool)
    for seed in range(300):
        events[seed, 0] = (augment(image, labels, seed, gamma=0.5)[0] != image).any()
        events[seed, 1] = augment(image, labels, seed, missing=0.5)[2].any()
        both = augment(image, labels, seed, gamma=0.5, missing=0.5)
        events[seed, 2] = both[2].any()
    assert np.array_equal(events[:, 1], events[:, 2])
    assert abs(np.corrcoef(events[:, 0], events[:, 1])[0, 1]) < 0.25


def test_equal_generators_give_equal_crops_and_one_number_is_drawn():
    """A sample depends on its seed alone, and the generator goes on alike whatever the settings."""
    image, labels = crop()
    settings = dict.fromkeys(OFF, 0.5)
    np.random.seed(0)
    first = augment(image, labels, 3, **settings)
    np.random.seed(1)
    assert same(first, augment(image, labels, 3, **settings))
    assert not same(first, augment(image, labels, 4, **settings))
    states = []
    for probability in (0.0, 1.0):
        generator = seeded(5)
        EMAugment(**dict.fromkeys(OFF, probability))(image, labels, SPACING, generator)
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_inputs_stay_as_they_are():
    """They may be a cached volume that is mapped read-only."""
    image, labels = crop()
    before = image.copy(), {name: label.copy() for name, label in labels.items()}
    for array in (image, *labels.values()):
        array.flags.writeable = False
    out = augment(image, labels, 2, **dict.fromkeys(OFF, 1.0))
    assert same((image, labels), before)
    assert out[0].flags.writeable and all(label.flags.writeable for label in out[1].values())


def test_no_labels_is_fine():
    """Images alone can be augmented, for training without labels."""
    image, _ = crop()
    out, labels, _ = augment(image, {}, **dict.fromkeys(OFF, 1.0))
    assert labels == {} and out.shape == image.shape


@pytest.mark.parametrize("settings", [
    {"flip": 1.5}, {"missing": -0.1}, {"noise": float("nan")}, {"noise_std": -1}, {"elastic_sigma": 0},
    {"gamma_range": (1.3, 0.7)}, {"gamma_range": (0, 1)}, {"max_shift": -1}, {"max_angle": -5.0}])
def test_settings_that_make_no_sense_are_refused(settings):
    """With the name of the setting, in one line."""
    with pytest.raises(UserError, match=next(iter(settings))) as error:
        EMAugment(**settings)
    assert "\n" not in str(error.value)


def test_every_part_has_its_probability():
    """PARTS orders the draws; a part that it lacks would end in a KeyError while training."""
    assert set(em_augment.PARTS) == set(EMAugment().probability) == set(OFF)


@pytest.mark.skipif(not EM.is_dir(), reason="shared/data/em is absent")
def test_real_mitochondria_stay_dark_inside_after_all_moves():
    """What the labels call mitochondria is as dark after moving as before: they did not move apart."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(EM / "vnc_sstem/vnc_stack1.h5") as file:
        image = (file["raw"][:8, 100:292, 100:292] / 255).astype(np.float32)
        labels = {"mito": file["mito_instances"][:8, 100:292, 100:292].astype(np.int32)}
    rest = image[labels["mito"] == 0].mean()
    before = image[labels["mito"] > 0].mean()
    assert before < rest - 0.05
    for seed in range(4):
        out, moved, _ = augment(image, labels, seed, (50, 4.6, 4.6), flip=1.0, rotate=1.0, elastic=1.0)
        assert out[moved["mito"] > 0].mean() == pytest.approx(before, abs=0.03)
