"""Invented brain tissue as serial-section electron microscopy sees it, so that demo data need no real one.

Neurites are tubes around winding centre lines that compete for space: a point belongs to the line of the
least distance minus radius (an additively weighted Voronoi diagram), and a membrane runs where the two
nearest cells are even.  Lengths are nm, in the order z, y, x; the origin is the first voxel.
"""

import cc3d
import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

STEP = 40.0                                          # nm between the points of a centre line
PITCH = 24.0                                         # nm, lattice on which distances are computed
REACH = 120.0                                        # nm outside a tube up to which distances count
MARGIN = 250.0                                       # nm around the block in which lines may begin
CORE = 60.0                                          # nm around its line that no wider cell takes from a cell
MEMBRANE = 8.0                                       # nm, deviation of a membrane's profile
MIN_VOXELS = 40                                      # a smaller piece is no object


def tissue(shape, spacing_nm, seed, neurites=60, mitochondria=15, synapses=14):
    """A block of neuropil and its truth.

    shape: (D, H, W).  spacing_nm: of the voxels; a section is as thick as their distance.
    seed: int or a list of them.  neurites: centre lines in and just around the block, which they fill: so it
    sets their calibre.  mitochondria, synapses: how many are tried.  Returns a dict of arrays [D, H, W]: raw
    uint8; neurons uint32, 1.. and 0 in the few gaps between cells; mitochondria uint32, each in one neuron;
    clefts uint32, each on the membrane of two neurons; membranes bool.  Each id is one 6-connected piece.
    """
    rng, spacing = np.random.default_rng(seed), np.asarray(spacing_nm, float)
    extent = np.asarray(shape) * spacing
    lines = draw_lines(rng, extent, neurites)
    counts = np.ceil(extent / PITCH).astype(int) + 6
    warp = np.stack([42 * noise(rng, counts, np.full(3, PITCH), 150.0)           # makes tubes irregular
                     + 10 * noise(rng, counts, np.full(3, PITCH), 55.0) for _ in range(3)])
    shifts = np.clip(rng.normal(0, 0.5, (shape[0], 2)), -1.2, 1.2) * spacing[1:]         # misalignment
    z, y, x = (np.arange(n) * step for n, step in zip(shape, spacing, strict=True))
    sections = list(zip(z, y + shifts[:, :1], x + shifts[:, 1:], strict=True))
    cells = cut_cells(tube_scores(*lines, neurites, warp, CORE), sections, spacing)
    tubes, hosts, axes = draw_mitochondria(rng, *lines, extent, mitochondria)
    mito = cut_mitochondria(tube_scores(*tubes, len(hosts), warp), hosts, cells, sections)
    contacts = draw_synapses(rng, cells, spacing, synapses)
    raw = expose(rng, stain(rng, cells, mito, axes, contacts, spacing), spacing)
    return {"raw": raw, "membranes": cells["gap"] < 1.5 * MEMBRANE,
            "neurons": pieces(np.where(cells["first"] < neurites, cells["first"] + 1, 0)),
            "mitochondria": pieces(np.where(mito["depth"] < 0, cells["first"] + 1, 0)),
            "clefts": pieces(np.where((contacts["far"] < 1) & (cells["gap"] < 14), contacts["which"], 0))}


def draw_lines(rng, extent, neurites):
    """(points [N, 3], radii [N], cell of each point [N]) of random walks through the block and its margin."""
    low, high = np.full(3, -MARGIN), extent + MARGIN
    bundles = rng.normal(size=(3, 3))[rng.integers(3, size=neurites)]
    heading = bundles * (rng.random((neurites, 1)) < 0.5) + 0.5 * rng.normal(size=(neurites, 3))
    heading /= np.linalg.norm(heading, axis=1, keepdims=True)
    half = int(np.linalg.norm(high - low) / STEP)
    steps = 1.3 * ndimage.gaussian_filter1d(rng.normal(size=(neurites, 2 * half, 3)), 4, axis=1)
    steps += heading[:, None]
    walk = np.cumsum(STEP * steps / np.linalg.norm(steps, axis=2, keepdims=True), axis=1)
    walk += (rng.uniform(low, high, (neurites, 3)) - walk[:, half])[:, None]             # [lines, steps, 3]
    inside = ((walk > low) & (walk < high)).all(2)
    radii = ndimage.gaussian_filter1d(rng.normal(size=inside.shape), 3, axis=1)          # swellings
    radii = np.exp(radii + 0.45 * rng.normal(size=(neurites, 1)))[inside]
    points, cells = walk[inside], np.nonzero(inside)[0]
    radii = np.maximum(radii * np.sqrt(np.prod(high - low) / (np.pi * STEP * (radii ** 2).sum())), 40)
    return push_apart(points, radii, cells), radii, cells


def push_apart(points, radii, cells, rounds=15):
    """Points moved until tubes of different cells hardly cross, so that none is cut through by another."""
    ends = np.flatnonzero(np.diff(cells)) + 1
    for _ in range(rounds):
        first, second = cKDTree(points).query_pairs(1.5 * MARGIN, output_type="ndarray").T
        apart = points[first] - points[second]
        distance = np.linalg.norm(apart, axis=1) + 1e-6
        overlap = 0.9 * (radii[first] + radii[second]) - distance
        keep = (cells[first] != cells[second]) & (overlap > 0)
        first, second = first[keep], second[keep]
        push = (overlap[keep] / distance[keep])[:, None] * apart[keep]
        share = (radii[second] / (radii[first] + radii[second]))[:, None]                # the thin give way
        where, amount = np.concatenate([first, second]), np.concatenate([push * share, push * (share - 1)])
        move = np.stack([np.bincount(where, column, len(points)) for column in amount.T], 1)
        move = move / np.sqrt(1 + np.bincount(where, minlength=len(points)))[:, None]
        points = points + 0.5 * np.vstack([ndimage.gaussian_filter1d(part, 1.5, axis=0, mode="nearest")
                                           for part in np.split(move, ends)])
    return points


def draw_mitochondria(rng, points, radii, cells, extent, count):
    """((points, radii, number) of tubes in wide neurites, hosts [M], directions [M, 3], at most 1 long)."""
    wide = np.flatnonzero(((points > 0) & (points < extent)).all(1) & (radii > np.median(radii)))
    parts, hosts, axes = [(np.zeros((0, 3)), np.zeros(0), np.zeros(0, int))], [], []
    for middle in rng.permutation(wide)[:count]:
        near = np.abs(np.arange(len(cells)) - middle) <= rng.integers(3, 14)
        piece = np.flatnonzero(near & (cells == cells[middle]))
        taper = np.sin(np.pi * (np.arange(len(piece)) + 0.7) / (len(piece) + 0.4)) ** 0.4
        width = np.clip(rng.uniform(0.5, 0.75) * radii[piece], 45, 150) * taper
        aside = rng.normal(size=3) * 0.2 * radii[middle]
        parts.append((points[piece] + aside, width, np.full(len(piece), len(hosts))))
        hosts.append(cells[middle])
        axes.append((points[piece[-1]] - points[piece[0]]) / (STEP * len(piece)))
    tubes = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return tubes, np.array(hosts, int), np.reshape(axes, (-1, 3))


def spline(positions, count, pitch):
    """Matrix [positions, count] from lattice values to a cubic B-spline at the positions, nm.

    Weights have few bits: with rounded distances the sums are exact, so that no label depends on the order in
    which a machine adds.
    """
    at = np.asarray(positions) / pitch + 3           # the lattice begins three points before the block
    left = np.clip(np.floor(at).astype(int), 1, count - 3)
    t = at - left
    weights = np.zeros((len(at), count))
    for offset, part in enumerate(((1 - t) ** 3, 4 - 6 * t * t + 3 * t ** 3,
                                   1 + 3 * t + 3 * t * t - 3 * t ** 3, t ** 3)):
        weights[np.arange(len(at)), left - 1 + offset] = np.rint(part / 6 * 2048) / 2048
    return weights


def noise(rng, shape, spacing, pitch):
    """Smooth random field, float32 [D, H, W], mean 0, deviation about 1; pitch: nm, or one per axis."""
    along = [spline(np.arange(n) * size, int(np.ceil(n * size / step)) + 6, step).astype(np.float32)
             for n, size, step in zip(shape, spacing, np.broadcast_to(pitch, 3), strict=True)]
    values = rng.standard_normal([len(matrix.T) for matrix in along], np.float32)
    return 3 * (along[1] @ np.tensordot(along[0], values, 1) @ along[2].T)


def tube_scores(points, radii, owner, owners, warp, core=0.0):
    """Distance minus radius to the tubes of each owner, nm, at most REACH: float32 [owners, Z, Y, X].

    core: nm from a tube's line within which its score falls off so steeply that no wider tube cuts it.
    """
    axes = [(np.arange(n) - 3) * PITCH for n in warp.shape[1:]]
    places = (np.stack(np.meshgrid(*axes, indexing="ij")) + warp).astype(np.float32)
    scores = np.full((owners, *warp.shape[1:]), REACH, np.float32)
    for number in np.unique(owner):
        mine = np.flatnonzero(owner == number)
        for part in np.split(mine, range(8, len(mine), 8)):
            margin = REACH + radii[part].max() + np.abs(warp).max()
            box = [slice(*np.searchsorted(axis, (middle.min() - margin, middle.max() + margin)))
                   for axis, middle in zip(axes, points[part].T, strict=True)]
            for point, radius in zip(points[part].astype(np.float32), radii[part], strict=True):
                far = np.sqrt(sum((place[*box] - at) ** 2 for place, at in zip(places, point, strict=True)))
                score = np.minimum(far - np.float32(radius), 3 * (far - np.float32(core)))
                np.minimum(scores[number, *box], np.rint(score * 16) / 16, out=scores[number, *box])
    return scores


def at_section(scores, limit, section, rise=0.0):
    """(owners near this section [F], their scores float64 [F, H, W] on its voxels (z, y, x), ``rise`` nm up).

    limit: [Z, Y, X]; near are owners whose score is below it anywhere.
    """
    z, y, x = section
    level = int(z / PITCH) + 3
    some = np.flatnonzero((scores[:, level - 1:level + 4] < limit[level - 1:level + 4]).any((1, 2, 3)))
    along = spline([z + rise], scores.shape[1], PITCH)[0, level - 1:level + 4]
    plane = np.tensordot(along, scores[some, level - 1:level + 4].astype(float), (0, 1))
    return some, spline(y, scores.shape[2], PITCH) @ plane @ spline(x, scores.shape[3], PITCH).T


def cut_cells(scores, sections, spacing):
    """The two nearest cells of each voxel: dict of [D, H, W] arrays.

    first, second: uint16; ``count``, their number, stands for the gaps between cells, where all are far.
    gap: float32, nm to the membrane between the two.  tilt: float32, how it grows along z, -1..1.
    """
    best = scores.min(0)
    far = np.rint(np.quantile(best, 0.985))
    cells = {name: [] for name in ("first", "second", "gap", "tilt")}
    for section in sections:
        some, local = at_section(scores, best + 80, section)
        _, above = at_section(scores, best + 80, section, rise=4.0)
        local, above = (np.concatenate([part, np.full((1, *part.shape[1:]), far)]) for part in (local, above))
        nearest = local.argmin(0)[None]
        others = local.copy()
        np.put_along_axis(others, nearest, np.inf, 0)
        second = others.argmin(0)[None]
        even, later = (np.take_along_axis(part, second, 0)[0] - np.take_along_axis(part, nearest, 0)[0]
                       for part in (local, above))
        slopes = [(later - even) / 4.0]
        for axis, step in enumerate(spacing[1:]):    # on the steeper side: at a membrane ``even`` turns
            change = np.abs(np.diff(even, axis=axis, prepend=even.take([0], axis))) / step
            slopes.append(ndimage.maximum_filter1d(change, 2, axis, origin=-1))
        steep = np.clip(np.sqrt(sum(slope ** 2 for slope in slopes)), 0.5, 4.0)
        some = np.append(some, len(scores)).astype(np.uint16)
        planes = some[nearest[0]], some[second[0]], np.float32(even / steep), np.float32(slopes[0] / steep)
        for name, plane in zip(cells, planes, strict=True):
            cells[name].append(plane)
    return {name: np.stack(planes) for name, planes in cells.items()} | {"count": len(scores)}


def cut_mitochondria(scores, hosts, cells, sections):
    """dict of [D, H, W]: which uint16; depth float32, nm to its surface, negative inside, all in its host."""
    mito = {"which": np.zeros(cells["gap"].shape, np.uint16), "depth": np.full_like(cells["gap"], REACH)}
    for number, section in enumerate(sections):
        some, local = at_section(scores, np.full(scores.shape[1:], 60.0), section)
        if len(some):
            own = cells["first"][number] == hosts[some, None, None]
            local = np.maximum(local, np.where(own, 20 - cells["gap"][number], REACH))   # cytoplasm around
            mito["which"][number], mito["depth"][number] = some[local.argmin(0)], local.min(0)
    return mito


def pieces(labels):
    """uint32 ids 1.. of the 6-connected pieces of each label that are large enough, 0 elsewhere."""
    labels = cc3d.connected_components(labels.astype(np.uint32), connectivity=6)
    sizes = np.bincount(labels.ravel())
    keep = (sizes >= MIN_VOXELS) & (np.arange(len(sizes)) > 0)
    return np.where(keep, np.cumsum(keep), 0).astype(np.uint32)[labels]


def draw_synapses(rng, cells, spacing, count):
    """dict: which uint16 [D, H, W], synapse 1.. whose two cells meet near this voxel; far float32, distance
    from its centre in its radii; sites: (centre nm [3], radius nm, cell before, cell behind) of each."""
    shape, both = cells["gap"].shape, np.maximum(cells["first"], cells["second"]) < cells["count"]
    found = np.argwhere(both & (cells["gap"] < 5) & (np.abs(cells["tilt"]) < 0.6))
    contacts = {"which": np.zeros(shape, np.uint16), "far": np.full(shape, 9, np.float32), "sites": []}
    for voxel in found[rng.permutation(len(found))[:count]]:
        centre, radius = voxel * spacing, rng.uniform(90, 170)
        pair = rng.permutation([cells["first"][tuple(voxel)], cells["second"][tuple(voxel)]])
        half = np.ceil(1.2 * radius / spacing).astype(int)
        box = tuple(slice(max(m - h, 0), m + h + 1) for m, h in zip(voxel, half, strict=True))
        place = np.indices(cells["gap"][box].shape) + np.maximum(voxel - half, 0)[:, None, None, None]
        far = np.linalg.norm(place.T * spacing - centre, axis=-1).T / radius
        mine = np.isin(cells["first"][box], pair) & np.isin(cells["second"][box], pair)
        mine &= far < contacts["far"][box]
        contacts["sites"].append((centre, radius, *pair))
        contacts["which"][box][mine], contacts["far"][box][mine] = len(contacts["sites"]), far[mine]
    return contacts


def vesicles(rng, cells, mito, contacts, spacing):
    """Centres [N, 3], nm, of the vesicles that fill the cells before the synapses."""
    shape = np.array(cells["gap"].shape)
    grid = 44.0 * np.argwhere(np.ones(np.ceil(shape * spacing / 44).astype(int)))
    grid += rng.uniform(-11, 11, grid.shape)
    index = tuple(np.clip(np.rint(grid / spacing), 0, shape - 1).astype(int).T)
    free = (cells["gap"][index] > 30) & (mito["depth"][index] > 30) & (rng.random(len(grid)) < 0.8)
    near = [(np.linalg.norm(grid - centre, axis=1) < 2.4 * radius) & (cells["first"][index] == before)
            for centre, radius, before, _ in contacts["sites"]]
    return grid[free & np.any([np.zeros(len(grid), bool), *near], axis=0)]


def stamp(shape, spacing, centres, profile, reach):
    """float32 [D, H, W]: the largest profile(nm from a centre) of the centres [N, 3], nm; section means."""
    image, side = np.zeros(shape, np.float32), np.ceil(reach / spacing).astype(int)
    offsets = np.argwhere(np.ones(2 * side + 1)) - side
    voxels = np.rint(centres / spacing).astype(int)[:, None] + offsets                   # [N, offsets, 3]
    apart = voxels * spacing - centres[:, None]
    value = np.mean([profile(np.linalg.norm(apart + (rise * spacing[0], 0, 0), axis=2))
                     for rise in (-0.33, 0, 0.33)], axis=0)
    inside = ((voxels >= 0) & (voxels < shape)).all(2)
    np.maximum.at(image, tuple(voxels[inside].T), value[inside].astype(np.float32))
    return image


def stain(rng, cells, mito, axes, contacts, spacing):
    """Grey values float32 [D, H, W] of all that was cut, before the microscope's blur and noise."""
    gap, shape = cells["gap"], cells["gap"].shape
    inner = np.clip((gap - 22) / 15, 0, 1)
    tone = np.append(rng.normal(165, 12, cells["count"]), 185).astype(np.float32)
    image = tone[cells["first"]] + 8 * noise(rng, shape, spacing, 150.0)
    image += 15 * noise(rng, shape, spacing, 20.0) * (1 + 0.4 * noise(rng, shape, spacing, 200.0))
    sheets = np.exp(-(noise(rng, shape, spacing, 75.0) / 0.15) ** 2)         # endoplasmic reticulum
    image -= 70 * sheets * inner * np.clip(noise(rng, shape, spacing, 180.0) - 0.3, 0, 1)
    image -= 75 * np.clip(noise(rng, shape, spacing, 14.0) - 1.5, 0, 1) * inner          # granules
    balls = vesicles(rng, cells, mito, contacts, spacing)
    image -= 80 * stamp(shape, spacing, balls, lambda far: np.exp(-((far - 17) / 6) ** 2), 32)
    image = paint_mitochondria(rng, image, mito, axes, spacing)
    width = np.sqrt(MEMBRANE ** 2 + (spacing[0] * cells["tilt"]) ** 2 / 12)              # section mean
    faint = np.clip(0.9 + 0.45 * noise(rng, shape, spacing, 60.0), 0.12, 1)
    dark = faint * MEMBRANE / width * np.exp(-(gap / width) ** 2 / 2)
    behind = np.array([-1] + [site[3] for site in contacts["sites"]])[contacts["which"]]
    spread = np.where(cells["first"] == behind, 26, 12)                                  # denser behind
    dense = np.clip(1.5 - 1.5 * contacts["far"] ** 4, 0, 1) * np.exp(-(gap / spread) ** 2)
    return image + (25 - image) * np.maximum(dark, dense)


def paint_mitochondria(rng, image, mito, axes, spacing):
    """The image with dark matrix, stripes of cristae and a rim."""
    at = np.nonzero(mito["depth"] < 25)
    depth, bend = mito["depth"][at], noise(rng, image.shape, spacing, 90.0)[at]
    across = (axes[mito["which"][at]] * np.transpose(at) * spacing).sum(1)
    matrix = 88 + 17 * np.sin(across * (2 * np.pi / 55) + 2.5 * bend)
    matrix += 10 * noise(rng, image.shape, spacing, 20.0)[at]
    grey = image[at] + (matrix - image[at]) / (1 + np.exp(depth / 4))
    image[at] = grey + (55 - grey) * 0.75 * np.exp(-(depth / 7) ** 2)
    return image


def expose(rng, image, spacing):
    """uint8 [D, H, W]: optics, uneven light, sections of unequal brightness, noise."""
    image = ndimage.gaussian_filter(image, (0, 0.5, 0.5))
    gain, offset = rng.normal(1, 0.03, (len(image), 1, 1)), rng.normal(0, 5, (len(image), 1, 1))
    image = (image - 128) * gain + 128 + offset + 4 * noise(rng, image.shape, spacing, (spacing[0], 700, 700))
    return np.clip(np.rint(image + 9 * rng.standard_normal(image.shape, np.float32)), 0, 255).astype(np.uint8)
