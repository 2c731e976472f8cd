"""What lies in a folder of SNEMI3D, CREMI or MitoEM2: volumes of electron microscopy with their labels."""

import json
from dataclasses import dataclass, field

import h5py
import numpy as np

from datasets.em_files import find_arrays, open_volume
from datasets.em_labels import CLASSES, meaning_of
from utils.config import BadFile

SUFFIXES = (".h5", ".hdf", ".hdf5", ".tif", ".tiff", ".nii", ".nii.gz")
SNEMI3D_NM, CREMI_NM, MITOEM_NM = (30.0, 6.0, 6.0), (40.0, 4.0, 4.0), (30.0, 8.0, 8.0)
SNEMI3D_SPLITS = {"ac4": "train", "ac3": "val"}     # two blocks of tissue; both must be there
CREMI_LABELS = {"neuron": "volumes/labels/neuron_ids", "cleft": "volumes/labels/clefts"}
MITOEM_CODES = {"mitochondrion": 1, "boundary": 2}  # where no dataset.json says otherwise
BOUNDARY_WORDS = ("boundary", "contour")
LOOKED_AT = 32                                      # sections that tell codes from ids


@dataclass(eq=False)
class Source:
    """Sections of one volume that belong to one split.

    name        str, for people
    dataset     "snemi3d" | "cremi3d" | "mitoem2" | "table", or the word that the table gives
    split       "train" | "val" | "test"; "" until em_sources has cut the volume
    raw         Volume [D, H, W] of em_files, or a Box
    labels      {word of em_labels.CLASSES: Volume of the same shape}: ids of the class's instances, or a mask
    sections    (first, end) of those that belong to the split
    spacing_nm  (D, H, W)
    complete    the classes that are annotated wherever they occur
    taught      the classes that some volume of the training annotates
    zero        what 0 of the neuron labels is: "background" | "boundary" | "ignore"
    assumed     whether spacing_nm is the data set's own, since no file tells
    codes       {word: value} where label files hold one value per class and no ids; "ignore": not annotated.
                Their boundary is that of the mitochondria.  Else empty.
    """

    name: str
    dataset: str
    raw: object
    labels: dict
    spacing_nm: tuple
    complete: frozenset
    split: str = ""
    sections: tuple = None
    zero: str = "background"
    taught: frozenset = frozenset(CLASSES[1:])
    assumed: bool = False
    codes: dict = field(default_factory=dict)

    def __post_init__(self):
        """Raises BadFile when raw and labels differ in shape."""
        for volume in self.labels.values():
            if tuple(volume.shape) != tuple(self.raw.shape):
                raise BadFile(f"{volume.path}: labels of {sized(volume)} voxels, but {self.raw.path} has "
                              f"{sized(self.raw)}")
        self.spacing_nm = tuple(float(step) for step in self.spacing_nm)
        self.sections = self.sections or (0, self.raw.shape[0])

    @property
    def meaning(self):
        """bool [5, 5], [t, c]: a voxel labelled t may in truth be of class c; see em_labels.meaning_of."""
        return meaning_of(self.complete, self.taught)


class Box:
    """A part of a volume, read as if it were the volume: labels may cover the inner part of an image only."""

    def __init__(self, volume, corner, shape):
        self.volume, self.corner, self.shape = volume, tuple(corner), tuple(shape)
        self.path, self.key, self.dtype, self.spacing_nm = (volume.path, volume.key, volume.dtype,
                                                            volume.spacing_nm)

    def __getitem__(self, index):
        index = (*(index if isinstance(index, tuple) else (index,)), slice(None), slice(None))[:3]
        moved = []
        for part, first, n in zip(index, self.corner, self.shape, strict=True):
            if isinstance(part, slice):
                start, stop, _ = part.indices(n)
                moved.append(slice(first + start, first + max(start, stop)))
            else:
                moved.append(first + range(n)[part])
        return self.volume[tuple(moved)]


def sized(volume):
    """Shape of a volume in words: 100 x 1024 x 1024."""
    return " x ".join(map(str, volume.shape))


def stem(path):
    """Name of a file without its ending, of which .nii.gz is one."""
    ending = next((ending for ending in SUFFIXES if path.name.lower().endswith(ending)), path.suffix)
    return path.name[:len(path.name) - len(ending)]


def files_of(folder):
    """{stem: path} of the files of a folder that may be volumes, by name.  BadFile: two with one stem."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name.lower().endswith(SUFFIXES) and not path.name.startswith("."):
            if stem(path) in files:
                raise BadFile(f"{path}: {files[stem(path)].name} lies beside it; keep one of the two")
            files[stem(path)] = path
    return files


def snemi3d(folder):
    """Sources of the pairs <name>_inputs.*, <name>_labels.* in a folder.

    Of AC4 and AC3 (Kasthuri et al. 2015, Cell 162), two blocks that share no tissue, AC4 is for training and
    AC3 for validation, as in the challenge; when either lies alone it has no split of its own, nor has any
    other volume.  0 is background: membranes and what is between cells.  Inputs without labels are left out.
    """
    files = files_of(folder)
    names = [name.removesuffix("_inputs") for name in files
             if name.endswith("_inputs") and f"{name.removesuffix('_inputs')}_labels" in files]
    both = set(SNEMI3D_SPLITS) <= {name.lower() for name in names}
    sources = []
    for name in names:
        raw, labels = open_volume(files[f"{name}_inputs"]), open_volume(files[f"{name}_labels"])
        spacing = raw.spacing_nm or labels.spacing_nm
        split = SNEMI3D_SPLITS.get(name.lower(), "") if both else ""
        sources.append(Source(name, "snemi3d", raw, {"neuron": labels}, spacing or SNEMI3D_NM,
                              frozenset({"neuron"}), split, assumed=spacing is None))
    return sources


def cremi3d(folder):
    """Sources of the CREMI files (*.h5, *.hdf) in a folder: neurons, and clefts where there are any.

    Labels may cover a box of the image, as in the padded files of the challenge: their attribute "offset",
    in nm, says where.  Files without labels (the challenge's test volumes) are left out.
    """
    sources = []
    for name, path in files_of(folder).items():
        keys = [key.strip("/") for key in find_arrays(path)] if path.suffix.startswith(".h") else []
        labels = {word: open_volume(path, key) for word, key in CREMI_LABELS.items() if key in keys}
        if not labels:
            continue
        raw = open_volume(path, "volumes/raw")
        told = raw.spacing_nm or next(iter(labels.values())).spacing_nm
        spacing = told or CREMI_NM
        corners = {place_of(raw, volume, spacing) for volume in labels.values()}
        shapes = {tuple(volume.shape) for volume in labels.values()}
        if len(corners) > 1 or len(shapes) > 1:
            raise BadFile(f"{path}: neuron_ids and clefts cover different parts of the image")
        corner, shape = corners.pop(), shapes.pop()
        if shape != tuple(raw.shape):
            if any(a < 0 or a + n > size for a, n, size in zip(corner, shape, raw.shape, strict=True)):
                raise BadFile(f"{path}: labels at voxel {corner} reach beyond the image of {sized(raw)}; "
                              "check their attribute offset (nm)")
            raw = Box(raw, corner, shape)
        elif any(corner):
            raise BadFile(f"{path}: labels are as large as the image, but lie {corner} voxels off it")
        sources.append(Source(name, "cremi3d", raw, labels, spacing, frozenset(labels), assumed=told is None))
    return sources


def place_of(raw, labels, spacing_nm):
    """Voxel of ``raw`` where the labels begin, from the attributes resolution and offset (nm) of both."""
    with h5py.File(raw.path) as file:
        offsets = [file[volume.key].attrs.get("offset", (0.0,) * 3) for volume in (raw, labels)]
    if any(np.shape(offset) != (3,) or np.asarray(offset).dtype.kind not in "iuf" for offset in offsets):
        raise BadFile(f"{raw.path}: an attribute offset that is not three numbers (z, y, x in nm)")
    if labels.spacing_nm is not None and not np.allclose(labels.spacing_nm, spacing_nm):
        raise BadFile(f"{raw.path}: voxels of {labels.key} measure {labels.spacing_nm} nm, of the image "
                      f"{spacing_nm}")
    corner = (np.asarray(offsets[1], float) - offsets[0]) / spacing_nm
    if np.abs(corner - corner.round()).max() > 0.01:
        raise BadFile(f"{raw.path}: {labels.key} begins between voxels of the image, at {corner.round(3)}")
    return tuple(int(step) for step in corner.round())


def mitoem2(folder):
    """Sources of the nnU-Net folders Dataset*_* in a folder, and of its folders human and rat.

    These two hold imagesTr and labelsTr too, or nnU-Net folders, or stacks of sections im and mito.  Only
    images for training are read (imagesTs has no labels).  Labels are 0, 1 mitochondrion, 2 its boundary, or
    what dataset.json says; or, where more values occur and no dataset.json is there, ids of instances.
    """
    places = [folder, folder / "human", folder / "rat"]
    places = [part for place in places for part in (place, *sorted(place.glob("Dataset*_*")))]
    sources = []
    for place in places:
        if (place / "imagesTr").is_dir():
            codes = codes_of(place / "dataset.json") if (place / "dataset.json").exists() else None
            images, labels = files_of(place / "imagesTr"), place / "labelsTr"
            labels = files_of(labels) if labels.is_dir() else {}
            for case in (name.removesuffix("_0000") for name in images if name.endswith("_0000")):
                if case not in labels:
                    raise BadFile(f"{images[case + '_0000']}: has no labels {place / 'labelsTr' / case}.*")
                name = f"{place.name}/{case}"
                sources.append(mitochondria(name, images[f"{case}_0000"], labels[case], codes))
        elif (place / "im").is_dir() and (place / "mito").is_dir():
            sources.append(mitochondria(place.name, place / "im", place / "mito", None))
    return sources


def mitochondria(name, image, labels, codes):
    """The Source of an image and labels of mitochondria; codes None: look whether they are codes or ids."""
    raw, labels = open_volume(image), open_volume(labels)
    if codes is None:
        depth = labels.shape[0]
        looked_at = np.unique(np.linspace(0, depth - 1, LOOKED_AT).astype(int))
        largest = max(labels[z:z + 1, 0:labels.shape[1], 0:labels.shape[2]].max() for z in looked_at)
        codes = MITOEM_CODES if largest <= max(MITOEM_CODES.values()) else {}
    spacing = raw.spacing_nm or labels.spacing_nm
    words = [word for word in ("mitochondrion", "boundary") if word in (codes or {"mitochondrion"})]
    return Source(name, "mitoem2", raw, dict.fromkeys(words, labels), spacing or MITOEM_NM,
                  frozenset({"mitochondrion"}), assumed=spacing is None, codes=codes)


def codes_of(path):
    """{word: value} that an nnU-Net dataset.json gives to its labels, version 1 or 2 of the format.

    Words: mitochondrion (a name with "mito"), boundary (boundary, contour, also of mitochondria), ignore.
    Raises BadFile for other names, for regions, and where background is not 0.
    """
    try:
        labels = json.loads(path.read_text())["labels"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadFile(f'{path}: holds no table "labels" ({error!r})') from error
    codes = {}
    for first, second in labels:
        name, value = (second, first) if isinstance(second, str) else (first, second)
        words = [word for word, parts in (("boundary", BOUNDARY_WORDS), ("mitochondrion", ("mito",)),
                                          ("background", ("background",)), ("ignore", ("ignore",)))
                 if any(part in name.lower() for part in parts)]
        if not words or not str(value).isdecimal() or words[0] in codes:
            raise BadFile(f'{path}: label "{name}" = {value} is none of background, mitochondrion, boundary '
                          "(or contour) and ignore, each once and with one value")
        codes[words[0]] = int(value)
    if codes.pop("background", None) != 0 or "mitochondrion" not in codes:
        raise BadFile(f"{path}: labels must name background as 0, and mitochondria")
    return codes


LAYOUTS = {"snemi3d": (snemi3d, "<name>_inputs.h5 and <name>_labels.h5 (or .tif)"),
           "cremi3d": (cremi3d, "*.h5 or *.hdf with volumes/raw and volumes/labels/neuron_ids or clefts"),
           "mitoem2": (mitoem2, "Dataset*_*/imagesTr and labelsTr, or human and rat with im and mito")}
