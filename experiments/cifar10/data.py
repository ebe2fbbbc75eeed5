"""CIFAR images decoded once to uint8 on the training device; augmentation and normalisation there, in batches.

Sources: the torchvision root of CIFAR-10, any image-folder tree with train/ and test/, or the packed subset that
comes with the repository. Images lie as [N, 32, 32, 3], so that a batch, permuted, is channels_last for nothing.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from . import processes
from .files import UserError

SUBSET = Path(__file__).with_name("subset.npz")
SIDE = 32
PAD = 4  # pixels of black around a training image before it is cropped at random
# Mean and standard deviation of CIFAR-10's training pixels, per channel, on the scale 0 to 1.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
VAL_SEED = 20_240_229  # the held-out images are the same whatever --seed is, so that runs can be compared
TORCHVISION_FOLDER = "cifar-10-batches-py"
Keep = Callable[[str, Tensor], Tensor]  # ("train" or "test", labels [N]) -> indices of the images to read
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")  # whatever the suffix: of others, Pillow hands some to other programs
REMEDY = (
    f"expected a folder that holds {TORCHVISION_FOLDER}/ (--download fetches it) or train/ and test/ with one folder "
    "per class; leave --data out to use the images that come with the repository"
)


class ImageSet(NamedTuple):
    """images: uint8 [N, 32, 32, 3]; labels: int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, index: Tensor) -> ImageSet:
        return ImageSet(self.images[index], self.labels[index])

    def to(self, device: torch.device) -> ImageSet:
        return ImageSet(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Splits:
    """Disjoint sets: weights are trained on ``train``, epochs chosen on ``val``, ``test`` is read once, at the end."""

    train: ImageSet
    val: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    source: str

    @property
    def sizes(self) -> dict[str, int]:
        """How many images each set has."""
        return {"train": len(self.train), "val": len(self.val), "test": len(self.test)}

    def describe(self) -> str:
        sizes = f"{len(self.train):,} training, {len(self.val):,} validation and {len(self.test):,} test images"
        return f"data: {self.source}; {sizes} in {len(self.classes)} classes"


def load(
    data: Path | None,
    *,
    download: bool = False,
    val_fraction: float = 0.1,
    limit: int | None = None,
    quiet: bool = False,
) -> Splits:
    """Decode all images, on the CPU.

    Args:
        data: a torchvision root or an image-folder tree; None for the packed subset.
        download: fetch CIFAR-10 into ``data`` with torchvision first.
        val_fraction: share of every class that is held out of the training set for validation; may be 0.
        limit: keep only so many images of every class, in both splits. What is held out does not depend on it: no
            image trains one run and validates another.
        quiet: no progress bar.

    Raises:
        UserError: naming the folder or file and the remedy.
    """
    if download:
        _download(data)
    held_out = []  # a mask over the kept training images

    def keep(split: str, labels: Tensor) -> Tensor:
        """Which images to decode: indices, ascending."""
        if split == "test":
            return _first_per_class(labels, limit)
        mask = _stratified(labels, val_fraction)
        kept = torch.arange(len(labels))
        if limit is not None:
            held = round(val_fraction * limit)
            parts = (mask, held), (~mask, limit - held)
            kept = torch.cat([kept[part][_first_per_class(labels[part], n)] for part, n in parts]).sort().values
        held_out.append(mask[kept])
        return kept

    if data is None:
        train, test, classes = _read_pack(SUBSET, keep)
        source = "the subset of CIFAR-10 that comes with the repository (for the whole: --download, or --data DIR)"
    else:
        read, folder = recognise(data)
        train, test, classes = read(folder, keep, quiet)
        source = str(folder)
    held_out = torch.cat(held_out)
    return Splits(train.at(~held_out), train.at(held_out), test, classes, source)


def recognise(data: Path) -> tuple[Callable, Path]:
    """How ``data`` is read, and its folder.

    Raises:
        UserError: where it is neither a folder of images nor torchvision's.
    """
    if not data.is_dir():
        raise UserError(f"--data {data}: {'not a folder' if data.exists() else 'no such folder'}; {REMEDY}")
    if data.name == TORCHVISION_FOLDER:
        return _read_torchvision, data
    if (data / TORCHVISION_FOLDER).is_dir():
        return _read_torchvision, data / TORCHVISION_FOLDER
    missing = [split for split in ("train", "test") if not (data / split).is_dir()]
    if missing == ["train", "test"]:
        raise UserError(f"--data {data}: {'neither CIFAR-10 nor train/' if any(data.iterdir()) else 'empty'}; {REMEDY}")
    if missing:
        raise UserError(f"--data {data}: has no {missing[0]}/ folder; {REMEDY}")
    return _read_folders, data


def _download(data: Path | None) -> None:
    try:  # torchvision is needed here alone, and not every torch has a matching one
        from torchvision.datasets import CIFAR10

        CIFAR10(str(data), download=True)
    except (ImportError, RuntimeError, OSError) as error:
        raise UserError(
            f"--download to {data} failed: {error}; fetch and unpack cifar-10-python.tar.gz there yourself"
        ) from error


def _read_pack(path: Path, keep: Keep) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
    """The packed subset: JPEG files end to end, with their offsets (make_subset.py writes it)."""
    if not path.is_file():
        raise UserError(f"{path} is missing: restore it with git, or make it again with experiments/make_subset.py")
    with np.load(path, allow_pickle=False) as file:
        pack = dict(file)

    def split(name: str) -> ImageSet:
        jpeg, offsets = pack[f"{name}_jpeg"].tobytes(), pack[f"{name}_offsets"]
        labels = torch.from_numpy(pack[f"{name}_labels"].astype(np.int64))
        kept = keep(name, labels)
        images = [_decode(io.BytesIO(jpeg[offsets[i] : offsets[i + 1]]), path) for i in kept.tolist()]
        return ImageSet(torch.from_numpy(np.stack(images)), labels[kept])

    return split("train"), split("test"), tuple(map(str, pack["classes"]))


def _decode(file: io.BytesIO | Path, name: Path) -> np.ndarray:
    """One image as uint8 [32, 32, 3]; its kind and size are looked at before it is decoded."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            if image.size != (SIDE, SIDE):
                width, height = image.size
                expected = f"{SIDE}x{SIDE}: resize the images first"
                raise UserError(f"{name}: {width}x{height} pixels; the models take {expected}")
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{name}: not an image that can be read ({error}); remove it or restore it") from error


def _read_folders(root: Path, keep: Keep, quiet: bool) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
    files = {split: _list_images(root / split) for split in ("train", "test")}
    classes = tuple(files["train"])
    if classes != tuple(files["test"]):
        differing = sorted(set(classes) ^ set(files["test"]))
        raise UserError(f"--data {root}: train/ and test/ have different classes ({', '.join(differing[:5])})")
    sets = []
    for split, by_class in files.items():
        paths = [(path, label) for label, name in enumerate(classes) for path in by_class[name]]
        labels = torch.tensor([label for _, label in paths])
        kept = keep(split, labels)
        chosen = [paths[i] for i in kept.tolist()]
        bar = tqdm(chosen, desc=f"decoding {split}", unit="img", disable=True if quiet else None, leave=False)
        images = torch.from_numpy(np.stack([_decode(path, path) for path, _ in bar]))
        sets.append(ImageSet(images, labels[kept]))
    return sets[0], sets[1], classes


def _list_images(folder: Path) -> dict[str, list[Path]]:
    """Class name -> its image files, both in sorted order."""
    found = {
        sub.name: sorted(path for path in sub.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        for sub in sorted(folder.iterdir())
        if sub.is_dir()
    }
    if not found:
        raise UserError(f"{folder}: has no class folders; {REMEDY}")
    for name, paths in found.items():
        if not paths:
            raise UserError(f"{folder / name}: has no images ({', '.join(sorted(IMAGE_SUFFIXES))}); {REMEDY}")
    return found


class _ArrayUnpickler(pickle.Unpickler):
    """Reads the pickles of NumPy arrays that CIFAR-10 is published as, and can build nothing else."""

    # By module, too: importing some of NumPy's runs a program.
    _ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str):
        if (module, name) in self._ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR-10 file does")


def _read_torchvision(root: Path, keep: Keep, quiet: bool) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
    def read(name: str) -> dict:
        path = root / name
        try:
            with path.open("rb") as file:
                return _ArrayUnpickler(file, encoding="latin1").load()
        except Exception as error:  # a pickle that is not CIFAR-10's can end in any of them
            raise UserError(f"{path}: missing or damaged ({error}); fetch it again with --download") from error

    def split(which: str, names: list[str]) -> ImageSet:
        batches = [read(name) for name in names]
        try:
            planes = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, SIDE, SIDE)
            labels = torch.tensor([label for batch in batches for label in batch["labels"]])
            if planes.dtype != np.uint8 or labels.dtype != torch.int64 or labels.shape != planes.shape[:1]:
                raise ValueError(f"{planes.dtype} {planes.shape} with {labels.dtype} {tuple(labels.shape)}")
        except (KeyError, ValueError, TypeError, IndexError, RuntimeError, OverflowError) as error:
            raise UserError(f"{root}: not CIFAR-10's own files ({error}); fetch them with --download") from error
        images = torch.from_numpy(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)))
        return ImageSet(images, labels).at(keep(which, labels))

    meta = read("batches.meta")
    if not isinstance(meta, dict) or not isinstance(meta.get("label_names"), list):
        raise UserError(f"{root / 'batches.meta'}: holds no label_names; fetch it again with --download")
    classes = tuple(map(str, meta["label_names"]))
    return split("train", [f"data_batch_{i}" for i in range(1, 6)]), split("test", ["test_batch"]), classes


def _first_per_class(labels: Tensor, count: int | None) -> Tensor:
    """Indices of the first ``count`` images of every class (None: of all), ascending."""
    found = [(labels == label).nonzero()[:count, 0] for label in labels.unique()]
    return torch.cat(found).sort().values if found else torch.zeros(0, dtype=torch.int64)


def _stratified(labels: Tensor, fraction: float) -> Tensor:
    """A mask [N], True for the validation images: the same share of every class, the same on every run."""
    generator = torch.Generator().manual_seed(VAL_SEED)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=generator)
        mask[members[order[: round(fraction * len(members))]]] = True
    return mask


class Batches:
    """Mini-batches of one set, made on the device that holds it.

    Args:
        split: the images, already on their device.
        batch_size: images per batch; the last one may be smaller.
        generator: a CPU generator that draws the order, crops and flips of an epoch; None for the stored order
            without augmentation. Drawing on the CPU, once per epoch, makes an epoch the same on every device.
        channels_last: memory format of the batches.
        drop_last: leave out the last images of an epoch where they do not fill a batch.

    Iterating draws an epoch and gives (x float32 [B, 3, 32, 32], normalised; labels int64 [B]); under torchrun each
    process's share of the batch, batches being those of one process.
    """

    def __init__(
        self,
        split: ImageSet,
        batch_size: int,
        generator: torch.Generator | None = None,
        channels_last: bool = True,
        drop_last: bool = False,
    ) -> None:
        self.batch_size, self.generator, self.channels_last = batch_size, generator, channels_last
        self.labels = split.labels
        self.count = len(self.labels) // batch_size * batch_size if drop_last else len(self.labels)  # images an epoch
        self.images = split.images if generator is None else F.pad(split.images, (0, 0, PAD, PAD, PAD, PAD))
        device = self.labels.device
        self.scale = 1 / (255 * torch.tensor(STD, device=device))
        self.shift = -torch.tensor(MEAN, device=device) / torch.tensor(STD, device=device)
        self.pixels = torch.arange(SIDE, device=device)

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.generator is not None:
            self._drawn = self._draw_epoch()
        return map(self.batch, range(len(self)))

    def size(self, step: int) -> int:
        """Images of batch ``step``, all processes' shares together."""
        return min(self.batch_size, self.count - step * self.batch_size)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Batch ``step`` of the epoch that was iterated last; the same pixels however often it is asked for."""
        start = step * self.batch_size
        chosen = processes.share(start, start + self.size(step))
        if self.generator is None:
            return self._normalise(self.images[chosen]), self.labels[chosen]
        index, top, left, flip = (drawn[chosen] for drawn in self._drawn)
        rows = top[:, None] + self.pixels  # [B, 32]
        columns = left[:, None] + torch.where(flip[:, None], self.pixels.flip(0), self.pixels)
        crops = self.images[index[:, None, None], rows[:, :, None], columns[:, None, :]]  # [B, 32, 32, 3]
        return self._normalise(crops), self.labels[index]

    def _draw_epoch(self) -> tuple[Tensor, ...]:
        count = len(self.labels)
        order = torch.randperm(count, generator=self.generator)
        top, left = torch.randint(0, 2 * PAD + 1, (2, count), generator=self.generator)
        flip = torch.rand(count, generator=self.generator) < 0.5
        return tuple(drawn.to(self.labels.device, non_blocking=True) for drawn in (order, top, left, flip))

    def _normalise(self, images: Tensor) -> Tensor:
        x = images.to(torch.float32).mul_(self.scale).add_(self.shift).permute(0, 3, 1, 2)
        return x if self.channels_last else x.contiguous()
