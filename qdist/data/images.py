"""Samples in image files: decode, resize, crop or letterbox, colour order, layout."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from qdist.data.image_list import read_labels, read_list
from qdist.data.preprocess import Preprocess
from qdist.data.source import Feeds
from qdist.data.stored import not_found, unreadable
from qdist.errors import ConfigError, DataError

SUFFIXES = frozenset(
    {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
"""Endings, in lower case, that count as images when a folder is listed."""

# What Pillow raises on damaged files of the formats above.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)
_COLORS = ("RGB", "BGR", "GRAY")
_LAYOUTS = ("NCHW", "NHWC")


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """One sample per image file under ``folder``; keys are paths relative to it, sorted.

    ``list_file``    text file with one relative path per line; its order is the samples' order.
    ``labels_file``  CSV rows ``file,label`` (a header row is recognised), label an integer.
    ``resize``       an int: the shorter side gets this length, the longer one in proportion
                     (rounded down); a pair: (height, width); None: as stored.
    ``crop``         side of the centred square cut out after ``resize``.
    ``start``, ``limit``  skip the first images, then take at most ``limit``.
    ``letterbox``    (height, width, pad value 0..255): fitted inside in proportion, pasted at the
                     top left. Excludes ``resize`` and ``crop``.
    ``color``        channel order of the result; ``preprocess`` sees channels in this order.
    ``layout``       "NCHW" gives samples [C,H,W], "NHWC" [H,W,C]; GRAY has one channel.

    Resampling is Pillow's bilinear, which averages over the source area when it shrinks. The
    orientation tag of a file is not applied. `load` takes [H,W,C] uint8 through ``preprocess``
    (whose ``channel_axis`` and ``transpose`` are ruled by ``layout`` here).

    Raises QD104, QD107 at construction; QD301, QD302, QD303 (smaller than the crop), QD306,
    QD308 on use.
    """

    folder: Path
    input_name: str
    list_file: Path | None = None
    labels_file: Path | None = None
    resize: int | tuple[int, int] | None = None
    crop: int | None = None
    letterbox: tuple[int, int, int] | None = None
    color: Literal["RGB", "BGR", "GRAY"] = "RGB"
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    preprocess: Preprocess = field(default_factory=Preprocess)
    limit: int | None = None
    start: int = 0

    def __post_init__(self) -> None:
        self._check_choices()
        sizes = [self.crop, *(self.letterbox or ())[:2], self.limit]
        sizes += list(self.resize) if isinstance(self.resize, tuple) else [self.resize]
        pad = self.letterbox[2] if self.letterbox else 0
        small = any(size is not None and size < 1 for size in sizes) or self.start < 0
        if small or not 0 <= pad <= 255:
            raise ConfigError(
                "QD104",
                where=str(self.folder),
                got=f"resize={self.resize}, crop={self.crop}, letterbox={self.letterbox}, "
                f"start={self.start}, limit={self.limit}",
                expected="sizes and limit of at least 1, a pad value from 0 to 255, a start from 0",
                mend="change the setting that is out of range",
            )

    def _check_choices(self) -> None:
        for name, value, known in (
            ("color", self.color, _COLORS),
            ("layout", self.layout, _LAYOUTS),
        ):
            if value not in known:
                raise ConfigError(
                    "QD104",
                    where=name,
                    got=repr(value),
                    expected="one of " + ", ".join(known),
                    mend=f"set {name} to one of them",
                )
        if self.letterbox is not None and (self.resize is not None or self.crop is not None):
            raise _contradiction("letterbox together with resize or crop", "one of them")
        if self.preprocess.transpose or self.preprocess.channel_axis != 0:
            raise _contradiction(
                "preprocess.transpose or preprocess.channel_axis for images", "layout alone"
            )

    def __getstate__(self) -> dict[str, Any]:
        # Leaves listings behind: the process that unpickles reads its own.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def uniform(self) -> bool:
        """Whether every sample has the same shape by construction."""
        return self.letterbox is not None or self.crop is not None or isinstance(self.resize, tuple)

    def keys(self) -> list[str]:
        """Paths relative to the folder, with ``/``, sorted; or the list file's lines in order."""
        return list(self._keys)

    def content_digest(self, key: str) -> str:
        """SHA-256 of the file's bytes."""
        try:
            with (self.folder / key).open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise self._unreadable(key, error) from error

    def preprocessing(self) -> dict[str, Any]:
        """Geometry, colours, layout and arithmetic."""
        resize = list(self.resize) if isinstance(self.resize, tuple) else self.resize
        return {
            "kind": "images",
            "input": self.input_name,
            "resize": resize,
            "crop": self.crop,
            "letterbox": None if self.letterbox is None else list(self.letterbox),
            # Decoders differ in the last bit between versions.
            "resampling": f"bilinear, Pillow {PIL.__version__}",
            "color": self.color,
            "layout": self.layout,
            "preprocess": self.preprocess.as_json(),
        }

    def load(self, key: str) -> Feeds:
        """``{input_name: [C,H,W] or [H,W,C]}`` of one image."""
        where = str(self.folder / key)
        try:
            with Image.open(self.folder / key) as stored:
                if stored.mode in ("I", "F") or stored.mode.startswith("I;"):
                    # Pillow would clip these to 255 without a word.
                    raise ValueError(f"mode {stored.mode}, more than 8 bits per channel")
                image = self._geometry(stored.convert("L" if self.color == "GRAY" else "RGB"), key)
                pixels = np.array(image)
        except _DECODE_ERRORS as error:
            if isinstance(error, DataError):
                raise
            raise self._unreadable(key, error) from error
        if pixels.ndim == 2:
            pixels = pixels[:, :, None]
        if self.color == "BGR":
            pixels = pixels[:, :, ::-1]
        if self.layout == "NCHW":
            pixels = pixels.transpose(2, 0, 1)
        pixels = np.ascontiguousarray(pixels)
        return {self.input_name: self._preprocess.apply(pixels, where=where)}

    def label(self, key: str) -> NDArray[np.int64] | None:
        """The label of one image as an array of shape ()."""
        if self.labels_file is None:
            return None
        if key not in self._labels:
            missing = [key for key in self._keys if key not in self._labels]
            raise DataError(
                "QD308",
                where=str(self.labels_file),
                got=f"no label for {key}, one of {max(1, len(missing))} images without",
                expected="a row 'file,label' for every image of the set",
                mend="add the rows, or leave the images out with a list file",
            )
        return np.asarray(self._labels[key], np.int64)

    @cached_property
    def _preprocess(self) -> Preprocess:
        """The settings, with the channel axis of the layout."""
        return replace(self.preprocess, channel_axis=0 if self.layout == "NCHW" else 2)

    @cached_property
    def _keys(self) -> tuple[str, ...]:
        if not self.folder.is_dir():
            raise not_found(self.folder, "a folder of images")
        if self.list_file is not None:
            found = read_list(self.folder, self.list_file)
        else:
            found = sorted(
                path.relative_to(self.folder).as_posix()
                for path in self.folder.rglob("*")
                if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
            )
        n_found, found = len(found), found[self.start :]
        if not found:
            raise DataError(
                "QD302",
                where=str(self.list_file or self.folder),
                got=f"{n_found} images, of which the first {self.start} are left out"
                if n_found
                else "no images",
                expected="at least one file ending in " + ", ".join(sorted(SUFFIXES)),
                mend="choose another folder or list file",
            )
        return tuple(found[: self.limit])

    @cached_property
    def _labels(self) -> dict[str, int]:
        return read_labels(self.labels_file) if self.labels_file is not None else {}

    def _geometry(self, image: Image.Image, key: str) -> Image.Image:
        if self.letterbox is not None:
            return _letterboxed(image, *self.letterbox)
        if isinstance(self.resize, tuple):
            image = _resized(image, *self.resize)
        elif self.resize is not None:
            shorter, longer = sorted(image.size)
            other = self.resize * longer // shorter
            wide = image.width >= image.height
            image = _resized(image, *((self.resize, other) if wide else (other, self.resize)))
        if self.crop is None:
            return image
        if min(image.size) < self.crop:
            raise DataError(
                "QD303",
                where=str(self.folder / key),
                got=f"{image.height} x {image.width} pixels before the crop",
                expected=f"at least {self.crop} x {self.crop}",
                mend="resize first, or choose a smaller crop",
            )
        left, top = round((image.width - self.crop) / 2), round((image.height - self.crop) / 2)
        return image.crop((left, top, left + self.crop, top + self.crop))

    def _unreadable(self, key: str, error: BaseException) -> DataError:
        return unreadable(
            self.folder / key,
            str(error) or type(error).__name__,
            "an image file that Pillow decodes, 8 bits per channel",
            "replace the file, or leave it out with a list file",
        )


def _resized(image: Image.Image, height: int, width: int) -> Image.Image:
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _letterboxed(image: Image.Image, height: int, width: int, pad: int) -> Image.Image:
    """Fitted inside (height, width) in proportion, at the top left, padded elsewhere."""
    ratio = min(height / image.height, width / image.width)
    # At least one pixel: a very long strip would round to nothing.
    inner = _resized(image, max(1, int(image.height * ratio)), max(1, int(image.width * ratio)))
    canvas = Image.new(image.mode, (width, height), pad if image.mode == "L" else (pad, pad, pad))
    canvas.paste(inner, (0, 0))
    return canvas


def _contradiction(got: str, expected: str) -> ConfigError:
    return ConfigError(
        "QD107", where="image settings", got=got, expected=expected, mend="remove one of the two"
    )
