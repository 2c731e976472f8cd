"""Every reader of images, and beside it the format's own library asked in the plainest way, to compare.

Each function takes a path and returns {name: array or value}.  Where ours returns at all, both must agree.
"""


import h5py
import nibabel as nib
import numpy as np
import pydicom
import tifffile
from input_files import AFFINE, MASK
from PIL import Image, ImageOps
from pydicom.uid import JPEG2000, JPEG2000Lossless, JPEGBaseline8Bit

from datasets.em_files import open_volume
from datasets.io import read_image
from datasets.photo_files import read_photo, read_spectral
from datasets.slice_masks import read_mask
from datasets.slice_series import Series, read_series
from datasets.volumes import read_dicom_series, read_nifti

PILLOW = (JPEGBaseline8Bit, JPEG2000, JPEG2000Lossless)
LIKE = Series(np.zeros(MASK.shape, np.float32), AFFINE[:, [2, 1, 0, 3]], "image.nii")
FLAT = Series(np.zeros((1, *MASK.shape[1:]), np.float32), np.eye(4), "image.png", placed=False)


# ------------------------------------------------------------------------------------------------ images

def image(path):
    return {"image": read_image(path)}


def nifti_peer(path):
    """nibabel's voxels [x, y, z], without axes of length 1 behind the third, and its affine."""
    found = nib.load(path)
    if not hasattr(found, "affine"):                 # of CIFTI, nibabel gives the rows and columns alone
        found = nib.Nifti2Image.from_filename(path)
    data = np.asarray(found.dataobj)
    return data.reshape(data.shape[:3] + tuple(n for n in data.shape[3:] if n != 1)), found.affine


def image_nifti_peer(path):
    return {"image": nifti_peer(path)[0].squeeze().T}


def dicom_peer(path):
    """pydicom's numbers, rescaled and windowed by its own functions."""
    dataset = pydicom.dcmread(path, force=True)
    plugin = "pillow" if dataset.file_meta.get("TransferSyntaxUID") in PILLOW else ""      # GDCM may abort
    pixels = pydicom.pixels.pixel_array(dataset, decoding_plugin=plugin)
    if pixels.ndim == 3:
        return {"image": pixels @ np.array([0.299, 0.587, 0.114], np.float32)}
    pixels = pydicom.pixels.apply_modality_lut(pixels, dataset)
    pixels = pydicom.pixels.apply_voi_lut(pixels, dataset, index=0)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        pixels = float(pixels.max()) + float(pixels.min()) - pixels
    return {"image": pixels}


def picture_peer(path):
    found = Image.open(path)
    grey = found.mode in ("L", "F") or found.mode.startswith("I")
    return {"image": np.asarray(found if grey else found.convert("L"))}


def photo(path):
    return {"photo": read_photo(path, 8).numpy()}


def photo_peer(path):
    """Pillow's RGB as small as a JPEG gives it, of 16 bits the upper 8; white under what is clear."""
    found = Image.open(path)
    found.draft(None, (8, 8))
    found = ImageOps.exif_transpose(found)
    if found.mode.startswith("I"):
        found = Image.fromarray((np.asarray(found) >> 8).astype(np.uint8))
    if found.has_transparency_data:
        found = found.convert("RGBA")
        found = Image.alpha_composite(Image.new("RGBA", found.size, "white"), found)
    return {"photo": np.asarray(found.convert("RGB")).transpose(2, 0, 1)}


def cube(path):
    return {"cube": read_spectral(path, 6).numpy()}


def cube_peer(path):
    found = tifffile.imread(path)
    found = found if found.shape[0] == 6 else found.transpose(2, 0, 1)
    return {"cube": found / (np.iinfo(found.dtype).max if found.dtype.kind in "iu" else 1)}


# ---------------------------------------------------------------------------------------- series and masks

def volume(path):
    found = read_nifti(path)
    assert (np.linalg.norm(found.affine[:3, :3], axis=0) > 0).all()
    return {"data": found.data, "affine": found.affine}


def volume_peer(path):
    data, affine = nifti_peer(path)
    return {"data": data, "affine": affine}


def series(path):
    """The header alone must tell the same shape and affine as the whole file."""
    whole, header = read_series(path), read_series(path, pixels=False)
    assert header.data.shape == whole.data.shape and np.allclose(header.affine, whole.affine), "header alone"
    return {"data": whole.data, "affine": whole.affine}


def series_peer(path):
    data, affine = nifti_peer(path)
    return {"data": data.T, "affine": affine[:, [2, 1, 0, 3]]}


def dicom_series(path):
    found = read_dicom_series(sorted(path.parent.iterdir()))
    return {"affine": found.affine, **({} if "uneven" in str(found.notes) else {"data": found.data})}


def dicom_folder(path):
    found = read_series(path.parent)
    return {"affine": found.affine[:, [2, 1, 0, 3]],
            **({} if "uneven" in str(found.notes) else {"data": found.data.T})}


def dicom_series_peer(path):
    """Every slice or frame, rescaled, in the order of their positions, and the affine of both ends."""
    slices = []
    for file in path.parent.iterdir():
        item = pydicom.dcmread(file, force=True)
        item.PhotometricInterpretation = item.get("PhotometricInterpretation") or "MONOCHROME2"    # as we do
        groups = item.get("PerFrameFunctionalGroupsSequence", [])
        frames = [group.PlanePositionSequence[0] for group in groups]
        pixels = item.pixel_array.reshape(len(frames) or 1, item.Rows, item.Columns)
        shared = item.get("SharedFunctionalGroupsSequence")
        spacing = (shared[0].PixelMeasuresSequence[0] if shared else item).get_item("PixelSpacing").value
        spacing = np.array(spacing.split(b"\\") if isinstance(spacing, bytes) else spacing, float)
        for place, stored in zip(frames or [item], pixels, strict=True):
            real = stored * float(item.get("RescaleSlope") or 1) + float(item.get("RescaleIntercept") or 0)
            real = real if item.PhotometricInterpretation != "MONOCHROME1" else -real
            slices.append((np.array(place.ImagePositionPatient, float), real, spacing))
    slices.sort(key=lambda found: found[0][2])
    (first, _, spacing), (last, *_) = slices[0], slices[-1]
    affine = np.column_stack([(-spacing[1], 0, 0), (0, -spacing[0], 0),
                              (last - first) / (len(slices) - 1) * (-1, -1, 1), first * (-1, -1, 1)])
    return {"data": np.stack([real for _, real, _ in slices]).T, "affine": np.vstack([affine, [0, 0, 0, 1]])}


def mask(path):
    return {"mask": read_mask(path, LIKE, ["a"]).data}


def mask_peer(path):
    """The same voxels, in the image's order where the header tells another."""
    found = nib.load(path)
    data = np.asarray(found.dataobj).reshape(found.shape[:3])
    if found.header["sform_code"] or found.header["qform_code"]:
        data = nib.apply_orientation(data, nib.io_orientation(np.linalg.inv(AFFINE) @ found.affine))
    return {"mask": data.T > 0}


def picture_mask(path):
    return {"mask": read_mask(path, FLAT, ["a"]).data}


def picture_mask_peer(path):
    return {"mask": np.asarray(Image.open(path))[None] > 0}


def picture_folder(path):
    return {"data": read_series(path.parent).data}


def picture_folder_peer(path):
    """The grey pictures of the size that most have."""
    found = [Image.open(file) for file in sorted(path.parent.iterdir())]
    sizes = [each.size for each in found]
    kept = [each for each in found if each.size == max(sizes, key=sizes.count) and each.mode != "RGB"]
    return {"data": np.stack([np.asarray(each) for each in kept])}


# ----------------------------------------------------------------------------------- electron microscopy

def some(shape, read):
    """{number of a section: 256 x 256 of it} of the first, the middle and the last: what crops ask for."""
    places = sorted({0, shape[0] // 2, shape[0] - 1})
    return {"shape": shape, **{f"section {z}": read(z) for z in places}}


def blocks(path):
    found = open_volume(path)
    assert found.spacing_nm is None or all(0 < size < 1e7 for size in found.spacing_nm)
    return some(found.shape, lambda z: found[z, :256, :256])


def blocks_of(array):
    return some(array.shape, lambda z: array[z, :256, :256])


def em_nifti_peer(path):
    return blocks_of(nifti_peer(path)[0].T)


def em_hdf5_peer(path):
    with h5py.File(path) as file:
        found = []
        file.visititems(lambda name, item: found.append(item) if isinstance(item, h5py.Dataset) else None)
        return blocks_of(file.get("main", found[0]))


def em_tiff_peer(path):
    return blocks_of(tifffile.imread(path))


def em_folder(path):
    return blocks(path.parent)


def em_folder_peer(path):
    read = tifffile.imread if path.suffix == ".tif" else lambda file: np.asarray(Image.open(file))
    return blocks_of(np.stack([read(file) for file in sorted(path.parent.iterdir())]))
