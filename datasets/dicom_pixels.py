"""The stored pixels of DICOM files, decoded by who does it without ending the process.

GDCM aborts on some damaged JPEG streams, and on those of another size than the tags of their file; pydicom
never finds its way out of some damaged JPEG 2000.
"""

import struct

from pydicom.encaps import get_frame
from pydicom.pixels import pixel_array
from pydicom.uid import (
    JPEG2000,
    JPEG2000Lossless,
    JPEG2000TransferSyntaxes,
    JPEGBaseline8Bit,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
)

PILLOW_SYNTAXES = (JPEGBaseline8Bit, JPEG2000, JPEG2000Lossless)     # Pillow comes first where it can decode
STREAMS = JPEGTransferSyntaxes + JPEGLSTransferSyntaxes + JPEG2000TransferSyntaxes
JP2 = b"\0\0\0\x0cjP  "                             # how a JPEG 2000 file begins, and its codestream:
CODESTREAM = b"\xff\x4f\xff\x51"                    # markers SOC and SIZ
FRAME_HEADERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}      # markers SOF0 to SOF15, SOF55 of JPEG-LS


def stored_pixels(dataset, frame=None):
    """The stored numbers of a DICOM dataset, as pydicom gives them; frame: the number of one of several."""
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax in STREAMS:
        check_stream(dataset, frame)
    plugin = "pillow" if syntax in PILLOW_SYNTAXES else ""
    return pixel_array(dataset, index=frame, decoding_plugin=plugin)


def check_stream(dataset, number=None):
    """ValueError unless the stream of frame ``number`` (None: the only one) is as large as the tags say.

    dataset: of pydicom, with encapsulated JPEG, JPEG-LS or JPEG 2000.
    """
    count = int(dataset.get("NumberOfFrames") or 1)
    stream = get_frame(dataset.PixelData, number or 0, number_of_frames=count)
    bits, rows, columns, samples = stream_size(stream)
    if (rows, columns, samples) != (dataset.Rows, dataset.Columns, dataset.SamplesPerPixel):
        raise ValueError(f"{dataset.Rows} x {dataset.Columns} x {dataset.SamplesPerPixel} pixels by its "
                         f"tags, but {rows} x {columns} x {samples} in its JPEG stream")
    if bits > dataset.BitsAllocated:
        raise ValueError(f"{bits} bits in its JPEG stream where {dataset.BitsAllocated} are due")


def stream_size(stream):
    """(bits, rows, columns, samples) of a JPEG, JPEG-LS or JPEG 2000 stream by its header.

    Raises ValueError where there is none.
    """
    if stream.startswith((JP2, CODESTREAM)):
        return codestream_size(stream)
    at = 2                                           # behind the marker of the beginning
    while stream[:2] == b"\xff\xd8" and at + 10 <= len(stream) and stream[at] == 0xFF:
        marker, size = stream[at + 1], int.from_bytes(stream[at + 2:at + 4], "big")
        if marker == 0xFF:                           # fill
            at += 1
        elif marker in FRAME_HEADERS:
            return struct.unpack_from(">BHHB", stream, at + 4)
        else:
            at += 2 + size
    raise ValueError("no frame header in its JPEG stream")


def codestream_size(stream):
    """The same of a JPEG 2000 codestream, or of a file whose boxes hold one."""
    at, kind = 0, b"jp2c" if stream.startswith(CODESTREAM) else b""
    while kind != b"jp2c" and at + 8 <= len(stream):
        size, kind = struct.unpack_from(">I4s", stream, at)
        at += 8 if kind == b"jp2c" else max(size, 8)
    if stream[at:at + 4] != CODESTREAM or at + 43 > len(stream):
        raise ValueError("no codestream in its JPEG stream")
    right, low, left, top, samples, bits = struct.unpack_from(">8x4I16xHB", stream, at)
    return (bits & 0x7F) + 1, low - top, right - left, samples
