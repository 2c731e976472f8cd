"""The files that em_writers fills, one class per kind.

Each takes (path, shape [D, H, W], dtype, spacing_nm or None, key, channels or None), then write(z, block)
with [C, dz, H, W] in ascending z, C = 1 without channels, in multiples of ``chunk_depth`` but for the last;
then close(), or abandon() when it is to be thrown away.  OSError where the system does not let us write.
"""

import io
import itertools
import math
from contextlib import suppress

import h5py
import nibabel as nib
import numpy as np
import tifffile
import zarr
from isal import igzip
from numcodecs import Blosc

CHUNK = (16, 256, 256)                               # voxels, at most
LAYER = 2 ** 26                                      # bytes of a layer of chunks, which the writer may hold
NIFTI1_SIDE = 2 ** 15 - 1


def chunk_shape(shape, dtype, channels):
    """Chunk [d, h, w] of a volume: of CHUNK, and so thin that a layer of chunks stays below LAYER bytes."""
    section = (channels or 1) * shape[1] * shape[2] * dtype.itemsize
    return tuple(map(min, (max(1, LAYER // section), *CHUNK[1:]), CHUNK, shape))


class Hdf5:
    """An array, gzip-compressed; attribute resolution in nm, z, y, x, as CREMI writes it."""

    def __init__(self, path, shape, dtype, spacing_nm, key, channels):
        chunks = chunk_shape(shape, dtype, channels)
        self.chunk_depth = chunks[0]
        leading, thin = ((), ()) if channels is None else ((channels,), (1,))
        self.sink = Sink(path)
        self.file = h5py.File(self.sink, "w")
        self.array = self.file.create_dataset(key, (*leading, *shape), dtype, chunks=(*thin, *chunks),
                                              compression="gzip", compression_opts=1, shuffle=True)
        if spacing_nm is not None:
            self.array.attrs["resolution"] = np.array(spacing_nm, np.float64)

    def write(self, z, block):
        for channel, part in enumerate(block):
            place = (slice(z, z + len(part)),)
            self.array[place if self.array.ndim == 3 else (channel, *place)] = part
            self.sink.check()

    def close(self):
        self.file.close()
        self.sink.close()
        self.sink.check()

    def abandon(self):
        self.sink.error = self.sink.error or OSError("abandoned")
        self.file.close()
        self.sink.close()


class Sink(io.RawIOBase):
    """A file for HDF5 that never fails: after an error, which it keeps, what is written is thrown away.

    HDF5 holds chunks back until it is closed.  If it cannot write them then, it neither closes nor forgets
    them, and ends the process with a segmentation fault when it tries again.
    """

    def __init__(self, path):
        self.file, self.error = open(path, "w+b", buffering=0), None

    def check(self):
        """Raise the error, if there was one."""
        if self.error is not None:
            raise self.error

    def write(self, data):
        data = memoryview(data).cast("B")
        done = 0
        try:
            while self.error is None and done < len(data):             # a full disk first takes a part
                done += self.file.write(data[done:])
        except OSError as error:
            self.error = error
        return len(data)

    def truncate(self, size=None):
        try:
            if self.error is None:
                self.file.truncate(size)
        except OSError as error:
            self.error = error
        return size

    def readinto(self, buffer):
        return self.file.readinto(buffer)

    def seek(self, offset, whence=io.SEEK_SET):
        return self.file.seek(offset, whence)

    def tell(self):
        return self.file.tell()

    def close(self):
        try:
            self.file.close()
        except OSError as error:
            self.error = self.error or error


class Tiff:
    """OME-TIFF, a page per section; channels vary faster than sections, as in ImageJ: [D, C, H, W]."""

    chunk_depth = 1

    def __init__(self, path, shape, dtype, spacing_nm, key, channels):
        pages = shape[0] * (channels or 1)
        size = pages * (math.prod(shape[1:]) * dtype.itemsize * 1.01 + 1024)
        self.description = ome_xml(shape, dtype, spacing_nm, channels or 1)
        self.file = tifffile.TiffWriter(path, bigtiff=size > 2 ** 32, ome=False, shaped=False)

    def write(self, z, block):
        for page in block.swapaxes(0, 1).reshape(-1, *block.shape[2:]):
            self.file.write(page, photometric="minisblack", compression="zlib", compressionargs={"level": 1},
                            description=self.description, metadata=None, contiguous=False, software=False)
            self.description = None                  # it belongs to the first page

    def close(self):
        self.file.close()

    def abandon(self):
        with suppress(OSError):
            self.file.close()


def ome_xml(shape, dtype, spacing_nm, channels):
    """OME-XML (2016-06) of one image whose pages are its planes, channels first, then sections."""
    kind = "float" if dtype.kind == "f" else dtype.name        # OME has no half; readers go by the pages
    sizes = "" if spacing_nm is None else "".join(
        f' PhysicalSize{axis}="{size:.12g}" PhysicalSize{axis}Unit="nm"'
        for axis, size in zip("ZYX", spacing_nm, strict=True))
    each = "".join(f'<Channel ID="Channel:0:{c}" SamplesPerPixel="1"/>' for c in range(channels))
    schema = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
    return (f'<?xml version="1.0" encoding="UTF-8"?><OME xmlns="{schema}" '
            'xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" '
            f'xsi:schemaLocation="{schema} {schema}/ome.xsd"><Image ID="Image:0"><Pixels ID="Pixels:0" '
            f'DimensionOrder="XYCZT" Type="{kind}" SizeX="{shape[2]}" SizeY="{shape[1]}" SizeC="{channels}" '
            f'SizeZ="{shape[0]}" SizeT="1"{sizes}>{each}'
            f'<TiffData IFD="0" PlaneCount="{channels * shape[0]}"/></Pixels></Image></OME>')


class Nifti:
    """X, Y, Z(, C), X fastest, sizes in microns; gzipped where the name says so, then without channels."""

    chunk_depth = 1

    def __init__(self, path, shape, dtype, spacing_nm, key, channels):
        self.dtype = np.dtype("<f4") if dtype == np.float16 else dtype.newbyteorder("<")
        self.section = math.prod(shape[1:]) * self.dtype.itemsize
        header = nib.Nifti2Header() if max(*shape, channels or 1) > NIFTI1_SIDE else nib.Nifti1Header()
        header.set_data_dtype(self.dtype)
        header.set_data_shape((*shape[::-1], *((channels,) if channels else ())))
        header.set_slope_inter(1, 0)
        if spacing_nm is not None:
            sizes = [size / 1000 for size in spacing_nm[::-1]]
            header["pixdim"][1:4] = sizes
            header.set_sform(np.diag([*sizes, 1]), "scanner")
            header.set_xyzt_units("micron")
        header.set_data_offset(header.single_vox_offset)
        compressed = path.name.lower().endswith(".nii.gz.tmp")
        self.file = igzip.open(path, "wb", compresslevel=2) if compressed else open(path, "wb")
        header.write_to(self.file)
        self.start, self.depth = header.single_vox_offset, shape[0]

    def write(self, z, block):
        for channel, part in enumerate(block):
            if len(block) > 1:
                self.file.seek(self.start + (channel * self.depth + z) * self.section)
            for section in part:
                self.file.write(np.ascontiguousarray(section, self.dtype).data)

    def close(self):
        self.file.close()

    def abandon(self):
        with suppress(OSError):
            self.file.close()


class Zarr:
    """OME-Zarr 0.4 (Zarr 2): an image of one level, "0", with Blosc; the axis c comes first."""

    def __init__(self, path, shape, dtype, spacing_nm, key, channels):
        chunks = chunk_shape(shape, dtype, channels)
        self.chunk_depth, self.sides = chunks[0], chunks[1:]
        leading, thin = ((), ()) if channels is None else ((channels,), (1,))
        unit = {} if spacing_nm is None else {"unit": "nanometer"}
        axes = [{"name": "c", "type": "channel"}] * len(leading)
        axes += [{"name": name, "type": "space", **unit} for name in "zyx"]
        scale = [1.0] * len(leading) + [float(size) for size in spacing_nm or (1, 1, 1)]
        level = {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": scale}]}
        group = zarr.create_group(path, zarr_format=2, attributes={
            "multiscales": [{"version": "0.4", "name": "volume", "axes": axes, "datasets": [level]}]})
        self.array = group.create_array(
            "0", shape=(*leading, *shape), dtype=dtype, chunks=(*thin, *chunks), fill_value=0,
            compressors=Blosc(cname="zstd", clevel=1, shuffle=Blosc.SHUFFLE),
            chunk_key_encoding={"name": "v2", "separator": "/"})

    def write(self, z, block):
        """Chunk by chunk: of many at once some would still be written after the first has failed."""
        (_, depth, *sides), (height, width) = block.shape, self.sides
        corners = itertools.product(*(range(0, n, step) for n, step in zip(sides, self.sides, strict=True)),
                                    range(0, depth, self.chunk_depth), range(len(block)))
        for y, x, first, channel in corners:
            part = block[channel, first:first + self.chunk_depth, y:y + height, x:x + width]
            ends = zip((z + first, y, x), part.shape, strict=True)
            place = tuple(slice(start, start + n) for start, n in ends)
            self.array[place if self.array.ndim == 3 else (channel, *place)] = part

    def close(self):
        """Every chunk is written already."""

    def abandon(self):
        """What was written is removed by the caller."""


FILES = {".h5": Hdf5, ".hdf5": Hdf5, ".hdf": Hdf5, ".tif": Tiff, ".tiff": Tiff, ".nii": Nifti,
         ".nii.gz": Nifti, ".zarr": Zarr}
