"""SimCLR at 256 px, batch 16: the two views, and the whole training step, against lightly and the original.

    python benchmarks/simclr_step.py --n 10

ours      views drawn per image from uint8, one forward of both, NT-Xent, bfloat16 autocast, fused AdamW
flags     lightly's transform and loss around the same network, under the same autocast and optimizer
lightly   the same in float32
original  the recipe of the system that this one follows: parameters drawn once for a batch, two forwards with
          activation checkpointing, cross-view InfoNCE, float32, torch's default AdamW

Both lightly's and the original's steps forward the two views one after the other, as their examples do.  A
step is views, forward, loss, backward and AdamW; decoding is left out, as all start from decoded images:
PIL's for lightly, a uint8 tensor for ours, a float one for the original.  PIL runs on one thread.
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss
from lightly.transforms import SimCLRTransform
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[1]))

from datasets.simclr_views import SimCLRViews
from losses.nt_xent import nt_xent_loss
from models.photo import build_photo_model
from models.simclr import SimCLR
from utils.optim import build_optimizer, parameter_groups

TEMPERATURE, LR, WEIGHT_DECAY = 0.07, 3e-4, 1e-4
AUGMENT_ROUNDS = 5                        # calls of the views for every timed step


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=10, help="timed rounds (default: %(default)s)")
    parser.add_argument("--model", default="hvit_small")
    parser.add_argument("--size", type=int, default=256, help="pixels (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="images (default: %(default)s)")
    return parser.parse_args()


def build_images(args):
    """uint8 [B, 3, S, S]: smooth coloured noise of several scales, as decoded photographs are."""
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(args.batch, 3, args.size, args.size)
    for side in (4, 16, 64):
        noise = torch.rand(args.batch, 3, side, side, generator=generator)
        images += F.interpolate(noise, images.shape[2:], mode="bicubic") / 3
    return (255 * images.clamp(0, 1)).byte()


def build_views(args, images):
    """{name: function of a seed -> (first, second) float32 [B, 3, S, S] in [0, 1]} for ours and the peers."""
    views = SimCLRViews(args.size)
    pictures = [v2.functional.to_pil_image(image) for image in images]
    transform = SimCLRTransform(args.size, min_scale=0.2, normalize=None)
    floats = images / 255
    kernel = 2 * (args.size // 20) + 1
    batched = v2.Compose([
        v2.RandomResizedCrop(args.size, (0.08, 1.0), antialias=True), v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8), v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], 0.5)])

    def ours(seed):
        return views(images, range(seed * args.batch, (seed + 1) * args.batch))

    def lightly(seed):
        return tuple(map(torch.stack, zip(*map(transform, pictures), strict=True)))

    def original(seed):
        return batched(floats), batched(floats)

    return {"ours": ours, "lightly": lightly, "original": original}


def info_nce(first, second, temperature):
    """Cross-view InfoNCE of both directions: negatives are the other images in the other view alone."""
    logits = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T / temperature
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def project(model, pair, together):
    """Projections of both views, float32: in one forward or in two."""
    if together:
        return model(torch.cat(pair))[0].float().chunk(2)
    return tuple(model(view)[0].float() for view in pair)


def build_steps(args, views):
    """{name: function of a seed that takes one step and returns its loss}, all from the same weights."""
    torch.manual_seed(0)
    model = SimCLR(build_photo_model(args.model, 0))
    lightly_loss = NTXentLoss(TEMPERATURE)

    def build(views, loss_function, together, bfloat16, plain):
        network = copy.deepcopy(model)
        if plain:
            for module in network.modules():                # of the hierarchical ViT and its stages
                if hasattr(module, "checkpoint_activations"):
                    module.checkpoint_activations = True
            optimizer = torch.optim.AdamW(network.parameters(), LR, weight_decay=WEIGHT_DECAY)
        else:
            groups = parameter_groups(network, WEIGHT_DECAY, False)
            optimizer = build_optimizer("adamw", groups, LR, WEIGHT_DECAY)

        def step(seed):
            pair = views(seed)
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                first, second = project(network, pair, together)
            loss = loss_function(first, second)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return step

    return model, {
        "ours": build(views["ours"], lambda *pair: nt_xent_loss(*pair, TEMPERATURE), True, True, False),
        "flags": build(views["lightly"], lightly_loss, False, True, False),
        "lightly": build(views["lightly"], lightly_loss, False, False, False),
        "original": build(views["original"], lambda *pair: info_nce(*pair, TEMPERATURE), False, False, True)}


@torch.no_grad()
def check(model, views):
    """Same loss on the same views; and views whose brightness and contrast are those of lightly's."""
    pair = views["ours"](0)
    model = copy.deepcopy(model).eval()                     # drop path draws for each forward
    together, apart = project(model, pair, True), project(model, pair, False)
    expected = NTXentLoss(TEMPERATURE)(*apart)
    torch.testing.assert_close(nt_xent_loss(*together, TEMPERATURE), expected, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = project(model, pair, True)
    torch.testing.assert_close(nt_xent_loss(*rounded, TEMPERATURE), expected, rtol=0.02, atol=0)
    batches = {name: torch.cat([torch.cat(views[name](seed)) for seed in range(8)])
               for name in ("ours", "lightly")}
    for name, figure in (("mean", lambda x: x.mean()), ("deviation", lambda x: x.std((1, 2, 3)).mean())):
        mine, theirs = (figure(batch).item() for batch in batches.values())
        print(f"views: {name} {mine:.3f}, lightly's {theirs:.3f}")
        assert abs(mine - theirs) < 0.05, name


def measure(functions, rounds):
    """{name: median seconds} of functions of a seed, called in turns; the first round warms up."""
    seconds = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name in list(functions)[::1 if i % 2 else -1]:
            start = time.perf_counter()
            functions[name](i)
            seconds[name] += [time.perf_counter() - start] if i else []
    return {name: statistics.median(values) for name, values in seconds.items()}


def main():
    args = parse_args()
    images = build_images(args)
    views = build_views(args, images)
    model, steps = build_steps(args, views)
    check(model, views)

    threads = torch.get_num_threads()
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        seconds = measure(views, AUGMENT_ROUNDS * args.n)
        rates = ", ".join(f"{name} {args.batch / value:.0f}" for name, value in seconds.items())
        print(f"two views on {count} threads, images/s: {rates}", flush=True)
        print(f"augmentation on {count} threads: {seconds['lightly'] / seconds['ours']:.2f} times lightly's, "
              f"{seconds['original'] / seconds['ours']:.2f} times the original's", flush=True)

    seconds = measure(steps, args.n)
    print("seconds per step: " + ", ".join(f"{name} {value:.2f}" for name, value in seconds.items()))
    print(f"under the same autocast and optimizer: {seconds['flags'] / seconds['ours']:.2f} times lightly's")
    print(f"the original's recipe: {seconds['original'] / seconds['ours']:.2f} times as long")
    print(f"ratio: {seconds['lightly'] / seconds['ours']:.2f} (peer / ours, median of {args.n})")


if __name__ == "__main__":
    main()
