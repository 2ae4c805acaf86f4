"""The command ``prepare SOURCE --out DIR``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from lsgm.data.packed import PackIndex, crop_note
from lsgm.data.packing.engine import pack
from lsgm.data.packing.settings import PRESETS, PackSettings, Preset
from lsgm.data.packing.splits import choose_splits
from lsgm.data.readers import FORMS, open_source
from lsgm.errors import UserError
from lsgm.system.arguments import ArgumentParser

__all__ = ["prepare"]

SHOWN_BROKEN = 5


def prepare(argv: Sequence[str], prog: str | None = None) -> None:
    """Make one packed data set of pictures, whatever they are kept in: a folder in any nesting,
    zip, tar (WebDataset), LMDB, TFRecord, Parquet, HDF5, NPZ or NPY. A training reads it without
    decoding anything (--data DIR). A second call goes on where a killed one
    was.

    Raises:
        UserError: SOURCE cannot be read, DIR holds something else, too many pictures are broken, or
            the arguments are wrong.
    """
    parser = ArgumentParser(prog, prepare.__doc__)
    parser.add_argument("source", metavar="SOURCE", help="file or folder")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to write")
    parser.add_argument("--image_size", type=int, metavar="N", help="side in pixels")
    parser.add_argument(
        "--image_width", type=int, metavar="N", help="width, where image_size is only the height"
    )
    parser.add_argument(
        "--preset",
        choices=sorted(PRESETS),
        help="published crop, size and splits: " + ", ".join(PRESETS),
    )
    parser.add_argument("--form", choices=tuple(FORMS), help="of SOURCE; default: told from it")
    parser.add_argument(
        "--channels", type=int, choices=(1, 3), help="default: grey if all pictures are"
    )
    parser.add_argument(
        "--crop", type=int, metavar="N", help="side of the centre square that is taken first"
    )
    parser.add_argument(
        "--test_fraction",
        type=float,
        default=0.1,
        help="share that is held out where SOURCE has no split (default: 0.1)",
    )
    parser.add_argument(
        "--max_broken",
        type=float,
        default=0.01,
        help="largest share of unreadable pictures (default: 0.01)",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default: one a core")
    given = parser.parse_args(argv)
    if given.workers is not None and given.workers < 1:
        raise UserError(f"--workers: must be at least 1, not {given.workers}")
    preset = PRESETS[given.preset] if given.preset else None
    settings = _settings(given, preset)
    source = open_source(given.source, given.form)
    splits, how = choose_splits(source, settings.test_fraction, preset)
    counts = {split: len(pictures) for split, pictures in splits.items()}
    listed = ", ".join(f"{count} {split}" for split, count in counts.items())
    print(f"{source.path}: {source.form}, {listed}; {how}", flush=True)
    if preset and preset.counts and counts != preset.counts:
        wanted = ", ".join(f"{count} {split}" for split, count in preset.counts.items())
        print(f"note: the published {given.preset} has {wanted}", flush=True)
    index = pack(source, splits, Path(given.out), settings, how=how, workers=given.workers)
    print(_summary(Path(given.out), index))


def _settings(given: object, preset: Preset | None) -> PackSettings:
    options = {
        name: value
        for name in ("image_size", "image_width", "channels", "crop", "test_fraction", "max_broken")
        if (value := getattr(given, name)) is not None
    }
    values = {**(preset.settings if preset else {}), **options}
    if "image_size" not in values:
        raise UserError("--image_size: give the side in pixels, for example 64, or a --preset")
    if preset and "crop" in options:
        values.pop("box", None)
    try:
        return PackSettings(**values)
    except ValueError as error:
        raise UserError(f"--{error}") from None


def _summary(out: Path, index: PackIndex) -> str:
    sides, kind = (index.image_size, index.image_width), "grey" if index.channels == 1 else "colour"
    size = sum(map(math.prod, map(index.shape, index.splits)))
    counts = ", ".join(f"{len(s.names)} {name}" for name, s in index.splits.items())
    classes = "no classes" if index.classes is None else f"{len(index.classes)} classes"
    pictures = f"{counts} pictures of {sides[0]} x {sides[1]}"
    lines = [f"{out}: {pictures}, {kind}, {classes}; {size / 1e6:.1f} MB"]
    if (note := crop_note(index)) is not None:
        lines.append(note)
    ignored = {reason: count for reason, count in index.ignored.items() if count}
    if ignored:
        lines.append("ignored: " + ", ".join(f"{count} {why}" for why, count in ignored.items()))
    if index.broken:
        lines.append(f"left out: {len(index.broken)} unreadable pictures, all listed in index.json")
        lines += [f"  {reason}" for _, _, reason in index.broken[:SHOWN_BROKEN]]
    lines.append(f"next: lsgm train-vae --data {out}")
    return "\n".join(lines)
