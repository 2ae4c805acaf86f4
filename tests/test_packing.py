"""Packed data hold the pictures that their source has, however they were made."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lsgm.commands.prepare import prepare
from lsgm.config.training import DataConfig
from lsgm.data import build_datasets
from lsgm.data.images import read_image
from lsgm.data.packed import PackedDataset, _page_ranges, read_index
from lsgm.data.packing import engine
from lsgm.data.packing.settings import PRESETS, PackSettings
from lsgm.data.packing.splits import choose_splits, held_out
from lsgm.data.readers import open_source
from lsgm.errors import UserError

RNG = np.random.default_rng(0)


def make(root: Path, count: int, *, classes: int = 0, grey: bool = False, start: int = 0) -> Path:
    for i in range(start, start + count):
        folder = root / f"class{i % classes}" if classes else root
        folder.mkdir(parents=True, exist_ok=True)
        array = RNG.integers(0, 256, (12 + i % 5, 20 - i % 3, 3), dtype=np.uint8)
        image = Image.fromarray(array)
        (image.convert("L") if grey else image).save(folder / f"{i:03d}.png")
    return root


def run(source: Path, out: Path, *options: str) -> None:
    prepare([str(source), "--out", str(out), *options], "lsgm prepare")


def arrays(out: Path) -> dict[str, np.ndarray]:
    return {p.stem: np.load(p) for p in sorted(out.glob("*.npy"))}


def config(root: Path, **options) -> DataConfig:
    return DataConfig(name="folder", root=str(root), **options)


def test_every_picture_is_where_the_index_says(tmp_path, capsys):
    source = make(tmp_path / "s", 23, classes=3)
    run(source, tmp_path / "p", "--image_size", "8", "--test_fraction", "0.2")
    said = capsys.readouterr().out
    index = read_index(tmp_path / "p")
    assert {s: len(x.names) for s, x in index.splits.items()} == {"train": 18, "test": 5}
    assert "5 pictures are held out" in said and f"train-vae --data {tmp_path / 'p'}" in said
    assert sorted(n for s in index.splits.values() for n in s.names) == sorted(
        p.relative_to(source).as_posix() for p in source.rglob("*.png")
    )
    for split, array in arrays(tmp_path / "p").items():
        packed = index.splits[split]
        for row, name, size, label in zip(
            array, packed.names, packed.sizes, packed.labels, strict=True
        ):
            assert np.array_equal(row, read_image(source / name, 8, 3).permute(1, 2, 0))
            with Image.open(source / name) as image:
                assert list(size) == [image.height, image.width]
            assert index.classes[label] == name.split("/")[0]
    data = build_datasets(config(tmp_path / "p"))
    assert data.spec.num_classes == 3 and data.spec.image_size == 8
    first = data.train.batch(torch.tensor([3, 0]))
    assert torch.equal((first * 255).round().byte()[1], read_image(
        source / index.splits["train"].names[0], 8, 3
    ))  # fmt: skip
    assert data.train.labels.tolist() == index.splits["train"].labels
    assert index.made["fingerprint"] == open_source(source).fingerprint


def test_the_result_does_not_depend_on_the_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "CHUNK_BYTES", 5 * 8 * 8 * 3)
    source = make(tmp_path / "s", 31)
    for workers in ("1", "2"):
        run(source, tmp_path / workers, "--image_size", "8", "--workers", workers)
    one, two = arrays(tmp_path / "1"), arrays(tmp_path / "2")
    assert one.keys() == two.keys() == {"train", "test"}
    assert all(np.array_equal(one[split], two[split]) for split in one)
    assert (tmp_path / "1/index.json").read_text() == (tmp_path / "2/index.json").read_text()
    assert sorted(p.name for p in (tmp_path / "2").iterdir()) == [
        "index.json", "test.npy", "train.npy",
    ]  # fmt: skip


def test_splits_and_classes_of_the_source_stay(tmp_path):
    make(tmp_path / "s/train", 6, classes=2)
    make(tmp_path / "s/val", 4, classes=2, start=6)
    run(tmp_path / "s", tmp_path / "p", "--image_size", "8")
    index = read_index(tmp_path / "p")
    assert {s: len(x.names) for s, x in index.splits.items()} == {"train": 6, "validation": 4}
    data = build_datasets(config(tmp_path / "p"))
    assert len(data.test) == 4
    names = index.splits["validation"].names
    assert data.test.labels.tolist() == [int(n[5]) for n in names]


def test_grey_pictures_keep_one_channel(tmp_path):
    source = make(tmp_path / "s", 5, grey=True)
    run(source, tmp_path / "p", "--image_size", "8")
    assert arrays(tmp_path / "p")["train"].shape == (4, 8, 8, 1)
    run(source, tmp_path / "q", "--image_size", "8", "--channels", "3")
    assert arrays(tmp_path / "q")["train"].shape == (4, 8, 8, 3)


def test_broken_pictures_are_left_out_listed_and_counted(tmp_path, capsys):
    source = make(tmp_path / "s", 20)
    (source / "007.png").write_bytes(b"no picture")
    os.truncate(source / "011.png", 60)
    with pytest.raises(UserError, match=r"007\.png: not a readable.*; and 1 more of 20 pictures$"):
        run(source, tmp_path / "p", "--image_size", "8")  # 1% of 20 is none
    run(source, tmp_path / "q", "--image_size", "8", "--max_broken", "0.1")
    assert "left out: 2 unreadable" in capsys.readouterr().out
    index = read_index(tmp_path / "q")
    assert sorted(name for _, name, _ in index.broken) == ["007.png", "011.png"]
    for split, array in arrays(tmp_path / "q").items():
        assert len(array) == len(index.splits[split].names)
        for row, name in zip(array, index.splits[split].names, strict=True):
            assert np.array_equal(row, read_image(source / name, 8, 3).permute(1, 2, 0))


def test_a_chunk_is_on_the_disk_before_the_log_says_so(tmp_path, monkeypatch):
    """A power cut would otherwise leave chunks that the log calls finished without their pixels."""
    monkeypatch.setattr(engine, "CHUNK_BYTES", 3 * 8 * 8 * 3)
    source, events = make(tmp_path / "s", 10), []
    fsync, line = os.fsync, engine.log_line

    def synced(handle):
        fsync(handle)
        events.append(os.fstat(handle).st_ino)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(engine, "log_line", lambda r: (events.append(r["split"]), line(r))[1])
    run(source, tmp_path / "p", "--image_size", "8", "--workers", "1")
    for split, chunks in (("train", 3), ("test", 1)):  # 9 pictures, and one held out
        file = (tmp_path / "p" / f"{split}.npy").stat().st_ino
        logged = [i for i, event in enumerate(events) if event == split]
        assert len(logged) == chunks
        for number, place in enumerate(logged, 1):
            assert events[:place].count(file) >= number


def test_rows_are_asked_for_at_their_place(tmp_path):
    """Whole pages that hold the rows, which begin and end within a page; in order, and twice."""
    values = np.random.default_rng(0).integers(0, 256, (9, 40, 50, 3)).astype(np.uint8)
    np.save(tmp_path / "a.npy", values)
    content = (tmp_path / "a.npy").read_bytes()
    array = np.load(tmp_path / "a.npy", mmap_mode="r")
    index = torch.tensor([8, 0, 5, 5])
    ranges = list(_page_ranges(array, index.numpy()))
    for row, (start, size) in zip([0, 5, 5, 8], ranges, strict=True):
        assert start % mmap.PAGESIZE == 0 and size < 40 * 50 * 3 + mmap.PAGESIZE
        assert content[start : start + size].endswith(values[row].tobytes())
    found = (PackedDataset(array).batch(index) * 255).round().byte().permute(0, 2, 3, 1)
    assert np.array_equal(found, values[index])


def test_a_killed_pack_goes_on_and_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "CHUNK_BYTES", 3 * 8 * 8 * 3)
    source = make(tmp_path / "s", 30)
    (source / "004.png").write_bytes(b"no picture")
    options = ("--image_size", "8", "--max_broken", "0.1", "--workers", "1")
    run(source, tmp_path / "whole", *options)
    done: list[engine.Chunk] = []
    original = engine.Job.__call__

    def dies(job: engine.Job, chunk: engine.Chunk) -> engine.Done:
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(chunk)
        return original(job, chunk)

    monkeypatch.setattr(engine.Job, "__call__", dies)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "p", *options)
    assert not (tmp_path / "p/index.json").exists()
    with pytest.raises(UserError, match="no image in"):
        build_datasets(config(tmp_path / "p", image_size=8))
    with pytest.raises(UserError, match="unfinished pack with another image_size"):
        run(source, tmp_path / "p", "--image_size", "4", *options[2:])
    log = tmp_path / "p/.prepare/chunks.jsonl"
    log.write_bytes(log.read_bytes() + b'{"split": "tra')  # torn
    again: list[engine.Chunk] = []
    monkeypatch.setattr(
        engine.Job, "__call__", lambda job, chunk: again.append(chunk) or original(job, chunk)
    )
    run(source, tmp_path / "p", *options)
    assert not set(again) & set(done[:4]) and len(again) + 4 == 10
    for name in ("train.npy", "test.npy", "index.json"):
        assert (tmp_path / "p" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_killed_at_the_very_end(tmp_path, monkeypatch):
    source = make(tmp_path / "s", 10)
    monkeypatch.setattr(engine, "write_index", lambda *args: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        run(source, tmp_path / "p", "--image_size", "8")
    monkeypatch.undo()
    run(source, tmp_path / "p", "--image_size", "8")
    run(source, tmp_path / "q", "--image_size", "8")
    assert (tmp_path / "p/train.npy").read_bytes() == (tmp_path / "q/train.npy").read_bytes()
    assert (tmp_path / "p/index.json").read_text() == (tmp_path / "q/index.json").read_text()


def test_a_process_that_is_killed(tmp_path):
    source = make(tmp_path / "s", 1500)
    (tmp_path / "go.py").write_text(
        "from lsgm.commands.prepare import prepare\n"
        "from lsgm.data.packing import engine\n"
        "engine.CHUNK_BYTES = 20 * 8 * 8 * 3\n"
        "if __name__ == '__main__':\n"
        f"    prepare([{str(source)!r}, '--out', {str(tmp_path / 'p')!r}, '--image_size', '8', "
        "'--workers', '2'])\n"
    )
    command = [sys.executable, str(tmp_path / "go.py")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    log = tmp_path / "p/.prepare/chunks.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert subprocess.run(command, stdout=subprocess.PIPE).returncode == 0
    index = read_index(tmp_path / "p")
    for split, array in arrays(tmp_path / "p").items():
        for i in range(0, len(array), 97):
            expected = read_image(source / index.splits[split].names[i], 8, 3)
            assert np.array_equal(array[i], expected.permute(1, 2, 0))


def test_published_crops(tmp_path):
    """Of the aligned faces (178 x 218): 148 from (15, 40), or the central 140."""
    array = RNG.integers(0, 256, (218, 178, 3), dtype=np.uint8)
    for i in range(4):
        (tmp_path / "s").mkdir(exist_ok=True)
        Image.fromarray(np.roll(array, i, 0)).save(tmp_path / f"s/00000{i}.png")
    (tmp_path / "list_eval_partition.txt").write_text(
        "".join(f"00000{i}.jpg {n}\n" for i, n in enumerate((0, 2, 1, 0)))
    )
    for preset, (left, top, side) in {
        "celeba64": (15, 40, 148),
        "celeba64-ncsn": (19, 39, 140),
    }.items():
        run(tmp_path / "s", tmp_path / preset, "--preset", preset)
        index = read_index(tmp_path / preset)
        assert {s: list(x.names) for s, x in index.splits.items()} == {
            "train": ["000000.png", "000003.png"],
            "validation": ["000002.png"],
            "test": ["000001.png"],
        }
        cropped = Image.fromarray(array[top : top + side, left : left + side])
        expected = cropped.resize((64, 64), Image.Resampling.BILINEAR)
        assert np.array_equal(arrays(tmp_path / preset)["train"][0], np.asarray(expected))


def test_published_counts_are_held_out(tmp_path):
    class Many:
        labels = None
        in_memory = False
        names = range(30_000)

        def __len__(self) -> int:
            return 30_000

    source = type("S", (), {"splits": {"all": Many()}, "path": tmp_path})()
    splits, how = choose_splits(source, 0.1, PRESETS["celebahq256"])
    assert (len(splits["train"]), len(splits["test"])) == (27_000, 3_000)
    assert not set(splits["train"].chosen) & set(splits["test"].chosen)
    assert "3000 pictures are held out" in how


def test_held_out_parts_are_never_empty():
    assert held_out(2, 0) == held_out(2, 5) and len(held_out(2, 0)[0]) == 1
    assert sorted(sum(held_out(17, 3), [])) == list(range(17))


def test_a_changed_cifar_like_set_is_said(tmp_path, capsys):
    run(make(tmp_path / "s", 6), tmp_path / "p", "--preset", "cifar10")
    assert "note: the published cifar10 has 50000 train, 10000 test" in capsys.readouterr().out
    assert arrays(tmp_path / "p")["train"].shape == (5, 32, 32, 3)


# Mistakes


def packed(tmp_path: Path) -> Path:
    run(make(tmp_path / "s", 6, classes=2), tmp_path / "p", "--image_size", "8")
    return tmp_path / "p"


def _edit(**changes):
    def edit(out: Path) -> None:
        values = json.loads((out / "index.json").read_text())
        for key, value in changes.items():
            values[key] = value
        (out / "index.json").write_text(json.dumps(values))

    return edit


def _without_names(out: Path) -> None:
    values = json.loads((out / "index.json").read_text())
    values["splits"]["train"]["names"].pop()
    (out / "index.json").write_text(json.dumps(values))


DAMAGE = {
    "array, truncated": (lambda out: os.truncate(out / "train.npy", 300), "run lsgm prepare again"),
    "array, other shape": (
        lambda out: np.save(out / "train.npy", np.zeros((5, 4, 4, 3), np.uint8)), "index.json says",
    ),
    "array, floats": (lambda out: np.save(out / "train.npy", np.zeros((5, 8, 8, 3))), "float64"),
    "array, missing": (lambda out: (out / "test.npy").unlink(), "test.npy: damaged"),
    "index, no JSON": (lambda out: (out / "index.json").write_text("{"), "not a readable index"),
    "index, a list": (lambda out: (out / "index.json").write_text("[]"), "not a readable index"),
    "index, another format": (_edit(format="x"), "not the index of packed data"),
    "index, later version": (_edit(version=9), "later version"),
    "index, no splits": (_edit(splits={}), "no train and test split"),
    "index, unknown key": (_edit(more=1), "not a readable index"),
    "index, channels": (_edit(channels=2), "channels are wrong"),
    "index, no classes": (_edit(classes=None), "labels and classes"),
    "index, too few classes": (_edit(classes=["a"]), "labels are wrong"),
    "index, a name too few": (_without_names, "names and sizes"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_packs_are_one_line(tmp_path, kind):
    out = packed(tmp_path)
    damage, words = DAMAGE[kind]
    damage(out)
    with pytest.raises(UserError) as raised:
        build_datasets(config(out))
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_a_training_asks_for_what_is_packed(tmp_path):
    out = packed(tmp_path)
    for key, value in (("image_size", 16), ("channels", 1)):
        with pytest.raises(UserError, match=f"data.{key}: .* is packed with"):
            build_datasets(config(out, **{key: value}))
    assert isinstance(build_datasets(config(out, image_size=8)).train, PackedDataset)


def test_wrong_commands_are_one_line(tmp_path, monkeypatch):
    source, out = make(tmp_path / "s", 6), packed(tmp_path / "x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/letter.txt").write_text("mine")
    (tmp_path / "one").mkdir()
    shutil.copy(source / "000.png", tmp_path / "one")
    cases = [
        ((source, tmp_path / "p"), "--image_size: give the side"),
        ((source, tmp_path / "p", "--image_size", "0"), "image_size: must be positive"),
        ((source, tmp_path / "p", "--image_size", "9999"), "at most 8192"),
        ((source, tmp_path / "p", "--image_size", "8", "--workers", "0"), "--workers"),
        ((source, tmp_path / "p", "--image_size", "8", "--test_fraction", "1"), "test_fraction"),
        ((source, tmp_path / "p", "--preset", "celeba"), "invalid choice"),
        ((source, tmp_path / "p", "--image_size", "8", "--crop", "40"), "too few for a crop"),
        ((source, out, "--image_size", "8"), "is packed already"),
        ((source, tmp_path / "other", "--image_size", "8"), "is not empty (letter.txt)"),
        ((tmp_path / "absent", tmp_path / "p", "--image_size", "8"), "no such file"),
        ((tmp_path / "one", tmp_path / "p", "--image_size", "8"), "at least two"),
    ]
    for (given, where, *options), words in cases:
        with pytest.raises(UserError) as raised:
            run(given, where, *options)
        assert words in str(raised.value) and "\n" not in str(raised.value)
    assert (tmp_path / "other/letter.txt").read_text() == "mine"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="the pack needs .* GB more"):
        run(source, tmp_path / "q", "--image_size", "8")


def test_settings_are_checked():
    with pytest.raises(ValueError, match="resample"):
        PackSettings(8, resample="nearest")
    with pytest.raises(ValueError, match="max_broken"):
        PackSettings(8, max_broken=-0.1)
