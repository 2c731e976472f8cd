"""Which sections of which volumes of electron microscopy are for training, validation and test."""

import json
import os
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from datasets.em_files import open_volume
from datasets.em_labels import CLASSES
from datasets.em_layouts import LAYOUTS, Box, Source
from datasets.splits import SPLITS, read_table
from utils.config import BadFile, UserError, closest

TABLE = "volumes.csv"
WORDS = CLASSES[1:]                                 # columns of the table that hold labels
COLUMNS = ("volume", "raw", *WORDS, "dataset", "split", "sections", "spacing_nm", "zero", "complete")
ZERO = ("background", "boundary", "ignore")
SAME = 0.05                                         # relative; spacings that differ less are one, rounded


def find_sources(data, datasets, val_fraction, test_fraction, gap):
    """The Sources of a folder, each for one split; sections of different splits never touch.

    data: a folder with a folder per word of ``datasets`` (snemi3d, cremi3d, mitoem2), or such a folder
    itself.  Where it holds volumes.csv, or is that file, the table alone says what there is: read_volumes.
    A volume without a split of its own is cut along D by the two fractions, see cut, with ``gap`` sections
    between two parts that nobody sees.
    Raises UserError for an unknown word, a folder without volumes, and as cut and check_apart do; BadFile
    for files that cannot be used.
    """
    data = Path(data)
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1 or gap < 0:
        raise UserError(f"VISTA_VAL_FRACTION {val_fraction}, VISTA_TEST_FRACTION {test_fraction}, VISTA_GAP "
                        f"{gap}: none may be negative, and the fractions' sum must be below 1")
    table = data if data.suffix == ".csv" else data / TABLE
    if table.exists():
        sources = read_volumes(table)
    else:
        sources = [source for word in datasets for source in read_dataset(data, word, datasets)]
    if not sources:
        raise UserError(f"{data}: no volumes: VISTA_DATASETS is empty and there is no {TABLE}")
    sources = [part for source in sources for part in divide(source, val_fraction, test_fraction, gap)]
    check_apart(sources, gap)
    taught = frozenset().union(*(source.complete for source in sources if source.split == "train"))
    return [replace(source, taught=taught) for source in sources]


def read_dataset(data, word, datasets):
    """The Sources, not yet cut, of the data set ``word``: of the folder data/word, or of data itself."""
    if word not in LAYOUTS:
        raise UserError(f'VISTA_DATASETS: "{word}" is none of {", ".join(LAYOUTS)}; other volumes are listed '
                        f"in a {TABLE}")
    read, expected = LAYOUTS[word]
    folder = data / word
    if not folder.is_dir():
        if data.name != word and list(datasets) != [word] or not data.is_dir():
            raise UserError(f"{folder}: no such folder; download {word} into it, take it out of "
                            f"VISTA_DATASETS, or list your volumes in {data / TABLE}{others(data, word)}")
        folder = data
    sources = read(folder)
    if not sources:
        raise UserError(f"{folder}: no volume of {word} with labels; expected {expected}{others(data, word)}")
    return sources


def others(data, word):
    """What a message adds where ``data`` is, or holds, the folders of data sets that are not ``word``."""
    found = [other for other in LAYOUTS if other != word and (data.name == other or (data / other).is_dir())]
    return f"; here is {', '.join(found)}: --set 'VISTA_DATASETS={json.dumps(found)}'" if found else ""


def notes_on(sources, depth):
    """Lines to be said before training on ``sources``, of find_sources, in crops ``depth`` sections deep.

    Which voxel size is assumed, once for each data set, and where crops are deeper than the volumes: what
    they lack is mirrored, and is neither annotated nor an instance (ConnectomicsDataset).
    """
    notes = [f"{dataset}: voxels of {' x '.join(f'{step:g}' for step in spacing)} nm assumed: the files do "
             "not tell" for dataset, spacing in dict.fromkeys((source.dataset, source.spacing_nm)
                                                              for source in sources if source.assumed)]
    for split in ("train", "val"):
        depths = [end - first for first, end in (part.sections for part in sources if part.split == split)]
        if min(depths, default=depth) < depth:
            where = f" in the shallowest of {len(depths)} volumes" if len(depths) > 1 else ""
            notes.append(f"{split}: {min(depths)} sections{where}, crops are {depth} deep: the rest is "
                         "mirrored and does not count")
    return notes


def read_volumes(path):
    """The Sources, not yet cut, of a table of volumes: a CSV file with a row per volume or part of one.

    volume         name, for people
    raw            the image: path, or path:key in HDF5 and Zarr; relative to the table
    neuron, cleft, mitochondrion, boundary   at least one: labels likewise, ids of instances or a mask
    and, where wanted:
    dataset        word that VISTA_DATASET_WEIGHTS may name; default "table"
    split          train, val or test; empty: the sections of this row are cut
    sections       "0:100", the first and the one behind the last; empty: all
    spacing_nm     "50x4.6x4.6", D, H, W, where the file does not say; it must not contradict the file
    zero           what 0 of the neuron labels is: background (default), boundary, or ignore: not known
    complete       words: classes that are annotated wherever they occur; default: those with a column here
    Raises UserError and BadFile that name the line.
    """
    rows = read_table(path, "--data")
    if not rows:
        raise UserError(f"{path}: lists no volumes")
    for column in rows[0][1]:
        if column not in COLUMNS:
            raise UserError(f'{path}: there is no column "{column}"{closest(column, COLUMNS)}')
    sources = []
    for line, row in rows:
        try:
            sources.append(read_row(path.parent, {column: row.get(column, "") for column in COLUMNS}))
        except UserError as error:                  # BadFile too, which begins with the file's own path
            raise type(error)(f"{error} ({path.name}, line {line})") from error
    return sources


def read_row(folder, row):
    """The Source of one row {column: text} of the table."""
    if not row["volume"] or not row["raw"]:
        raise UserError("volume and raw must not be empty")
    raw = open_cell(folder, row["raw"])
    labels = {word: open_cell(folder, row[word]) for word in WORDS if row[word]}
    if not labels:
        raise UserError(f"volume {row['volume']} has no labels; give one of {', '.join(WORDS)}")
    complete = set(row["complete"].split()) or set(labels)
    zero = row["zero"] or "background"
    for column, found, known in (("split", {row["split"]} - {""}, SPLITS), ("zero", {zero}, ZERO),
                                 ("complete", complete, WORDS)):
        if found - set(known):
            raise UserError(f'{column} "{sorted(found - set(known))[0]}" is none of {", ".join(known)}')
    if zero == "boundary" and "neuron" in labels:
        complete.add("boundary")
    return Source(row["volume"], row["dataset"] or "table", raw, labels, spacing_of(row["spacing_nm"], raw),
                  frozenset(complete), row["split"], sections_of(row["sections"], raw.shape[0]), zero)


def open_cell(folder, cell):
    """The Volume that a cell "path" or "path:key" names."""
    path, colon, key = cell.rpartition(":")
    if not colon or os.path.exists(folder / cell):
        path, key = cell, None
    return open_volume(folder / path, key)


def spacing_of(cell, raw):
    """(D, H, W) in nm of the file, or else of the cell "50x4.6x4.6"."""
    try:
        given = tuple(float(step) for step in cell.split("x")) if cell else None
    except ValueError:
        given = ()
    if given is not None and (len(given) != 3 or not all(0 < step < 1e6 for step in given)):
        raise UserError(f'spacing_nm "{cell}": must be three numbers as in 50x4.6x4.6, nm')
    if raw.spacing_nm is None and given is None:
        raise UserError(f"{raw.path}: {raw.spacing_note}; fill the column spacing_nm, as in 50x4.6x4.6")
    if given and raw.spacing_nm and any(abs(a - b) > SAME * b for a, b in
                                        zip(given, raw.spacing_nm, strict=True)):
        raise UserError(f"spacing_nm {cell} contradicts {raw.path}, whose voxels measure "
                        f"{'x'.join(f'{step:g}' for step in raw.spacing_nm)} nm; correct one of them")
    return raw.spacing_nm or given


def sections_of(cell, depth):
    """(first, end) of the cell "0:100", or all ``depth`` sections."""
    first, _, end = cell.partition(":")
    if not cell:
        return 0, depth
    if not (first.isdecimal() and end.isdecimal() and len(cell) < 20) or not int(first) < int(end) <= depth:
        raise UserError(f'sections "{cell}": must be like 0:{depth}; there are {depth} sections')
    return int(first), int(end)


def divide(source, val_fraction, test_fraction, gap):
    """The source as it is when it has a split; else the parts of its sections, in the order of SPLITS."""
    if source.split:
        return [source]
    first, end = source.sections
    try:
        parts = cut(end - first, val_fraction, test_fraction, gap)
    except UserError as error:
        raise UserError(f"{source.raw.path}: {error}") from error
    return [replace(source, split=split, sections=(first + low, first + high))
            for split, (low, high) in parts.items()]


def cut(depth, val_fraction, test_fraction, gap):
    """{split: (first, end)} of ``depth`` sections: train, gap, val, gap, test, without those of fraction 0.

    The fractions are of what is left beside the gaps.  Raises UserError when a part would be empty.
    """
    fractions = {split: fraction for split, fraction in (("val", val_fraction), ("test", test_fraction))
                 if fraction > 0}
    left = depth - gap * len(fractions)
    sizes = {split: max(1, round(fraction * left)) for split, fraction in fractions.items()}
    sizes = {"train": left - sum(sizes.values()), **sizes}
    if sizes["train"] < 1:
        raise UserError(f"{depth} sections are too few for {', '.join(sizes)} with {gap} between; lower "
                        "VISTA_GAP, or set VISTA_VAL_FRACTION or VISTA_TEST_FRACTION to 0")
    parts, first = {}, 0
    for split, size in sizes.items():
        parts[split] = first, first + size
        first += size + gap
    return parts


def check_apart(sources, gap):
    """Raise UserError where sections of two splits are the same or nearer than ``gap`` in one file.

    A file is what the disk says, so that a second name or a link of it does not hide it.
    """
    placed = {}                                     # (file, key) -> [(split, first, end, path)], of the file
    for source in sources:
        for volume in (source.raw, *source.labels.values()):
            below = volume.corner[0] if isinstance(volume, Box) else 0
            part = source.split, source.sections[0] + below, source.sections[1] + below, volume.path
            placed.setdefault((*identity(volume.path), volume.key), []).append(part)
    for parts in placed.values():
        for (one, low, high, path), (other, first, end, _) in combinations(parts, 2):
            if one != other and max(first - high, low - end) < gap:
                raise UserError(f"{path}: sections {low}:{high} ({one}) and {first}:{end} ({other}) are not "
                                f"{gap} apart (VISTA_GAP)")


def identity(path):
    """(device, inode) of a file or folder."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise BadFile(f"{path}: cannot be read ({error})") from error
    return found.st_dev, found.st_ino
