"""Labels of studies from a CSV file: findings, one class of several, or numbers."""

import math
from dataclasses import dataclass

import torch

from datasets.splits import first_line, read_table
from utils.config import UserError

STUDY_COLUMNS = ("study_id", "study")                # either word, also in the tables of modes and splits
MISSING = ("", "nan", "na")
KINDS = ("bce", "ce", "mse", "mae", "rmse")


@dataclass(frozen=True)
class Labels:
    """Labels by study.

    kind: the loss they are for, a word of KINDS.  names: the label columns; for "ce" the classes, in order.
    values: {study: float32 [L]}, NaN = missing; for "ce" [1], the index of the class.  source: the file.
    """

    kind: str
    names: list
    values: dict
    source: str

    def match(self, studies):
        """(studies with a label, names of studies without any, names in the file that are no such study).

        studies: list of cache.Study.  Raises UserError when none has a label.
        """
        labelled = {name for name, value in self.values.items() if not value.isnan().all()}
        found = [study for study in studies if study.name in labelled]
        if not found:
            raise UserError(f"{self.source}: has labels for none of the {len(studies)} studies "
                            f"({', '.join(study.name for study in studies[:3])} ...), but for "
                            f"{', '.join(list(self.values)[:3])} ...")
        names = {study.name for study in studies}
        return (found, [study.name for study in studies if study.name not in labelled],
                [name for name in self.values if name not in names])

    def class_counts(self, studies):
        """int64 counts over the studies, missing ones left out: "bce" [L, 2] negatives, positives; "ce" [C].

        Raises UserError for numbers, which have no classes.
        """
        if self.kind not in ("bce", "ce"):
            raise UserError(f'class weights are for the losses bce and ce, not for "{self.kind}"')
        values = torch.stack([self.values[study.name] for study in studies])                   # [B, L]
        if self.kind == "bce":
            return torch.stack([(values == 0).sum(0), (values == 1).sum(0)], 1)
        return values[~values.isnan()].long().bincount(minlength=len(self.names))

    def balanced_weights(self, studies):
        """float32 weights by which all classes count alike in training.

        "bce" [L]: of the positives, negatives / positives.  "ce" [C]: studies / (C * studies of the class).
        Raises UserError naming a label or class that the training studies do not have.
        """
        counts = self.class_counts(studies)
        words = ("negative ", "positive ") if self.kind == "bce" else ("",)
        for name, count in zip(self.names, counts.view(len(self.names), -1).tolist(), strict=True):
            if 0 in count:
                raise UserError(f'{self.source}: no {words[count.index(0)]}study of "{name}" is in training; '
                                "leave the label out, or split the studies otherwise")
        if self.kind == "bce":
            return counts[:, 0] / counts[:, 1]
        return counts.sum() / (len(counts) * counts)

    def loss_weights(self, studies, given, balance):
        """float32 weights of the loss: the ``given`` ones, or with ``balance`` balanced_weights; else None.

        Raises UserError for a loss that takes no weights, and for another number of them.
        """
        if self.kind not in ("bce", "ce") and given:
            raise UserError(f'MIL_CLASS_WEIGHTS: the loss "{self.kind}" takes none; set it to []')
        if self.kind not in ("bce", "ce") or not (given or balance):
            return None
        if given and len(given) != len(self.names):
            raise UserError(f"MIL_CLASS_WEIGHTS = {given}: must be {len(self.names)} numbers, for "
                            f"{', '.join(self.names)}")
        return torch.as_tensor(given or self.balanced_weights(studies)).float()


def read_labels(path, loss):
    """Labels of a CSV file with a column study_id (or study) and label columns.

    loss: "bce", columns of 0 and 1, each a label of its own; "ce", one column of classes, words or whole
    numbers; "mse", "mae" or "rmse", columns of numbers.  A cell that is empty, "nan" or "na" is missing.
    Raises UserError naming the file, and the line of a study that comes twice or of a value that is no label.
    """
    if loss not in KINDS:
        raise UserError(f'MIL_LOSS = "{loss}": must be one of {", ".join(KINDS)}')
    rows = read_table(path, "STUDY_LABELS")
    columns = list(rows[0][1]) if rows else []
    key = next((column for column in STUDY_COLUMNS if column in columns), None)
    if key is None:
        raise UserError(f"{path}: needs rows and a column study_id{first_line(path)}")
    columns.remove(key)
    if not columns or (loss == "ce" and len(columns) > 1):
        raise UserError(f"{path}: needs {'one' if loss == 'ce' else 'a'} label column beside {key}, "
                        f"has {', '.join(columns) or 'none'}")
    cells = {}
    for line, row in rows:
        place = f"{path}, line {line}"
        if not row[key]:
            raise UserError(f"{place}: the study has no name")
        if row[key] in cells:
            raise UserError(f"{place}: the study {row[key]} comes a second time")
        cells[row[key]] = [parse(row[column], loss, f"{place}, {column}") for column in columns]
    names = columns
    if loss == "ce":
        names = sorted_classes({cell for (cell,) in cells.values()} - {None}, path)
        cells = {study: [None if cell is None else names.index(cell)] for study, (cell,) in cells.items()}
    values = {study: torch.tensor([math.nan if cell is None else cell for cell in row], dtype=torch.float32)
              for study, row in cells.items()}
    return Labels(loss, names, values, str(path))


def parse(cell, loss, place):
    """A cell's label: None if missing, a word for "ce", else a float.  Raises UserError naming the place."""
    if cell.lower() in MISSING:
        return None
    number = number_in(cell)
    if loss == "ce":
        if number is not None and not is_whole(cell):
            raise UserError(f'{place}: "{cell}" is no class; classes are words or whole numbers')
        return cell
    if number is None or not abs(number) <= torch.finfo(torch.float32).max:
        raise UserError(f'{place}: "{cell}" is no number')
    if loss == "bce" and number not in (0, 1):
        raise UserError(f'{place}: "{cell}" is neither 0 nor 1, nor empty for a missing label')
    return number


def number_in(cell):
    """The number that a text is, or None."""
    try:
        return float(cell)
    except ValueError:
        return None


def is_whole(cell):
    """Whether a text is a whole number without a point, of a length that numbers of classes have."""
    return cell.removeprefix("-").isdecimal() and len(cell) < 20


def sorted_classes(classes, path):
    """Classes in order, by number if all are whole numbers.  Raises UserError when there are not two."""
    if len(classes) < 2:
        raise UserError(f"{path}: holds {len(classes)} class(es), and ce tells two at least apart")
    return sorted(classes, key=int if all(map(is_whole, classes)) else str)
