"""Pictures that claim more pixels than their files can hold."""

import pytest
from PIL import Image

from datasets.picture_claims import DEFLATE, FREE, check_claim
from utils.config import BadFile


@pytest.mark.parametrize("suffix, mode", [(".png", "L"), (".png", "1"), (".png", "RGB"), (".jpg", "L"),
                                          (".jpg", "RGB"), (".tif", "L"), (".tif", "1")])
def test_the_emptiest_picture_of_any_format_is_let_through(suffix, mode, tmp_path):
    """Nothing shrinks better than black; what a program wrote must never be refused."""
    path = tmp_path / f"a{suffix}"
    options = {"compression": "tiff_adobe_deflate"} if suffix == ".tif" else {"optimize": True}
    Image.new(mode, (3000, 2500)).save(path, **options)
    with Image.open(path) as image:
        assert image.size[0] * image.size[1] > FREE
        check_claim(path, image, path.stat().st_size)


def test_what_deflate_cannot_hold_is_refused(tmp_path):
    """By name and size, before anything is decoded."""
    for number, size in enumerate([(1500, 2000), (1000, 1000)]):
        Image.new("L", size).save(tmp_path / f"{number}.png")
    with Image.open(tmp_path / "0.png") as image:
        check_claim("a.png", image, 2000 * 1500 // DEFLATE + 1)
        with pytest.raises(BadFile, match="a.png: .*1500 x 2000 pixels, which 1000 bytes cannot hold"):
            check_claim("a.png", image, 1000)
    with Image.open(tmp_path / "1.png") as image:
        check_claim("a.png", image, 10)              # small ones may claim what they like
