"""What packing costs beside decoding alone, and how fast a training reads, packed or not."""

from __future__ import annotations

import io
import resource
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lsgm.config.checks import require_positive
from lsgm.config.command_line import parse_command_line
from lsgm.data.folder import FolderDataset
from lsgm.data.images import load_image
from lsgm.data.packed import PackedDataset
from lsgm.data.packing import engine
from lsgm.data.packing.settings import PackSettings
from lsgm.data.packing.splits import choose_splits
from lsgm.data.readers import open_source
from lsgm.data.spec import ImageDataset
from lsgm.system.markdown import markdown_table

__all__ = ["DataBenchmark", "data_command"]

DISTINCT = 200
"""Different pictures among the synthetic ones."""
QUALITY = 90
BATCH = 64


@dataclass(frozen=True)
class DataBenchmark:
    """Packing and reading of synthetic pictures."""

    count: int = 20_000
    """JPEG files."""
    size: int = 256
    """Their side in pixels, and that of the packed pictures."""
    workers: int | None = None
    """Processes. None: one a core."""
    batches: int = 100
    """Batches of 64 that are read from each."""
    folder: str | None = None
    """Where the files are made. None: a temporary folder."""

    def __post_init__(self) -> None:
        require_positive(self, "count size workers batches")


@dataclass(frozen=True)
class _Decoding(engine.Job):
    """What a worker does without packing: decode into an array."""

    def __call__(self, chunk: engine.Chunk) -> engine.Done:
        pictures = self.splits[chunk.split]
        for index in range(chunk.start, chunk.stop):
            np.asarray(load_image(pictures.read(index)).convert("RGB"))
        return engine.Done(chunk, [])


def make_pictures(folder: Path, count: int, size: int) -> None:
    """Write JPEG files of smooth noise, the same for the same arguments."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(min(DISTINCT, count)):
        coarse = rng.integers(0, 256, (max(size // 8, 1), max(size // 8, 1), 3), dtype=np.uint8)
        file = io.BytesIO()
        image = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
        image.save(file, "JPEG", quality=QUALITY)
        encoded.append(file.getvalue())
    folder.mkdir(parents=True)
    for i in range(count):
        (folder / f"{i:06d}.jpg").write_bytes(encoded[i % len(encoded)])


def _reading(dataset: ImageDataset, batches: int) -> float:
    """Images a second in batches of :data:`BATCH` in random order."""
    rng = torch.Generator().manual_seed(0)
    index = [torch.randint(len(dataset), (BATCH,), generator=rng) for _ in range(batches)]
    dataset.batch(index[0])
    began = time.perf_counter()
    for chosen in index:
        dataset.batch(chosen)
    return batches * BATCH / (time.perf_counter() - began)


def _writing(path: Path, size: int) -> float:
    """Seconds that ``size`` bytes take to write, by one process, without decoding anything."""
    block = np.zeros(engine.CHUNK_BYTES, np.uint8)
    began = time.perf_counter()
    with path.open("wb") as file:
        for start in range(0, size, len(block)):
            file.write(block[: size - start].data)
    return time.perf_counter() - began


def measure(options: DataBenchmark, root: Path) -> list[list[str]]:
    """Rows ``(what, value)`` of the report."""
    make_pictures(root / "pictures", options.count, options.size)
    source = open_source(root / "pictures")
    splits, how = choose_splits(source, 0.1, None)
    settings = PackSettings(options.size)
    job = _Decoding(splits, root, settings, 3, {})
    began = time.perf_counter()
    chunks = engine.chunks_of(splits, settings, 3)
    with engine.worker_pool(job, options.workers, len(chunks)) as pool:
        for _ in engine.in_parallel(pool, chunks, job):
            pass
    decoding = time.perf_counter() - began
    began = time.perf_counter()
    index = engine.pack(source, splits, root / "packed", settings, how=how, workers=options.workers)
    packing = time.perf_counter() - began
    own, workers = (
        resource.getrusage(who).ru_maxrss / 2**20
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    files = FolderDataset(
        sorted((root / "pictures").iterdir()),
        size=(options.size, options.size),
        channels=3,
        labels=None,
        num_workers=0,
    )
    array = np.load(root / "packed/train.npy", mmap_mode="r")
    slow = _reading(files, max(options.batches // 10, 1))
    cold, fast = (_reading(PackedDataset(array), options.batches) for _ in range(2))
    count = sum(len(split.names) for split in index.splits.values())
    writing = _writing(root / "bytes", array[0].nbytes * count)
    return [
        ["decoding alone", f"{count / decoding:.0f} images/s"],
        ["packing", f"{count / packing:.0f} images/s"],
        ["time of packing over that of decoding alone", f"{packing / decoding:.2f}"],
        ["writing as many bytes, one process", f"{count / writing:.0f} images/s"],
        ["packed data", f"{array[0].nbytes * count / 2**30:.2f} GiB"],
        ["peak memory, main process", f"{own:.2f} GiB"],
        ["peak memory, largest worker", f"{workers:.2f} GiB"],
        ["batches from the folder, one thread", f"{slow:.0f} images/s"],
        ["batches from the pack, first pass, one thread", f"{cold:.0f} images/s"],
        ["batches from the pack, again, one thread", f"{fast:.0f} images/s"],
        ["reading from the pack over the folder", f"{fast / slow:.1f}"],
    ]


def data_command(argv: Sequence[str], prog: str = "data") -> None:
    """``benchmark data [--count N] [--size N] ...``."""
    line = parse_command_line(DataBenchmark, argv, extra=(), prog=prog, description=__doc__)
    options = line.config
    root = Path(tempfile.mkdtemp(prefix="lsgm-data-", dir=options.folder))
    try:
        print(markdown_table(["", ""], measure(options, root)))
    finally:
        shutil.rmtree(root, ignore_errors=True)
