"""Context and target tokens of volumes: achieved shares, the block's shape, and what happens to the rest."""

import numpy as np
import pytest
import torch

from datasets.block_mask import VolumeBlockMask, box_sums, drop_slab_, growing_sizes, mask_ratios
from utils.config import UserError

SHARE, CEILING = {"mri": 0.70, "ct": 0.75}, {"mri": 0.25, "ct": 0.20}
OPEN = {"mri": 1.0, "ct": 1.0}                                     # with no drops: the block alone


def grid(*size):
    """Coordinates int64 [N, 3] of a whole token grid."""
    return torch.cartesian_prod(*(torch.arange(side) for side in size)).view(-1, 3)


def random_foreground(rng):
    """(coords, foreground): a ball, an ellipsoid, a head off the centre, a small crop, or a few tokens."""
    kind = rng.choice(["ball", "ellipsoid", "head", "crop", "few"])
    small = kind in ("crop", "few")
    size = rng.integers(1, 8, 3) if small else rng.integers(6, 15, 3)
    coords = grid(*size.tolist())
    place = (coords.numpy() + 0.5) / size * 2 - 1                                        # in [-1, 1]
    centre = rng.uniform(-0.5, 0.5, 3) if kind in ("head", "crop") else np.zeros(3)
    radius = rng.uniform(0.4, 2.0 if small else 1.0, 1 if kind == "ball" else 3)
    foreground = (((place - centre) / radius) ** 2).sum(1) < 1
    if kind == "few":
        foreground = rng.permutation(len(coords)) < rng.integers(1, 12)
    foreground[rng.integers(len(coords))] = True
    return coords, torch.from_numpy(foreground)


def ball(side=12):
    """The largest ball in a cube."""
    coords = grid(side, side, side)
    return coords, ((coords + 0.5 - side / 2) ** 2).sum(1) < (side / 2) ** 2


def block_alone(**options):
    """A mask without ceiling and drops."""
    return VolumeBlockMask(SHARE, OPEN, drop_rate=0.0, context_range=(0.05, 0.95), **options)


def test_shares_hold_over_a_thousand_random_foregrounds():
    """Targets at their share or above, context below its ceiling and of use, no token in both, none lost."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    mask, shares = VolumeBlockMask(SHARE, CEILING), {"mri": [], "ct": []}
    for _ in range(1000):
        coords, foreground = random_foreground(rng)
        mode = int(rng.integers(4))
        kind = "mri" if mode == 0 else "ct"
        context, target = mask(coords, foreground, mode, generator)
        assert context.dtype == target.dtype == torch.bool
        assert torch.equal(context ^ target, foreground) and not (context & target).any()
        count = int(foreground.sum())
        if count * CEILING[kind] < 1:                       # no whole token fits below the ceiling
            assert context.sum() == 1
            continue
        assert 0.05 * count <= context.sum() <= CEILING[kind] * count
        shares[kind].append((count, (target.sum() / count).item()))
    for kind, values in shares.items():
        counts, values = np.array(values).T
        assert len(values) > 200 and values.mean() > SHARE[kind]
        # The ceiling, less the tenth of the context that is dropped; small ones round it to whole tokens.
        assert values[counts > 100].mean() == pytest.approx(1 - 0.9 * CEILING[kind], abs=0.015)


@pytest.mark.parametrize("mode, kind", [(0, "mri"), (1, "ct"), (2, "ct"), (3, "ct")])
def test_the_block_alone_holds_the_target_share(mode, kind):
    """Heads are rounder than a block and shorter than the volume, so the area of the formula would not do."""
    rng, generator = np.random.default_rng(1), torch.Generator().manual_seed(0)
    shares, mask = [], block_alone()
    while len(shares) < 60:
        coords, foreground = random_foreground(rng)
        if foreground.sum() < 200:
            continue
        shares.append((mask(coords, foreground, mode, generator)[1].sum() / foreground.sum()).item())
    assert min(shares) >= 0.95 * SHARE[kind] - 1e-6
    assert np.mean(shares) == pytest.approx(SHARE[kind], abs=0.04)


def test_each_constant_moves_what_it_names():
    """Share, ceiling, aspect, drop rate and range, each against its default on one ball."""
    coords, foreground = ball()
    count = foreground.sum()

    def context_share(**options):
        settings = {"target_share": SHARE, "context_ceiling": OPEN, "drop_rate": 0.0, **options}
        generator = torch.Generator().manual_seed(0)
        mask = VolumeBlockMask(**settings)
        return np.mean([(mask(coords, foreground, 0, generator)[0].sum() / count).item() for _ in range(20)])

    assert context_share() == pytest.approx(0.3, abs=0.04)
    assert context_share(target_share={"mri": 0.6, "ct": 0.6}) == pytest.approx(0.4, abs=0.04)
    assert context_share(context_ceiling={"mri": 0.1, "ct": 1.0}) == pytest.approx(0.1, abs=0.002)
    assert context_share(drop_rate=0.5) == pytest.approx(0.15, abs=0.03)
    assert context_share(context_range=(0.05, 0.1)) == pytest.approx(1 / count.item())     # the last resort
    full = torch.ones(8 * 12 * 12, dtype=torch.bool)
    for aspect in (0.5, 2.0):
        _, target = block_alone(aspect=(aspect, aspect))(grid(8, 12, 12), full, 0, torch.Generator())
        rows, columns = (len(grid(8, 12, 12)[target, axis].unique()) for axis in (1, 2))
        assert (rows > columns) == (aspect > 1) and rows != columns


def test_the_block_is_one_rectangle_of_full_depth():
    """Each column of tokens is target or context as a whole, and targets lie together in the plane."""
    coords, foreground = ball()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        _, target = block_alone()(coords, foreground, 0, generator)
        inside = coords[target, 1:]
        box = ((coords[:, 1:] >= inside.amin(0)) & (coords[:, 1:] <= inside.amax(0))).all(1)
        assert torch.equal(target, foreground & box)


def test_a_foreground_that_fills_the_volume_gets_the_area_of_the_formula():
    """H * W * share * foreground fraction; one row and one column less would be too small."""
    coords = grid(2, 20, 16)
    foreground = torch.ones(len(coords), dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    areas = [block_alone()(coords, foreground, 0, generator)[1].sum().item() / 2 for _ in range(100)]
    assert 0.7 * 320 <= min(areas) and max(areas) < 0.7 * 320 + 20 + 16


def test_blocks_differ_in_place_and_shape():
    """A block that never moved would hide the same anatomy in every epoch."""
    coords, foreground = ball()
    generator = torch.Generator().manual_seed(0)
    targets = torch.stack([block_alone()(coords, foreground, 0, generator)[1] for _ in range(100)])
    assert len(targets.unique(dim=0)) > 20


def test_the_generator_alone_decides():
    """The same seed gives the same mask, wherever the crop lay in its volume and whatever ran before."""
    coords, foreground = ball()
    mask = VolumeBlockMask(SHARE, CEILING)
    first, second, other = (mask(coords + shift, foreground, 0, torch.Generator().manual_seed(seed))[0]
                            for shift, seed in ((0, 5), (torch.tensor([3, 40, 7]), 5), (0, 6)))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_the_slab_is_one_run_along_the_depth():
    """Exactly ``keep`` stay; nothing is left between the first and the last slice of the run."""
    generator = torch.Generator().manual_seed(0)
    starts = set()
    for _ in range(100):
        depth = torch.randint(10, (60,), generator=generator)
        before = torch.rand(60, generator=generator) < 0.7
        after = before.clone()
        drop_slab_(after, depth, 15, generator)
        dropped = depth[before & ~after]
        assert after.sum() == 15 and not (after & ~before).any()
        kept = depth[after]
        assert not ((kept > dropped.min()) & (kept < dropped.max())).any()
        starts.add(dropped.min().item())
    assert len(starts) > 3
    unchanged = before.clone()
    drop_slab_(unchanged, depth, 60, generator)
    assert torch.equal(unchanged, before)


def test_box_sums_equal_a_loop_over_boxes():
    """The summed-area table against plain sums."""
    values = np.random.default_rng(0).integers(0, 9, (5, 7))
    table = np.pad(values, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    for h, w in ((1, 1), (2, 3), (5, 7), (0, 0), (5, 2)):
        expected = [[values[i:i + h, j:j + w].sum() for j in range(8 - w)] for i in range(6 - h)]
        np.testing.assert_array_equal(box_sums(table, (h, w)), expected)


@pytest.mark.parametrize("aspect", [0.3, 1.0, 3.0])
def test_sizes_only_grow_and_keep_their_aspect_until_the_border(aspect):
    """So the share that the best place holds only grows, as the search by halves needs."""
    sizes = np.array(growing_sizes(12, 9, aspect))
    assert sizes[0].tolist() == [0, 0] and sizes[-1].tolist() == [12, 9]
    assert (np.diff(sizes, axis=0) >= 0).all() and np.diff(sizes, axis=0).max() == 1
    free = sizes[(sizes < [12, 9]).all(1) & (sizes > 0).all(1)]
    assert (np.abs(free[:, 0] - aspect * free[:, 1]) <= 0.5 + 0.5 * aspect + 1e-9).all()


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 1, 2), (1, 2, 1), (1, 1, 3), (2, 1, 1)])
def test_the_least_foregrounds_keep_one_context_token(size):
    """One token is context and nothing is target; of two or three, one is context, above any ceiling."""
    coords = grid(*size)
    foreground = torch.ones(len(coords), dtype=torch.bool)
    for seed in range(5):
        context, target = VolumeBlockMask(SHARE, CEILING)(coords, foreground, 0,
                                                          torch.Generator().manual_seed(seed))
        assert context.sum() == 1 and torch.equal(target, ~context)


@pytest.mark.parametrize("size", [(20, 1, 1), (1, 14, 14), (1, 1, 20), (10, 2, 2), (9, 1, 2)])
def test_flat_and_narrow_crops_get_a_useful_context(size):
    """A single slice has no slab to drop, a single column no block that leaves context; crops hold both."""
    coords = grid(*size)
    foreground = torch.ones(len(coords), dtype=torch.bool)
    contexts = [VolumeBlockMask(SHARE, CEILING)(coords, foreground, 0, torch.Generator().manual_seed(seed))[0]
                for seed in range(20)]
    assert np.mean([context.float().mean() for context in contexts]) == pytest.approx(0.22, abs=0.06)


def test_wrong_input_is_an_error():
    """~ of an integer mask is 254 or 255, true everywhere: rules on it would silently never hold."""
    coords = grid(2, 3, 3)
    mask = VolumeBlockMask(SHARE, CEILING)
    with pytest.raises(TypeError, match="bool"):
        mask(coords, torch.ones(18, dtype=torch.uint8), 0, torch.Generator())
    with pytest.raises(ValueError, match="no foreground"):
        mask(coords, torch.zeros(18, dtype=torch.bool), 0, torch.Generator())


@pytest.mark.parametrize("option, value", [
    ("target_share", {"mri": 0.7}), ("target_share", {"mri": 0.0, "ct": 0.7}),
    ("target_share", {"mri": 0.7, "ct": 0.96}), ("context_ceiling", {"mri": 0.05, "ct": 0.2}),
    ("context_ceiling", {"mri": 0.2, "ct": 1.1}), ("aspect", [3.0, 0.3]), ("aspect", [0.0, 1.0]),
    ("drop_rate", 1.0), ("drop_rate", -0.1), ("context_range", [0.0, 0.5]), ("context_range", [0.5, 0.1])])
def test_mistakes_name_the_constant(option, value):
    """The user edits constants.py."""
    settings = {"target_share": SHARE, "context_ceiling": CEILING, option: value}
    with pytest.raises(UserError, match=f"JEPA_{option.upper()}"):
        VolumeBlockMask(**settings)


def test_ratios_equal_a_loop_over_series():
    """Each series counts the same, however long; one without foreground counts as nothing."""
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 0, 40, 17, 3]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    foreground = torch.rand(65, generator=generator) < 0.8
    foreground[-3:] = False
    context = foreground & (torch.rand(65, generator=generator) < 0.3)
    target = foreground & ~context
    expected = []
    for mask in (target, context):
        shares = [mask[a:b].sum().item() / max(1, foreground[a:b].sum().item())
                  for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]
        expected.append(torch.tensor(np.mean(shares), dtype=torch.float32))
    actual = mask_ratios({"context": context, "target": target, "foreground": foreground, "cu_seqlens": ends})
    assert list(actual) == ["target_share", "context_share"]
    torch.testing.assert_close(list(actual.values()), expected)
