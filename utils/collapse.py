"""Whether self-supervised features have collapsed, as two numbers to watch."""

import torch
import torch.nn.functional as F


@torch.no_grad()
def feature_statistics(features):
    """{"std", "effective_rank"} of features [T, E], as floats; both fall when the features collapse.

    std: of each dimension over the tokens after L2 normalisation of each token, mean over dimensions, times
    sqrt(E); 0 = all tokens point the same way, 1 = directions of an isotropic cloud (SimSiam, Chen & He 2021,
    arXiv:2011.10566, section 4.1).
    effective_rank: exp of the entropy of the singular values divided by their sum; 1 = one direction and its
    opposite, min(T, E) = all directions alike (Roy & Vetterli 2007, eq. 2; RankMe, Garrido et al. 2023,
    arXiv:2210.02885, eq. 1).  T must be several times E for an isotropic cloud to come near E.

    Computed in float64; meant for some thousand tokens.  Features that are not finite give nan.  Raises
    ValueError for no tokens.
    """
    if len(features) == 0:
        raise ValueError("no features, hence no statistics")
    features = features.double()
    if not features.isfinite().all():
        return {"std": float("nan"), "effective_rank": float("nan")}
    std = F.normalize(features, dim=1).std(0, correction=0).mean() * features.shape[1] ** 0.5
    singular = torch.linalg.svdvals(features)                                          # [min(T, E)]
    shares = singular / singular.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return {"std": std.item(), "effective_rank": torch.special.entr(shares).sum().exp().item()}
