"""Whether a study is MRI or CT: from a table, from DICOM, or guessed from values and names."""

import re

import numpy as np

from datasets.dicom_files import read_dataset
from datasets.labels import STUDY_COLUMNS
from datasets.splits import first_line, read_table
from datasets.volumes import check_image, read_volume
from utils.config import BadFile, UserError, closest

STUDY_MODES = ("mri", "ct")
MODALITIES = {"MR": "mri", "CT": "ct", "OT": None, "": None}      # of DICOM; the last two say nothing
AIR = -500                                           # HU; nothing of a head is thinner
SAMPLE = 1_000_000                                   # voxels that a guess looks at
WINDOW = r"(?:brain|blood|bone)(?=[ _-]?window)"
WINDOW_WORD = re.compile(rf"(?<![a-z])(?:brain|blood|bone)(?![a-z])|{WINDOW}")
CT_WORD = re.compile(rf"(?<![a-z])ct(?![a-z])|{WINDOW}")


def read_modes(path, studies):
    """{study: "mri" | "ct"} of a CSV with the columns study (or study_id) and mode; {} without one (None).

    Raises UserError naming the line of an unknown mode, or of a study that comes twice or is not there.
    """
    if path is None:
        return {}
    rows, modes = read_table(path, "--modes"), {}
    key = next((column for column in STUDY_COLUMNS if rows and column in rows[0][1]), None)
    if key is None or "mode" not in rows[0][1]:
        raise UserError(f"{path}: needs rows, and the columns study and mode{first_line(path)}")
    for line, row in rows:
        study, mode, place = row[key], row["mode"], f"{path}, line {line}"
        if mode not in STUDY_MODES:
            raise UserError(f'{place}: the mode "{mode}" is not one of {", ".join(STUDY_MODES)}')
        if study in modes:
            raise UserError(f"{place}: the study {study} comes a second time")
        if study not in studies:
            raise UserError(f"{place}: there is no study {study}{closest(study, studies)}")
        modes[study] = mode
    return modes


def vote_of(source, raw, look):
    """(mode or None, why) of one Source: DICOM Modality, a CT's name, or values that look like HU.

    Of another modality DICOM's own word is the mode ("PT"): such a series belongs into no study.
    look False: the values are not looked at.  A file that is no image, or cannot be read, says nothing ("").
    """
    path = source.paths[0]
    if source.kind == "dicom":
        header = read_dataset(path, stop_before_pixels=True, specific_tags=["Modality"])
        word = str(header.get("Modality") or "")
        mode = MODALITIES.get(word, word)
        if mode:
            return mode, "DICOM Modality"
    if not look:
        return None, ""
    if CT_WORD.search(str(path.relative_to(raw)).lower()):
        return "ct", "guess: name"
    try:
        data = read_volume(source).data
        check_image(path, data)
    except BadFile:
        return None, ""
    return ("ct" if looks_like_hu(data) else None), f"guess: values {data.min():g}..{data.max():g}"


def looks_like_hu(data):
    """Whether an array has the air of a CT: much of it near -1000, more than between there and tissue.

    The second tells a CT from the phase images of an MRI, whose values are spread over thousands.
    """
    flat = data.ravel(order="K")
    flat = flat[::1 + flat.size // SAMPLE]
    air = np.mean((flat >= -1100) & (flat <= -900))
    between = np.mean((flat > -900) & (flat < -200))
    return bool(air > 0.01 and air > between and np.mean(flat > 5000) < 0.001)


def decide(votes):
    """(mode, why) of a study from the votes of its series; the majority, and CT when equally many.

    Values that do not look like a CT count as MRI.  Other modalities and files that say nothing do not count.
    """
    count = {mode: sum((word or "mri") == mode for word, why in votes if why) for mode in STUDY_MODES}
    mode = "ct" if count["ct"] >= max(1, count["mri"]) else "mri"
    reasons = ([why for word, why in votes if word == mode]
               or [why for word, why in votes if word is None and why])
    return mode, reasons[0] if reasons else "guess: no MRI or CT can be read"


def window_in(path):
    """The last of brain, blood and bone (BrainWindow ...) that a path names as a word, or None."""
    words = WINDOW_WORD.findall(str(path).lower())
    return words[-1] if words else None
