"""What a picture's header may claim."""

from utils.config import BadFile

FREE = 2 ** 20                                       # pixels, in a file of any size
DEFLATE = 1032                                       # times that deflate shrinks at most; JPEG does 341


def check_claim(path, image, stored):
    """BadFile when an opened picture claims more pixels than ``stored`` bytes can hold; nothing is decoded.

    Decoders make room for all pixels before they find that there are none; and Pillow leaves black what the
    strips of a TIFF do not cover.
    """
    width, height = image.size
    held = max(FREE, DEFLATE * stored * (8 if image.mode == "1" else 1))
    if width * height > held:
        raise BadFile(f"{path}: damaged image file (claims {width} x {height} pixels, which {stored} bytes "
                      "cannot hold)")
    covered = sum((right - left) * (low - top) for _, (left, top, right, low), *_ in image.tile)
    if image.format == "TIFF" and covered < width * height:
        raise BadFile(f"{path}: damaged image file ({covered} of {width} x {height} pixels are there)")
