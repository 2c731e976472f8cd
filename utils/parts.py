"""Intermediate results of a long computation, kept on disk so that an interrupted run goes on."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np

from utils.config import BadFile, UserError

SETTINGS = "settings.json"


class Parts:
    """A folder of named groups of arrays, each written whole or not at all.

    settings: what the parts depend on, a dict that JSON can hold.  A folder with parts of other settings is
    refused (UserError): they would be mixed.
    """

    def __init__(self, folder, settings):
        self.folder = Path(folder)
        path = self.folder / SETTINGS
        settings = json.loads(json.dumps(settings))
        if path.is_file():
            found = json.loads(path.read_text())
            other = [key for key in settings if found.get(key) != settings[key]]
            if other:
                raise UserError(f"{self.folder}: holds parts of an unfinished run with another "
                                f"{', '.join(other)}; delete that folder, or use the same settings")
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(settings, indent=2))
            os.replace(temporary, path)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written ({error.strerror})") from error

    def path(self, name):
        """Where the part of that name is, or will be."""
        return self.folder / f"{name}.npz"

    def __contains__(self, name):
        return self.path(name).is_file()

    def save(self, name, **arrays):
        """Write a part.  UserError when the disk is full or the folder read-only."""
        temporary = self.folder / f".{name}-{os.getpid()}"
        try:
            with open(temporary, "wb") as file:
                np.savez_compressed(file, **arrays)
            os.replace(temporary, self.path(name))
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(f"{self.path(name)}: cannot be written ({error.strerror}); free space and run "
                            "the same command again: it goes on from here") from error

    def load(self, name):
        """The arrays of a part, by name.  BadFile: damaged."""
        try:
            with np.load(self.path(name)) as arrays:
                return dict(arrays)
        except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise BadFile(f"{self.path(name)}: damaged; delete it and run the same command again") from error

    def save_slab(self, z0, z1, values):
        """Write sections [z0, z1) of a volume: values [C, z1 - z0, H, W].  Raises as ``save``."""
        self.save(f"slab_{z0}_{z1}", values=values)

    def slabs(self):
        """[(z0, z1)] of the slabs that are there, ascending."""
        return sorted(tuple(map(int, path.stem.split("_")[1:])) for path in self.folder.glob("slab_*.npz"))

    def sections(self, z0, z1):
        """Sections [z0, z1) of the slabs: [C, z1 - z0, H, W].  Raises as ``load``."""
        pieces = []
        for first, last in self.slabs():
            if first < z1 and last > z0:
                values = self.load(f"slab_{first}_{last}")["values"]
                pieces.append(values[:, max(z0 - first, 0):z1 - first])
        return np.concatenate(pieces, axis=1)

    def remove(self):
        """Delete the folder."""
        shutil.rmtree(self.folder)
