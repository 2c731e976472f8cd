"""Files of photographs and spectral cubes: every usual kind is read rightly, every bad one is named."""

import io
import shutil
import struct

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from datasets.photo_files import read_photo, read_spectral
from utils.config import BadFile

RNG = np.random.default_rng(0)
SMOOTH = np.asarray(Image.fromarray(RNG.integers(0, 256, (6, 8, 3), np.uint8)).resize((64, 48)))


def save(path, array=SMOOTH, mode=None, **options):
    """Write an array, converted to a mode of Pillow's; returns the path."""
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def bad(path):
    """The message of the BadFile that reading raises: one line that begins with the path."""
    with pytest.raises(BadFile) as error:
        read_photo(path)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "webp"])
def test_lossless_formats_give_their_pixels(tmp_path, suffix):
    """Rows, columns and colours in order, whatever the suffix says about the content."""
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"leaf.{suffix}", **options)
    image = read_photo(path)
    assert image.dtype == torch.uint8 and np.array_equal(image.permute(1, 2, 0), SMOOTH)
    shutil.copy(path, tmp_path / "renamed.jpg")
    assert torch.equal(read_photo(tmp_path / "renamed.jpg"), image)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    """Phones store the sensor's picture and how it was held; against the definitions of the standard."""
    upright = SMOOTH
    stored = [upright, upright[:, ::-1], upright[::-1, ::-1], upright[::-1], upright.transpose(1, 0, 2),
              np.rot90(upright), np.rot90(upright.transpose(1, 0, 2), 2), np.rot90(upright, -1)]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "leaf.png", np.ascontiguousarray(stored[orientation - 1]), exif=exif)
    assert np.array_equal(read_photo(path).permute(1, 2, 0), upright)


def test_grey_values_of_16_bits_keep_their_upper_8(tmp_path):
    """65535 is white in TIFF and PNG, in grey and in colour alike; clipping at 255 would make all white."""
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    save(tmp_path / "grey.png", ramp)
    tifffile.imwrite(tmp_path / "grey.tif", ramp)
    tifffile.imwrite(tmp_path / "big.tif", ramp, byteorder=">")
    tifffile.imwrite(tmp_path / "rgb.tif", np.stack([ramp] * 3, -1), photometric="rgb")
    for name in ("grey.png", "grey.tif", "big.tif", "rgb.tif"):
        image = read_photo(tmp_path / name)
        assert image.shape == (3, 256, 256)
        assert (image.numpy() == ramp // 256).all(), name


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "LAB"])
def test_other_modes_look_as_the_picture_does(tmp_path, mode):
    """Grey, bilevel, palettes and print colours become RGB; an index or ink is no brightness."""
    flat = np.full((16, 24, 3), 255, np.uint8)
    flat[:, 12:] = 0
    path = save(tmp_path / "leaf.tif", flat, mode)
    image = read_photo(path).float()
    assert image.shape == (3, 16, 24)
    assert (image[:, :, :12] > 235).all() and (image[:, :, 12:] < 25).all()


def test_a_cmyk_jpeg_has_the_colours_of_its_rgb_twin(tmp_path):
    """Adobe's files store inverted inks."""
    plain = read_photo(save(tmp_path / "rgb.jpg", quality=95)).float()
    inks = read_photo(save(tmp_path / "cmyk.jpg", mode="CMYK", quality=95)).float()
    assert (plain - inks).abs().mean() < 4


def test_transparent_parts_are_white(tmp_path):
    """What lies in the colours of an invisible pixel is chance; of palettes too."""
    array = np.dstack([SMOOTH, np.full(SMOOTH.shape[:2], 255, np.uint8)])
    array[:24, :, 3] = 0
    array[24:36, :, 3] = 128
    image = read_photo(save(tmp_path / "leaf.png", array)).permute(1, 2, 0).numpy().astype(float)
    assert (image[:24] == 255).all() and np.array_equal(image[36:], SMOOTH[36:])
    assert np.abs(image[24:36] - (SMOOTH[24:36] * (128 / 255) + 127)).max() < 2
    palette = Image.fromarray(np.tile(np.arange(2, dtype=np.uint8), (16, 8)), "P")
    palette.putpalette([9, 9, 9, 70, 80, 90])
    palette.save(tmp_path / "p.png", transparency=0)
    colours = read_photo(tmp_path / "p.png")
    assert colours[:, 0, 0].tolist() == [255] * 3 and colours[:, 0, 1].tolist() == [70, 80, 90]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_of_an_animation_the_first_frame_counts(tmp_path, suffix):
    """A photograph is one picture."""
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    assert Image.open(tmp_path / f"a.{suffix}").n_frames == 2
    assert read_photo(tmp_path / f"a.{suffix}").float().mean((1, 2)).round().tolist() == [200, 0, 0]


def test_a_large_jpeg_is_decoded_small_but_never_too_small(tmp_path):
    """The short side has what was asked for, and the picture is that of the whole decoding, shrunk."""
    path = save(tmp_path / "big.jpg", np.asarray(Image.fromarray(SMOOTH).resize((640, 480))), quality=95)
    whole, small = read_photo(path), read_photo(path, size=100)
    assert whole.shape == (3, 480, 640) and small.shape == (3, 120, 160)
    shrunk = torch.nn.functional.avg_pool2d(whole.float(), 4)
    assert (shrunk - small.float()).abs().mean() < 1
    assert read_photo(path, size=481).shape == whole.shape


def test_files_that_are_no_photograph_are_named(tmp_path):
    """Text, nothing, a folder, no file, one pixel, one line, 32 bits, pages: one line each."""
    (tmp_path / "text.jpg").write_text("this is a letter\nof two lines")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "folder.jpg").mkdir()
    tifffile.imwrite(tmp_path / "float.tif", np.ones((16, 16), np.float32))
    tifffile.imwrite(tmp_path / "pages.tif", np.ones((5, 16, 16), np.uint8), photometric="minisblack")
    save(tmp_path / "pixel.png", SMOOTH[:1, :1])
    save(tmp_path / "line.png", np.tile(SMOOTH[:8], (1, 3, 1)))
    for name in ("text", "empty", "folder", "absent"):
        assert "cannot be read" in bad(tmp_path / f"{name}.jpg")
    assert "32 bits" in bad(tmp_path / "float.tif")
    assert "5 pages" in bad(tmp_path / "pages.tif")
    assert "1 x 1 pixels" in bad(tmp_path / "pixel.png")
    assert "192 x 8 pixels" in bad(tmp_path / "line.png")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "tif", "bmp"])
def test_truncated_files_are_named(tmp_path, suffix):
    """Cut at any place: never a picture whose lower part is grey."""
    data = save(tmp_path / f"whole.{suffix}").read_bytes()
    for share in (0.02, 0.3, 0.6, 0.9):
        (tmp_path / f"cut.{suffix}").write_bytes(data[:int(share * len(data))])
        bad(tmp_path / f"cut.{suffix}")


def test_a_damaged_png_is_noticed(tmp_path):
    """Its checksums tell; decoding does not look at all of them."""
    data = bytearray(save(tmp_path / "leaf.png", compress_level=0).read_bytes())
    data[len(data) // 2] ^= 16
    (tmp_path / "leaf.png").write_bytes(data)
    bad(tmp_path / "leaf.png")


def test_decompression_bombs_are_refused_before_they_are_decoded(tmp_path):
    """A few kilobytes must not ask for gigabytes."""
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "BMP")
    header = bytearray(buffer.getvalue())
    header[18:26] = np.array([60000, 60000], "<i4").tobytes()
    (tmp_path / "bomb.bmp").write_bytes(header)
    assert "bomb" in bad(tmp_path / "bomb.bmp")


CUBE = RNG.integers(0, 65536, (5, 12, 16)).astype(np.uint16)


def test_cubes_of_every_layout_are_the_same(tmp_path):
    """Bands first or last, pages or samples, npy or TIFF; 16 bits become [0, 1]."""
    np.save(tmp_path / "first.npy", CUBE)
    np.save(tmp_path / "last.npy", CUBE.transpose(1, 2, 0))
    tifffile.imwrite(tmp_path / "pages.tif", CUBE, photometric="minisblack")
    tifffile.imwrite(tmp_path / "samples.tif", CUBE.transpose(1, 2, 0), photometric="minisblack",
                     planarconfig="contig")
    for name in ("first.npy", "last.npy", "pages.tif", "samples.tif"):
        cube = read_spectral(tmp_path / name, 5)
        assert cube.dtype == torch.float32 and cube.is_contiguous()
        np.testing.assert_allclose(cube, CUBE / 65535, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("dtype", "largest"), [("uint8", 255), ("int16", 32767), ("bool", 1), ("float32", 1),
                                                ("float64", 1)])
def test_whole_numbers_are_divided_by_the_largest_of_their_type(tmp_path, dtype, largest):
    """Floating-point reflectance stays as it is; a single band needs no axis."""
    values = (CUBE[0] % 100).astype(dtype)
    np.save(tmp_path / "cube.npy", values)
    np.testing.assert_allclose(read_spectral(tmp_path / "cube.npy", 1)[0], values / largest, rtol=1e-6)


def test_a_cube_that_lost_pages_is_refused(tmp_path):
    """The rows that are left must not be taken for a band of their own, nor its columns for bands."""
    pages = tmp_path / "cube.tif"
    tifffile.imwrite(pages, np.ones((12, 16, 5), np.uint8), compression="zlib", photometric="minisblack")
    assert read_spectral(pages, 5).shape == (5, 12, 16)
    for left in (1, 7):
        data = bytearray(pages.read_bytes())
        with tifffile.TiffFile(pages) as file:
            last = file.pages[left - 1].offset
        (count,) = struct.unpack_from("<H", data, last)
        struct.pack_into("<I", data, last + 2 + 12 * count, len(data) + 100)     # where the next page is
        (tmp_path / "cut.tif").write_bytes(data)
        with pytest.raises(BadFile, match="cut.tif: truncated"):
            read_spectral(tmp_path / "cut.tif", 5)
    np.save(tmp_path / "one.npy", np.ones((16, 5)))
    with pytest.raises(BadFile, match="HVIT_SPECTRAL_CHANNELS = 5"):
        read_spectral(tmp_path / "one.npy", 5)
    assert read_spectral(tmp_path / "one.npy", 1).shape == (1, 16, 5)


def test_cubes_with_other_bands_or_broken_values_are_named(tmp_path):
    """The message names the constant, and the shape that was found."""
    np.save(tmp_path / "cube.npy", CUBE)
    np.save(tmp_path / "nan.npy", np.full((5, 4, 4), np.nan, np.float32))
    np.save(tmp_path / "objects.npy", np.array([{}, []], object))
    np.save(tmp_path / "words.npy", np.full((5, 4, 4), "a"))
    np.save(tmp_path / "many.npy", np.zeros((2, 5, 4, 4)))
    data = (tmp_path / "cube.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(data[:len(data) // 2])
    (tmp_path / "bomb.npy").write_bytes(data.replace(b"(5, 12, 16), }        ", b"(5, 999999, 999999), }"))
    (tmp_path / "text.tif").write_text("no picture")
    with pytest.raises(BadFile, match=r"cube.npy: 5 x 12 x 16 .* HVIT_SPECTRAL_CHANNELS = 4"):
        read_spectral(tmp_path / "cube.npy", 4)
    for name in ("nan.npy", "objects.npy", "words.npy", "many.npy", "cut.npy", "bomb.npy", "text.tif",
                 "no.npy"):
        with pytest.raises(BadFile, match=name) as error:
            read_spectral(tmp_path / name, 5)
        assert "\n" not in str(error.value)
