"""Demo data: photographs of invented sugarcane leaves, healthy and with four diseases, in class folders."""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage

from datasets.demo_files import is_complete, make_missing, whole_folder, write_marker
from utils.config import UserError

CLASSES = ("healthy", "mosaic", "red_rot", "rust", "yellow")
LEAST = (5, 64)                                      # photographs per class, pixels of the short side
COPY_EVERY = 4                                       # every fourth original has a changed copy beside it
STRAW, SOIL, GRASS = (196, 176, 134), (112, 82, 62), (70, 98, 46)                 # backgrounds, RGB
YELLOW, PALE, RUST, RED = (222, 190, 60), (186, 206, 104), (138, 70, 34), (134, 42, 34)


def make_leaves(folder, per_class=64, size=144, seed=0, workers=0):
    """Write ``folder``/images/<class>/<class>_(n).jpg, and <class>_(n)_aug1.jpg of every fourth -> images.

    per_class: originals of each class.  size: pixels of the short side; the long one is up to 1.4 times that.
    A photograph depends on (seed, class, n, size) alone.  workers: processes; 0 makes all here.  What a
    stopped run made is kept, class by class; a finished set is not made again.
    Raises UserError when per_class or size is below LEAST, or the folder holds a set with other settings, or
    other files.
    """
    folder = Path(folder)
    if per_class < LEAST[0] or size < LEAST[1]:
        raise UserError(f"{per_class} demo leaves per class of {size} pixels: must be {LEAST[0]} and "
                        f"{LEAST[1]} at least")
    wanted = {"per_class": per_class, "size": size, "seed": seed}
    if not is_complete(folder, wanted):
        write_marker(folder, wanted, complete=False)
        (folder / "images").mkdir(exist_ok=True)
        jobs = [(folder / "images" / word, per_class, size, seed) for word in CLASSES]
        make_missing(write_class, jobs, workers, unit="class")
        write_marker(folder, wanted, complete=True)
    return folder / "images"


def write_class(job):
    """All photographs of a class, in a folder renamed when whole.  job: (folder, per_class, size, seed)."""
    folder, per_class, size, seed = job
    with whole_folder(folder) as unfinished:
        for number in range(1, per_class + 1):
            rng = np.random.default_rng([seed, CLASSES.index(folder.name), number])
            image = Image.fromarray(leaf(rng, folder.name, size))
            name = f"{folder.name}_({number})"
            image.save(unfinished / f"{name}.jpg", quality=int(rng.integers(80, 95)))
            if number % COPY_EVERY == 0:
                changed_copy(rng, image).save(unfinished / f"{name}_aug1.jpg", quality=75)


def changed_copy(rng, image):
    """An image as augmentation before training leaves it: cropped a little, mirrored or turned, relit."""
    width, height = image.size
    left, top = (int(rng.integers(0, max(1, side // 16))) for side in (width, height))
    image = image.crop((left, top, left + width - width // 16, top + height - height // 16))
    changes = (ImageOps.mirror, ImageOps.flip, lambda same: same.transpose(Image.Transpose.ROTATE_90))
    image = changes[int(rng.integers(len(changes)))](image)
    return ImageEnhance.Brightness(image).enhance(float(rng.uniform(0.8, 1.2)))


def leaf(rng, word, size):
    """One photograph of a leaf of a class, uint8 RGB [H, W, 3], upright or lying."""
    height, width = int(size * rng.uniform(1, 1.4)), size
    y, x = np.mgrid[:height, :width] / size - np.array([height / size, 1])[:, None, None] / 2
    angle = rng.normal(0, 0.22)
    u = y * math.cos(angle) + x * math.sin(angle)                        # along the leaf, widths of the image
    v = x * math.cos(angle) - y * math.sin(angle)
    v = (v - rng.normal(0, 0.06) - rng.normal(0, 0.15) * u ** 2) \
        / (rng.uniform(0.2, 0.42) * (1 - rng.uniform(0, 0.5) * (u + 0.5)).clip(0.2))    # edges at -1 and 1
    image = background(rng, x, y)
    inside = ndimage.gaussian_filter((np.abs(v) < 1).astype(float), 0.6)
    shade = ndimage.gaussian_filter(np.roll(inside, tuple(rng.integers(-9, 10, 2)), (0, 1)), 5)
    image *= (1 - 0.5 * shade)[..., None]
    blade = tissue(rng, u, v)
    blade = wear(rng, blade, u, v)
    if word != "healthy":
        blade = DISEASES[word](rng, blade, u, v)
    image = photographed(rng, blend(image, blade, inside), x, y)
    return image.transpose(1, 0, 2)[:, ::-1].copy() if rng.random() < 0.2 else image


def noise(rng, y, x, octaves=1):
    """Smooth noise with a period of about 1 in y and x, float [H, W] in [-1, 1], most near 0."""
    total = 0.0
    for octave in range(octaves):
        cells = rng.uniform(-1, 1, (61, 67))
        places = [y * 2 ** octave + rng.uniform(0, 61), x * 2 ** octave + rng.uniform(0, 67)]
        total = total + ndimage.map_coordinates(cells, places, order=1, mode="grid-wrap") / 2 ** octave
    return total / (2 - 0.5 ** (octaves - 1))


def blend(image, colour, amount):
    """Image [H, W, 3] with a colour (3 numbers or [H, W, 3]) laid over it, amount [H, W] in [0, 1]."""
    return image + (np.asarray(colour, float) - image) * np.clip(amount, 0, 1)[..., None]


def background(rng, x, y):
    """Straw, soil or grass, float [H, W, 3]: grains, or layers of stalks that lie across one another."""
    base = (STRAW, SOIL, GRASS)[int(rng.integers(3))]
    image = np.zeros((*x.shape, 3)) + np.array(base) * rng.uniform(0.5, 0.9)
    image *= (1 + 0.7 * noise(rng, y * 12, x * 12, 3))[..., None]
    if base is SOIL:
        return image
    for _ in range(int(rng.integers(3, 7))):
        turn = rng.uniform(0, math.pi)
        along, across = y * math.cos(turn) + x * math.sin(turn), x * math.cos(turn) - y * math.sin(turn)
        stalk = noise(rng, along * 1.5, across * rng.uniform(9, 20))
        light = 1 + 0.5 * noise(rng, along, across * 60)
        image = blend(image, np.array(base) * rng.uniform(0.5, 1.2) * light[..., None], (stalk - 0.25) * 9)
    return image


def tissue(rng, u, v):
    """A sound blade, float [H, W, 3]: green, veined lengthwise, with a pale midrib and two tilted halves."""
    green = np.array([rng.uniform(60, 135), rng.uniform(125, 165), rng.uniform(40, 95)])
    light = 1 + 0.09 * noise(rng, u * 0.5, v * 26) + 0.1 * noise(rng, u * 2, v * 2, 2)
    light = light * (1 + rng.uniform(-0.2, 0.2) * np.tanh(v * 12)) * (1 - 0.18 * np.abs(v) ** 3)
    image = green * light[..., None]
    rib = np.exp(-(v / rng.uniform(0.06, 0.13)) ** 2) * rng.uniform(0.6, 0.95)
    return blend(image, np.array([205, 218, 178]) * light[..., None], rib)


def wear(rng, image, u, v):
    """What healthy leaves have too, so that colour alone decides nothing: dry edges, dirt, a paler patch."""
    if rng.random() < 0.35:                          # a dry edge, straw or brown
        edge = (np.abs(v + rng.choice([-0.5, 0.0, 0.5])) - rng.uniform(0.85, 1.2)) * 9
        dry = np.array([190, 150, 90]) * (rng.uniform(0.6, 1.1) + 0.25 * noise(rng, u * 3, v * 16))[..., None]
        image = blend(image, dry, edge + 2 * noise(rng, u * 5, v * 2))
    if rng.random() < 0.5:                           # crumbs of soil: round, dark, anywhere
        marks = spots(rng, u, v, int(rng.integers(2, 9)), (0.008, 0.014), 1.0)
        image = blend(image, np.array([96, 60, 44]) * rng.uniform(0.5, 1.1), marks * 0.9)
    if rng.random() < 0.4:                           # a broad paler patch, as the light falls
        image = blend(image, np.array(PALE), 0.4 * noise(rng, u * 1.2, v * 0.6) + 0.1)
    return image


def spots(rng, u, v, count, radius, stretch, centre=0.0, along=0.9, across=0.9):
    """``count`` ellipses along the leaf, float [H, W] in [0, 1]: 1 inside, soft at the edge.

    radius: range, widths of the image; stretch: length / breadth.  Places are even, in u within
    centre +- along and in v within +- across.
    """
    total = np.zeros(u.shape)
    grain = 1 + 0.5 * noise(rng, u * 40, v * 12)
    for _ in range(count):
        at_u, at_v = centre + along * rng.uniform(-1, 1), across * rng.uniform(-1, 1)
        size = rng.uniform(*radius)
        apart = ((u - at_u) / (size * stretch)) ** 2 + ((v - at_v) * 0.28 / size) ** 2
        np.maximum(total, 1.6 - apart * grain, out=total)
    return total.clip(0, 1)


def mosaic(rng, image, u, v):
    """Many pale flecks and short stripes between the veins, all over or on a part of the blade."""
    flecks = noise(rng, u * rng.uniform(9, 16), v * rng.uniform(7, 12), 2)
    where = 0.75 + noise(rng, u * 1.2, v * 0.8)
    amount = ((flecks - rng.uniform(-0.05, 0.2)) * rng.uniform(2, 5) * where).clip(0, 1)
    return blend(image, np.array(PALE) * rng.uniform(0.85, 1.1), amount * rng.uniform(0.4, 0.8))


def red_rot(rng, image, u, v):
    """One to four long red lesions on the midrib, some with a straw-coloured middle."""
    for _ in range(int(rng.integers(1, 5))):
        place = rng.uniform(-0.5, 0.5)
        breadth, length = rng.uniform(0.016, 0.035), rng.uniform(4, 12)
        shape = {"count": 1, "stretch": length, "centre": place, "along": 0.0}
        image = blend(image, np.array(RED) * rng.uniform(0.8, 1.3),
                      spots(rng, u, v, radius=(breadth, breadth), across=0.06, **shape) * 0.92)
        if breadth > 0.024:
            middle = spots(rng, u, v, radius=(breadth / 3, breadth / 3), across=0.0, **shape)
            image = blend(image, STRAW, middle * 0.7)
    return image


def rust(rng, image, u, v):
    """Dozens of small orange to brown pustules, a little longer than broad, with yellow rings, in patches."""
    for _ in range(int(rng.integers(1, 4))):
        place, count = rng.uniform(-0.45, 0.45), int(rng.integers(12, 36))
        state = rng.integers(2 ** 32)
        radius, spread = rng.uniform(0.005, 0.01), rng.uniform(0.15, 0.5)
        brown = np.array(RUST) * rng.uniform(0.8, 1.4)
        for colour, factor, amount in ((YELLOW, 2.2, rng.uniform(0.1, 0.45)), (brown, 1, 0.9)):
            marks = spots(np.random.default_rng(state), u, v, count, (radius * factor, radius * factor * 1.5),
                          1.8, place, spread)
            image = blend(image, colour, marks * amount)
    return image


def yellow(rng, image, u, v):
    """A smooth yellow band, along the midrib or along both edges, that fades lengthwise and sideways."""
    middle = rng.random() < 0.5
    across = np.exp(-(v / rng.uniform(0.3, 0.6)) ** 2) if middle else np.abs(v) ** rng.uniform(1.5, 3)
    along = 0.75 + 0.5 * noise(rng, u * 1.0, v * 0.2)
    return blend(image, np.array(YELLOW) * rng.uniform(0.85, 1.1), across * along * rng.uniform(0.6, 1.0))


def photographed(rng, image, x, y):
    """Light, shadows, white balance, blur and noise of a camera: float [H, W, 3] -> uint8."""
    if rng.random() < 0.4:                           # the edge of a shadow
        turn = rng.uniform(0, 2 * math.pi)
        dark = np.tanh((x * math.cos(turn) + y * math.sin(turn) - rng.uniform(-0.2, 0.4)) * 14) / 2 + 0.5
        image = image * (1 - dark * rng.uniform(0.2, 0.5))[..., None]
    image = image * (1 + 0.25 * noise(rng, y * 0.8, x * 0.8))[..., None] * rng.uniform(0.7, 1.3)
    image = image * rng.normal(1, 0.06, 3)
    image = ndimage.gaussian_filter(image, (sigma := rng.uniform(0.3, 0.9), sigma, 0))
    image = image + rng.normal(0, rng.uniform(1, 5), image.shape)
    return image.clip(0, 255).astype(np.uint8)


DISEASES = {"mosaic": mosaic, "red_rot": red_rot, "rust": rust, "yellow": yellow}
