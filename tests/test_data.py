"""The data of the experiments: every source, every refusal, the split, and augmentation against its plain form."""

from __future__ import annotations

import contextlib
import importlib
import pickle
import random
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))
pytest.importorskip("tqdm")
Image = pytest.importorskip("PIL.Image")
data = importlib.import_module("cifar10.data")
UserError = importlib.import_module("cifar10.files").UserError


def make_folders(root: Path, per_class: int = 4, splits=("train", "test"), side: int = 32) -> Path:
    """An image-folder tree of two classes; every image has one colour, given by class and number."""
    for split in splits:
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(per_class):
                Image.new("RGB", (side, side), (label * 100, i * 10, 7)).save(root / split / name / f"{i}.png")
    return root


def make_torchvision_root(root: Path) -> Path:
    folder = root / data.TORCHVISION_FOLDER
    folder.mkdir(parents=True)
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        planes = np.arange(2 * 3072, dtype=np.int64).reshape(2, 3072) % 251 + number
        (folder / name).write_bytes(pickle.dumps({"data": planes.astype(np.uint8), "labels": [0, 1]}, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat", "dog"]}))
    return root


@pytest.fixture(scope="module")
def subset():
    return data.load(None)


def test_subset_is_balanced_and_complete(subset):
    assert len(subset.classes) == 10
    assert torch.bincount(subset.train.labels).tolist() == [450] * 10
    assert torch.bincount(subset.val.labels).tolist() == [50] * 10
    assert torch.bincount(subset.test.labels).tolist() == [100] * 10
    assert subset.train.images.shape == (4500, 32, 32, 3)
    assert subset.train.images.dtype == torch.uint8
    assert "4,500 training" in subset.describe()
    assert data.SUBSET.stat().st_size < 2.5e6


def test_validation_images_do_not_depend_on_the_global_seed(subset):
    torch.manual_seed(1234)
    again = data.load(None)
    assert torch.equal(again.val.images, subset.val.images)
    everything = data.load(None, val_fraction=0.0)
    assert len(everything.val) == 0 and len(everything.train) == 5000


def test_limit_keeps_the_first_of_every_class(subset):
    few = data.load(None, limit=20)
    assert torch.bincount(torch.cat([few.train.labels, few.val.labels])).tolist() == [20] * 10
    assert torch.bincount(few.test.labels).tolist() == [20] * 10


def test_what_is_held_out_does_not_depend_on_the_limit(subset):
    """A float network of all images may be the start of a run on some of them: their validation must be new to it."""
    few = data.load(None, limit=20)
    assert len(few.val) == 20
    everything, part = ({tuple(image.flatten()[:400].tolist()) for image in s.val.images} for s in (subset, few))
    assert part < everything


def test_image_folders(tmp_path):
    splits = data.load(make_folders(tmp_path), val_fraction=0.25)
    assert splits.classes == ("cat", "dog")
    assert (len(splits.train), len(splits.val), len(splits.test)) == (6, 2, 8)
    assert splits.test.images[:, 0, 0].tolist() == [[c * 100, i * 10, 7] for c in (0, 1) for i in range(4)]
    assert splits.test.labels.tolist() == [0] * 4 + [1] * 4


def test_torchvision_root_and_its_inner_folder(tmp_path):
    root = make_torchvision_root(tmp_path)
    splits = data.load(root, val_fraction=0.0)
    assert (len(splits.train), len(splits.test), splits.classes) == (10, 2, ("cat", "dog"))
    assert splits.train.images[0, 0, 1].tolist() == [1, (1024 + 1) % 251, (2048 + 1) % 251]
    assert torch.equal(data.load(root / data.TORCHVISION_FOLDER, val_fraction=0.0).test.images, splits.test.images)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    root = make_torchvision_root(tmp_path)
    witness = tmp_path / "witness"

    class Attack:
        def __reduce__(self):
            return Path.touch, (witness,)

    (root / data.TORCHVISION_FOLDER / "test_batch").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(UserError, match="test_batch"):
        data.load(root)
    assert not witness.exists()


@pytest.mark.parametrize("module, name", [
    ("numpy.f2py.__main__", "dtype"), ("numpy.testing", "ndarray"), ("builtins", "eval"), ("numpy", "fromfile"),
])  # fmt: skip
def test_a_pickle_gets_arrays_and_nothing_else(module, name, tmp_path):
    root = make_torchvision_root(tmp_path)
    (root / data.TORCHVISION_FOLDER / "test_batch").write_bytes(f"c{module}\n{name}\n.".encode())
    with pytest.raises(UserError, match=f"it asks for {module}.{name}"):
        data.load(root)
    assert "numpy.f2py.__main__" not in sys.modules


def test_a_damaged_pickle_is_told_as_one(tmp_path):
    root = make_torchvision_root(tmp_path)
    path = root / data.TORCHVISION_FOLDER / "test_batch"
    whole, choose = path.read_bytes(), random.Random(0)
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[choose.randrange(200)] = choose.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(UserError):
            data.load(root)


def _no_test_split(root: Path) -> Path:
    return make_folders(root, splits=("train",))


def _empty_class(root: Path) -> Path:
    make_folders(root)
    for path in (root / "test" / "dog").iterdir():
        path.unlink()
    return root


def _no_classes(root: Path) -> Path:
    for split in ("train", "test"):
        (root / split).mkdir()
    return root


def _other_classes(root: Path) -> Path:
    make_folders(root)
    (root / "test" / "dog").rename(root / "test" / "frog")
    return root


def _damaged(root: Path) -> Path:
    make_folders(root)
    (root / "train" / "cat" / "1.png").write_bytes(b"not a png")
    return root


def _another_kind(root: Path) -> Path:
    make_folders(root)
    Image.new("RGB", (32, 32)).save(root / "train" / "cat" / "1.png", format="EPS")  # Pillow gives it to Ghostscript
    return root


def _bomb(side: int):
    """A small PNG that claims side x side pixels."""

    def make(root: Path) -> Path:
        make_folders(root)
        path = root / "train" / "cat" / "1.png"
        content = bytearray(path.read_bytes())
        content[16:24] = struct.pack(">II", side, side)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        path.write_bytes(content)
        return root

    return make


def _damaged_batch(root: Path) -> Path:
    path = make_torchvision_root(root) / data.TORCHVISION_FOLDER / "data_batch_3"
    path.write_bytes(path.read_bytes()[:100])
    return root


BAD_FOLDERS = {
    "missing": (lambda root: root / "nowhere", "no such folder"),
    "a file": (lambda root: (root / "x").write_text("") and None or root / "x", "not a folder"),
    "empty": (lambda root: root, "empty"),
    "unrelated": (lambda root: (root / "notes").mkdir() or root, "neither CIFAR-10 nor train/"),
    "no test split": (_no_test_split, "has no test/ folder"),
    "no class folders": (_no_classes, "no class folders"),
    "an empty class": (_empty_class, "dog: has no images"),
    "other classes": (_other_classes, "different classes"),
    "a damaged image": (_damaged, "1.png: not an image"),
    "another kind of image": (_another_kind, "1.png: not an image"),
    "a large image": (_bomb(5_000), "1.png: 5000x5000 pixels"),
    "far too large an image": (_bomb(60_000), "1.png: not an image"),
    "another size": (lambda root: make_folders(root, side=16), "16x16 pixels"),
    "a truncated batch": (_damaged_batch, "data_batch_3: missing or damaged"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders_are_named(case, tmp_path):
    make, message = BAD_FOLDERS[case]
    with pytest.raises(UserError, match=message) as error:
        data.load(make(tmp_path))
    assert str(tmp_path) in str(error.value)


def test_batches_are_normalised_and_channels_last(subset):
    batches = data.Batches(subset.val, 64)
    x, y = next(iter(batches))
    expected = subset.val.images[:64].permute(0, 3, 1, 2).double() / 255
    expected = (expected - torch.tensor(data.MEAN).view(3, 1, 1)) / torch.tensor(data.STD).view(3, 1, 1)
    assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x.double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(y, subset.val.labels[:64])
    assert [len(y) for _, y in batches] == [64] * 7 + [52]
    assert next(iter(data.Batches(subset.val, 64, channels_last=False)))[0].is_contiguous()


def test_augmentation_crops_and_flips_each_image_once(subset):
    few = subset.train.at(torch.arange(50))
    batches = data.Batches(few, 16, torch.Generator().manual_seed(3))
    seen = []
    for step, (x, y) in enumerate(batches):
        index, top, left, flip = (drawn[step * 16 : step * 16 + 16] for drawn in batches._drawn)
        seen += index.tolist()
        assert torch.equal(y, few.labels[index])
        for i in range(len(y)):  # the plain form: pad with black, crop, mirror
            padded = torch.zeros(40, 40, 3, dtype=torch.uint8)
            padded[4:36, 4:36] = few.images[index[i]]
            crop = padded[top[i] : top[i] + 32, left[i] : left[i] + 32]
            crop = crop.flip(1) if flip[i] else crop
            assert torch.equal(x[i], batches._normalise(crop[None])[0])
    assert sorted(seen) == list(range(50))
    assert batches._drawn[1].min() == 0 and batches._drawn[1].max() == 8


def test_epochs_differ_and_repeat_with_the_generator(subset):
    def two_epochs():
        batches = data.Batches(subset.val, 500, torch.Generator().manual_seed(5))
        return [next(iter(batches))[0] for _ in range(2)]

    (a, b), (c, d) = two_epochs(), two_epochs()
    assert torch.equal(a, c) and torch.equal(b, d) and not torch.equal(a, b)


def test_a_batch_can_be_made_again(subset):
    batches = data.Batches(subset.val, 100, torch.Generator().manual_seed(5))
    for step, (x, _) in enumerate(batches):
        assert torch.equal(x, batches.batch(step)[0])


def test_make_subset_keeps_the_first_of_each_class():
    make_subset = importlib.import_module("make_subset")
    pack = {"classes": np.array(["cat", "dog"])}
    for split in ("train", "test"):
        pack[f"{split}_labels"] = np.array([1, 0, 1, 0, 0], dtype=np.uint8)
        pack[f"{split}_jpeg"] = np.frombuffer(b"aabcccdef", dtype=np.uint8)
        pack[f"{split}_offsets"] = np.array([0, 2, 3, 6, 7, 9])
    packed = make_subset.subset(pack, {"train": 2, "test": 1})
    assert packed["train_labels"].tolist() == [1, 0, 1, 0]
    assert packed["train_jpeg"].tobytes() == b"aabcccd"
    assert packed["train_offsets"].tolist() == [0, 2, 3, 6, 7]
    assert packed["test_jpeg"].tobytes() == b"aab"
