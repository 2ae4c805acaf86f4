"""Every form of data gives the same pictures, and damaged or hostile files are one line."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lsgm.data.images import load_image, read_image
from lsgm.data.readers import FORMS, Source, open_source
from lsgm.data.readers.arrays import open_npz
from lsgm.data.readers.base import fingerprint
from lsgm.errors import UserError

lmdb = pytest.importorskip("lmdb")
h5py = pytest.importorskip("h5py")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
crc32c = pytest.importorskip("crc32c").crc32c
example_pb2 = pytest.importorskip("tfrecord.example_pb2")

FORMS_FOLDER = Path(os.environ.get("LSGM_DATA", "")) / "forms"
GIVEN = {
    "folder": "folder", "nested": "folder", "pictures.zip": "zip", "webdataset": "tar",
    "lmdb_raw": "lmdb", "lmdb_encoded": "lmdb", "tfrecord_glow": "tfrecord",
    "tfrecord_progan": "tfrecord", "train-00000-of-00001.parquet": "parquet",
    "pictures.h5": "hdf5", "medmnist_like.npz": "npz", "expected.npy": "npy",
}  # fmt: skip
RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (5, 6, 9, 3), dtype=np.uint8)
SQUARE = RNG.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)


def pixels(stored, name="p") -> np.ndarray:
    return np.asarray(load_image(stored, name))


def everything(source: Source) -> np.ndarray:
    order = [s for s in ("all", "train", "validation", "test") if s in source.splits]
    return np.stack(
        [pixels(source.splits[s].read(i)) for s in order for i in range(len(source.splits[s]))]
    )


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


@pytest.mark.skipif(not FORMS_FOLDER.is_dir(), reason="no forms in LSGM_DATA")
@pytest.mark.parametrize(("name", "form"), GIVEN.items())
def test_given_forms(name, form):
    source = open_source(FORMS_FOLDER / name)
    assert source.form == form
    assert np.array_equal(everything(source), np.load(FORMS_FOLDER / "expected.npy"))
    sizes = {split: len(pictures) for split, pictures in source.splits.items()}
    if form == "lmdb":
        assert sizes == {"train": 21, "validation": 3}
    elif form == "npz":
        assert sizes == {"train": 20, "validation": 2, "test": 2}
    labels = [p.labels for p in source.splits.values()]
    if form == "npz":
        assert labels == [[0] * 20, [0, 0], [0, 0]]
    elif form in ("zip", "tar", "parquet"):
        assert [label for part in labels for label in part] == [i % 3 for i in range(24)]
    elif name == "nested":
        assert labels == [["a", "b"] * 12]
    elif name != "tfrecord_glow":
        assert labels == [None] * len(labels)


def write_zip(path: Path, labels: object = None, **options) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for i, picture in enumerate(PICTURES):
            archive.writestr(f"0000{i % 2}/img{i}.png", png(picture))
        if labels is not None:
            archive.writestr("dataset.json", json.dumps(labels))
    return path


def add_member(archive: tarfile.TarFile, name: str, data: bytes, **fields) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    archive.addfile(info, io.BytesIO(data))


def write_tar(path: Path, start: int = 0, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for i, picture in enumerate(PICTURES):
            add_member(archive, f"{start + i:04d}.png", png(picture))
            add_member(archive, f"{start + i:04d}.json", json.dumps({"label": i}).encode())
    return path


def write_lmdb(path: Path, items: dict[bytes, bytes]) -> Path:
    with lmdb.open(str(path), map_size=1 << 22) as environment, environment.begin(write=True) as t:
        for key, value in items.items():
            t.put(key, value)
    return path


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def write_record(file, payload: bytes) -> None:
    length = struct.pack("<Q", len(payload))
    file.write(length + masked(length) + payload + masked(payload))


def example(array: np.ndarray, label: int | None = None, shape=None) -> bytes:
    message = example_pb2.Example()
    features = message.features.feature
    features["data"].bytes_list.value.append(array.tobytes())
    features["shape"].int64_list.value.extend(shape or array.shape)
    if label is not None:
        features["label"].int64_list.value.append(label)
    return message.SerializeToString()


def write_tfrecord(path: Path, pictures: np.ndarray, channels_first: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for i, picture in enumerate(pictures):
            array = np.ascontiguousarray(picture.transpose(2, 0, 1)) if channels_first else picture
            write_record(file, example(array, None if channels_first else 7 - i))
    return path


def write_parquet(path: Path, columns: dict, rows: int = 2) -> Path:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=rows)
    return path


def test_zip_takes_labels_from_its_json_and_else_from_folders(tmp_path):
    names = [f"0000{i % 2}/img{i}.png" for i in range(5)]
    given = write_zip(tmp_path / "a.zip", {"labels": [[n, 9 - i] for i, n in enumerate(names)]})
    pictures = open_source(given).splits["all"]
    assert list(pictures.names) == sorted(names)
    assert [9 - names.index(n) for n in pictures.names] == pictures.labels
    for i, name in enumerate(pictures.names):
        assert np.array_equal(pixels(pictures.read(i)), PICTURES[names.index(name)])
    folders = open_source(write_zip(tmp_path / "b.zip")).splits["all"]
    assert folders.labels == ["00000"] * 3 + ["00001"] * 2
    null = open_source(write_zip(tmp_path / "c.zip", {"labels": None}, compression=8))
    assert np.array_equal(
        pixels(null.splits["all"].read(0)), PICTURES[names.index(null.splits["all"].names[0])]
    )


def test_zip_with_splits(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i, picture in enumerate(PICTURES):
            archive.writestr(f"{'Train' if i < 3 else 'val'}/{'ab'[i % 2]}/{i}.png", png(picture))
        archive.writestr("__MACOSX/._0.png", b"no picture")
    source = open_source(tmp_path / "a.zip")
    assert {s: list(p.labels) for s, p in source.splits.items()} == {
        "train": ["a", "a", "b"],
        "validation": ["a", "b"],
    }
    assert source.ignored == {"hidden": 1}


def test_shards_are_one_set_and_may_be_splits(tmp_path):
    write_tar(tmp_path / "part-000001.tar", 5)
    write_tar(tmp_path / "part-000000.tar")
    pictures = open_source(tmp_path).splits["all"]
    assert pictures.labels == [0, 1, 2, 3, 4] * 2
    assert np.array_equal(pixels(pictures.read(8)), PICTURES[3])
    (tmp_path / "part-000001.tar").rename(tmp_path / "val-000001.tar")
    (tmp_path / "part-000000.tar").rename(tmp_path / "train-000000.tar")
    assert {s: len(p) for s, p in open_source(tmp_path).splits.items()} == {
        "train": 5,
        "validation": 5,
    }


def test_lsun_and_numeric_keys(tmp_path):
    write_lmdb(
        tmp_path / "church_train_lmdb", {b"zz9": png(PICTURES[0]), b"a\xff": png(PICTURES[1])}
    )
    write_lmdb(tmp_path / "church_val_lmdb", {b"q": png(PICTURES[2])})
    source = open_source(tmp_path)
    assert source.splits["train"].names == ["a\\xff", "zz9"]
    assert np.array_equal(pixels(source.splits["train"].read(0)), PICTURES[1])
    assert source.splits["train"].labels is None
    write_lmdb(tmp_path / "tower_train_lmdb", {b"t": png(PICTURES[3])})
    assert open_source(tmp_path).splits["train"].labels == ["church", "church", "tower"]
    raw = write_lmdb(tmp_path / "raw", {str(i).encode(): s.tobytes() for i, s in enumerate(SQUARE)})
    found = open_source(raw)
    assert found.splits["all"].names == [str(i) for i in range(12)]  # by number, not by bytes
    assert np.array_equal(everything(found), SQUARE)


def test_tfrecords_of_both_layouts(tmp_path):
    for split in ("train", "validation"):
        for shard in range(2):
            name = f"{split}-r03-s-{shard:04d}-of-0002.tfrecords"
            write_tfrecord(tmp_path / "glow" / split / name, SQUARE[shard::2])
    glow = open_source(tmp_path / "glow")
    assert {s: len(p) for s, p in glow.splits.items()} == {"train": 12, "validation": 12}
    assert glow.splits["train"].labels == [7, 6, 5, 4, 3, 2] * 2
    assert np.array_equal(pixels(glow.splits["train"].read(7)), SQUARE[3])
    for level in (1, 3, 2):
        small = SQUARE[:, : 2**level, : 2**level]
        write_tfrecord(tmp_path / "progan" / f"x-r{level:02d}.tfrecords", small, True)
    progan = open_source(tmp_path / "progan")
    assert list(progan.splits) == ["all"] and progan.splits["all"].labels is None
    assert np.array_equal(everything(progan), SQUARE)  # the largest
    wide = write_tfrecord(tmp_path / "wide.tfrecords", PICTURES, True)
    assert np.array_equal(everything(open_source(wide)), PICTURES)


def test_parquet_over_files_and_row_groups(tmp_path):
    images = [{"bytes": png(p), "path": f"{i}.png"} for i, p in enumerate(PICTURES)]
    write_parquet(tmp_path / "train-0.parquet", {"image": images[:3], "label": [4, 5, 6]}, rows=2)
    write_parquet(tmp_path / "test-0.parquet", {"image": images[3:], "label": [7, 8]})
    source = open_source(tmp_path)
    assert source.splits["train"].labels == [4, 5, 6] and source.splits["test"].labels == [7, 8]
    assert np.array_equal(everything(source), PICTURES)
    flat = write_parquet(tmp_path / "x.parquet", {"img": [i["bytes"] for i in images]})
    assert np.array_equal(everything(open_source(flat)), PICTURES)


def test_arrays(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", images=PICTURES, labels=np.arange(5)[:, None])
    source = open_source(tmp_path / "a.npz")
    assert source.splits["all"].labels == [0, 1, 2, 3, 4]
    assert np.array_equal(everything(source), PICTURES)
    np.save(tmp_path / "grey.npy", SQUARE[..., :1])
    assert np.array_equal(everything(open_source(tmp_path / "grey.npy")), SQUARE[..., 0])
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["train/images"], file["train/labels"] = PICTURES, np.arange(5)
        file["val/images"] = PICTURES[:2]
    found = open_source(tmp_path / "a.h5")
    assert found.splits["train"].labels == [0, 1, 2, 3, 4]
    assert np.array_equal(everything(found), np.concatenate([PICTURES, PICTURES[:2]]))


def test_other_processes_open_their_own_files(tmp_path):
    write_zip(tmp_path / "a.zip")
    (tmp_path / "t").mkdir()
    write_tar(tmp_path / "t/a.tar")
    write_tfrecord(tmp_path / "a.tfrecords", SQUARE)
    write_lmdb(tmp_path / "l", {b"1": png(PICTURES[0])})
    for name in ("a.zip", "t", "a.tfrecords", "l"):
        pictures = open_source(tmp_path / name).splits["all"]
        first = pixels(pictures.read(0))
        assert np.array_equal(pixels(pickle.loads(pickle.dumps(pictures)).read(0)), first)


def test_fingerprints_tell_edited_files_apart(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(100))
    first = fingerprint([path])
    path.write_bytes(bytes(99) + b"\1")
    assert fingerprint([path]) != first
    (tmp_path / "f").mkdir()
    for i, picture in enumerate(PICTURES):
        (tmp_path / "f" / f"{i}.png").write_bytes(png(picture))
    before = open_source(tmp_path / "f").fingerprint
    assert open_source(tmp_path / "f").fingerprint == before
    (tmp_path / "f" / "0.png").write_bytes(png(PICTURES[1]))
    assert open_source(tmp_path / "f").fingerprint != before


def test_nested_folders_are_in_the_order_of_file_names(tmp_path):
    for i in range(5):
        folder = tmp_path / "f" / "abcde"[4 - i] if i < 4 else tmp_path / "f"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.PNG").write_bytes(png(PICTURES[i]))
    source = open_source(tmp_path / "f")
    assert np.array_equal(everything(source), PICTURES) and source.splits["all"].labels is None


def test_crops_and_bytes_are_read_as_files_are(tmp_path):
    picture = RNG.integers(0, 256, (218, 178, 3), dtype=np.uint8)
    (tmp_path / "a.png").write_bytes(png(picture))
    for options in ({}, {"box": (15, 40, 163, 188)}, {"crop": 140}):
        a, b, c = (
            read_image(stored, 64, 3, name="a", **options)
            for stored in (tmp_path / "a.png", png(picture), picture)
        )
        assert (a == b).all() and (a == c).all()
    exact = read_image(picture, 148, 3, name="a", box=(15, 40, 163, 188))
    assert np.array_equal(exact.permute(1, 2, 0), picture[40:188, 15:163])
    centre = read_image(picture, 140, 3, name="a", crop=140)
    assert np.array_equal(centre.permute(1, 2, 0), picture[39:179, 19:159])


# Damaged and hostile files


def truncated(path: Path, keep: float = 0.6) -> Path:
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    return path


def _zip_cut(d):
    return truncated(write_zip(d / "a.zip"))


def _zip_json(labels):
    return lambda d: write_zip(d / "a.zip", labels)


def _zip_empty(d):
    zipfile.ZipFile(d / "a.zip", "w").close()
    return d / "a.zip"


def _tar_cut(d):
    return truncated(write_tar(d / "a.tar"), 0.12)


def _tar_compressed(d):
    return write_tar(d / "a.tar", mode="w:gz")


def _tar_links(d):
    with tarfile.open(d / "a.tar", "w") as archive:
        add_member(archive, "../../etc.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add_member(archive, "dev.png", b"", type=tarfile.CHRTYPE)
    return d / "a.tar"


def _record(header: bytes, rest: bytes = b""):
    def make(d):
        (d / "a.tfrecords").write_bytes(header + rest)
        return d / "a.tfrecords"

    return make


HUGE = struct.pack("<Q", 1 << 60)


def _record_payload_cut(d):
    return truncated(write_tfrecord(d / "a.tfrecords", SQUARE), 0.97)


def _record_flipped(d):
    path = write_tfrecord(d / "a.tfrecords", SQUARE)
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    return path


def _record_no_example(d):
    with (d / "a.tfrecords").open("wb") as file:
        write_record(file, b"\xff" * 20)
    return d / "a.tfrecords"


def _lmdb_cut(d):
    path = write_lmdb(d / "l", {str(i).encode(): bytes(3000) for i in range(200)})
    truncated(path / "data.mdb")
    return path


def _lmdb_noise(d):
    (d / "l").mkdir()
    (d / "l/data.mdb").write_bytes(RNG.bytes(10000))
    return d / "l"


def _parquet_cut(d):
    return truncated(write_parquet(d / "a.parquet", {"image": [png(PICTURES[0])]}))


def _parquet_other(d):
    return write_parquet(d / "a.parquet", {"text": ["a"], "label": [1]})


def _parquet_strings(d):
    return write_parquet(d / "a.parquet", {"image": ["a.png"]})


def _hdf5_cut(d):
    with h5py.File(d / "a.h5", "w") as file:
        file["images"] = PICTURES
    return truncated(d / "a.h5")


def _hdf5_floats(d):
    with h5py.File(d / "a.h5", "w") as file:
        file["images"] = PICTURES / 255
    return d / "a.h5"


def _hdf5_external(d):
    (d / "secret").write_bytes(bytes(1000))
    with h5py.File(d / "a.h5", "w") as file:
        file.create_dataset(
            "images", (10, 10, 10), "u1", external=[(str(d / "secret"), 0, h5py.h5f.UNLIMITED)]
        )
    return d / "a.h5"


def _npz(**arrays):
    def make(d):
        np.savez(d / "a.npz", **arrays)
        return d / "a.npz"

    return make


def _npz_cut(d):
    return truncated(_npz(images=PICTURES)(d))


def _npy(array):
    def make(d):
        np.save(d / "a.npy", array)
        return d / "a.npy"

    return make


def _npy_cut(d):
    return truncated(_npy(PICTURES)(d))


def _npz_claims(d):
    """A member whose header claims a petabyte."""
    member = io.BytesIO()
    header = {"shape": (1 << 24, 1 << 13, 1 << 13), "fortran_order": False, "descr": "|u1"}
    np.lib.format.write_array_header_1_0(member, header)
    with zipfile.ZipFile(d / "a.npz", "w") as archive:
        archive.writestr("images.npy", member.getvalue())
    return d / "a.npz"


def _text(d):
    (d / "a.bin").write_bytes(b"no pictures here" * 50)
    return d / "a.bin"


def _nothing(d):
    return d / "absent"


def _empty_folder(d):
    (d / "f").mkdir()
    (d / "f/readme.txt").write_text("nothing")
    return d / "f"


def _two_splits_of_a_name(d):
    for name in ("train", "Training", "test"):
        (d / "f" / name).mkdir(parents=True)
        (d / "f" / name / "0.png").write_bytes(png(PICTURES[0]))
    return d / "f"


def _no_train(d):
    write_lmdb(d / "val.lmdb", {b"1": png(PICTURES[0])})
    write_lmdb(d / "test.lmdb", {b"1": png(PICTURES[0])})
    return d


ONE = "00000/img0.png"
BAD = {
    "zip, truncated": (_zip_cut, "not a readable"),
    "zip, empty": (_zip_empty, "no picture"),
    "zip, labels are a list": (_zip_json([1]), 'is not {"labels"'),
    "zip, a file without label": (_zip_json({"labels": [[ONE, 1]]}), "no label of"),
    "zip, a label is a float": (_zip_json({"labels": [[ONE, 0.5]]}), "from 0 on, not 0.5"),
    "tar, truncated": (_tar_cut, "a.tar"),
    "tar, compressed": (_tar_compressed, "none of the forms"),
    "tar, links and devices": (_tar_links, "no picture"),
    "tfrecord, truncated header": (_record(b"12345"), "ends early"),
    "tfrecord, truncated payload": (_record_payload_cut, "do not fit"),
    "tfrecord, petabytes": (_record(HUGE, masked(HUGE)), "do not fit"),
    "tfrecord, wrong checksum": (_record_flipped, "checksum"),
    "tfrecord, no example": (_record_no_example, "no Example"),
    "lmdb, truncated": (_lmdb_cut, "ends early"),
    "lmdb, noise": (_lmdb_noise, "not a readable LMDB"),
    "lmdb, no train": (_no_train, "no train"),
    "parquet, truncated": (_parquet_cut, "not a readable Parquet"),
    "parquet, other columns": (_parquet_other, "there are text, label"),
    "parquet, paths": (_parquet_strings, "encoded pictures"),
    "hdf5, truncated": (_hdf5_cut, "not a readable HDF5"),
    "hdf5, floats": (_hdf5_floats, "uint8 (N, H, W)"),
    "hdf5, data of another file": (_hdf5_external, "uint8 (N, H, W)"),
    "npz, truncated": (_npz_cut, "not a readable"),
    "npz, objects": (_npz(images=np.array([{}], dtype=object)), "uint8 (N, H, W)"),
    "npz, labels of other length": (_npz(images=PICTURES, labels=np.arange(4)), "5 whole numbers"),
    "npz, two arrays": (_npz(a=PICTURES, b=PICTURES), "one array of pictures"),
    "npz, a petabyte": (_npz_claims, "bytes"),
    "npy, truncated": (_npy_cut, "not a readable NPY"),
    "npy, floats": (_npy(PICTURES / 2), "uint8 (N, H, W)"),
    "npy, objects": (_npy(np.array([{}], dtype=object)), "NPY"),
    "another file": (_text, "none of the forms"),
    "nothing": (_nothing, "no such file"),
    "no picture": (_empty_folder, "no picture"),
    "one split twice": (_two_splits_of_a_name, "keep one of them"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_damaged_and_hostile_sources_are_one_line(tmp_path, kind):
    make, words = BAD[kind]
    path = make(tmp_path)
    with pytest.raises(UserError) as raised:
        open_source(path)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_single_pictures_are_broken_without_the_rest(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", compression=zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", png(PICTURES[0]))
        archive.writestr("1.png", bytes(400 << 20))  # a bomb: 400 MiB of zeros
        archive.writestr("2.png", b"text")
    pictures = open_source(tmp_path / "a.zip").splits["all"]
    assert np.array_equal(pixels(pictures.read(0)), PICTURES[0])
    with pytest.raises(UserError, match="larger than"):
        pictures.read(1)
    with pytest.raises(UserError, match="not a readable image"):
        load_image(pictures.read(2), "a.zip: 2.png")
    raw = write_lmdb(tmp_path / "l", {b"0": SQUARE[0].tobytes(), b"1": bytes(100)})
    found = open_source(raw).splits["all"]
    assert np.array_equal(found.read(0), SQUARE[0])
    with pytest.raises(UserError, match="100 bytes are neither"):
        found.read(1)
    path = tmp_path / "a.tfrecords"
    with path.open("wb") as file:
        write_record(file, example(SQUARE[0], shape=(3, 3, 3)))
    with pytest.raises(UserError, match="do not have the shape"):
        open_source(path).splits["all"].read(0)


def test_forms_can_be_named(tmp_path):
    write_zip(tmp_path / "a.zip")
    assert open_source(tmp_path / "a.zip", "zip").form == "zip"
    with pytest.raises(UserError, match=r"--form: there is no rar; there are folder, .*npy"):
        open_source(tmp_path / "a.zip", "rar")
    with pytest.raises(UserError, match="is a file and no folder"):
        open_source(tmp_path / "a.zip", "folder")
    assert set(FORMS) == {
        "folder",
        "zip",
        "tar",
        "lmdb",
        "tfrecord",
        "parquet",
        "hdf5",
        "npz",
        "npy",
    }
    with pytest.raises(UserError, match="not a readable"):
        open_npz(tmp_path / "a.zip")
