"""Small valid files of every kind that is read.

    write_all(Path("samples"))                       # samples/<name>/: all files of one sample

The files of a folder belong together.  Whenever they are written they have the same bytes.
"""

import csv
import io

import h5py
import nibabel as nib
import numpy as np
import pydicom
import tifffile
from PIL import Image
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
)

RNG = np.random.default_rng(0)
Z, Y, X = np.mgrid[:6, :24, :20]
VOXELS = ((np.sin(X / 4) * np.cos(Y / 5 + Z) + 1) * 2000 + RNG.integers(0, 90, Z.shape)).astype(np.uint16)
BYTES = (VOXELS // 17).astype(np.uint8)
COLOUR = np.stack([BYTES[0], BYTES[1], BYTES[2]], -1)                          # [H, W, 3]
MASK = (VOXELS > 2500).astype(np.uint8)
AFFINE = np.array([[-0.7, 0, 0, 9], [0, 0.1, -2, 4], [0, 0.8, 0.3, -7], [0, 0, 0, 1]])       # oblique
SLICE = np.diag([-0.7, -0.7, 1, 1])
STACKS = {"stack": {}, "zip": {"compression": "zlib"}, "big_endian": {"byteorder": ">"},
          "imagej": {"imagej": True, "metadata": {"axes": "ZYX"}}, "tiles": {"tile": (16, 16)},
          "ome.ome": {"metadata": {"axes": "ZYX", "UUID": "00000000-0000-0000-0000-000000000000",
                                   **{f"PhysicalSize{axis}": 0.004 for axis in "XYZ"}}}}


def save_nifti(path, array, version=nib.Nifti1Image, endian="<", slope=None, inter=0.0, affine=AFFINE):
    """Voxels [x, y, ...] as they are; read, they are slope * stored + inter."""
    header = version.header_class(endianness=endian)
    header.set_data_dtype(array.dtype)
    header.set_xyzt_units("micron")
    header["pixdim"][1:4] = 0.007, 0.007, 0.04
    image = version(array, affine, header)
    if slope is not None:
        image.header.set_slope_inter(slope, inter)
    path.write_bytes(b"")
    nib.save(image, path)


def save_dicom(path, pixels, number=0, syntax=ExplicitVRLittleEndian, **tags):
    """One slice of a series, [H, W]."""
    item = pydicom.Dataset()
    item.file_meta = pydicom.dataset.FileMetaDataset()
    item.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    item.SOPClassUID, item.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.4", f"1.2.3.{number + 1}"
    item.Modality, item.SeriesInstanceUID, item.StudyInstanceUID = "MR", "1.2.3.4", "1.2.3"
    item.PixelSpacing, item.ImageOrientationPatient = [0.5, 0.75], [1, 0, 0, 0, 1, 0]
    item.ImagePositionPatient, item.SliceThickness = [0.0, 0.0, 2.0 * number], 2.0
    item.ImageType, item.NumberOfFrames = ["ORIGINAL", "PRIMARY"], 1
    item.StudyDate, item.StudyTime = "20200202", "101112"          # else GDCM writes now
    item.set_pixel_data(pixels, "MONOCHROME2", 8 * pixels.itemsize, generate_instance_uid=False)
    for name, value in tags.items():
        setattr(item, name, value)
    if syntax == RLELossless:
        item.compress(syntax, encoding_plugin="pydicom", generate_instance_uid=False)
    elif syntax in (JPEGBaseline8Bit, JPEG2000Lossless):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG" if syntax == JPEGBaseline8Bit else "JPEG2000")
        item.PixelData = pydicom.encaps.encapsulate([buffer.getvalue()])
        item["PixelData"].VR = "OB"
    item.file_meta.TransferSyntaxUID = syntax
    item.save_as(path, enforce_file_format=True)


def save_recoded(path, pixels, syntax):
    """A slice under one of GDCM's transfer syntaxes, by GDCM's name."""
    import gdcm  # never before zlib: Python's would crash in GDCM's own

    save_dicom(path, pixels)
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


def save_enhanced(path):
    """All slices in one file of many frames, each with its place."""
    def group(**macros):
        whole = pydicom.Dataset()
        for name, values in macros.items():
            macro = pydicom.Dataset()
            for key, value in values.items():
                setattr(macro, key, value)
            setattr(whole, name, [macro])
        return whole

    save_dicom(path, VOXELS)
    item = pydicom.dcmread(path)
    item.SharedFunctionalGroupsSequence = [group(
        PixelMeasuresSequence={"PixelSpacing": item.PixelSpacing},
        PlaneOrientationSequence={"ImageOrientationPatient": item.ImageOrientationPatient})]
    item.PerFrameFunctionalGroupsSequence = [
        group(PlanePositionSequence={"ImagePositionPatient": [0.0, 0.0, 2.0 * number]})
        for number in range(len(VOXELS))]
    for name in ("PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient"):
        delattr(item, name)
    item.save_as(path, enforce_file_format=True)


def save_hdf5(path, array, **options):
    """An array "main" with its voxel size."""
    with h5py.File(path, "w") as file:
        file.create_dataset("main", data=array, **options).attrs["resolution"] = [40.0, 4.0, 4.0]


def save_table(path, header, rows):
    """A CSV file."""
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header.split(), *rows])


def write_nifti_and_dicom(folder):
    """The samples of medicine."""
    save_nifti(folder("image.nii"), VOXELS[0].T.astype(np.float32), affine=SLICE)
    save_nifti(folder("image.nii.gz"), BYTES[0].T[..., None], slope=0.5, inter=-3.0, affine=SLICE)
    save_nifti(folder("volume.nii"), VOXELS.T.astype(np.int16))
    save_nifti(folder("volume.nii.gz"), BYTES.T, slope=2.5)
    save_nifti(folder("volume2.nii"), VOXELS.T.astype(np.float64), nib.Nifti2Image, ">")
    save_nifti(folder("series.nii.gz"), VOXELS.T.astype(np.float32))
    save_nifti(folder("mask.nii.gz"), MASK.T)
    save_nifti(folder("em.nii"), VOXELS.T)
    save_nifti(folder("em.nii.gz"), BYTES.T, slope=2.0, inter=1.0)
    save_dicom(folder("image.dcm"), VOXELS[0], WindowCenter=2000, WindowWidth=3000, RescaleSlope=1.5,
               RescaleIntercept=-10)
    save_dicom(folder("implicit.dcm"), VOXELS[0], syntax=ImplicitVRLittleEndian)
    save_dicom(folder("rle.dcm"), VOXELS[0], syntax=RLELossless)
    save_dicom(folder("deflated.dcm"), VOXELS[0], syntax=DeflatedExplicitVRLittleEndian)
    save_dicom(folder("jpeg.dcm"), BYTES[0], syntax=JPEGBaseline8Bit)
    save_dicom(folder("jpeg2000.dcm"), VOXELS[0], syntax=JPEG2000Lossless)
    save_recoded(folder("lossless.dcm"), VOXELS[0], "JPEGLosslessProcess14_1")
    save_recoded(folder("jpegls.dcm"), VOXELS[0], "JPEGLSLossless")
    for name, syntax in (("slices", ExplicitVRLittleEndian), ("rle_slices", RLELossless),
                         ("mri", ImplicitVRLittleEndian)):
        for number, pixels in enumerate(VOXELS):
            save_dicom(folder(name) / f"{number}.dcm", pixels, number, syntax, RescaleSlope=2,
                       RescaleIntercept=-1)
    save_enhanced(folder("enhanced.dcm"))


def write_arrays_and_pictures(folder):
    """The samples of microscopy, and pictures."""
    save_hdf5(folder("plain.h5"), VOXELS)
    save_hdf5(folder("gzip.h5"), VOXELS.astype(np.int64), chunks=(2, 16, 16), compression="gzip")
    save_hdf5(folder("checked.h5"), VOXELS.astype(np.float32), chunks=(6, 8, 8), shuffle=True,
              fletcher32=True)
    for name, options in STACKS.items():
        tifffile.imwrite(folder(f"{name}.tif"), VOXELS, **options)
    tifffile.imwrite(folder("cube.tif"), BYTES, photometric="minisblack")
    tifffile.imwrite(folder("cube_zip.tif"), VOXELS.transpose(1, 2, 0).copy(), compression="zlib",
                     predictor=True, photometric="minisblack")
    Image.fromarray(VOXELS[0]).save(folder("image.tif"))
    Image.fromarray(VOXELS[0]).save(folder("lzw.tif"), compression="tiff_lzw")
    Image.fromarray(COLOUR).save(folder("photo.tif"), compression="tiff_adobe_deflate")
    for number, section in enumerate(VOXELS):
        tifffile.imwrite(folder("sections") / f"{number}.tif", section, compression="zlib")
        Image.fromarray(section).save(folder("png_sections") / f"{number}.png")
        Image.fromarray(BYTES[number]).save(folder("png_slices") / f"{number}.png")
    Image.fromarray(BYTES[0]).save(folder("grey.png"))
    Image.fromarray(VOXELS[0]).save(folder("deep.png"))
    Image.fromarray(COLOUR).save(folder("colour.png"))
    Image.fromarray(COLOUR).convert("RGBA").save(folder("clear.png"))
    Image.fromarray(COLOUR).quantize(30).save(folder("palette.png"))
    Image.fromarray(MASK[0]).save(folder("mask.png"))
    Image.fromarray(BYTES[0]).save(folder("grey.jpg"))
    Image.fromarray(COLOUR).save(folder("colour.jpg"), quality=95)
    Image.fromarray(COLOUR).save(folder("progressive.jpg"), progressive=True)


def write_tables(folder):
    """CSV files, those that name files beside these."""
    names = [f"p{number:02d}" for number in range(10)]
    splits = ["train"] * 6 + ["val"] * 2 + ["test"] * 2
    save_table(folder("splits.csv"), "patient split", zip(names, splits, strict=True))
    save_table(folder("bce.csv"), "study_id bleed mass", [(name, "01"[name > "p04"], "") for name in names])
    save_table(folder("ce.csv"), "study class", [(name, int(name[1:]) % 3) for name in names])
    save_table(folder("mse.csv"), "study_id age", [(name, 20.5 + n) for n, name in enumerate(names)])
    save_table(folder("modes.csv"), "study mode", [(name, "ct" if name > "p05" else "mri") for name in names])
    photos, slices = folder("photos.csv"), folder("slices.csv")
    for number, name in enumerate(names):
        Image.fromarray(BYTES[0]).save(photos.parent / f"{name}.png")
        Image.fromarray(BYTES[0]).save(slices.parent / f"{name}_{number}.png")
    save_table(photos, "path label group split",
               [(f"{name}.png", "ab"[n % 2], name, split) for n, (name, split) in
                enumerate(zip(names, splits, strict=True))])
    save_nifti(slices.parent / "scan.nii", VOXELS.T.astype(np.int16))
    save_table(slices, "path label patient split index axis",
               [*((f"{name}_{n}.png", "ab"[n % 2], name, split, "", "") for n, (name, split) in
                  enumerate(zip(names, splits, strict=True))), ("scan.nii", "a", "q", "train", 1, "stored"),
                ("scan.nii", "b", "q", "train", 2, "stored")])
    patients = folder("patients.csv")
    for name in names:
        Image.fromarray(BYTES[0]).save(patients.parent / f"{name}.png")
    save_table(patients, "path patient", [(f"{name}.png", f"a{name}") for name in names])
    volumes = folder("volumes.csv")
    save_hdf5(volumes.parent / "a.h5", VOXELS)
    save_table(volumes, "volume raw neuron split sections spacing_nm",
               [(name, "a.h5:main", "a.h5:main", split, "0:4", "40x4x4")
                for name, split in zip(names[4:], splits[4:], strict=True)])


def write_all(root):
    """Write every sample into a folder of its own below ``root``."""
    def folder(name):
        place = root / name
        place.mkdir(parents=True, exist_ok=True)
        return place / name if "." in name else place

    write_nifti_and_dicom(folder)
    write_arrays_and_pictures(folder)
    write_tables(folder)
