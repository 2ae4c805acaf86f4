"""Which files of a folder are data, and what is said about the others."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lsgm.config.training import DataConfig
from lsgm.data import Datasets, build_datasets, discovery, folder
from lsgm.data.discovery import find_images
from lsgm.data.packed import PackedDataset
from lsgm.errors import UserError


def write(path: Path, value: int = 100, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (8, 8), value if mode == "L" else (value, 0, 0)).save(path)
    return path


def write_all(root: Path, *names: str) -> None:
    for name in names:
        write(root / name)


def build(root: Path, **options: object) -> Datasets:
    given = {"cache": "off", **options}
    return build_datasets(DataConfig(name="folder", root=str(root), image_size=8, **given))


def names(data: Datasets, root: Path) -> list[str]:
    """All images of both splits."""
    return sorted(str(p.relative_to(root)) for p in [*data.train.paths, *data.test.paths])


def refusal(root: Path, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        build(root, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Which files


def test_what_is_hidden_is_skipped_and_counted(tmp_path):
    write_all(tmp_path, "a/1.png", "a/2.png", "b/1.png", "b/2.png")
    write_all(tmp_path, ".ipynb_checkpoints/a.png", "__MACOSX/a/1.png", "a/@eaDir/1.png")
    (tmp_path / "a" / "._1.png").write_bytes(b"what a Mac leaves behind")
    (tmp_path / "labels.csv").write_text("1,2")
    data = build(tmp_path)
    assert names(data, tmp_path) == ["a/1.png", "a/2.png", "b/1.png", "b/2.png"]
    assert data.spec.num_classes == 2
    assert data.summary() == (
        "folder (3 x 8 x 8): 3 training, 1 test images, 2 classes, "
        "5 files ignored (4 hidden, 1 not images)"
    )


def test_what_a_run_wrote_is_no_data_and_does_not_move_the_split(tmp_path):
    write_all(tmp_path, *(f"{i:02}.png" for i in range(10)))
    before = build(tmp_path)
    assert before.summary().endswith("9 training, 1 test images, no classes, 0 files ignored")
    run = tmp_path / "runs" / "vae"
    write_all(run, "samples/samples_00000100.png", "curves.png", "evaluation/samples.png")
    (run / "config.yaml").write_text("name: vae")
    (run / "metrics.jsonl").write_text("")
    write_all(tmp_path / "report", "samples.png")
    for name in ("report.json", "report.md"):
        (tmp_path / "report" / name).write_text("")
    after = build(tmp_path)
    assert after.train.paths == before.train.paths and after.test.paths == before.test.paths
    assert after.ignored == {"of a run": 8}
    # The run in the very folder of the data.
    write_all(tmp_path, "samples/samples_00000100.png", "curves.png")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("name: vae")
    assert build(tmp_path).test.paths == before.test.paths


def test_masks_of_celebamask_hq_are_no_faces(tmp_path):
    root = tmp_path / "CelebAMask-HQ"
    write_all(root, "CelebA-HQ-img/0.jpg", "CelebA-HQ-img/1.jpg")
    write_all(root, "CelebAMask-HQ-mask-anno/0/00000_hair.png")
    data = build(root)
    assert names(data, root) == ["CelebA-HQ-img/0.jpg", "CelebA-HQ-img/1.jpg"]
    assert data.spec.num_classes is None and data.train.labels is None  # one class is none
    assert data.ignored == {"masks": 1}


def test_links_are_followed_once_and_loops_end(tmp_path):
    root = tmp_path / "root"
    write_all(tmp_path / "pool", "cat/1.png", "cat/2.png", "dog/1.png", "file.png")
    write_all(root, "bird/1.png")
    (root / "cat").symlink_to(tmp_path / "pool" / "cat")
    (root / "dog").symlink_to(tmp_path / "pool" / "dog")
    (root / "a_second_way").symlink_to(root / "bird")
    (root / "bird" / "loop").symlink_to(root)
    (root / "bird" / "2.png").symlink_to(tmp_path / "pool" / "file.png")
    data = build(root)
    assert names(data, root) == ["bird/1.png", "bird/2.png", "cat/1.png", "cat/2.png", "dog/1.png"]
    assert data.spec.num_classes == 3
    assert data.ignored == {"linked folders read already": 2}


@pytest.mark.parametrize("name", ["class", "1.png"])
def test_a_link_that_leads_nowhere_is_named(tmp_path, name):
    write_all(tmp_path, "2.png", "3.png")
    (tmp_path / name).symlink_to(tmp_path / "unmounted")
    line = refusal(tmp_path)
    assert str(tmp_path / name) in line and "No such file" in line


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    write_all(tmp_path, "a/1.png", "a/2.png", "b/1.png")
    scandir = os.scandir

    def guarded(path: Path) -> object:  # tests may run as root, who may read everything
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(discovery.os, "scandir", guarded)
    assert f"{tmp_path / 'b'}: cannot be read (Permission denied)" in refusal(tmp_path)


def test_files_do_not_depend_on_the_order_of_the_disk(tmp_path, monkeypatch):
    write_all(tmp_path, "b/2.png", "a/c/1.png", "a/1.png", "b.png", "a-1.png")
    first = find_images(tmp_path).files
    assert first == sorted(first) and len(first) == 5
    monkeypatch.setattr(
        discovery, "sorted", lambda entries, key: list(entries)[::-1], raising=False
    )
    assert find_images(tmp_path).files == first


def test_pipes_are_not_opened(tmp_path):
    write_all(tmp_path, "1.png", "2.png")
    os.mkfifo(tmp_path / "3.png")
    assert build(tmp_path).ignored == Counter({"not images": 1})


# Splits and classes


@pytest.mark.parametrize(
    ("train", "test"),
    [("train", "test"), ("Train", "Test"), ("TRAIN", "val"), ("Training", "VALID")],
)
def test_splits_are_named_in_any_case(tmp_path, train, test):
    write_all(tmp_path, f"{train}/a/1.png", f"{train}/b/1.png", f"{test}/a/2.png", "more/3.png")
    data = build(tmp_path)
    assert [p.name for p in data.train.paths] == ["1.png", "1.png"]
    assert [p.name for p in data.test.paths] == ["2.png"]
    assert data.spec.num_classes == 2
    assert data.ignored == {f"outside {train}/ and {test}/": 1}


def test_train_without_test_is_split(tmp_path):
    write_all(tmp_path, *(f"train/{name}/{i}.png" for name in "ab" for i in range(5)))
    data = build(tmp_path, test_fraction=0.2)
    assert (len(data.train), len(data.test), data.spec.num_classes) == (8, 2, 2)
    write(tmp_path / "aeroplane" / "1.png")
    line = refusal(tmp_path)
    assert "train/ and no test/" in line and "aeroplane/1.png" in line


def test_splits_that_cannot_be_told_are_refused(tmp_path):
    write_all(tmp_path, "test/1.png", "cat/1.png")
    assert "has test/ and no train/" in refusal(tmp_path)
    write_all(tmp_path, "train/1.png", "Train/1.png")
    assert "has Train/ and train/; keep one" in refusal(tmp_path)


# Pixels


@pytest.mark.parametrize("first", ["L", "RGB"])
def test_one_grey_file_does_not_make_the_others_grey(tmp_path, first):
    write(tmp_path / "0.png", mode=first)
    write(tmp_path / "1.png", mode="RGB" if first == "L" else "L")
    assert build(tmp_path).spec.channels == 3
    for name in ("0.png", "1.png"):
        write(tmp_path / name, mode="L")
    assert build(tmp_path).spec.channels == 1


def test_every_damaged_file_of_both_splits_shows_at_the_start(tmp_path):
    write_all(tmp_path, *(f"{split}/{i}.png" for split in ("train", "test") for i in range(3)))
    for name in ("1.png", "2.png"):
        path = tmp_path / "test" / name
        os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match=r"test/1\.png: not a readable.*; and 1 more of 3 files$"):
        build(tmp_path).read_all()
    with pytest.raises(
        UserError, match=r"test/1\.png: not a readable.*; and 1 more of 6 pictures$"
    ):
        build(tmp_path, cache="auto")
    for name in ("1.png", "2.png"):
        write(tmp_path / "test" / name)
    build(tmp_path, cache="auto")  # nothing of the first try is left
    own = [p for p in folder.cache_folder().glob("*") if _packs(p, tmp_path)]
    assert len(own) == 1 and not (own[0] / ".prepare").exists()


def _packs(pack: Path, root: Path) -> bool:
    return any(str(root) in f.read_text() for f in pack.rglob("*.json"))


def test_the_cache_holds_the_pixels_of_the_files_and_follows_their_changes(tmp_path, capsys):
    values = (51, 102, 153, 204)
    for i, value in enumerate(values):
        write(tmp_path / "data" / "ab"[i % 2] / f"{i}.png", value=value)
    plain = build(tmp_path / "data")
    first = build(tmp_path / "data", cache="auto")
    assert "is packed in" in capsys.readouterr().out
    for split in ("train", "test"):
        a, b = getattr(plain, split), getattr(first, split)
        assert isinstance(b, PackedDataset) and (a.labels == b.labels).all()
        index = torch.arange(len(a))
        assert (a.batch(index) == b.batch(index)).all()
    again = build(tmp_path / "data", cache="auto")
    assert "packed" not in capsys.readouterr().out
    assert again.spec == first.spec == plain.spec and again.ignored == plain.ignored
    packs = list(folder.cache_folder().glob("*"))
    write(tmp_path / "data/a/0.png", value=255)
    changed = build(tmp_path / "data", cache="auto")
    assert "is packed in" in capsys.readouterr().out
    rows = torch.cat([s.batch(torch.arange(len(s))) for s in (changed.train, changed.test)])
    assert sorted(rows[:, 0, 0, 0].tolist()) == pytest.approx([0.4, 0.6, 0.8, 1.0])
    assert len(list(folder.cache_folder().glob("*"))) == len(packs)  # the old pack is gone


def test_classes_of_jpeg_pictures(data_dir):
    root = data_dir / "cifar10_jpeg"
    data = build_datasets(DataConfig(name="folder", root=str(root), image_size=32))
    assert (len(data.train), len(data.test), data.spec.num_classes) == (10_000, 2_000, 10)
    assert np.unique(data.train.labels).tolist() == list(range(10))
    assert data.train[0].shape == (3, 32, 32)
