"""The labels of one crop of electron microscopy: classes, instances, and the weights of their voxels.

Arrays are numpy, [D, H, W] or a slice [H, W].  `spacing_nm` is the voxel size D, H, W in nm, for slices too.
In instance maps 0 is no instance.
"""

import cc3d
import edt
import numpy as np

from utils.config import UserError

CLASSES = ("background", "neuron", "cleft", "mitochondrion", "boundary")      # position = value in class maps
INSTANCE_CLASSES = (1, 2, 3)            # neuron, cleft, mitochondrion: what comes in objects that are counted
BOUNDARY = 4                            # membrane, the border between instances
IGNORE = -100                           # a voxel that no loss looks at


def meaning_of(annotated, taught=CLASSES[1:]):
    """What a label may mean in a data set that annotates some classes only.

    annotated: words of CLASSES, without "background".  Returns bool [5, 5]: [t, c] is True where a voxel
    labelled t may in truth be of class c; the identity when everything is annotated.  What is not annotated
    hides in other labels, but only if it is among ``taught``, what other data sets of the training annotate:
    a network that is never shown a mitochondrion could else call all neurons by that name.

    neuron           in the background
    boundary         in the background; traced neurons show it, so it is annotated where they are
    mitochondrion    in the neurons, or in the background when these are not traced
    cleft            in the background and in the membranes, but not in the rim of a mitochondrion

    Raises UserError for another word.
    """
    unknown = sorted(set(annotated) - set(CLASSES[1:]))
    if unknown:
        raise UserError(f"annotated class {unknown[0]!r}: the words are {', '.join(CLASSES[1:])}")
    neuron, cleft, mitochondrion, boundary = (word in annotated for word in CLASSES[1:])
    meaning = np.eye(len(CLASSES), dtype=bool)
    meaning[0] |= [True, not neuron, not cleft, not (neuron or mitochondrion), not (neuron or boundary)]
    meaning[1, 3] = neuron and not mitochondrion
    meaning[BOUNDARY, 2] = (neuron or boundary) and not cleft
    seen = ["neuron" in taught, "cleft" in taught, "mitochondrion" in taught,
            "neuron" in taught or "boundary" in taught]
    return meaning & np.array([True, *seen]) | np.eye(len(CLASSES), dtype=bool)


def relabel(instances):
    """Connected components of equal ids -> int32 ids 1..K, in the order of their first voxels.

    instances: integers of any width or bool; 0 stays 0.  Voxels connect by their faces (6; 4 in a slice).
    What a crop cuts in two becomes two instances: nothing in the crop tells that they are one.
    Raises UserError for other types.
    """
    if instances.dtype.kind not in "biu":
        raise UserError(f"instances are {instances.dtype}: ids must be integers")
    native = np.ascontiguousarray(instances, dtype=instances.dtype.newbyteorder("="))
    return cc3d.connected_components(native, connectivity=2 * native.ndim).astype(np.int32)


def boundaries(instances, spacing_nm):
    """bool: voxels that see another id, or 0 beside an id, among their 3 x 3 x 3 neighbours.

    Where sections lie more than two pixels apart only the 3 x 3 neighbours in the section count: a neurite
    that runs aslant moves by several pixels to the next section, and all of it would be boundary.  Beyond the
    crop nothing is seen.
    """
    depth, *plane = spacing_nm
    first = 1 if instances.ndim == 3 and depth > 2 * max(plane) else 0
    low, high = instances.copy(), instances.copy()
    for axis in range(first, instances.ndim):
        spread(low, axis, np.minimum)
        spread(high, axis, np.maximum)
    return low != high


def spread(values, axis, extreme):
    """Replace each value by the extreme (np.minimum, np.maximum) of it and its neighbours along the axis."""
    along = np.moveaxis(values, axis, 0)
    before = along.copy()
    extreme(along[1:], before[:-1], out=along[1:])
    extreme(along[:-1], before[1:], out=along[:-1])


def instance_weights(instances, spacing_nm, edge=10.0, bone=10.0):
    """Weights of voxels in the discriminative loss: more at the edges of an instance and along its middle.

    instances: int32 compact ids as of `relabel`.  edge, bone: factors, 1 or less for none.  Returns float32:
    1 outside, inside (1 + (edge - 1) * [boundary]) * (1 + (bone - 1) * EDT / its maximum in the instance).

    EDT is the distance in nm to the nearest voxel that is not of the instance.  The faces of the crop are no
    membrane: neurites go on behind them, and their middle does too.  An instance that fills the crop, so that
    the distance is infinite, gets no bone factor.
    """
    weight = np.ones(instances.shape, np.float32)
    if edge > 1:
        weight[boundaries(instances, spacing_nm)] = edge
    if bone > 1:
        distance = edt.edt(instances, anisotropy=tuple(spacing_nm)[-instances.ndim:], black_border=False)
        distance[np.isinf(distance)] = 0
        largest = np.full(instances.max(initial=0) + 1, np.finfo(np.float32).tiny)
        np.maximum.at(largest, instances.ravel(), distance.ravel())
        weight *= 1 + np.float32(bone - 1) * (distance / largest[instances])
    weight[instances == 0] = 1
    return weight
