"""Reading brain studies: a crop from the cache, a DICOM series, a NIfTI file; against the plain libraries.

    python benchmarks/study_cache.py --n 9

crop    8 crops of 96^3 voxels, one after the other as a loader reads them, each with its own load_image and
        copy, against nibabel's slicer of the .nii.gz
dicom   100 slices of 512x512: read_dicom_series, against pydicom's pixel_array, rescaled in float64
nifti   256x256x180 int16 of smooth noise: read_nifti, against nibabel's dataobj

The files are in the page cache, as in every epoch but the first.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).parents[1]))

from datasets.cache import load_image, read_cache, write_cache
from datasets.volumes import read_dicom_series, read_nifti

SETTINGS = {"spacing": [1.0, 1.0], "percentiles": [0.0, 100.0], "mri_background": 10.0,
            "ct_background": -500.0}
CROPS = [tuple(slice(corner, corner + 96) for corner in corners)                          # D, H, W
         for corners in np.random.default_rng(0).integers(0, (85, 161, 161), (8, 3)).tolist()]
NIFTI_SHAPE, DICOM_SHAPE = (256, 256, 180), (512, 512, 100)       # x, y, z


def smooth_noise(shape, deviation, mean):
    """int16 [x, y, z] that compresses like an image."""
    noise = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(shape, np.float32), 2)
    return (noise / noise.std() * deviation + mean).astype(np.int16)


def write_dicom(folder, data):
    """An uncompressed CT series of data [x, y, z] in HU; returns the sorted paths."""
    folder.mkdir(parents=True)
    uids = {name: generate_uid() for name in ("SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID")}
    for z in range(data.shape[2]):
        meta = pydicom.dataset.FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        slice_of = {
            **uids, "SOPClassUID": CTImageStorage, "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
            "Modality": "CT", "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "PixelSpacing": [1, 1],
            "ImagePositionPatient": [0, 0, z], "SliceThickness": 1, "InstanceNumber": z + 1,
            "RescaleSlope": 1, "RescaleIntercept": -1024, "SamplesPerPixel": 1,
            "PhotometricInterpretation": "MONOCHROME2", "Columns": data.shape[0], "Rows": data.shape[1],
            "BitsAllocated": 16, "BitsStored": 16, "HighBit": 15, "PixelRepresentation": 1,
        }
        dataset = pydicom.Dataset()
        dataset.file_meta = meta
        for name, value in slice_of.items():
            setattr(dataset, name, value)
        dataset.PixelData = (data[:, :, z].T + 1024).tobytes()
        dataset.save_as(folder / f"{z:03d}.dcm", enforce_file_format=True)
    return sorted(folder.iterdir())


def pydicom_loop(paths):
    """float64 [x, y, z] in HU, the way that every tutorial reads a series."""
    slices = [pydicom.dcmread(path) for path in paths]
    slices.sort(key=lambda dataset: dataset.ImagePositionPatient[2])
    return np.stack([float(dataset.RescaleSlope) * dataset.pixel_array.T + float(dataset.RescaleIntercept)
                     for dataset in slices], axis=-1)


def oriented_as(volume, affine):
    """Data of a Volume with axes that run as those of ``affine``."""
    turn = nib.orientations.ornt_transform(nib.io_orientation(volume.affine), nib.io_orientation(affine))
    return nib.orientations.apply_orientation(volume.data, turn)


def compare(name, ours, peer, n):
    """Time both in turn, print, and return the ratio of medians."""
    seconds = {ours: [], peer: []}
    for i in range(n + 1):                                             # the first round warms up
        for function in (ours, peer) if i % 2 else (peer, ours):
            start = time.perf_counter()
            function()
            seconds[function] += [time.perf_counter() - start] if i else []
    mine, theirs = (statistics.median(seconds[function]) for function in (ours, peer))
    print(f"{name}, equal: ours {1e3 * mine:.2f} ms, peer {1e3 * theirs:.1f} ms")
    print(f"{name} ratio: {theirs / mine:.1f}", flush=True)
    return theirs / mine


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=9, help="timed rounds (default: %(default)s)")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = smooth_noise(NIFTI_SHAPE, 10, 1000)
        path = folder / "raw/study/scan.nii.gz"
        path.parent.mkdir(parents=True)
        affine = np.diag([1.0, -1.0, -1.0, 1.0])                       # right, posterior, inferior
        nib.save(nib.Nifti1Image(data, affine), path)
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")
        slices = write_dicom(folder / "dicom", smooth_noise(DICOM_SHAPE, 100, 0))

        def nifti_ours():
            return read_nifti(path).data

        def nifti_peer():
            return np.asanyarray(nib.load(path).dataobj)

        np.testing.assert_array_equal(nifti_ours(), nifti_peer())
        compare("nifti", nifti_ours, nifti_peer, args.n)

        def dicom_ours():
            return read_dicom_series(slices)

        def dicom_peer():
            return pydicom_loop(slices)

        lps = np.diag([-1.0, -1.0, 1.0, 1.0])                          # the way of the loop's axes
        np.testing.assert_array_equal(oriented_as(dicom_ours(), lps), dicom_peer())
        compare("dicom", dicom_ours, dicom_peer, args.n)

        write_cache(folder / "raw", folder / "cache", None, 0, SETTINGS)
        series = read_cache(folder / "cache")[0].series[0]

        def crop_ours():
            return [load_image(series, "mri")[crop].numpy().copy() for crop in CROPS]

        def crop_peer():
            return [np.asanyarray(nib.load(path).slicer[crop[::-1]].dataobj) for crop in CROPS]

        low, high = data.min(), data.max()                             # to the cache's 8 bits
        for ours, peer in zip(crop_ours(), crop_peer(), strict=True):
            same = (peer.T.astype(np.float32) - low) * np.float32(255 / (high - low))
            assert np.abs(ours - same).max() < 0.51
        print("page cache: warm")
        ratio = compare("crop", crop_ours, crop_peer, args.n)
    print(f"ratio: {ratio:.1f} (peer / ours, median of {args.n})")


if __name__ == "__main__":
    main()
