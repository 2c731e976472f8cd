"""Tables of figures: aligned text for the screen, and CSV files."""

import csv
import math

from utils.files import replacing
from utils.intervals import Interval


def first_of(names):
    """``: a, b`` for a message, five of the names at most; nothing where there are none."""
    return f"{': ' if names else ''}{', '.join(names[:5])}"


def text_table(rows, meanings, digits=3):
    """Aligned text: a line per figure with its meaning, a column per name.

    rows: dict name -> dict of figures, floats or Intervals; missing and nan ones show as "-".  meanings: dict
    figure -> words; a figure without any has none.
    """
    names = list(dict.fromkeys(figure for row in rows.values() for figure in row))
    columns = [[name, *(cell(row.get(figure, math.nan), digits) for figure in names)]
               for name, row in rows.items()]
    label, widths = max(map(len, names)), [max(map(len, column)) for column in columns]
    lines = []
    for i, figure in enumerate(["", *names]):
        cells = "".join(f"  {column[i]:>{width}}" for column, width in zip(columns, widths, strict=True))
        lines.append(f"{figure:<{label}}{cells}   {meanings.get(figure, '')}".rstrip())
    return "\n".join(lines)


def cell(figure, digits=3):
    """``0.912``, ``0.912 (0.850 to 0.960)`` for an Interval, or ``-`` where it is nan."""
    value, *bounds = figure[:3] if isinstance(figure, Interval) else (figure,)
    if math.isnan(value):
        return "-"
    low_to_high = " to ".join(f"{bound:.{digits}f}" for bound in bounds)
    return f"{value:.{digits}f}" + (f" ({low_to_high})" if bounds else "")


def write_csv(path, columns, rows):
    """Write a CSV file, whole or not at all; rows: sequences, or dicts, of which what is missing stays empty.

    Raises UserError when the file cannot be written.
    """
    with replacing(path, "w", newline="", errors="backslashreplace") as file:        # names may be no Unicode
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([row.get(column, "") for column in columns] if isinstance(row, dict) else row
                         for row in rows)
