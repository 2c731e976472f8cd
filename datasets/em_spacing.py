"""Voxel sizes in nanometres, from whatever a file of electron microscopy says about them.

Every function returns (spacing_nm, note): three floats along D, H, W and "", or None and the reason.  A file
whose size makes no sense (negative, zero, not finite, beyond LIMITS_NM) can still be read: its size is None.
"""

import json
from xml.etree import ElementTree

import numpy as np

LIMITS_NM = (0.01, 1e6)                              # of a size with a unit
EM_NM = (1, 1000)                                    # of electron microscopy: 1000 wide, as units are apart
UNITS_NM = {"pm": 1e-3, "picometer": 1e-3, "å": 0.1, "angstrom": 0.1, "nm": 1.0, "nanometer": 1.0,
            "nanometre": 1.0, "um": 1e3, "µm": 1e3, "μm": 1e3, "\\u00b5m": 1e3, "micron": 1e3,
            "microns": 1e3, "micrometer": 1e3, "micrometre": 1e3, "mm": 1e6, "millimeter": 1e6,
            "millimetre": 1e6, "cm": 1e7, "centimeter": 1e7, "m": 1e9, "meter": 1e9, "metre": 1e9}
NIFTI_UNITS = {1: "meter", 2: "mm", 3: "micron"}
ATTRIBUTES = ("resolution_nm_zyx", "resolution")     # CREMI writes resolution: z, y, x in nm


def to_spacing(values, unit, where, digits=12):
    """Three sizes [z, y, x] of one unit; unit: a word of UNITS_NM, or None to tell it from the values.

    digits: significant ones kept; 6 where the file holds float32, whose 0.0046 is 0.0045999998.
    Without a unit, or with one that is not to be trusted, the sizes are those in nm, um or mm that lie within
    EM_NM, all three: so 8 x 8 x 30 and 0.008 x 0.008 x 0.03 mean the same.  1 x 1 x 1 means that nobody said.
    """
    said = f"{where} = {str(values).strip()[:60]}"
    try:
        sizes = np.array(values, np.float64)
    except (TypeError, ValueError):
        return None, f"{said} is no voxel size"
    if sizes.shape != (3,) or not np.isfinite(sizes).all():
        return None, f"{said} is no voxel size"
    if unit is not None:
        factors = [UNITS_NM[unit]]
        least, most = LIMITS_NM
    else:
        factors = [] if (sizes == 1).all() else [UNITS_NM[word] for word in ("nm", "um", "mm")]
        least, most = EM_NM
    for factor in factors:
        spacing = [float(f"{size * factor:.{digits}g}") for size in sizes]
        if all(least <= size <= most for size in spacing):
            return tuple(spacing), ""
    return None, f"{said} is no voxel size of electron microscopy"


def attribute_spacing(attributes):
    """From the attributes of an array and of the groups around it, nearest first; in nm."""
    for mapping in attributes:
        for name in ATTRIBUTES:
            if name in mapping:
                return to_spacing(mapping[name], "nm", f"attribute {name}")
    return None, f"no attribute {' or '.join(ATTRIBUTES)}"


def nifti_spacing(pixdim, units):
    """From pixdim[1:4] (x, y, z) and the byte xyzt_units of a NIfTI header.

    Microns are taken at their word.  Programs of medicine write mm whatever they were given, so mm, metres
    and no unit say nothing.
    """
    unit = "micron" if NIFTI_UNITS.get(int(units) & 7) == "micron" else None
    return to_spacing([float(size) for size in pixdim[::-1]], unit, "pixdim (z, y, x)", digits=6)


def sidecar_spacing(path):
    """From "spacing" (z, y, x) of the .json file that nnU-Net keeps beside a TIFF; (None, "") without one.

    For ``case_0000.tif`` that is ``case_0000.json`` or ``case.json``.  It has no unit.
    """
    stem = path.name[:-len(path.suffix)]
    for name in (f"{stem}.json", f"{stem[:-5]}.json" if stem.endswith("_0000") else None):
        sidecar = path.with_name(name) if name else None
        if sidecar is None or not sidecar.is_file():
            continue
        try:
            content = json.loads(sidecar.read_text())
        except (OSError, ValueError, RecursionError):
            return None, f"{name} is not JSON"
        if isinstance(content, dict) and "spacing" in content:
            return to_spacing(content["spacing"], None, f"spacing in {name}")
    return None, ""


def tiff_spacing(path, tif):
    """Of an open tifffile.TiffFile: the sidecar first, then OME metadata, then ImageJ's."""
    spacing, note = sidecar_spacing(path)
    if spacing or note:
        return spacing, note
    if tif.ome_metadata:
        return ome_xml_spacing(tif.ome_metadata)
    if tif.imagej_metadata:
        return imagej_spacing(tif)
    return None, "the TIFF does not say how far sections are apart"


def ome_xml_spacing(text):
    """From PhysicalSizeZ, Y, X and their units (default um) of the first image in OME-XML."""
    nodes = ElementTree.fromstring(text).iter()
    pixels = next((node for node in nodes if node.tag.endswith("}Pixels")), None)
    attributes = {} if pixels is None else pixels.attrib
    sizes, where = [], "PhysicalSize (z, y, x)"
    for axis in "ZYX":
        unit = attributes.get(f"PhysicalSize{axis}Unit", "µm").lower()
        try:
            sizes.append(float(attributes[f"PhysicalSize{axis}"]) * UNITS_NM[unit])
        except (KeyError, ValueError):
            return None, f"{where} is not complete"
    return to_spacing(sizes, "nm", where)


def imagej_spacing(tif):
    """From ImageJ's section distance and unit, and the tags of pixels per unit."""
    unit = str(tif.imagej_metadata.get("unit", "")).lower()
    if unit not in UNITS_NM or "spacing" not in tif.imagej_metadata:
        return None, f"ImageJ metadata without a section distance in a unit of length (unit {unit!r})"
    sizes = [tif.imagej_metadata["spacing"]]
    for name in ("YResolution", "XResolution"):
        tag = tif.pages[0].tags.get(name)
        pixels, per = tag.value if tag else (1, 1)
        sizes.append(per / pixels if pixels else 0)
    if sizes[1:] == [1, 1]:                          # what programs write that know sections only
        return None, "ImageJ metadata without a size of pixels"
    return to_spacing(sizes, unit, "ImageJ voxel size (z, y, x)", digits=6)


def multiscale_spacing(multiscale, level):
    """From a level of an OME-Zarr multiscale: its scale times the common one, in the units of the axes."""
    axes = multiscale.get("axes", [])
    scale = np.ones(3)
    transforms = level.get("coordinateTransformations", []) + multiscale.get("coordinateTransformations", [])
    for transform in transforms:
        if transform.get("type") == "scale":
            scale = scale * np.array(transform["scale"][-3:], np.float64)
    units = [axis.get("unit") if isinstance(axis, dict) else None for axis in axes[-3:]]
    if len(units) < 3 or None in units:
        return to_spacing(scale, None, "scale without a unit")
    if not all(str(unit).lower() in UNITS_NM for unit in units):
        return None, f"units {', '.join(map(str, units))} are no lengths"
    return to_spacing([UNITS_NM[str(unit).lower()] for unit in units] * scale, "nm", "scale in nm")
