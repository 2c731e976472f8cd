"""Decisions of a cascade on series of slices: votes, what goes on, which series there are, tables."""

import json
from collections import Counter
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np

from datasets.slice_lists import is_mask, stem_of
from datasets.slice_series import left_out
from utils.config import UserError, closest
from utils.files import replacing

VOTES = ("anatomy", "location_view", "sequence")     # the series has one class, by a vote of its slices
MASKS = {"cord_mask": "cord", "lesion_mask": "lesion"}
STAGES = (*VOTES, "cord", *MASKS)                    # in their order; "cord" chooses slices
KEEP = {"anatomy": ["spine"], "location_view": ["cervical_sagittal"], "sequence": ["T2w"],
        "cord": ["present"]}
LEFT_OUT = {                                         # what it means that a stage is left out
    "anatomy": "every series is taken for a spine",
    "location_view": "series of every location and view go on",
    "sequence": "series of every sequence go on",
    "cord": "every slice of a series goes on to the masks",
    "cord_mask": "no cord is outlined, and lesions may lie anywhere",
    "lesion_mask": "no lesions are looked for"}


class Vote(NamedTuple):
    """winner: number of the class; votes: slices for it; margin, probability: see ``vote``."""

    winner: int
    votes: int
    margin: float
    probability: float


def vote(probabilities):
    """The Vote of a series, probabilities [N, K] of its slices: each is for its most probable class.

    Most votes win; of equally many the class with the higher mean probability, then the first.
    margin: the winner's share of the votes less that of the next, 0 for a tie; probability: the winner's mean
    over all slices.
    """
    votes = np.bincount(probabilities.argmax(1), minlength=probabilities.shape[1])
    means = probabilities.mean(0)
    first, second = np.lexsort((-means, -votes))[:2]
    return Vote(int(first), int(votes[first]), float((votes[first] - votes[second]) / len(probabilities)),
                float(means[first]))


def decide(stage, probabilities, names, kept, least, stop):
    """(fields of the series' row, whether the vote is doubtful, why the series ends here or "").

    probabilities [N, K] of its slices; names: of the K classes; kept: those that go on; least: margin below
    which a vote is doubtful; stop: whether a doubtful series ends here.
    """
    found = vote(probabilities)
    word, doubtful = names[found.winner], found.margin < least
    fields = {stage: word, f"{stage}_votes": f"{found.votes} of {len(probabilities)}",
              f"{stage}_margin": round(found.margin, 4), f"{stage}_probability": round(found.probability, 4)}
    if word not in kept:
        return fields, doubtful, f"{stage}: {word}"
    return fields, doubtful, f"{stage}: doubtful ({word})" if doubtful and stop else ""


def choose_slices(stage, probabilities, names, kept):
    """(fields of the series' row, bool [N] of the slices that go on, why the series ends here or "").

    A slice goes on when its most probable class is among ``kept``; a single one is enough.  The probability
    is that of the kept classes, mean over the slices that go on, or over all where none does.
    """
    on = np.isin(np.array(names)[probabilities.argmax(1)], list(kept))
    share = probabilities[:, [name in kept for name in names]].sum(1)
    word = " or ".join(kept) if on.any() else names[vote(probabilities).winner]
    fields = {stage: word, f"{stage}_votes": f"{on.sum()} of {len(on)}",
              f"{stage}_probability": round(float(share[on if on.any() else slice(None)].mean()), 4)}
    return fields, on, "" if on.any() else f"{stage}: {word} in every slice"


def parse_keep(words, stages):
    """{stage: [classes]} of words such as "sequence=T1w,T2w", over KEEP; ``stages``: those that are used."""
    keep = {stage: KEEP[stage] for stage in stages if stage in KEEP}
    for word in words:
        stage, separator, classes = word.partition("=")
        if not separator or not classes or stage not in KEEP:
            raise UserError(f"--keep {word}: expected STAGE=CLASS or STAGE=CLASS,CLASS, the stage one of "
                            f"{', '.join(KEEP)}")
        if stage not in keep:
            raise UserError(f"--keep {word}: the stage {stage} is left out, so that nothing is kept by it")
        keep[stage] = classes.split(",")
    return keep


def kept_classes(stage, words, names):
    """Those of the class ``names`` that ``words`` name, in full or, where no class is so named, with * and ?.

    Raises UserError for a word that names none.
    """
    kept = []
    for word in words:
        found = [word] if word in names else [name for name in names if fnmatchcase(name, word)]
        if not found:
            shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            raise UserError(f"--keep {stage}={word}: the network of that stage has no such class, but {shown}"
                            f"{closest(word, names)}")
        kept += [name for name in found if name not in kept]
    return kept


def without_masks(entries):
    """(the Entries that are no masks, notes); a mask has another's name and _cord, _lesion, _seg behind."""
    stems = {stem_of(entry.name) for entry in entries}
    masks = [entry.name for entry in entries if is_mask(stem_of(entry.name), stems, "cord")]
    return [entry for entry in entries if entry.name not in masks], left_out(masks, "mask(s) of other series")


def output_names(entries):
    """A name for the files of each Entry: its own without suffix, and ~2 behind where another has it."""
    taken, names = Counter(), []
    for stem in (stem_of(entry.name) for entry in entries):
        taken[stem] += 1
        names.append(stem if taken[stem] == 1 else f"{stem}~{taken[stem]}")
    return names


def series_columns(stages):
    """Columns of the table of series, for these stages."""
    votes = [f"{stage}{end}" for stage in stages if stage in KEEP
             for end in ("", "_votes", "_margin", "_probability") if (stage, end) != ("cord", "_margin")]
    masks = [f"{MASKS[stage]}_mm3" for stage in stages if stage in MASKS]
    return ["series", "path", "uid", "slices", "view", *votes, *masks,
            *["lesions"] * ("lesion_mask" in stages), "doubtful", "stopped", "notes"]


def read_record(path, made_with):
    """{"row", "slices"} of a series that is whole and was made with the same, or None."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    whole = record.get("made_with") == json.loads(json.dumps(made_with)) \
        and all((path.parent / name).is_file() for name in record["files"])
    return {"row": record["row"], "slices": record["slices"]} if whole else None


def write_record(path, made_with, files, row, slices):
    """Write what read_record reads, whole or not at all, and return it; files: names beside it."""
    with replacing(path, "w") as file:
        json.dump({"made_with": made_with, "files": files, "row": row, "slices": slices}, file)
    return {"row": row, "slices": slices}


def summary(rows):
    """Lines that say how many series ended where, and which votes are doubtful; rows: of series."""
    ends = Counter(row["stopped"].partition(" (")[0] or "through all stages" for row in rows)
    doubtful = [row for row in rows if row.get("doubtful")]
    lines = [f"{len(rows)} series: " + "; ".join(f"{count} {end}" for end, count in ends.most_common())]
    shown = [f"{row['series']} ({stage} {row[stage]}, margin {row[f'{stage}_margin']:.2f})"
             for row in doubtful[:8] for stage in row["doubtful"].split(", ")]
    if doubtful:
        lines.append(f"Doubtful votes in {len(doubtful)} series: {'; '.join(shown)}"
                     + ("; ..." if len(doubtful) > 8 else ""))
    return lines
