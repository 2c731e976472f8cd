"""SimCLR: a backbone and the projection in whose space two views of an image shall agree."""

import torch.nn as nn


class SimCLR(nn.Module):
    """A backbone without head, and a projector of two layers; the features before it are what is kept.

    backbone: models.photo.build_photo_model with num_classes 0; projection_dim: width of the projections.
    Chen et al. 2020, arXiv:2002.05709, section 4.2 and figure 8.
    """

    def __init__(self, backbone, projection_dim=128):
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Sequential(nn.Linear(backbone.dim, backbone.dim), nn.ReLU(),
                                       nn.Linear(backbone.dim, projection_dim))

    def forward(self, images):
        """images [B, 3, H, W] -> (projections [B, P], features [B, E])."""
        features = self.backbone(images)
        return self.projector(features), features
