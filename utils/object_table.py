"""Sizes and centres of the instances of a volume, slab by slab, and the table of them."""

import numpy as np

from utils.tables import write_csv


class ObjectTable:
    """Running sums over the voxels of each id.

    class_of: int [K + 1], the class of each id; classes: the word of each class.
    """

    def __init__(self, class_of, classes):
        self.class_of, self.classes = class_of, classes
        self.sums = np.zeros((len(class_of), 4))                  # voxels, and their z, y, x

    def add(self, labels, z0):
        """Add sections [z0, z0 + d): ids 0..K as integers [d, H, W], 0 = none."""
        count = len(self.sums)
        for z, section in enumerate(labels, z0):
            rows, columns = np.nonzero(section)
            ids = section[rows, columns]
            voxels = np.bincount(ids, minlength=count)
            self.sums += np.stack([voxels, z * voxels, np.bincount(ids, rows, count),
                                   np.bincount(ids, columns, count)], axis=1)

    def write(self, path):
        """Write a CSV of the ids with a voxel: id, class, voxels, and the centre z, y, x in voxels.

        Returns their number.
        """
        found = np.flatnonzero(self.sums[:, 0])
        rows = ((number, self.classes[self.class_of[number]], int(self.sums[number, 0]),
                 *(f"{value:.2f}" for value in self.sums[number, 1:] / self.sums[number, 0]))
                for number in found)
        write_csv(path, ("id", "class", "voxels", "z", "y", "x"), rows)
        return len(found)
