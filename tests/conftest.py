"""Small pairs of images, studies, volumes, photographs and slices on disk, and the scripts as functions."""

import importlib
import signal
import sys

import h5py
import nibabel
import numpy as np
import pytest
import torch
import torchvision.models
from PIL import Image
from torchvision.models.efficientnet import EfficientNet, MBConvConfig
from torchvision.models.resnet import BasicBlock, ResNet

import constants as C
import models.hvit
import models.vit
from datasets.cache import write_cache
from datasets.demo_em import write_em_demo
from prepare_data import cache_settings
from utils.config import exit_code

torch.set_num_threads(1)          # as in the processes of forks.py: the same results on any machine

INTERRUPTS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)            # what Interrupts answers

# A network of a few million weights on images of 64 pixels: an epoch takes a second or two.
SMALL = ["EFFICIENTNET=b0", "VIT=tiny", "IMG_SIZE=64", "MASK_PATCH_SIZE=32", "BATCH_SIZE=2",
         "UPDATE_EVERY_BATCHES=2", "LONGITUDINAL_MIM_EPOCHS=2", "NUM_WORKERS=0", "TRACKERS=[]",
         "PRECISION=fp32", "SAVE_EVERY_EPOCHS=0", "KEEP_TOP_K=0", "LOG_EVERY_BATCHES=2"]
# A transformer of some ten thousand weights on studies of a hundred tokens.
SMALL_STUDY = ["STUDY_VIT=custom", "STUDY_VIT_DIM=48", "STUDY_VIT_DEPTH=2", "STUDY_VIT_HEADS=2",
               "JEPA_PREDICTOR_DIM=32", "JEPA_PREDICTOR_DEPTH=1", "JEPA_PREDICTOR_HEADS=2", "JEPA_EPOCHS=2",
               "JEPA_BATCH_SIZE=2", "JEPA_UPDATE_EVERY_BATCHES=2", "MIL_EPOCHS=2", "MIL_BATCH_SIZE=4",
               "MIL_UPDATE_EVERY_BATCHES=2", "MIL_ATTENTION_DIM=16", "MIL_MLP_DIMS=[16]",
               "STUDY_VAL_FRACTION=0.3", "STUDY_TEST_FRACTION=0.2", "NUM_WORKERS=0", "TRACKERS=[]",
               "PRECISION=fp32", "SAVE_EVERY_EPOCHS=0", "KEEP_TOP_K=0", "LOG_EVERY_BATCHES=2"]

# A network of some ten thousand weights on crops of 8 x 32 x 32 voxels.
SMALL_VISTA = ["VISTA_ENCODER=segresnet", "VISTA_FEATURES=8", "VISTA_HEAD_WIDTH=8", "VISTA_EMBEDDING=4",
               "VISTA_PATCH_SIZE=[8, 32, 32]", "VISTA_CROPS_PER_EPOCH=8", "VISTA_VAL_CROPS=3",
               "VISTA_VAL_FRACTION=0.3", "VISTA_GAP=2", "VISTA_EPOCHS=2", "VISTA_BATCH_SIZE=2",
               "VISTA_UPDATE_EVERY_BATCHES=2", "NUM_WORKERS=0", "TRACKERS=[]", "PRECISION=fp32",
               "SAVE_EVERY_EPOCHS=0", "KEEP_TOP_K=0", "LOG_EVERY_BATCHES=2"]

# A transformer of some hundred thousand weights, see train_photo, on photographs of 32 x 32 pixels.
SMALL_PHOTO = ["HVIT_MODEL=hvit_tiny", "HVIT_IMG_SIZE=32", "HVIT_DROP_PATH=0.1", "HVIT_VAL_FRACTION=0.25",
               "HVIT_TEST_FRACTION=0.25", "SIMCLR_EPOCHS=2", "SIMCLR_BATCH_SIZE=4",
               "SIMCLR_UPDATE_EVERY_BATCHES=2", "SIMCLR_PROBE_EVERY=1", "HVIT_EPOCHS=2",
               "HVIT_BATCH_SIZE=4", "HVIT_UPDATE_EVERY_BATCHES=2", "NUM_WORKERS=0", "TRACKERS=[]",
               "PRECISION=fp32", "SAVE_EVERY_EPOCHS=0", "KEEP_TOP_K=0", "LOG_EVERY_BATCHES=2"]

# A ResNet of some fifty thousand weights, see train_spine, and a U-Net on it, on slices of 32 x 32 pixels.
SMALL_SPINE = ["SPINE_SIZE=32", "SPINE_FEATURES=4", "SPINE_VAL_FRACTION=0.25", "SPINE_TEST_FRACTION=0.25",
               "SPINE_EPOCHS=2", "SPINE_BATCH_SIZE=4", "SPINE_UPDATE_EVERY_BATCHES=2", "NUM_WORKERS=0",
               "TRACKERS=[]", "PRECISION=fp32", "SAVE_EVERY_EPOCHS=0", "KEEP_TOP_K=0", "LOG_EVERY_BATCHES=2"]


def write_case(folder, seed, size=64):
    """A pair whose current image has one bright or dark disc more; returns the folder."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size] / size
    base = 0.5 + 0.2 * np.sin(6 * rows + seed) * np.cos(5 * columns)
    base += 0.02 * rng.standard_normal((size, size))
    row, column, sign = rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7), rng.choice([-1, 1])
    diff = 0.25 * sign * (np.hypot(rows - row, columns - column) < 0.15)
    folder.mkdir(parents=True)
    for name, image in [("prior", base), ("current", np.clip(base + diff, 0, 1)), ("diff_map", diff)]:
        nibabel.save(nibabel.Nifti1Image(image.T.astype(np.float32), np.diag([-1, -1, 1, 1])),
                     folder / f"{name}.nii.gz")
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Folder with the pairs of 16 patients, one each."""
    root = tmp_path_factory.mktemp("pairs")
    for patient in range(16):
        write_case(root / f"p{patient:02d}_a", seed=patient)
    return root


def grid_coords(size):
    """Index (d, h, w) of every token of a grid of ``size`` tokens, int64 [N, 3], in the order of tokenize."""
    return torch.cartesian_prod(*(torch.arange(int(n)) for n in size))


def write_study(folder, number):
    """A study of two MRI series, every third one of one CT; with a bright ball where its number is odd."""
    rng = np.random.default_rng(number)
    folder.mkdir(parents=True)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (48, 56, 12)), indexing="ij")
    ball = (x ** 2 + (y - 0.2) ** 2 + z ** 2 < 0.2) * (number % 2)
    for name in ("ct",) if number % 3 == 0 else ("t1", "t2"):
        tissue = 40 + 5 * rng.standard_normal(x.shape) + 10 * (name == "t2") + 60 * ball
        values = np.where(y > 0.5, -1000 if name == "ct" else 0, tissue)
        nibabel.save(nibabel.Nifti1Image(values.astype(np.int16), np.diag([2, 2, 4, 1])),
                     folder / f"{name}.nii.gz")


@pytest.fixture(scope="session")
def studies(tmp_path_factory):
    """Folder with raw/<study>, its cache, and labels.csv of ten studies."""
    root = tmp_path_factory.mktemp("studies")
    for number in range(10):
        write_study(root / "raw" / f"s{number}", number)
    rows = [f"s{number},{number % 2},{int(number % 3 == 0)}\n" for number in range(10)]
    (root / "labels.csv").write_text("study_id,ball,ct\n" + "".join(rows))
    write_cache(root / "raw", root / "cache", None, 0, cache_settings())
    return root


def bricks(shape=(40, 48, 52), size=12):
    """(image uint8, ids uint16) of bricks with dark mortar between them, a row of bricks every ``size``."""
    z, y, x = np.indices(shape)
    x = x + size // 2 * (y // size % 2)
    ids = 1 + x // size + 8 * (y // size) + 64 * (z // (2 * size))
    edge = np.minimum(y % size, size - 1 - y % size)
    edge = np.minimum(edge, np.minimum(x % size, size - 1 - x % size))
    noise = np.random.default_rng(0).normal(0, 8, shape)
    return np.clip(60 + 50 * np.minimum(edge, 2) + noise, 0, 255).astype(np.uint8), ids.astype(np.uint16)


@pytest.fixture(scope="session")
def volumes(tmp_path_factory):
    """Folder with one volume in the layout of SNEMI3D, below snemi3d."""
    root = tmp_path_factory.mktemp("volumes")
    (root / "snemi3d").mkdir()
    for name, values in zip(("inputs", "labels"), bricks(), strict=True):
        with h5py.File(root / "snemi3d" / f"toy_{name}.h5", "w") as file:
            file["main"] = values
    return root


@pytest.fixture(scope="session")
def em_demo(tmp_path_factory):
    """Folder with small demonstration volumes in the three layouts."""
    return write_em_demo(tmp_path_factory.mktemp("em"), (24, 64), 0, 0)


def write_photo(path, colour, seed, size=(44, 40)):
    """A photograph with a large disc of a colour on a pattern of its own."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 200, (5, 5, 3), dtype=np.uint8))
    image = np.array(small.resize(size, Image.Resampling.BICUBIC))
    rows, columns = np.mgrid[:size[1], :size[0]]
    image[np.hypot(rows - size[1] / 2, columns - size[0] / 2) < 12] = colour
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, quality=95)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Folder with 10 photographs of each of three classes; the first of each has an augmented copy."""
    root = tmp_path_factory.mktemp("photos")
    for label, (word, colour) in enumerate([("blue", (20, 30, 220)), ("green", (20, 210, 40)),
                                            ("red", (230, 20, 30))]):
        for number in range(10):
            write_photo(root / word / f"{word}_({number}).jpg", colour, 10 * label + number)
        write_photo(root / word / f"{word}_(0)_aug1.jpg", colour, 10 * label)
    return root


def write_spine(root, number):
    """A patient's series of 6 slices, in every second one a bar, with masks of a disc and a spot in it.

    Returns rows of two tables, of the cord's and of the lesion's masks: path, index, label, mask, patient.
    """
    rng = np.random.default_rng(number)
    rows, columns, slices = np.mgrid[:40, :36, :6]
    row, column = rng.uniform(14, 24, 2)
    cord = (np.hypot(rows - row, columns - column) < 8) & (slices > 0)
    lesion = (np.hypot(rows - row, columns - column) < 3) & (slices > 2)
    image = 100 + 10 * rng.standard_normal(cord.shape) + 80 * cord + 60 * lesion
    image[30:34] += 120 * (slices[30:34] % 2)
    for name, values in (("", image), ("_cord", cord), ("_lesion", lesion)):
        nibabel.save(nibabel.Nifti1Image(values.astype(np.int16), np.diag([1, 1, 4, 1])),
                     root / f"c{number}{name}.nii.gz")
    return [[f"c{number}.nii.gz,{index},{('bare', 'barred')[index % 2]},c{number}_{mask}.nii.gz,c{number}\n"
             for index in range(6)] for mask in ("cord", "lesion")]


@pytest.fixture(scope="session")
def spine(tmp_path_factory):
    """Folder with the series of eight patients, cord_masks.csv and lesion_masks.csv.

    By the hashes of their names a quarter is for validation and a quarter for the test.
    """
    root = tmp_path_factory.mktemp("spine")
    tables = zip(*(write_spine(root, number) for number in range(8)), strict=True)
    for name, parts in zip(("cord_masks", "lesion_masks"), tables, strict=True):
        (root / f"{name}.csv").write_text("path,index,label,mask,patient\n" + "".join(sum(parts, [])))
    return root


def narrow_resnet(weights=None):
    """A ResNet like torchvision's, of one narrow block a stage."""
    network = ResNet(BasicBlock, [1, 1, 1, 1])
    network.inplanes = 64
    for number, width in enumerate((8, 16, 32, 64), start=1):
        setattr(network, f"layer{number}", network._make_layer(BasicBlock, width, 1, 1 + (number > 1)))
    network.fc = torch.nn.Linear(64, 10)
    return network


def narrow_efficientnet(weights=None, stochastic_depth_prob=0.0):
    """An EfficientNet like torchvision's, of one narrow block a stage."""
    widths, strides = (8, 8, 8, 16, 16, 24, 24, 32), (1, 2, 2, 2, 1, 2, 1)
    blocks = [MBConvConfig(2, 3, stride, before, after, 1)
              for stride, before, after in zip(strides, widths[:-1], widths[1:], strict=True)]
    return EfficientNet(blocks, 0.0, stochastic_depth_prob)


@pytest.fixture
def narrow_xray(monkeypatch):
    """EFFICIENTNET=b0 and VIT=tiny are some hundred thousand weights, where it matters not what is learnt."""
    monkeypatch.setattr(torchvision.models, "efficientnet_b0", narrow_efficientnet)
    monkeypatch.setitem(models.vit.VIT_SIZES, "tiny", (64, 1, 1))


@pytest.fixture
def script(monkeypatch):
    """Call a script's ``main`` with command-line words; constants.py is as it was afterwards, and signals."""
    before = {name: value for name, value in vars(C).items() if name.isupper()}
    handlers = {number: signal.getsignal(number) for number in INTERRUPTS}
    threads = torch.get_num_threads()

    def call(name, *words):
        vars(C).update(before)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        return importlib.import_module(name).main()

    yield call
    vars(C).update(before)
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)                # a process forked later would not end on SIGTERM


@pytest.fixture
def refused(script, capsys):
    """Run a script that must end with exit code 2 and one line on stderr; returns the line."""
    def call(name, *words):
        assert exit_code(lambda: script(name, *words)) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        lines = [line for line in lines if "%|" not in line]                       # progress bars
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    return call


@pytest.fixture
def train(script, pairs, tmp_path):
    """Train the small network into ``tmp_path/runs/<name>``; returns that folder."""
    def call(name, *overrides, words=()):
        script("longitudinal_MIM_training", "-n", name, "--data", pairs, *words,
               "--set", *SMALL, f"RUNS_DIR={tmp_path / 'runs'}", *overrides)
        return tmp_path / "runs" / name

    return call


@pytest.fixture
def train_study(script, studies, tmp_path):
    """Train a small network on the small studies into ``tmp_path/runs/<name>``; returns that folder."""
    def call(kind, name, *overrides, words=(), labels=True):
        words = [*(("train_pretrain", "--method") if kind == "jepa" else ("train_finetune", "--task")), kind,
                 "-n", name, "--data", studies / "cache", *words]
        labels = [f"STUDY_LABELS={studies / 'labels.csv'}"] if labels else []
        script(*words, "--set", *SMALL_STUDY, *labels, f"RUNS_DIR={tmp_path / 'runs'}", *overrides)
        return tmp_path / "runs" / name

    return call


@pytest.fixture
def train_vista(script, volumes, tmp_path):
    """Train a small network on the small volume into ``tmp_path/runs/<name>``; returns that folder."""
    def call(name, *overrides, words=()):
        script("train_vista3d", "-n", name, "--data", volumes, *words,
               "--set", *SMALL_VISTA, f"RUNS_DIR={tmp_path / 'runs'}", *overrides)
        return tmp_path / "runs" / name

    return call


@pytest.fixture
def train_photo(script, photos, tmp_path, monkeypatch):
    """Train a narrow network on the small photographs into ``tmp_path/runs/<name>``; returns that folder."""
    monkeypatch.setitem(models.hvit.WIDTHS, "tiny", 12)

    def call(kind, name, *overrides, words=()):
        script_of = ("train_pretrain", "--method") if kind == "simclr" else ("train_finetune", "--task")
        script(*script_of, kind, "-n", name, "--data", photos, *words, "--set", *SMALL_PHOTO,
               f"RUNS_DIR={tmp_path / 'runs'}", *overrides)
        return tmp_path / "runs" / name

    return call


@pytest.fixture
def train_spine(script, spine, tmp_path, monkeypatch):
    """Train a narrow network on the small slices into ``tmp_path/runs/<name>``; returns that folder."""
    monkeypatch.setattr(torchvision.models, "resnet18", narrow_resnet)

    def call(kind, name, *overrides, words=(), table="cord_masks"):
        script("train_finetune", "--task", kind, "-n", name, "--data", spine / f"{table}.csv", *words,
               "--set", *SMALL_SPINE, f"RUNS_DIR={tmp_path / 'runs'}", *overrides)
        return tmp_path / "runs" / name

    return call
