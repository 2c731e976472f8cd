"""Seeded mutants of valid files: what disks, networks, programs and people do to them.

    data, fault = mutant(data, "nifti", random.Random("0/17"))

The same seed gives the same mutant.  Half of the faults know nothing of the format (bits, cuts, blocks,
numbers at their extremes); the others are written where the format keeps its sizes, lengths and distances,
with checksums made right again, so that they get as far as a wrong header can.
"""

import io
import struct
import zlib

import h5py
import nibabel as nib
import numpy as np
import pydicom
from isal import igzip

HEAD = 600                                           # bytes in which most formats keep their sizes
WHOLE = (0, 1, -1, 2, 3, 7, 127, 255, 32767, -32768, 65535, 2 ** 31 - 1, -2 ** 31, 2 ** 32 - 1, 2 ** 40,
         2 ** 62)
REAL = (0.0, -1.0, -0.7, 1e-40, 1e-6, 1e6, 1e38, -1e308, float("nan"), float("inf"), float("-inf"))
CELLS = ("", "nan", "inf", "-inf", "NaN", "-1", "0", "2", "1e999", "1e-999", "0x10", "1_0", "²", "٣",
         "9" * 30, "9" * 5000, "x" * 300, "x/" * 3000, "../..", "/", ".", "\0", "\n", "a\x7fb", '"', "'", ",",
         ";", "\ufeff", "train ", "TRAIN", "val", "é", "🙂", "path", "split", "/dev/null", "/proc/self/mem",
         "~", "\\")
DICOM_WORDS = ("", "0", "-1", "nan", "inf", "-inf", "1e38", "1e-38", "0\\0", "nan\\nan", "-1\\-1", "1\\0\\0",
               "x", "0\\0\\0\\0\\0\\0", "1e9\\1e9\\1e9", "99999999999", "\\\\", "MONOCHROME1", "RGB",
               "\xff\xfe")
DICOM_TAGS = ("Rows", "Columns", "NumberOfFrames", "BitsAllocated", "BitsStored", "HighBit",
              "SamplesPerPixel", "PixelRepresentation", "PhotometricInterpretation", "PixelSpacing",
              "ImageOrientationPatient", "ImagePositionPatient", "RescaleSlope", "RescaleIntercept",
              "WindowCenter", "WindowWidth", "SliceThickness", "PixelPaddingValue", "PixelData", "Modality",
              "ImageType", "PlanarConfiguration")
FIELDS = ("dim", "dim", "dim", "pixdim", "pixdim", "pixdim", "vox_offset", "scl_slope", "scl_inter",
          "datatype", "bitpix", "sizeof_hdr", "magic", "sform_code", "qform_code", "srow_x", "srow_y",
          "srow_z", "quatern_b", "quatern_c", "qoffset_x", "xyzt_units", "intent_code")
SHAPES = ((2 ** 40, 2 ** 10, 4), (2 ** 20,) * 3, (10, 2 ** 13, 2 ** 13), (0, 5, 5), (3, 3), (7,),
          (1,) * 20, (), (2, 12, 14, 16))
SIDES = ((0, None), (None, 0), (13_000, 13_000), (2 ** 31 - 1, 1), (100_000, 100_000), (7, None), (None, 7),
         (4000, 4000), (8, 120_000_000), (2 ** 31, 2 ** 31))


# ------------------------------------------------------------------------------------------ of any format

def place(data, rng, size):
    """Where a fault of ``size`` bytes begins: half the time among the first HEAD bytes."""
    end = max(1, len(data) - size)
    return rng.randrange(min(end, HEAD) if rng.random() < 0.5 else end)


def flip_bits(data, rng):
    """1 to 16 bits turned over."""
    for _ in range(2 ** rng.randrange(5)):
        data[place(data, rng, 1)] ^= 1 << rng.randrange(8)
    return data


def cut(data, rng):
    """The end is missing; sometimes almost nothing or almost all of it."""
    return data[:rng.choice([rng.randrange(len(data)), rng.randrange(min(len(data), HEAD)),
                             len(data) - rng.randrange(1, 9)])]


def block(data, rng):
    """Up to 4 kB are zero, or of another place of the file; or they are missing, or come twice."""
    size = min(rng.choice([1, 4, 64, 512, 4096]), len(data) // 2)
    here, there = place(data, rng, size), rng.randrange(len(data) - size)
    fill = rng.choice([bytes(size), data[there:there + size]])
    return rng.choice([data[:here] + fill + data[here + size:], data[:here] + data[here + size:],
                       data[:here] + fill + data[here:]])


def number(data, rng):
    """A number of 1 to 8 bytes is an extreme one, or NaN or infinite."""
    code = rng.choice("bBhHiIqQfdfd")
    value = rng.choice(REAL if code in "fd" else WHOLE)
    size = struct.calcsize(code)
    if code not in "fd":
        raw = (value % 2 ** (8 * size)).to_bytes(size, rng.choice(["little", "big"]))
    else:
        raw = np.array(value).astype(rng.choice("<>") + code).tobytes()
    here = place(data, rng, size) // 2 * 2
    return data[:here] + raw + data[here + size:]


def foreign(data, rng):
    """Another kind of content altogether, or some behind the end."""
    other = rng.choice([b"", b"\0" * 400, b"<html>404 Not Found</html>\n" * 20,
                        b"\x1f\x8b\x08\0\0\0\0\0", b"DICM" * 99, rng.randbytes(1000),
                        b"\x89PNG\r\n\x1a\n", b"II*\0\x08\0\0\0", b"%PDF-1.4"])
    return bytearray(rng.choice([other, data + other, other + data]))


# ----------------------------------------------------------------------------------------- of one format

def nifti_header(data, rng):
    """One or two fields of the header hold an extreme, NaN, infinity, 0 or a negative size."""
    version = nib.Nifti2Header if data[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else nib.Nifti1Header
    header = version.from_fileobj(io.BytesIO(data), check=False)
    size = header.structarr.nbytes
    for _ in range(rng.choice([1, 1, 2])):
        field = rng.choice(FIELDS)
        array = header.structarr[field].reshape(-1)
        if array.dtype.kind == "S":
            array[0] = rng.choice([b"", b"n+1", b"ni1", b"n+2", b"xxx"])
        elif array.dtype.kind == "f":
            array[rng.randrange(len(array))] = rng.choice(REAL)
        else:
            limits = np.iinfo(array.dtype)
            value = rng.choice((*WHOLE, 4, 5, 8, 16, 64, 128, 512, 1024))
            array[rng.randrange(len(array))] = min(max(value, limits.min), limits.max)
    return bytearray(header.binaryblock) + data[size:]


def dicom_tag(data, rng):
    """The value of a tag, or its claimed length, makes no sense; others keep their place."""
    dataset = pydicom.dcmread(io.BytesIO(data), force=True)
    tags = [name for name in DICOM_TAGS if name in dataset]
    for name in rng.sample(tags, min(len(tags), rng.choice([1, 1, 2]))):
        element = dataset.get_item(name)
        start, length = getattr(element, "value_tell", None) or 0, getattr(element, "length", 0)
        if not start or length == 0xFFFFFFFF or rng.random() < 0.2:            # the length itself
            start = (start or data.rfind(b"\xe0\x7f\x10\0") + 12) - 4
            value, length = struct.pack("<I", rng.choice(WHOLE[:-2]) % 2 ** 32), 4
        elif element.VR in ("US", "SS", "OW", "OB") or name == "PixelData":
            value, length = struct.pack("<q", rng.choice(WHOLE))[:2], 2
        else:
            value = rng.choice(DICOM_WORDS).encode("latin1")[:length].ljust(length)
        data[start:start + length] = value
    return data


def hdf5_content(data, rng):
    """Well-formed, but with other shapes, values, attributes or links than one would think."""
    with h5py.File(io.BytesIO(data), "r") as file:
        array, attributes = file["main"][...], dict(file["main"].attrs)
    target = io.BytesIO()
    wrong = rng.choice(["shape", "chunks", "values", "attribute", "type", "link", "external", "names"])
    with h5py.File(target, "w") as file:
        if wrong == "shape":
            shape = rng.choice(SHAPES)
            chunks = tuple(min(n, 16) for n in shape) if shape and 0 not in shape else None
            file.create_dataset("main", shape, array.dtype, chunks=chunks)
        elif wrong == "chunks":                      # of 512 MB each, none of which is stored
            file.create_dataset("main", (64, 2 ** 13, 2 ** 13), np.uint8, chunks=(8, 2 ** 13, 2 ** 13),
                                compression="gzip")
        elif wrong == "type":
            dtype = rng.choice([complex, "S4", bool, ">f2", [("a", "i4"), ("b", "f4")]])
            file["main"] = array.astype(dtype)
        elif wrong == "values":
            array = array.astype(np.float32)
            array.flat[rng.randrange(array.size)] = rng.choice(REAL[-3:])
            file["main"] = array
        elif wrong == "link":
            file["main"] = rng.choice([h5py.SoftLink("/main"), h5py.SoftLink("/none"),
                                       h5py.ExternalLink("/etc/hostname", "x"),
                                       h5py.ExternalLink("none.h5", "main")])
        elif wrong == "external":                    # bytes of any file of the reader's, as voxels
            file.create_dataset("main", (4, 16, 16), np.uint8, external=[("/etc/passwd", 0, 1024)])
        else:
            file["main" if wrong == "attribute" else rng.choice(["a/b", "é", "x" * 300])] = array
    if wrong == "attribute":
        with h5py.File(target, "r+") as file:
            file["main"].attrs["resolution"] = rng.choice([
                [0, 4, 4], [-40, 4, 4], [float("nan")] * 3, [float("inf"), 4, 4], "text", [], [4],
                np.zeros((9, 9)), [1e300, 1, 1], [b"a", b"b", b"c"], attributes["resolution"][::-1]])
    return bytearray(target.getvalue())


def tiff_tag(data, rng):
    """One or two entries of a directory hold another tag, type, count or value."""
    order = "<" if data[:2] == b"II" else ">"
    (first,) = struct.unpack_from(order + "I", data, 4)
    (entries,) = struct.unpack_from(order + "H", data, first)
    for _ in range(rng.choice([1, 1, 2])):
        at = first + 2 + 12 * rng.randrange(entries)
        part, size = rng.choice([(0, 2), (2, 2), (4, 4), (8, 4), (8, 4), (8, 4), (8, 2)])
        value = rng.choice((*WHOLE, 4, 5, 8, 16, 64, 256, 257, 4096, 20000)) % 2 ** (8 * size)
        data[at + part:at + part + size] = value.to_bytes(size, "little" if order == "<" else "big")
    if rng.random() < 0.1:                           # the next directory is this one
        struct.pack_into(order + "I", data, first + 2 + 12 * entries, first)
    return data


def picture_header(data, rng):
    """PNG: a chunk of another size or kind, its checksum right.  JPEG: other sides or components."""
    if data[:2] == b"\xff\xd8":
        at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
        side = rng.choice([0, 1, 2, 7, 4000, 12_000, 65535])
        struct.pack_into(">H", data, at + rng.choice([5, 7]), side)
        if rng.random() < 0.2:
            data[at + 9] = rng.choice([0, 1, 2, 4, 255])
        return data
    chunks, at = [], 8
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        chunks.append([data[at + 4:at + 8], data[at + 8:at + 8 + size]])
        at += 12 + size
    header = chunks[0][1]
    if rng.random() < 0.7:
        for offset, side in zip((0, 4), rng.choice(SIDES), strict=True):
            if side is not None:
                struct.pack_into(">I", header, offset, side)
    else:
        header[8 + rng.randrange(5)] = rng.choice([0, 1, 2, 3, 4, 6, 8, 16, 255])
    if rng.random() < 0.2:                           # a text that unpacks to 50 MB
        chunks.insert(1, [b"zTXt", b"Comment\0\0" + zlib.compress(bytes(50_000_000), 9)])
    return bytearray(data[:8] + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks))


def csv_cells(data, rng):
    """Cells, lines and columns that people and spreadsheets write."""
    lines = data.decode().splitlines()
    for _ in range(rng.choice([1, 1, 3])):
        at = rng.randrange(len(lines))
        cells = lines[at].split(",")
        column = rng.randrange(len(cells))
        kind = rng.choice(["cell"] * 4 + ["twice", "drop", "line", "again", "quote", "blank"])
        if kind in ("cell", "twice", "quote"):
            cells[column] = {"cell": rng.choice(CELLS), "twice": cells[column - 1],
                             "quote": f'"{cells[column]}'}[kind]
        elif kind == "drop":
            del cells[column]
        lines[at] = ",".join(cells)
        if kind in ("again", "blank"):
            lines.insert(at, lines[at] if kind == "again" else "," * rng.randrange(5))
        elif kind == "line" and len(lines) > 1:
            del lines[at]
    text = rng.choice(["\n", "\n", "\r\n", "\r"]).join(lines)
    encoding = rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin1"])
    return bytearray(text.encode(encoding, errors="replace"))


FAULTS = [flip_bits, flip_bits, cut, block, number, foreign]
OWN = {"nifti": nifti_header, "dicom": dicom_tag, "hdf5": hdf5_content, "tiff": tiff_tag,
       "picture": picture_header, "csv": csv_cells}


def mutant(data, kind, rng):
    """(bytes of a mutant of ``data``, name of its fault); kind: a word of OWN; rng: random.Random.

    Of gzip files half have the fault in their content, so that no checksum gives it away.
    """
    zipped = data[:2] == b"\x1f\x8b"
    inside = zipped and rng.random() < 0.7
    if inside:
        data = igzip.decompress(data)
    fault = OWN[kind] if (inside or not zipped) and rng.random() < 0.5 else rng.choice(FAULTS)
    with np.errstate(over="ignore"):                 # 1e308 is infinite in float32
        mutated = bytes(fault(bytearray(data), rng))
    if inside:
        mutated = igzip.compress(mutated, 2, mtime=0)
    return mutated, fault.__name__ + " inside gzip" * inside
