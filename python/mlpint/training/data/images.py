"""Images with class labels: scikit-learn's digits, ``.npz`` files, or folders of image files."""

from __future__ import annotations

import dataclasses
import io
import math
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from ...errors import DataError
from . import hub
from .files import most_unpacked, read, visible_files

if TYPE_CHECKING:
    from PIL.Image import Image

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_MOST_PIXELS = 64_000_000  # of an image file: 488 MiB at most while it is decoded
_MOST_CLASSES = 1 << 20
_NAMES = {"train": (("x_train", "y_train"), ("images", "labels"), ("x", "y")), "test": (("x_test", "y_test"),)}


class Images:
    """Images of one size with their classes.

    Args:
        name: where they came from.
        pixels: [n, height, width, channels], or paths of n image files.
        labels: [n] int64.
        classes: names of the classes.
        size: (height, width, channels); image files are scaled and cropped to it.
        largest: the value of a white pixel.
    """

    def __init__(
        self,
        name: str,
        pixels: np.ndarray | list[Path],
        labels: np.ndarray,
        classes: list[str],
        size: tuple[int, int, int],
        largest: float = 255.0,
    ) -> None:
        self.name, self.pixels, self.labels, self.classes = name, pixels, labels, classes
        self.size, self.largest = size, largest

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> np.ndarray:
        """[n, channels, height, width] float32, black 0 and white 1."""
        if isinstance(self.pixels, list):
            chosen = np.stack([_decoded(self.pixels[i], self.size) for i in indices])
        else:
            chosen = self.pixels[indices]
        return np.ascontiguousarray(chosen.transpose(0, 3, 1, 2), np.float32) / np.float32(self.largest)

    def part(self, indices: np.ndarray) -> Images:
        """Some of the images."""
        some = [self.pixels[i] for i in indices] if isinstance(self.pixels, list) else self.pixels[indices]
        return Images(self.name, some, self.labels[indices], self.classes, self.size, self.largest)


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """Images to train on and images held out, of the same size and with the same classes."""

    train: Images
    held_out: Images


def load_images(path: str, validation: str = "", size: int = 0) -> LabelledImages:
    """Reads images. Without others to validate on, every fifth image of each class is held out.

    Args:
        path: an ``.npz`` file with ``images`` [n, height, width] or [n, height, width, channels] and ``labels`` [n]
            (or ``x_train``, ``y_train``, ``x_test``, ``y_test``), or a directory with one folder of image files for
            each class (or folders ``train`` and ``val`` of such), or a data set
            (:mod:`mlpint.training.data.hub`) with columns ``image`` and ``label``. Empty: scikit-learn's 1,797 digits,
            8 x 8.
        validation: images to validate on, likewise.
        size: side that image files are scaled and cropped to; 0: they must all be of the same size.

    Raises:
        DataError: naming the file, and what is wrong with it.
    """
    where = Path(path)
    if not path:
        everything, held_out = _digits(), None
    elif path.startswith(hub.PREFIX):
        train, other = hub.splits(path)
        everything = _from_hub(path, train, size)
        held_out = None if other is None else _from_hub(path, other, size)
    elif where.is_dir():
        pair = not validation and (where / "train").is_dir() and (where / "val").is_dir()
        everything = _folders(where / "train" if pair else where, size)
        held_out = _folders(where / "val", size, everything.classes) if pair else None
    else:
        everything, held_out = _npz(where)
    if validation:
        other = Path(validation)
        held_out = _folders(other, size, everything.classes) if other.is_dir() else _npz(other)[0]
    if held_out is None:
        return _split(everything)
    if held_out.size != everything.size:
        sizes = [" x ".join(map(str, images.size)) for images in (held_out, everything)]
        raise DataError(f"{held_out.name}: images are {sizes[0]}, those of {everything.name} {sizes[1]}")
    unknown = sorted(set(held_out.labels.tolist()) - set(everything.labels.tolist()))
    if unknown:
        raise DataError(f"{held_out.name}: label {unknown[0]} is unknown in {everything.name}")
    return LabelledImages(everything, held_out)


def _split(images: Images) -> LabelledImages:
    held_out = np.zeros(len(images), bool)
    for label in np.unique(images.labels):
        held_out[np.flatnonzero(images.labels == label)[4::5]] = True
    if not held_out.any():
        raise DataError(f"{images.name}: {len(images)} images are too few to hold out a fifth of each class")
    return LabelledImages(images.part(np.flatnonzero(~held_out)), images.part(np.flatnonzero(held_out)))


def _digits() -> Images:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("data = '': the digits need scikit-learn; pip install scikit-learn, or name images") from None
    digits = load_digits()
    pixels = digits.images.astype(np.float32)[..., None]
    return Images("digits", pixels, digits.target.astype(np.int64), [str(n) for n in range(10)], (8, 8, 1), 16.0)


def _npz(path: Path) -> tuple[Images, Images | None]:
    arrays = _arrays(path)
    parts = []
    for part, choices in _NAMES.items():
        names = next((pair for pair in choices if all(name in arrays for name in pair)), None)
        if names:
            parts.append(_of_arrays(str(path), arrays[names[0]], arrays[names[1]], names))
        elif part == "train":
            raise DataError(f"{path}: holds {', '.join(arrays) or 'nothing'}; must hold images and labels")
    return parts[0], parts[1] if len(parts) > 1 else None


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """Those of a file that have names of images or labels."""
    content = read(path)
    limit = most_unpacked(len(content))
    wanted = {name for choices in _NAMES.values() for pair in choices for name in pair}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [entry for entry in archive.infolist() if entry.filename.removesuffix(".npy") in wanted]
            if sum(entry.file_size for entry in members) > limit:
                raise DataError(f"{path}: its {len(content):,} bytes hold more than {limit:,}, which no images do")
            arrays = {}
            for entry in members:
                with archive.open(entry) as file:
                    _check_header(file, entry.file_size)
                with archive.open(entry) as file:
                    arrays[entry.filename.removesuffix(".npy")] = np.lib.format.read_array(file, allow_pickle=False)
            return arrays or {name.removesuffix(".npy"): np.empty(0) for name in archive.namelist()}
    except (ValueError, EOFError, OSError, OverflowError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: is not an .npz file of arrays ({error or type(error).__name__})") from None


def _check_header(file: IO[bytes], size: int) -> None:
    """Whether an array is as large as its header says: its memory is taken before it is read."""
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    if math.prod(shape) * dtype.itemsize != size - file.tell():
        raise ValueError(f"an array {shape} of {dtype} in {size} bytes")


def _of_arrays(name: str, pixels: np.ndarray, labels: np.ndarray, names: tuple[str, str]) -> Images:
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    if pixels.ndim != 4 or pixels.dtype.kind not in "uif":
        raise DataError(f"{name}: {names[0]} is {pixels.shape} {pixels.dtype}; must be [n, height, width(, channels)]")
    if not pixels.size:
        raise DataError(f"{name}: {names[0]} is {pixels.shape}, which holds no pixels")
    if not np.isfinite([pixels.max(), pixels.min()]).all():
        raise DataError(f"{name}: {names[0]} holds values that are not finite")
    labels = labels.reshape(-1)
    if len(labels) != len(pixels) or not len(labels) or labels.dtype.kind not in "ui":
        raise DataError(
            f"{name}: {len(pixels)} images with {len(labels)} labels, {labels.dtype}; must be one integer each"
        )
    if labels.min() < 0:
        raise DataError(f"{name}: label {labels.min()} is negative")
    if labels.max() >= _MOST_CLASSES:
        raise DataError(f"{name}: label {labels.max()}: must be below {_MOST_CLASSES:,}, the number of a class")
    largest = 255.0 if pixels.dtype == np.uint8 else float(pixels.max()) or 1.0
    classes = [str(n) for n in range(int(labels.max()) + 1)]
    return Images(name, pixels, labels.astype(np.int64), classes, pixels.shape[1:], largest)


def _from_hub(name: str, part: hub.Dataset, size: int) -> Images:
    """All images of a part, decoded."""
    images, labels = hub.column(part, name, "image", "img"), hub.column(part, name, "label", "labels", "fine_label")
    classes = hub.class_names(part, labels)
    pixels: list[np.ndarray] = []
    first: tuple[int, int, int] | None = None
    for n, image in enumerate(part[images]):
        shape = (size or image.height, size or image.width, _channels(image))
        first = first or shape
        if shape != first:
            raise DataError(
                f"{name}: image {n} is {' x '.join(map(str, shape))}, image 0 {' x '.join(map(str, first))}; "
                "must be of one size, or give --image-size"
            )
        pixels.append(_fitted(image, shape))
    if first is None:
        raise DataError(f"{name}: holds no images")
    numbers = np.array(part[labels], np.int64)
    return Images(name, np.stack(pixels), numbers, classes or [str(n) for n in range(int(numbers.max()) + 1)], first)


def _folders(path: Path, size: int, known: list[str] | None = None) -> Images:
    try:
        folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    files, labels, classes = [], [], known or [p.name for p in folders]
    for folder in folders:
        if not folder.name.isprintable():
            raise DataError(f"{path}: the class {folder.name!r} is named by other than printable characters")
        if folder.name not in classes:
            raise DataError(f"{folder}: class {folder.name!r} is unknown; those to train on are {', '.join(classes)}")
        images = [p for p in visible_files(folder) if p.suffix.lower() in _SUFFIXES]
        if not images:
            raise DataError(f"{folder}: holds no images")
        files += images
        labels += [classes.index(folder.name)] * len(images)
    if not files:
        raise DataError(f"{path}: holds no folders of images, one for each class")
    return Images(str(path), files, np.array(labels), classes, _common_size(files, size))


def _common_size(files: list[Path], size: int) -> tuple[int, int, int]:
    """(height, width, channels) of image files; only their heads are read."""
    first = _size_of(files[0], size)
    for path in files[1:]:
        shape = _size_of(path, size)
        if shape != first:
            raise DataError(
                f"{path}: is {shape[0]} x {shape[1]} x {shape[2]}, {files[0]} is {first[0]} x {first[1]} x {first[2]}; "
                "must be of one size, or give --image-size"
            )
    return first


def _size_of(path: Path, size: int) -> tuple[int, int, int]:
    with _opened(path) as image:
        return size or image.height, size or image.width, _channels(image)


def _opened(path: Path) -> Image:
    try:
        from PIL import Image as pillow
    except ImportError:
        raise DataError(f"{path}: reading image files needs pillow; pip install pillow") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pillow.DecompressionBombWarning)  # the limit below is lower
            image = pillow.open(path)
    except Exception as error:  # of damaged files pillow raises all kinds
        raise DataError(f"{path}: is not an image ({error or type(error).__name__})") from None
    if image.width * image.height > _MOST_PIXELS:
        image.close()
        raise DataError(f"{path}: has {image.width} x {image.height} pixels; must be {_MOST_PIXELS:,} at most")
    return image


def _decoded(path: Path, size: tuple[int, int, int]) -> np.ndarray:
    try:
        with _opened(path) as image:
            return _fitted(image, size)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path}: is damaged ({error or type(error).__name__})") from None


def _channels(image: Image) -> int:
    return 1 if image.mode in ("1", "L", "I;16") else 3


def _fitted(image: Image, size: tuple[int, int, int]) -> np.ndarray:
    """[height, width, channels] uint8: the shorter side is scaled, then the middle is cut out."""
    from PIL import ImageOps

    height, width, channels = size
    mode = "L" if channels == 1 else "RGB"
    pixels = ImageOps.fit(image if image.mode == mode else image.convert(mode), (width, height))
    return np.asarray(pixels).reshape(height, width, channels)
