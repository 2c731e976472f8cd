"""What a cache of brain studies tells of its making: the tables beside it, and lines for the screen."""

import csv
from pathlib import Path

NOTES, MODES = "notes.csv", "mode_mapping.csv"
SHOWN = 5                                            # names or series that the screen shows; tables have all


def write_modes(output, modes):
    """Write mode_mapping.csv: study, mode, source; corrected, it can be given to the next run."""
    rows = [(study, *mode) for study, mode in modes.items()]
    write_table(output / MODES, [("study", "mode", "source"), *rows])


def write_notes(output, records):
    """Write notes.csv of {source: record}: study, series, path, note of each series that was repaired.

    Removes an old one when there is none.
    """
    rows = sorted((source.study, source.name, record["source"], "; ".join(record["notes"]))
                  for source, record in records.items() if record["notes"])
    (output / NOTES).unlink(missing_ok=True)
    if rows:
        write_table(output / NOTES, [("study", "series", "path", "note"), *rows])


def write_table(path, rows):
    """Write rows as CSV; a name may be no Unicode."""
    with open(path, "w", newline="", errors="backslashreplace") as file:
        csv.writer(file).writerows(rows)


def told_of(output):
    """Lines about a cache that was just made: its studies' names, guessed modes, and what was repaired."""
    output = Path(output)
    modes = read_rows(output / MODES)
    guessed = sum(row["source"].startswith("guess") for row in modes)
    lines = ["Studies, as labels and splits must name them: " + shown([row["study"] for row in modes], ", ")]
    if guessed:
        lines.append(f"{guessed} of {len(modes)} modes (MRI or CT) were guessed: check {output / MODES} and "
                     "give it with --modes")
    notes = [f"{row['study']}/{row['series']}: {row['note']}" for row in read_rows(output / NOTES)]
    if notes:
        lines.append(f"Repaired series, {len(notes)}, all in {output / NOTES}:\n" + shown(notes, "\n"))
    return lines


def shown(words, between):
    """The first SHOWN words, and how many more there are."""
    more = [f"... and {len(words) - SHOWN} more"] if len(words) > SHOWN else []
    return between.join(words[:SHOWN] + more)


def read_rows(path):
    """The rows of a table as dicts; none without a file."""
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
