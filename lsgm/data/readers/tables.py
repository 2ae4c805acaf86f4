"""Pictures in Parquet files, as the Hugging Face Hub serves them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lsgm.data.readers.base import (
    ALL,
    Label,
    Pictures,
    Source,
    fingerprint,
    optional_library,
    split_of,
)
from lsgm.errors import UserError, one_line

__all__ = ["ParquetPictures", "open_parquet"]

WHAT = "reading Parquet"
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img", "picture"), ("label", "labels", "fine_label")
CACHED_GROUPS = 2
GROUP_LIMIT = 1 << 31
"""Bytes of a row group that is read whole."""


class ParquetPictures(Pictures):
    """Rows of Parquet files; a row group at a time is kept, so that neighbours are read at once."""

    def __init__(
        self,
        files: Sequence[Path],
        column: str,
        places: Sequence[tuple[int, int, int]],
        names: Sequence[str],
        labels: Sequence[Label] | None,
    ) -> None:
        self.files, self.column = list(files), column
        self.places, self.names, self.labels = list(places), list(names), labels

    def _open(self) -> dict[tuple[int, int], Any]:
        return {}

    def read(self, index: int) -> bytes:
        file, group, row = self.places[index]
        if (file, group) not in self.handle:
            while len(self.handle) >= CACHED_GROUPS:
                self.handle.pop(next(iter(self.handle)))
            self.handle[file, group] = self._group(file, group)
        value = self.handle[file, group][row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise UserError(
                f"{self.files[file]}: {self.names[index]}: holds no bytes of a picture (a path is "
                "not followed)"
            )
        return data

    def _group(self, file: int, group: int) -> Any:
        parquet = optional_library("pyarrow.parquet", WHAT)
        arrow = optional_library("pyarrow", WHAT)
        try:
            with parquet.ParquetFile(self.files[file]) as table:
                return table.read_row_group(group, columns=[self.column]).column(self.column)
        except (arrow.ArrowException, OSError) as error:
            raise UserError(f"{self.files[file]}: row group {group}: {one_line(error)}") from error


def open_parquet(paths: Sequence[Path], root: Path) -> Source:
    """Parquet files with a column ``image`` of encoded pictures (``{bytes, path}`` or binary) and
    maybe ``label``: splits by the first word of the file's name.

    Raises:
        UserError: A file is damaged, or has no such column.
    """
    by_split: dict[str, tuple[list[Any], list[str], list[Label]]] = {}
    columns = set()
    for number, path in enumerate(paths):
        split = (len(paths) > 1 and split_of(path.name.split("-")[0].split(".")[0])) or ALL
        places, names, labels = by_split.setdefault(split, ([], [], []))
        column, groups, found = _rows(path)
        columns.add(column)
        places += [(number, g, row) for g, rows in enumerate(groups) for row in range(rows)]
        names += [f"{path.name}/{row:08d}" for row in range(sum(groups))]
        labels += found
    if len(columns) > 1:
        raise UserError(f"{root}: pictures are in the columns {' and '.join(sorted(columns))}")
    splits = {
        split: ParquetPictures(
            paths, min(columns), places, names, None if None in labels else labels
        )
        for split, (places, names, labels) in by_split.items()
    }
    return Source(root, "parquet", splits, fingerprint(paths))


def _rows(path: Path) -> tuple[str, list[int], list[Label]]:
    """The column of pictures, the rows of each group, and the classes (None: there are none)."""
    parquet = optional_library("pyarrow.parquet", WHAT)
    arrow = optional_library("pyarrow", WHAT)
    try:
        with parquet.ParquetFile(path) as table:
            schema = table.schema_arrow
            column = next((c for c in IMAGE_COLUMNS if c in schema.names), None)
            if column is None or not _holds_bytes(arrow, schema.field(column).type):
                raise UserError(
                    f"{path}: no column {' or '.join(IMAGE_COLUMNS)} of encoded pictures; there "
                    f"are {', '.join(schema.names)[:200] or 'none'}"
                )
            meta = table.metadata
            groups = [meta.row_group(g).num_rows for g in range(meta.num_row_groups)]
            largest = max(
                (meta.row_group(g).total_byte_size for g in range(meta.num_row_groups)), default=0
            )
            if largest > GROUP_LIMIT:
                raise UserError(f"{path}: a row group of {largest} bytes; write smaller ones")
            known = next((c for c in LABEL_COLUMNS if c in schema.names), None)
            labels: list[Label] = [None] * sum(groups)
            if known and arrow.types.is_integer(schema.field(known).type):
                labels = table.read(columns=[known]).column(known).to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({one_line(error)})") from error
    return column, groups, labels


def _holds_bytes(arrow: Any, kind: Any) -> bool:
    if arrow.types.is_struct(kind):
        field = kind.get_field_index("bytes")
        return field >= 0 and _holds_bytes(arrow, kind.field(field).type)
    return bool(arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind))
