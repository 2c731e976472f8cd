"""Sizes and centres of the instances of a volume, slab by slab, and the table of them."""

import csv

import numpy as np


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
        with open(path, "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("id", "class", "voxels", "z", "y", "x"))
            for number in found:
                voxels, *total = self.sums[number]
                rows.writerow((number, self.classes[self.class_of[number]], int(voxels),
                               *(f"{value / voxels:.2f}" for value in total)))
        return len(found)
