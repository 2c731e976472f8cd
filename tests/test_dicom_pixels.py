"""Compressed DICOM pixels that a decoder must never see."""

import io

import gdcm
import numpy as np
import pydicom
import pytest
from PIL import Image
from test_io import GREY, recode_dicom, refusal, write_dicom

from datasets.dicom_pixels import stored_pixels, stream_size

SYNTAXES = ["JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless"]


def compressed(folder, syntax):
    """GREY in one of GDCM's transfer syntaxes."""
    syntax = getattr(gdcm.TransferSyntax, syntax)
    return recode_dicom(write_dicom(folder / "a.dcm"), folder / "b.dcm", syntax)


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_stream_of_another_size_than_its_tags_is_refused(syntax, tmp_path):
    """GDCM would end the process, and with it a run over thousands of files; and what it says is checked."""
    path = compressed(tmp_path, syntax)
    np.testing.assert_array_equal(stored_pixels(pydicom.dcmread(path)), GREY)
    for name, value in (("Rows", 23), ("Columns", 65535), ("SamplesPerPixel", 3), ("BitsAllocated", 8)):
        item = pydicom.dcmread(path)
        setattr(item, name, value)
        item.save_as(tmp_path / "c.dcm")
        assert "JPEG stream" in refusal(tmp_path / "c.dcm"), name


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_the_size_of_a_stream_is_that_of_its_picture(syntax, tmp_path):
    """And what is no stream has none."""
    path = compressed(tmp_path, syntax)
    stream = next(pydicom.encaps.generate_frames(pydicom.dcmread(path).PixelData, number_of_frames=1))
    bits, *size = stream_size(stream)
    assert size == [*GREY.shape, 1] and 12 <= bits <= 16
    for damaged in (b"", stream[:2], stream[:8], stream[2:], b"\xff\xd8" + bytes(100), b"\xff" * 100):
        with pytest.raises(ValueError, match="no (frame header|codestream)"):
            stream_size(damaged)


def test_boxes_of_a_jpeg_2000_file_lead_to_its_codestream_or_nowhere(tmp_path):
    """A box of no length would be looked at for ever."""
    buffer = io.BytesIO()
    Image.fromarray(GREY.astype(np.uint16)).save(buffer, "JPEG2000")
    stream = buffer.getvalue()
    assert stream.startswith(b"\0\0\0\x0cjP  ") and stream_size(stream)[1:] == (*GREY.shape, 1)
    for size in (0, 1, 7, 2 ** 32 - 1):
        damaged = stream[:12] + size.to_bytes(4, "big") + stream[16:].replace(b"jp2c", b"none")
        with pytest.raises(ValueError, match="no codestream"):
            stream_size(damaged)
