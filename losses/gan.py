"""Adversarial losses of the patch discriminator and of the network that it judges."""

import torch.nn.functional as F


def discriminator_loss(real_logits, fake_logits):
    """Binary cross-entropy of telling true maps from predicted ones; log 2 when undecided.

    Goodfellow et al. 2014, arXiv:1406.2661, eq. 1, halved.  Logits of any shape and float type, one
    for each patch; computed in float32.  Mean over the patches of each kind, then over the two kinds.
    Pass logits of a detached prediction: the generator must not learn from this term.
    """
    real, fake = real_logits.float(), fake_logits.float()
    return (F.binary_cross_entropy_with_logits(real, real.new_ones(real.shape))
            + F.binary_cross_entropy_with_logits(fake, fake.new_zeros(fake.shape))) / 2


def generator_loss(fake_logits):
    """Binary cross-entropy of passing predicted maps for true ones; log 2 when the judge is undecided.

    The non-saturating form of Goodfellow et al. 2014, arXiv:1406.2661, section 3: -log D(fake), whose
    gradient stays large while the discriminator is sure.  Logits of any shape and float type;
    computed in float32; mean over the patches.
    """
    fake = fake_logits.float()
    return F.binary_cross_entropy_with_logits(fake, fake.new_ones(fake.shape))
