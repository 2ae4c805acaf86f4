"""Pictures in TFRecord files, in the layouts of Glow and of progressive GAN.

A record is its length (8 bytes), a checksum of these, the ``Example``, and a checksum of that; both
are CRC-32C, masked.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lsgm.data.images import MAX_PIXELS, Stored
from lsgm.data.readers.base import (
    ALL,
    Label,
    SlicedPictures,
    Source,
    fingerprint,
    optional_library,
    split_of,
)
from lsgm.errors import UserError

__all__ = ["RecordPictures", "open_tfrecords", "record_files"]

WHAT = "reading TFRecord"
HEADER, FOOTER = 12, 4
MAX_BYTES = 4 * MAX_PIXELS
LEVEL = re.compile(r"-r(\d{2})(?=[-.])")


class RecordPictures(SlicedPictures):
    """Records by their offsets; each holds ``data`` and ``shape`` (H, W, C, as Glow has it, or
    C, H, W, as progressive GAN), or an encoded picture.
    """

    def __init__(
        self,
        files: Sequence[Path],
        places: Sequence[tuple[int, int, int]],
        labels: Sequence[Label] | None,
    ) -> None:
        self.files, self.places, self.labels = list(files), list(places), labels
        counts: dict[int, int] = {}
        self.names = []
        for file, *_ in places:
            number = counts[file] = counts.get(file, -1) + 1
            self.names.append(f"{self.files[file].name}/{number:08d}")

    def read(self, index: int) -> Stored:
        file, _, length = self.places[index]
        payload = self.slice(index, FOOTER)
        where = f"{self.files[file].parent}/{self.names[index]}"
        _check_crc(payload[:length], payload[length:], where)
        return _picture(_features(payload[:length], where), where)


def record_files(path: Path) -> list[Path]:
    """The TFRecord files that a path means: itself, or those below a folder; of progressive GAN's
    files, one a resolution, the largest.
    """
    if path.is_file():
        return [path]
    files = sorted(p for p in path.rglob("*") if ".tfrecord" in p.name and p.is_file())
    levels = {p: LEVEL.search(p.name) for p in files}
    alone = {p: m for p, m in levels.items() if m and "-of-" not in p.name}
    if alone:
        highest = max(int(m[1]) for m in alone.values())
        files = [p for p in files if p not in alone or int(alone[p][1]) == highest]
    return files


def open_tfrecords(path: Path) -> Source:
    """TFRecord files: splits by the folder or the first word of the file's name.

    Raises:
        UserError: A file is damaged, or its records are no pictures.
    """
    files = record_files(path)
    by_split: dict[str, tuple[list[tuple[int, int, int]], list[Label]]] = {}
    for number, file in enumerate(files):
        split = split_of(file.parent.name) or split_of(file.name.split("-")[0]) or ALL
        if file.parent == path.parent:  # a file by itself has no split
            split = ALL
        places, labels = by_split.setdefault(split, ([], []))
        for offset, length, label in _records(file):
            places.append((number, offset, length))
            labels.append(label)
    splits = {
        split: RecordPictures(files, places, None if None in labels else labels)
        for split, (places, labels) in by_split.items()
    }
    return Source(path, "tfrecord", splits, fingerprint(files))


def _records(path: Path) -> Iterator[tuple[int, int, Label]]:
    """Offset, length and class of each record."""
    size = path.stat().st_size
    with path.open("rb") as file:
        offset = 0
        while offset < size:
            where = f"{path}: record at byte {offset}"
            file.seek(offset)
            header = file.read(HEADER)
            if len(header) < HEADER:
                raise UserError(f"{where}: the file ends early")
            _check_crc(header[:8], header[8:], where)
            (length,) = struct.unpack("<Q", header[:8])
            if length > MAX_BYTES or offset + HEADER + length + FOOTER > size:
                raise UserError(f"{where}: {length} bytes do not fit into the file")
            payload = file.read(length)
            label = _features(payload, where).get("label")
            yield offset + HEADER, length, label if type(label) is int else None
            offset += HEADER + length + FOOTER


def _check_crc(data: bytes, stored: bytes, where: str) -> None:
    crc = optional_library("crc32c", WHAT).crc32c(data)
    masked = (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
    if struct.pack("<I", masked) != stored:
        raise UserError(f"{where}: the checksum is wrong; the file is damaged or no TFRecord")


def _features(payload: bytes, where: str) -> dict[str, Any]:
    """What an ``Example`` says of a picture: ``data``, ``shape`` and ``label``, where there."""
    protobuf = optional_library("google.protobuf.message", WHAT)
    example = optional_library("tfrecord.example_pb2", WHAT).Example()
    try:
        example.ParseFromString(payload)
    except protobuf.DecodeError as problem:
        raise UserError(f"{where}: is no Example") from problem
    found: dict[str, Any] = {}
    for key, feature in example.features.feature.items():
        values = getattr(feature, feature.WhichOneof("kind") or "bytes_list").value
        if key in ("data", "image/encoded", "image_raw", "image") and len(values) == 1:
            found["data"] = values[0]
        elif key == "shape":
            found["shape"] = tuple(values)
        elif key in ("label", "image/class/label") and len(values) == 1:
            found["label"] = values[0]
    return found


def _picture(found: dict[str, Any], where: str) -> Stored:
    data, shape = found.get("data"), found.get("shape")
    if not isinstance(data, bytes):
        raise UserError(f"{where}: has no picture in `data`")
    if shape is None:
        return data
    whole = len(shape) == 3 and all(type(s) is int and s > 0 for s in shape)
    if not whole or shape[0] * shape[1] * shape[2] != len(data):
        raise UserError(f"{where}: {len(data)} bytes do not have the shape {shape}")
    array = np.frombuffer(data, np.uint8).reshape(shape)
    channels_first = shape[0] in (1, 3) and shape[2] not in (1, 3)
    return array.transpose(1, 2, 0) if channels_first else array
