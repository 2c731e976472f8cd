"""Hidden patches for masked image modelling."""

import torch

from utils.config import UserError


class PatchMask:
    """Which pixels of a pair of images are hidden from the network.

    patch: side of a hidden patch in pixels; patches lie on a grid, the last ones are cut at the border.
    mode: "single" hides, with the given probability, one patch of one of the two images; "random" hides each
    patch of both images by itself with that probability (SimMIM, Xie et al. 2022, arXiv:2111.09886).
    UserError: another mode.
    """

    def __init__(self, patch, mode):
        if mode not in ("single", "random"):
            raise UserError(f"MASK_MODE={mode}: allowed are single and random")
        self.patch, self.mode = patch, mode

    def __call__(self, height, width, probability, generator):
        """Bool [2, height, width], channel 0 the prior and 1 the current image; True = hidden."""
        rows, columns = -(-height // self.patch), -(-width // self.patch)
        if self.mode == "random":
            grid = torch.rand(2, rows, columns, generator=generator) < probability
        else:
            grid = torch.zeros(2 * rows * columns, dtype=torch.bool)
            place = torch.randint(len(grid), (1,), generator=generator)
            grid[place] = torch.rand(1, generator=generator) < probability
            grid = grid.view(2, rows, columns)
        pixels = grid.repeat_interleave(self.patch, 1).repeat_interleave(self.patch, 2)
        return pixels[:, :height, :width]
