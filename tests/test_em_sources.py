"""What lies in a folder of electron microscopy, and which sections of it are for training."""

import json
import os
from itertools import combinations
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import tifffile

from datasets.em_labels import CLASSES
from datasets.em_sources import check_apart, cut, find_sources, notes_on
from utils.config import BadFile, UserError

REAL = Path(__file__).parents[2] / "shared/data/em"
SHAPE = (20, 6, 8)
SPACING = np.array([40.0, 4.0, 4.0])


def write_h5(path, arrays, **attributes):
    """An HDF5 file of {key: array}; attributes: {key's last word: {name: value}}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file[key] = array
            file[key].attrs.update(attributes.get(key.split("/")[-1], {}))
    return path


def volume(seed=0, shape=SHAPE, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, 200, shape).astype(dtype)


def write_snemi(folder, *names, shape=SHAPE):
    for seed, name in enumerate(names):
        write_h5(folder / f"{name}_inputs.h5", {"main": volume(seed, shape)})
        write_h5(folder / f"{name}_labels.h5", {"main": volume(seed + 9, shape, np.uint16)})


def write_cremi(path, shape=SHAPE, **attributes):
    return write_h5(path, {"volumes/raw": volume(shape=shape),
                           "volumes/labels/neuron_ids": volume(1, SHAPE, np.uint64),
                           "volumes/labels/clefts": volume(2, SHAPE, np.uint64)}, **attributes)


def write_nifti(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(array.T), np.eye(4)), path)


def write_table(folder, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "volumes.csv").write_text(text)
    return folder


def places(sources):
    return [(source.name, source.split, source.sections) for source in sources]


def find(data, *words, val=0.2, test=0.0, gap=2):
    return find_sources(data, words, val, test, gap)


# ------------------------------------------------------------------------------------------------- the cut

def test_parts_of_a_volume_are_disjoint_and_a_gap_apart():
    """Neighbouring sections show the same neurites: without a gap validation would measure memory."""
    rng = np.random.default_rng(0)
    for _ in range(500):
        depth, gap, val, test = rng.integers(1, 200), rng.integers(0, 12), *rng.uniform(0, 0.5, 2)
        val, test = val * (rng.random() < 0.7), test * (rng.random() < 0.7)
        wanted = ["train"] + [split for split, fraction in (("val", val), ("test", test)) if fraction > 0]
        try:
            parts = cut(depth, val, test, gap)
        except UserError as error:
            assert all(f"VISTA_{name}" in str(error) for name in ("GAP", "VAL_FRACTION", "TEST_FRACTION"))
            assert depth - gap * (len(wanted) - 1) < 3 + 2 / (1 - val - test)
            continue
        assert list(parts) == wanted
        ends = [0, *(end for part in parts.values() for end in part)]
        assert ends[1] == 0 and ends[-1] == depth and all(first < end for first, end in parts.values())
        assert all(ends[i + 1] - ends[i] == gap for i in range(2, len(ends) - 1, 2))
        left = depth - gap * (len(wanted) - 1)
        for split, fraction in (("val", val), ("test", test)):
            if split in parts:
                assert abs(parts[split][1] - parts[split][0] - max(1, fraction * left)) <= 0.5


def test_no_section_is_shared_or_near_over_any_table(tmp_path):
    """A second row, a link or another name of a file must not carry validation sections into training."""
    files = [write_h5(tmp_path / f"{name}.h5", {"main": volume(i)}) for i, name in enumerate("ab")]
    (tmp_path / "soft.h5").symlink_to(files[0])
    os.link(files[1], tmp_path / "hard.h5")
    (tmp_path / "folder").symlink_to(tmp_path)
    file_of = {"a.h5": 0, "soft.h5": 0, "folder/a.h5": 0, "b.h5": 1, "hard.h5": 1}
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(30):
        rows, seen, gap = [], [], int(rng.integers(0, 4))
        for number in range(rng.integers(2, 4)):
            name, split = rng.choice(list(file_of)), rng.choice(["train", "val", "test"])
            first, end = np.sort(rng.choice(SHAPE[0] + 1, 2, replace=False))
            rows.append(f"v{number},{name},{name}:main,{split},{first}:{end},40x4x4")
            seen += [(file_of[name], split, z) for z in range(first, end)]
        write_table(tmp_path, "volume,raw,neuron,split,sections,spacing_nm\n" + "\n".join(rows))
        near = any(one[0] == other[0] and one[1] != other[1] and abs(one[2] - other[2]) <= gap
                   for one, other in combinations(seen, 2))
        refused += near
        if near:
            with pytest.raises(UserError, match="VISTA_GAP"):
                find(tmp_path, gap=gap)
        else:
            assert len(find(tmp_path, gap=gap)) == len(rows)
    assert 5 < refused < 25


def test_labels_shared_by_two_images_count_as_one_block(tmp_path):
    """The same block stored twice with other grey values is still the same block."""
    for name in ("one", "two"):
        write_h5(tmp_path / f"{name}.h5", {"main": volume()})
    write_h5(tmp_path / "ids.h5", {"main": volume(3)})
    write_table(tmp_path, "volume,raw,neuron,split,spacing_nm\n"
                "a,one.h5,ids.h5,train,40x4x4\nb,two.h5,ids.h5,val,40x4x4\n")
    with pytest.raises(UserError, match="VISTA_GAP"):
        find(tmp_path)


@pytest.mark.parametrize("val, test, gap", [(-0.1, 0, 1), (0.5, 0.5, 1), (0.1, 0.1, -1)])
def test_fractions_that_make_no_sense_are_refused(tmp_path, val, test, gap):
    """Before anything is read."""
    with pytest.raises(UserError, match="VISTA_VAL_FRACTION"):
        find(tmp_path, "snemi3d", val=val, test=test, gap=gap)


# ------------------------------------------------------------------------------------------------- SNEMI3D

def test_snemi3d_trains_on_one_block_and_validates_on_the_other(tmp_path):
    """The public original let train and validation share all of AC4."""
    write_snemi(tmp_path / "snemi3d", "AC3", "AC4")
    (tmp_path / "snemi3d/test_inputs.h5").touch()                        # no labels: not opened
    sources = find(tmp_path, "snemi3d")
    assert places(sources) == [("AC3", "val", (0, 20)), ("AC4", "train", (0, 20))]
    assert {source.split: Path(source.raw.path).name for source in sources} == {
        "val": "AC3_inputs.h5", "train": "AC4_inputs.h5"}
    assert sources[0].spacing_nm == (30.0, 6.0, 6.0) and list(sources[0].labels) == ["neuron"]


def test_a_block_alone_is_cut_by_sections(tmp_path):
    """The guide's listing shows AC3 alone: then it must hold both splits, with the gap."""
    write_snemi(tmp_path / "snemi3d", "AC3")
    assert places(find(tmp_path, "snemi3d")) == [("AC3", "train", (0, 14)), ("AC3", "val", (16, 20))]
    assert places(find(tmp_path, "snemi3d", test=0.2)) == [
        ("AC3", "train", (0, 10)), ("AC3", "val", (12, 15)), ("AC3", "test", (17, 20))]
    with pytest.raises(UserError, match="VISTA_GAP"):
        find(tmp_path, "snemi3d", gap=19)


def test_tiff_pairs_are_read_and_the_spacing_of_the_file_goes_first(tmp_path):
    """The default holds for the challenge's files only."""
    folder = tmp_path / "snemi3d"
    folder.mkdir()
    tifffile.imwrite(folder / "x_inputs.tif", volume())
    write_h5(folder / "x_labels.h5", {"main": volume(1)}, main={"resolution": [20.0, 5.0, 5.0]})
    assert find(tmp_path, "snemi3d")[0].spacing_nm == (20.0, 5.0, 5.0)
    tifffile.imwrite(folder / "x_labels.tif", volume())
    with pytest.raises(BadFile, match="keep one"):
        find(tmp_path, "snemi3d")


def test_raw_and_labels_of_different_shape_are_refused(tmp_path):
    """A crop would take labels from elsewhere."""
    write_snemi(tmp_path / "snemi3d", "a")
    path = write_h5(tmp_path / "snemi3d/a_labels.h5", {"main": volume(shape=(20, 6, 7))})
    with pytest.raises(BadFile, match=f"^{path}.*a_inputs.h5"):
        find(tmp_path, "snemi3d")


def test_a_folder_may_be_the_data_set_itself(tmp_path):
    """--data data/snemi3d is what people type."""
    write_snemi(tmp_path / "snemi3d", "a")
    write_snemi(tmp_path / "mine", "a")
    assert len(find(tmp_path / "snemi3d", "snemi3d")) == len(find(tmp_path / "mine", "snemi3d")) == 2
    with pytest.raises(UserError, match="cremi3d: no such folder"):
        find(tmp_path, "snemi3d", "cremi3d")
    with pytest.raises(UserError, match="none of snemi3d, cremi3d, mitoem2"):
        find(tmp_path, "snemi")
    with pytest.raises(UserError, match="expected Dataset"):
        find(tmp_path / "mine", "mitoem2")


def test_the_data_sets_that_lie_there_are_named_with_the_word_that_takes_them(tmp_path):
    """Who has CREMI files alone meets the default, snemi3d."""
    write_cremi(tmp_path / "cremi3d/sample_A_20160501.hdf")
    for data in (tmp_path, tmp_path / "cremi3d"):
        with pytest.raises(UserError, match=r"snemi3d.* here is cremi3d: --set 'VISTA_DATASETS=..cremi3d..'"):
            find(data, "snemi3d")
    with pytest.raises(UserError, match=r"snemi3d: no such folder.* here is cremi3d: --set"):
        find(tmp_path, "snemi3d", "cremi3d")
    assert [source.name for source in find(tmp_path, "cremi3d")] == ["sample_A_20160501"] * 2
    write_snemi(tmp_path / "mine", "a")
    with pytest.raises(UserError, match="labelsTr, or human and rat with im and mito$"):
        find(tmp_path / "mine", "mitoem2")


def test_a_voxel_size_that_no_file_tells_is_said_once_for_a_data_set(tmp_path):
    """It may be wrong, and weights of boundaries and growing go by it."""
    write_snemi(tmp_path / "snemi3d", "a", "b")
    write_cremi(tmp_path / "cremi3d/told.hdf", raw={"resolution": SPACING})
    assert notes_on(find(tmp_path, "snemi3d", "cremi3d"), 1) == [
        "snemi3d: voxels of 30 x 6 x 6 nm assumed: the files do not tell"]
    write_cremi(tmp_path / "cremi3d/silent.hdf")
    write_nnunet(tmp_path / "mitoem2/Dataset001_x", volume() % 3)
    assert [note.split(":")[0] for note in notes_on(find(tmp_path, "cremi3d", "mitoem2"), 1)] == [
        "cremi3d", "mitoem2"]
    write_table(tmp_path, "volume,raw,neuron,spacing_nm\na,snemi3d/a_inputs.h5,snemi3d/a_labels.h5,40x4x4")
    assert notes_on(find(tmp_path), 1) == []                                       # said by the user


def test_crops_deeper_than_the_volumes_are_said(tmp_path):
    """Most of such a crop is mirrored: less is seen than its size tells."""
    write_cremi(tmp_path / "cremi3d/a.hdf", raw={"resolution": SPACING})
    sources = find(tmp_path, "cremi3d")
    assert notes_on(sources, 4) == []
    assert notes_on(sources, 5) == [
        "val: 4 sections, crops are 5 deep: the rest is mirrored and does not count"]
    write_cremi(tmp_path / "cremi3d/b.hdf", raw={"resolution": SPACING})
    train, val = notes_on(find(tmp_path, "cremi3d"), 32)
    assert train.startswith("train: 14 sections in the shallowest of 2 volumes, crops are 32 deep")
    assert val.startswith("val: 4 sections in the shallowest of 2 volumes, ")


# --------------------------------------------------------------------------------------------------- CREMI

def test_cremi_validation_and_test_are_different_sections_of_each_volume(tmp_path):
    """The original's were the same slices, of two volumes glued together."""
    for name in "AB":
        write_cremi(tmp_path / f"cremi3d/sample{name}.hdf")
    write_h5(tmp_path / "cremi3d/sampleA+.hdf", {"volumes/raw": volume()})               # no labels: left out
    sources = find(tmp_path, "cremi3d", test=0.2)
    check_apart(sources, 2)
    assert places(sources) == [(f"sample{name}", *part) for name in "AB" for part in (
        ("train", (0, 10)), ("val", (12, 15)), ("test", (17, 20)))]
    assert list(sources[0].labels) == ["neuron", "cleft"] and sources[0].spacing_nm == (40.0, 4.0, 4.0)


def test_cremi_labels_that_cover_a_box_keep_their_place(tmp_path):
    """The padded files have raw around the labels: voxel (0, 0, 0) of the two is not the same place."""
    labels = {"resolution": SPACING, "offset": SPACING * [3, 2, 1]}
    path = write_cremi(tmp_path / "cremi3d/a.hdf", (26, 10, 12), raw={"resolution": SPACING},
                       neuron_ids=labels, clefts=labels)
    source = find(tmp_path, "cremi3d", val=0)[0]
    with h5py.File(path) as file:
        inner = file["volumes/raw"][3:23, 2:8, 1:9]
    assert source.raw.shape == SHAPE and source.sections == (0, 20)
    np.testing.assert_array_equal(source.raw[0:20, 0:6, 0:8], inner)
    np.testing.assert_array_equal(source.raw[5:9, 1:3, 2:8], inner[5:9, 1:3, 2:8])
    np.testing.assert_array_equal(source.raw[-1], inner[-1])
    np.testing.assert_array_equal(source.raw[15:99, :, 3], inner[15:, :, 3])


@pytest.mark.parametrize("offset, message", [
    ([130.0, 0, 0], "between voxels"), ([400.0, 0, 0], "reach beyond"), ([-40.0, 0, 0], "reach beyond"),
    ([1.0], "three numbers")])
def test_cremi_labels_that_lie_elsewhere_are_refused(tmp_path, offset, message):
    """Shifted labels teach the wrong thing and look fine."""
    labels = {"resolution": SPACING, "offset": offset}
    write_cremi(tmp_path / "cremi3d/a.hdf", (26, 10, 12), raw={"resolution": SPACING},
                neuron_ids=labels, clefts=labels)
    with pytest.raises(BadFile, match=message):
        find(tmp_path, "cremi3d")
    write_cremi(tmp_path / "cremi3d/a.hdf", neuron_ids={"offset": [40.0, 0, 0]})
    with pytest.raises(BadFile, match="different parts"):
        find(tmp_path, "cremi3d")


def test_a_padded_file_is_compared_by_sections_of_the_file(tmp_path):
    """Section 0 of its labels is section 3 of the image that a table may name too."""
    labels = {"resolution": SPACING, "offset": SPACING * [3, 2, 1]}
    write_cremi(tmp_path / "cremi3d/a.hdf", (26, 10, 12), raw={"resolution": SPACING},
                neuron_ids=labels, clefts=labels)
    write_h5(tmp_path / "ids.h5", {"main": volume(shape=(26, 10, 12))})
    write_table(tmp_path / "t", "volume,raw,neuron,split,sections\na,../cremi3d/a.hdf:volumes/raw,../ids.h5,"
                "val,0:2\n")
    sources = find(tmp_path, "cremi3d", val=0) + find(tmp_path / "t")
    check_apart(sources, 1)                                                        # 0:2 and 3:23
    with pytest.raises(UserError):
        check_apart(sources, 2)


# ------------------------------------------------------------------------------------------------- MitoEM2

def write_nnunet(folder, labels, cases=("c1",), text=None):
    for case in cases:
        write_nifti(folder / f"imagesTr/{case}_0000.nii.gz", volume())
        write_nifti(folder / f"labelsTr/{case}.nii.gz", labels)
    write_nifti(folder / "imagesTs/hidden_0000.nii.gz", volume())
    if text is not None:
        (folder / "dataset.json").write_text(text if isinstance(text, str) else json.dumps({"labels": text}))


@pytest.mark.parametrize("labels, codes", [
    ({"background": 0, "mito": 1, "boundary": 2}, {"mitochondrion": 1, "boundary": 2}),
    ({"0": "background", "2": "Mitochondria", "1": "mito_boundary"}, {"mitochondrion": 2, "boundary": 1}),
    ({"background": 0, "mitochondrion": 1, "ignore": 2}, {"mitochondrion": 1, "ignore": 2})])
def test_mitoem2_labels_are_what_dataset_json_names(tmp_path, labels, codes):
    """Both versions of the format, whatever the order of its codes."""
    write_nnunet(tmp_path / "mitoem2/Dataset001_ME2-Beta", volume() % 3, ("c1", "c2"), labels)
    sources = find(tmp_path, "mitoem2", val=0)
    assert [source.name for source in sources] == ["Dataset001_ME2-Beta/c1", "Dataset001_ME2-Beta/c2"]
    assert sources[0].codes == codes and sources[0].spacing_nm == (30.0, 8.0, 8.0)
    assert set(sources[0].labels) == set(codes) - {"ignore"}


@pytest.mark.parametrize("text", [{"background": 0, "nucleus": 1}, {"background": 0, "mito": [1, 2]},
                                  {"background": 0, "mito": 1, "mitochondria": 2},
                                  {"background": 1, "mito": 0}, {"background": 0, "boundary": 1},
                                  "{", "[]", "{}", '{"labels": 3}'])
def test_other_names_in_dataset_json_are_refused(tmp_path, text):
    """A nucleus must not be taken for a mitochondrion because its code is 1."""
    write_nnunet(tmp_path / "mitoem2/Dataset001_x", volume() % 2, text=text)
    with pytest.raises(BadFile, match="^.*dataset.json: "):
        find(tmp_path, "mitoem2")


def test_mitoem2_stacks_and_folders_of_people_are_found(tmp_path):
    """The guide's tree: human/ and rat/."""
    for z, section in enumerate(volume() % 3):
        for kind, image in (("im", volume()[z]), ("mito", section)):
            folder = tmp_path / "mitoem2/human" / kind
            folder.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(folder / f"{kind}{z}.tif", image)
    write_nnunet(tmp_path / "mitoem2/rat", np.minimum(volume(), 7))
    human, rat = find(tmp_path, "mitoem2", val=0)
    assert (human.name, human.codes) == ("human", {"mitochondrion": 1, "boundary": 2})
    np.testing.assert_array_equal(human.labels["mitochondrion"][0:20, 0:6, 0:8], volume() % 3)
    assert (rat.name, rat.codes, list(rat.labels)) == ("rat/c1", {}, ["mitochondrion"])      # ids


def test_an_image_without_labels_is_named(tmp_path):
    """In imagesTr it is a mistake: half a download."""
    write_nnunet(tmp_path / "mitoem2/Dataset001_x", volume() % 3)
    (tmp_path / "mitoem2/Dataset001_x/labelsTr/c1.nii.gz").unlink()
    with pytest.raises(BadFile, match="c1_0000.nii.gz: has no labels"):
        find(tmp_path, "mitoem2")


# --------------------------------------------------------------------------------------------------- table

@pytest.fixture
def mine(tmp_path):
    write_h5(tmp_path / "em.h5", {"raw": volume(), "ids": volume(1), "mito": volume(2), "more": volume(4),
                                 "wide": volume(3, (20, 6, 9))})
    write_h5(tmp_path / "sized.h5", {"main": volume()}, main={"resolution_nm_zyx": [50, 4.6, 4.6]})
    return tmp_path


def test_a_table_says_it_all(mine):
    """Each column has an effect."""
    write_table(mine, "volume,raw,neuron,mitochondrion,dataset,split,sections,spacing_nm,zero,complete\n"
                "v,em.h5:raw,em.h5:ids,em.h5:mito,fly,test,3:9,50x4x5,ignore,neuron cleft\n"
                "w,sized.h5,,em.h5:more,,,5:20,,,\n")
    v, *w = find(mine, "snemi3d")
    assert (v.name, v.dataset, v.split, v.sections) == ("v", "fly", "test", (3, 9))
    assert (v.spacing_nm, v.zero, v.complete) == ((50.0, 4.0, 5.0), "ignore", {"neuron", "cleft"})
    assert list(v.labels) == ["neuron", "mitochondrion"]
    assert places(w) == [("w", "train", (5, 15)), ("w", "val", (17, 20))]
    assert (w[0].dataset, w[0].spacing_nm, w[0].complete) == ("table", (50.0, 4.6, 4.6), {"mitochondrion"})
    assert len(find(mine / "volumes.csv")) == 3


@pytest.mark.parametrize("row, message", [
    (",em.h5:raw,em.h5:ids,,,40x4x4,", "must not be empty"),
    ("v,em.h5:raw,,,,40x4x4,", "has no labels"),
    ("v,em.h5:raw,em.h5:nothing,,,40x4x4,", "nothing.*ids"),
    ("v,absent.h5,em.h5:ids,,,40x4x4,", "absent.h5"),
    ("v,em.h5:raw,em.h5:wide,,,40x4x4,", "20 x 6 x 9"),
    ("v,em.h5:raw,em.h5:ids,valid,,40x4x4,", 'split "valid"'),
    ("v,em.h5:raw,em.h5:ids,,0:21,40x4x4,", "20 sections"),
    ("v,em.h5:raw,em.h5:ids,,5:5,40x4x4,", "20 sections"),
    ("v,em.h5:raw,em.h5:ids,,all,40x4x4,", "20 sections"),
    ("v,em.h5:raw,em.h5:ids,,,,", "spacing_nm"),
    ("v,em.h5:raw,em.h5:ids,,,40x4,", "spacing_nm"),
    ("v,em.h5:raw,em.h5:ids,,,40x4x0,", "spacing_nm"),
    ("v,sized.h5,em.h5:ids,,,40x4x4,", "contradicts"),
    ("v,em.h5:raw,em.h5:ids,,,40x4x4,membrane", 'zero "membrane"')])
def test_a_wrong_row_is_named_by_its_line(mine, row, message):
    """In a table of fifty volumes the line is what one needs."""
    write_table(mine, "volume,raw,neuron,split,sections,spacing_nm,zero\n"
                f"good,sized.h5,em.h5:ids,train,0:10,,\n{row}\n")
    with pytest.raises(UserError, match=message) as error:
        find(mine)
    assert "volumes.csv, line 3" in str(error.value) and "\n" not in str(error.value)


def test_unknown_columns_and_empty_tables_are_refused(mine):
    """A misspelt column would be a setting that does nothing."""
    write_table(mine, "volume,raw,neurons\nv,em.h5:raw,em.h5:ids\n")
    with pytest.raises(UserError, match='"neurons".*did you mean neuron'):
        find(mine)
    write_table(mine, "volume,raw,neuron\n")
    with pytest.raises(UserError, match="no volumes"):
        find(mine)


def test_what_a_label_may_mean_follows_from_what_is_annotated(mine):
    """Where clefts are not annotated a background voxel may be one; where all is, it is background."""
    write_table(mine, "volume,raw,neuron,mitochondrion,spacing_nm,zero,complete,split\n"
                "a,em.h5:raw,em.h5:ids,,40x4x4,,,train\nb,em.h5:raw,,em.h5:mito,40x4x4,,,train\n"
                "c,em.h5:raw,em.h5:ids,,40x4x4,,neuron cleft mitochondrion boundary,train\n"
                "d,em.h5:raw,em.h5:ids,,40x4x4,boundary,,train\n")
    may_be = [{t: {c for c in CLASSES if source.meaning[CLASSES.index(t), CLASSES.index(c)]} for t in CLASSES}
              for source in find(mine)]
    assert may_be[0]["neuron"] == {"neuron", "mitochondrion"}
    assert may_be[0]["background"] == {"background", "cleft"}
    assert may_be[0]["boundary"] == {"boundary", "cleft"}
    assert may_be[1]["background"] == set(CLASSES) - {"mitochondrion"}
    assert may_be[1]["mitochondrion"] == {"mitochondrion"}
    assert all(may_be[2][word] == {word} for word in CLASSES)
    assert find(mine)[3].complete == {"neuron", "boundary"}


# ---------------------------------------------------------------------------------------------- real files

@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL} is not there")
def test_published_volumes_are_found(tmp_path):
    """As they lie in their archives."""
    (tmp_path / "snemi3d").symlink_to(REAL / "fib25_sample2")
    (tmp_path / "cremi3d").symlink_to(REAL / "gala_crop")
    sources = find(tmp_path, "snemi3d", "cremi3d", gap=8)
    assert places(sources) == [("fib25", "train", (0, 114)), ("fib25", "val", (122, 150)),
                               ("gala_train", "train", (0, 34)), ("gala_train", "val", (42, 50))]
    assert all(source.spacing_nm == (10.0, 10.0, 10.0) for source in sources)
    vnc = REAL / "vnc_sstem/vnc_stack1.h5"
    write_table(tmp_path / "t", "volume,raw,neuron,mitochondrion,boundary,spacing_nm,zero\n"
                f"vnc,{vnc}:raw,,{vnc}:mito_instances,{vnc}:membranes,,\n"
                f"isbi,{REAL}/isbi2012_png/image,{REAL}/isbi2012_png/label,,,50x4x4,boundary\n")
    vnc, isbi = find(tmp_path / "t", val=0)
    assert vnc.raw.shape == (20, 640, 576) and vnc.spacing_nm == (50.0, 4.6, 4.6)
    assert isbi.raw.shape == (20, 512, 512) and isbi.complete == {"neuron", "boundary"}
    assert [vnc.meaning.sum(), isbi.meaning.sum()] == [6, 6]
