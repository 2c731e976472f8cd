"""Reading images of every format, refusing bad ones, and writing NIfTI."""

import random
import struct
import warnings
import zlib

import gdcm
import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from datasets.io import (
    image_files,
    letterbox,
    min_max,
    one_line,
    read_image,
    resize,
    undo_letterbox,
    write_nifti,
)
from utils.config import BadFile, UserError

ROWS, COLUMNS = np.mgrid[:24, :20]
GREY = ((np.sin(COLUMNS / 4) * np.cos(ROWS / 5) + 1) * 2000).astype(np.uint16)     # 0..4000, not symmetric
BYTES = (GREY // 16).astype(np.uint8)
COLOUR = np.stack([BYTES, BYTES[::-1], BYTES[:, ::-1]], axis=-1)
LUMINANCE = COLOUR @ np.array([0.299, 0.587, 0.114])


def write_dicom(path, pixels=GREY, syntax=None, **tags):
    """A secondary capture with the given pixels; tags set to None are removed."""
    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    dataset.set_pixel_data(pixels, "RGB" if pixels.shape[-1] == 3 else "MONOCHROME2", 8 * pixels.itemsize)
    for name, value in tags.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    if syntax == RLELossless:
        dataset.compress(syntax)
    elif syntax:
        dataset.file_meta.TransferSyntaxUID = syntax
    dataset.save_as(path, enforce_file_format=True)
    return path


def recode_dicom(source, target, syntax):
    """The same DICOM file under another of GDCM's transfer syntaxes."""
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(source))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(target))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return target


def refusal(path):
    """The message of the BadFile that reading ``path`` raises: one line that begins with the path."""
    with pytest.raises(BadFile) as error:
        read_image(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_is_read_back_equal(tmp_path, suffix):
    """Rows stay rows: an array that is not square or symmetric comes back as it was written."""
    path = tmp_path / f"a{suffix}"
    image = GREY.astype(np.float32) / 7
    write_nifti(path, image, spacing=(2.0, 0.5))
    np.testing.assert_array_equal(read_image(path), image)
    stored = nib.load(path)
    assert stored.shape == image.T.shape
    np.testing.assert_array_equal(stored.affine, np.diag([-0.5, -2.0, 1.0, 1.0]))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]            # nothing temporary is left


def test_equal_arrays_give_equal_files(tmp_path):
    """No clock in the file: remade data can be compared by checksum."""
    for name in ("a.nii.gz", "b.nii.gz"):
        write_nifti(tmp_path / name, GREY)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


@pytest.mark.parametrize("dtype, scale", [("uint8", 1 / 255), ("int16", 1 / 32767), ("uint16", 1 / 65535)])
def test_scaled_integers_are_honoured(tmp_path, dtype, scale):
    """A quantised image comes back in its own units, to half a step."""
    image = min_max(GREY)
    write_nifti(tmp_path / "a.nii.gz", image, dtype=dtype, scale=scale)
    np.testing.assert_allclose(read_image(tmp_path / "a.nii.gz"), image, atol=0.51 * scale)


def test_values_that_do_not_fit_are_not_wrapped_round(tmp_path):
    """256 stored as uint8 would be read as 0."""
    with pytest.raises(ValueError, match="uint8"):
        write_nifti(tmp_path / "a.nii.gz", np.array([[0, 256]]), dtype="uint8")


@pytest.mark.parametrize("shape", [(20, 24, 1), (1, 20, 24), (20, 24, 1, 1)])
def test_singleton_axes_are_dropped(tmp_path, shape):
    """Many programs store a 2D image as one slice of a volume."""
    nib.save(nib.Nifti1Image(GREY.T.astype(np.float32).reshape(shape), np.eye(4)), tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read_image(tmp_path / "a.nii.gz"), GREY)


def test_volumes_and_colour_nifti_are_refused(tmp_path):
    """Neither may be taken for one grey image."""
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6), np.float32), np.eye(4)), tmp_path / "volume.nii.gz")
    assert "3D volume of shape 4x5x6 where a 2D image is due" in refusal(tmp_path / "volume.nii.gz")
    rgb = np.zeros((4, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(rgb, np.eye(4)), tmp_path / "rgb.nii.gz")
    assert "colour" in refusal(tmp_path / "rgb.nii.gz")


def test_a_header_that_claims_more_than_the_file_holds_is_refused(tmp_path):
    """Before any memory is asked for: the claim may be petabytes."""
    header = bytearray(nib.Nifti1Image(np.zeros((4, 5), np.float32), np.eye(4)).to_bytes())
    header[42:46] = np.array([32767, 32767], "<i2").tobytes()
    (tmp_path / "a.nii").write_bytes(header)
    assert "claims" in refusal(tmp_path / "a.nii")


def test_missing_empty_foreign_and_folder_are_refused(tmp_path):
    """Each names what is wrong."""
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no image")
    assert "No such file" in refusal(tmp_path / "absent.nii.gz")
    assert "empty" in refusal(tmp_path / "empty.png")
    assert "not a NIfTI" in refusal(tmp_path / "text.png")
    assert "folder" in refusal(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_not_numbers_are_refused(tmp_path, value):
    """One NaN makes the loss NaN, many steps later."""
    image = GREY.astype(np.float32)
    image[3, 4] = value
    write_nifti(tmp_path / "a.nii.gz", image)
    assert "1 pixels are NaN or infinite" in refusal(tmp_path / "a.nii.gz")


def test_pictures_keep_their_depth_and_lose_colour_and_transparency(tmp_path):
    """16 bits stay 16 bits; colour becomes luminance, whatever the transparency says."""
    transparent = np.dstack([COLOUR, BYTES])
    for name, array, expected, tolerance in (
            ("grey16.png", GREY, GREY, 0), ("grey8.png", BYTES, BYTES, 0), ("grey16.tif", GREY, GREY, 0),
            ("rgb.png", COLOUR, LUMINANCE, 1), ("rgba.png", transparent, LUMINANCE, 1),
            ("grey.jpg", BYTES, BYTES, 12)):
        Image.fromarray(array).save(tmp_path / name)
        image = read_image(tmp_path / name)
        assert image.dtype == np.float32
        np.testing.assert_allclose(image, expected, atol=tolerance, err_msg=name)


def test_a_palette_is_looked_up(tmp_path):
    """The stored numbers of a palette picture are not grey values."""
    picture = Image.fromarray(BYTES // 64)
    picture.putpalette([200, 200, 200, 10, 10, 10, 90, 90, 90, 0, 0, 0])
    picture.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.array([200, 10, 90, 0])[BYTES // 64])


def test_the_content_decides_not_the_suffix(tmp_path):
    """Exported DICOM files come with any name."""
    write_dicom(tmp_path / "1.2.840.113")
    np.testing.assert_array_equal(read_image(tmp_path / "1.2.840.113"), GREY)


def test_dicom_is_rescaled_windowed_and_inverted(tmp_path):
    """Against the formulas of the standard (PS3.3 C.11.1.1.2, C.11.2.1.2): larger is brighter in the end."""
    rescaled = 2.0 * GREY - 1000
    path = write_dicom(tmp_path / "a.dcm", RescaleSlope=2, RescaleIntercept=-1000)
    np.testing.assert_allclose(read_image(path), rescaled)

    window = {"WindowCenter": [2000, 5], "WindowWidth": [3001, 7]}             # the first of several counts
    path = write_dicom(tmp_path / "b.dcm", RescaleSlope=2, RescaleIntercept=-1000, **window)
    expected = (rescaled.clip(499.5, 3499.5) - 499.5) / 3000
    np.testing.assert_allclose(min_max(read_image(path)), expected, atol=1e-6)

    path = write_dicom(tmp_path / "c.dcm", PhotometricInterpretation="MONOCHROME1", RescaleSlope=2,
                       RescaleIntercept=-1000, **window)
    np.testing.assert_allclose(min_max(read_image(path)), 1 - expected, atol=1e-6)


def test_colour_dicom_becomes_luminance(tmp_path):
    """Secondary captures are often stored in colour though they are grey."""
    np.testing.assert_allclose(read_image(write_dicom(tmp_path / "a.dcm", COLOUR)), LUMINANCE, atol=1e-3)


def test_compressed_dicom_equals_the_uncompressed(tmp_path):
    """RLE, JPEG lossless, JPEG-LS and JPEG 2000, the syntaxes of archives, are all without loss here."""
    plain = write_dicom(tmp_path / "plain.dcm")
    syntaxes = gdcm.TransferSyntax
    paths = [write_dicom(tmp_path / "rle.dcm", syntax=RLELossless),
             recode_dicom(plain, tmp_path / "jpeg.dcm", syntaxes.JPEGLosslessProcess14_1),
             recode_dicom(plain, tmp_path / "jpegls.dcm", syntaxes.JPEGLSLossless),
             recode_dicom(plain, tmp_path / "jpeg2000.dcm", syntaxes.JPEG2000Lossless)]
    for path in paths:
        np.testing.assert_array_equal(read_image(path), GREY, err_msg=path.name)


def test_dicom_that_is_not_one_grey_image_is_refused(tmp_path):
    """Several frames, no pixels, a palette, an unknown compression."""
    assert "2 frames" in refusal(write_dicom(tmp_path / "a.dcm", np.stack([GREY, GREY])))
    assert "without pixel data" in refusal(write_dicom(tmp_path / "b.dcm", PixelData=None))
    palette = {"PhotometricInterpretation": "PALETTE COLOR"}
    assert "palette" in refusal(write_dicom(tmp_path / "c.dcm", BYTES, **palette))
    assert "cannot be decoded" in refusal(write_dicom(tmp_path / "d.dcm", Rows=None))


def damaged(data, generator):
    """A copy cut short, or with one bit flipped, half the time near the beginning, where headers are."""
    data = bytearray(data)
    if generator.random() < 0.3:
        return bytes(data[:generator.randrange(len(data))])
    position = generator.randrange(generator.choice([len(data), min(len(data), 500)]))
    data[position] ^= 1 << generator.randrange(8)
    return bytes(data)


def test_damaged_files_give_an_image_or_bad_file_and_nothing_else(tmp_path):
    """A run over thousands of files survives any of them; formats with checksums never give wrong pixels."""
    write_nifti(tmp_path / "a.nii.gz", GREY)
    write_nifti(tmp_path / "b.nii", GREY)
    for name, array in (("a.png", GREY), ("b.png", COLOUR), ("a.jpg", BYTES), ("a.tif", GREY)):
        Image.fromarray(array).save(tmp_path / name)
    write_dicom(tmp_path / "a.dcm", WindowCenter=2000, WindowWidth=3000)
    write_dicom(tmp_path / "b.dcm", syntax=RLELossless)
    write_dicom(tmp_path / "c.dcm", syntax=DeflatedExplicitVRLittleEndian)
    for path in sorted(tmp_path.iterdir()):
        whole, data, generator = read_image(path), path.read_bytes(), random.Random(path.name)
        for _ in range(60):
            path.write_bytes(damaged(data, generator))
            try:
                image = read_image(path)
            except BadFile as error:
                assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
                continue
            assert image.dtype == np.float32 and image.ndim == 2 and np.isfinite(image).all()
            if path.suffix in (".gz", ".png"):
                np.testing.assert_array_equal(image, whole, err_msg=path.name)


def test_reading_warns_of_nothing(tmp_path, caplog):
    """What a library merely warns of, or logs, would break the promise of one line per mistake."""
    path = write_dicom(tmp_path / "a.dcm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(path)
    write_nifti(tmp_path / "a.nii", GREY)
    data = bytearray((tmp_path / "a.nii").read_bytes())
    data[70:72] = b"\xff\x7f"                        # a data type that there is not
    (tmp_path / "a.nii").write_bytes(data)
    refusal(tmp_path / "a.nii")
    assert caplog.records == []


def test_headers_that_claim_what_no_file_can_hold_are_refused(tmp_path):
    """Voxels at infinity; 169 million pixels in a hundred bytes, for which room would be made."""
    write_nifti(tmp_path / "a.nii", GREY)
    data = bytearray((tmp_path / "a.nii").read_bytes())
    data[108:112] = np.float32(np.inf).tobytes()
    (tmp_path / "a.nii").write_bytes(data)
    refusal(tmp_path / "a.nii")
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[16:24] = struct.pack(">II", 13_000, 13_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "a.png").write_bytes(data)
    assert "cannot hold" in refusal(tmp_path / "a.png")


def test_a_tiff_of_too_few_strips_is_refused(tmp_path):
    """Pillow leaves black what no strip covers."""
    Image.fromarray(GREY).save(tmp_path / "a.tif")
    data = bytearray((tmp_path / "a.tif").read_bytes())
    (first,) = struct.unpack_from("<I", data, 4)
    for at in range(first + 2, first + 2 + 12 * data[first], 12):
        if struct.unpack_from("<H", data, at)[0] == 278:         # rows per strip, of which there is one
            struct.pack_into("<I", data, at + 8, 1)
    (tmp_path / "a.tif").write_bytes(data)
    assert "are there" in refusal(tmp_path / "a.tif")


def test_a_message_of_a_library_is_one_line_of_letters():
    """Control characters of a damaged header could hide the line, or end it."""
    assert one_line(ValueError("a\r\nb\x00\x1b c\u2028d")) == "a b c d"
    assert one_line(ValueError()) == "ValueError"


def test_image_files_are_sorted_and_found_by_suffix_or_mark(tmp_path):
    """DICOM without a suffix is found by its content; reports, hidden files and the index are left out."""
    (tmp_path / "sub").mkdir()
    write_dicom(tmp_path / "sub" / "IM0001")
    write_dicom(tmp_path / "DICOMDIR")
    for name in ("b.PNG", "a.nii.gz", ".hidden.png", "report.txt", "a.nii.gz.tmp", "notes"):
        (tmp_path / name).write_bytes(b"x")
    assert image_files(tmp_path) == [tmp_path / "a.nii.gz", tmp_path / "b.PNG", tmp_path / "sub" / "IM0001"]


def test_a_folder_without_images_is_an_error(tmp_path):
    """Nothing to do must not look like success."""
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=str(folder)):
            image_files(folder)


def test_min_max_spans_zero_to_one_and_a_constant_is_zero():
    """Also where the range overflows float32 or underflows it."""
    for factor in (1, 1e34, 1e-44):
        scaled = min_max(((GREY.astype(np.float64) - 2000) * factor).astype(np.float32))
        assert scaled.dtype == np.float32 and (scaled.min(), scaled.max()) == (0, 1)
    np.testing.assert_array_equal(min_max(np.full((3, 4), 7.0)), np.zeros((3, 4)))


def test_resizing_averages_and_stays_in_range():
    """Without antialiasing a stripe pattern would survive as noise; with it, the mean is kept."""
    stripes = np.tile(np.array([0.0, 1.0], np.float32), (64, 32))
    half = resize(stripes, (32, 32))
    assert half.shape == (32, 32) and abs(half[:, 2:-2] - 0.5).max() < 0.1
    assert resize(min_max(GREY), (50, 60)).min() >= 0 and resize(min_max(GREY), (50, 60)).max() <= 1
    np.testing.assert_array_equal(resize(GREY, GREY.shape), GREY)


@pytest.mark.parametrize("shape", [(24, 20), (20, 24), (24, 24), (200, 3)])
def test_a_letterboxed_image_comes_back(shape):
    """The picture fills its box, zeros the rest; cutting back gives its shape and smooth values."""
    image = (1 + np.add.outer(np.linspace(0, 1, shape[0]), np.linspace(0, 1, shape[1]))).astype(np.float32)
    square, (top, left, height, width) = letterbox(image, 96)
    assert square.shape == (96, 96) and max(height, width) == 96
    assert np.count_nonzero(square) == height * width == np.count_nonzero(
        square[top:top + height, left:left + width])
    back = undo_letterbox(square, (top, left, height, width), shape)
    assert back.shape == shape
    if min(shape) > 3:
        np.testing.assert_allclose(back, image, atol=0.05)
