from __future__ import annotations

import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from lsgm.config.command_line import load_config
from lsgm.config.training import DataConfig, VAETrainConfig
from lsgm.data import (
    ArrayDataset,
    Batches,
    DataSpec,
    build_datasets,
    epoch_order,
    fixed_binarisation,
    preprocess,
    random_affine,
    random_flip,
    reduce_bits,
    sources,
    storage,
)
from lsgm.data.folder import FolderDataset
from lsgm.data.pixels import Pixels
from lsgm.data.sources import column_major_images
from lsgm.errors import UserError
from lsgm.evaluation.likelihood.bounds import evaluation_batches
from lsgm.system.torchvision import import_torchvision
from vae.random import ShardedGenerator

BINARY = DataSpec("toy", channels=1, image_size=4, padding=0, binary=True)
COLOUR = DataSpec("toy", channels=3, image_size=4, padding=0, binary=False)


def message(function, *args, **kwargs) -> str:
    """The one line of the UserError that a call raises."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    text = str(caught.value)
    assert text and "\n" not in text
    return text


def numbered(n: int) -> ArrayDataset:
    """Images whose pixels are all their index, out of 255."""
    return ArrayDataset(torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 4, 4))


def numbers(images: torch.Tensor) -> list[int]:
    return (images[:, 0, 0, 0] * 255).round().int().tolist()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def write_images(
    folder: Path, count: int, mode: str = "RGB", size: tuple[int, int] = (12, 9)
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{i}.png")


# Order and batches


def test_epoch_order_is_a_permutation_fixed_by_seed_and_epoch():
    orders = {(s, e): epoch_order(50, s, e).tolist() for s in range(4) for e in range(4)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert orders[2, 3] == epoch_order(50, 2, 3).tolist()
    assert len({tuple(order) for order in orders.values()}) == len(orders)  # (1, 2) is not (2, 1)


def test_training_epoch_visits_each_image_once_but_for_the_dropped_rest():
    batches = Batches(numbered(23), 5, train=True, seed=1)
    epoch = [(step, numbers(images)) for step, images in batches.epoch(2)]
    assert [step for step, _ in epoch] == [0, 1, 2, 3] == list(range(batches.steps_per_epoch))
    assert [n for _, batch in epoch for n in batch] == epoch_order(23, 1, 2)[:20].tolist()


def test_resuming_inside_an_epoch_gives_the_same_batches():
    batches = Batches(numbered(40), 4, train=True, seed=3)
    whole = [(step, numbers(images)) for step, images in batches.epoch(7)]
    again = Batches(numbered(40), 4, train=True, seed=3)
    assert [(step, numbers(images)) for step, images in again.epoch(7, start=6)] == whole[6:]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("world_size", [2, 4])
def test_parts_of_all_ranks_make_the_global_batch(train, world_size):
    options = {"train": train, "seed": 5}
    whole = [numbers(images) for _, images in Batches(numbered(30), 8, **options).epoch(1)]
    parts = [
        {step: numbers(images) for step, images in b.epoch(1)}
        for b in (
            Batches(numbered(30), 8, rank=r, world_size=world_size, **options)
            for r in range(world_size)
        )
    ]
    assert [sum((part.get(step, []) for part in parts), []) for step in range(len(whole))] == whole


def test_evaluation_keeps_order_and_every_image():
    assert sum(
        (numbers(images) for _, images in Batches(numbered(10), 4, train=False).epoch()), []
    ) == list(range(10))
    limited = Batches(numbered(10), 4, train=False, limit=5)
    assert [len(images) for _, images in limited.epoch()] == [4, 1]


def test_impossible_batches_are_refused():
    with pytest.raises(ValueError, match="does not divide"):
        Batches(numbered(10), 5, train=True, world_size=2)
    with pytest.raises(ValueError, match="more than the 10"):
        Batches(numbered(10), 11, train=True)


# From [0, 1] to the model's input


def test_binarisation_has_the_grey_value_as_mean():
    n = 4000
    grey = torch.linspace(0, 1, 16).view(1, 1, 4, 4)
    x = preprocess(grey.expand(n, 1, 4, 4), BINARY, rng=seeded())
    assert set(x.unique().tolist()) == {-1.0, 1.0}
    mean = ((x + 1) / 2).mean(0, keepdim=True)
    standard_error = (grey * (1 - grey) / n).sqrt()
    assert (
        (mean - grey).abs() <= 4 * standard_error
    ).all()  # exact at 0 and 1, where the error is 0


def test_training_draws_are_fresh_and_fixed_by_the_generator():
    grey = torch.full((8, 1, 4, 4), 0.5)
    rng = seeded(1)
    first, second = preprocess(grey, BINARY, rng=rng), preprocess(grey, BINARY, rng=rng)
    assert not torch.equal(first, second)
    assert torch.equal(first, preprocess(grey, BINARY, rng=seeded(1)))


@pytest.mark.parametrize("spec", [BINARY, DataSpec("toy", 1, 4, 0, True, flip=True, affine=True)])
def test_two_processes_see_the_noise_of_one(spec):
    grey = torch.rand(6, 1, 4, 4, generator=seeded())
    whole = preprocess(grey, spec, rng=seeded(2), train=True)
    parts = [
        preprocess(grey[3 * r : 3 * r + 3], spec, rng=ShardedGenerator(seeded(2), r, 2), train=True)
        for r in range(2)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_fixed_binarisation_is_one_draw_per_image():
    grey = ArrayDataset(torch.rand(1500, 1, 4, 4, generator=seeded()), padding=2)
    fixed = fixed_binarisation(grey, seed=4)
    everything = fixed.batch(torch.arange(1500))
    assert set(everything.unique().tolist()) == {0.0, 1.0}
    assert everything.shape == (1500, 1, 8, 8)
    assert torch.equal(everything, fixed_binarisation(grey, seed=4).batch(torch.arange(1500)))
    assert not torch.equal(everything, fixed_binarisation(grey, seed=5).batch(torch.arange(1500)))
    # What evaluation does with it changes nothing, whatever the generator.
    assert torch.equal(preprocess(fixed.batch(torch.arange(9)), BINARY), 2 * everything[:9] - 1)


@pytest.mark.parametrize("bits", range(1, 9))
def test_bit_reduction_is_exact(bits):
    k = torch.arange(256)
    kept = reduce_bits(k.to(torch.uint8).float() / 255.0, bits) * (2**bits - 1)
    torch.testing.assert_close(kept, (k // 2 ** (8 - bits)).float(), rtol=0, atol=1e-4)
    x = preprocess((k / 255.0).view(-1, 1, 1, 1), COLOUR, bits)
    assert (x.min(), x.max(), len(x.unique())) == (-1, 1, 2**bits)


def test_bits_are_checked():
    with pytest.raises(ValueError, match="8 for binary"):
        preprocess(torch.zeros(1, 1, 4, 4), BINARY, 5)
    with pytest.raises(ValueError, match="1 to 8"):
        preprocess(torch.zeros(1, 3, 4, 4), COLOUR, 9)


def test_flips_mirror_half_of_the_images():
    images = torch.rand(1000, 1, 4, 4, generator=seeded())
    flipped = random_flip(images, seeded(1))
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    kept = (flipped == images).flatten(1).all(1)
    assert (mirrored ^ kept).all()
    assert abs(mirrored.float().mean() - 0.5) < 4 * 0.5 / 1000**0.5


def test_affine_moves_ink_without_bias_and_never_into_the_padding():
    n, side = 2000, 24
    blob = torch.zeros(1, 1, side, side)
    blob[..., 9:15, 9:15] = 1.0
    padded = torch.nn.functional.pad(blob, (2, 2, 2, 2)).expand(n, 1, side + 4, side + 4)
    moved = random_affine(padded, 2, seeded())
    border = moved.clone()
    border[..., 2:-2, 2:-2] = 0
    assert border.abs().max() == 0
    assert moved.min() >= 0 and moved.max() <= 1
    place = torch.arange(side + 4.0) - (side + 3) / 2
    ink = moved.sum((1, 2, 3))
    for axis in (2, 3):
        centre = (moved.sum((1, 5 - axis)) * place).sum(1) / ink
        # Uniform shifts of at most 0.08 of the side, seen through the scaling and shear.
        assert centre.abs().max() < 0.08 * side * 1.25
        assert 0.8 < centre.std() / (0.08 * side / 3**0.5) < 1.2
        assert centre.mean().abs() < 4 * centre.std() / n**0.5
    assert abs(ink.mean() / 36 - 1) < 0.05


def test_no_frame_comes_in_from_outside_of_a_picture():
    grey = torch.full((50, 3, 12, 12), 0.7)
    torch.testing.assert_close(random_affine(grey, 0, seeded(), "reflection"), grey)
    assert random_affine(grey, 0, seeded(), "zeros").min() < 0.1
    spec = DataSpec("toy", 3, 12, 0, False, affine=True, affine_padding="reflection")
    augmented = preprocess(grey, spec, rng=seeded(), train=True)
    torch.testing.assert_close(augmented, 2 * grey - 1)
    torch.testing.assert_close(Pixels.of(spec, "unit", False).augment(grey, seeded()), grey)


def test_augmentation_belongs_to_the_dataset(tmp_path):
    """The README's example: pictures of one's own under the configuration made for digits."""
    write_images(tmp_path, 4)
    words = ["--data.name", "folder", "--data.root", str(tmp_path), "--data.image_size", "8"]
    config = Path(__file__).parent.parent / "configs" / "digits" / "vae.yaml"
    data = load_config(VAETrainConfig, config, words).data
    assert not build_datasets(data).spec.affine
    data = load_config(VAETrainConfig, config, [*words, "--data.augment", "affine"]).data
    spec = build_datasets(data).spec
    assert spec.affine and spec.affine_padding == "reflection"
    assert build_datasets(load_config(VAETrainConfig, config).data).spec.affine


def test_digits_are_augmented_unless_told_otherwise():
    affine = {
        choice: build_datasets(DataConfig(augment=choice)).spec.affine
        for choice in ("auto", "none", "affine")
    }
    assert affine == {"auto": True, "none": False, "affine": True}
    assert build_datasets(DataConfig()).spec.affine_padding == "zeros"


def test_bounds_on_training_images_are_of_the_images_themselves():
    images = torch.rand(6, 3, 8, 8, generator=seeded())
    spec = DataSpec("toy", 3, 8, 0, False, flip=True, affine=True, affine_padding="reflection")
    batches = evaluation_batches(ArrayDataset(images), spec, batch_size=4)
    assert torch.equal(torch.cat(list(batches)), 2 * images - 1)


# Named datasets


def test_digits_are_a_fixed_stratified_split():
    data = build_datasets(DataConfig())
    assert (data.spec.network_shape, data.spec.num_dims, data.spec.binary) == ((16, 16), 256, True)
    assert len(data.train) + len(data.test) == 1797
    for label in range(10):
        train, test = (int((split.labels == label).sum()) for split in (data.train, data.test))
        assert abs(test / (train + test) - 0.2) < 0.005
    assert torch.equal(data.test.images, build_datasets(DataConfig()).test.images)
    assert data.train[0].shape == (1, 16, 16)


def chardata(folder: Path, **arrays: object) -> DataConfig:
    rng = np.random.default_rng(0)
    contents: dict = {"data": rng.random((784, 6)), "testdata": rng.random((784, 3))} | arrays
    (folder / "omniglot").mkdir(exist_ok=True)
    savemat(
        folder / "omniglot" / "chardata.mat", {k: v for k, v in contents.items() if v is not None}
    )
    return DataConfig(name="omniglot", root=str(folder))


def test_omniglot_columns_are_read_in_column_major_order(tmp_path):
    image = np.random.default_rng(1).random((28, 28)).astype(np.float32)
    data = build_datasets(chardata(tmp_path, data=image.flatten(order="F")[:, None]))
    np.testing.assert_array_equal(data.train[0][0, 2:30, 2:30].numpy(), image)
    assert data.train[0].shape == (1, 32, 32)
    assert data.train[0].sum() == pytest.approx(image.sum(), rel=1e-5)  # the padding is empty


def test_grey_values_of_8_bits_are_kept_as_such():
    columns = np.arange(784, dtype=np.float64)[:, None] % 256 / 255
    assert column_major_images(columns, 28).dtype == torch.uint8
    assert column_major_images(columns * 0.999, 28).dtype == torch.float32


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"testdata": None}, "no array 'testdata' (found: data)"),
        (
            {"data": np.zeros((5, 784))},
            "'data' has shape (5, 784) where (784, number of images) is needed",
        ),
        ({"data": np.zeros((784, 0))}, "where (784, number of images) is needed"),
        ({"data": np.full((784, 2), 2.0)}, "'data' has values that are not numbers in [0, 1]"),
        (
            {"testdata": np.full((784, 2), np.nan)},
            "'testdata' has values that are not numbers in [0, 1]",
        ),
        ({"data": "text"}, "'data' has shape"),
    ],
)
def test_wrong_omniglot_files_are_refused(tmp_path, arrays, expected):
    line = message(build_datasets, chardata(tmp_path, **arrays))
    assert str(tmp_path / "omniglot" / "chardata.mat") in line
    assert expected in line


def one_hot(labels: list[int], rows: int = 50) -> np.ndarray:
    return np.eye(rows)[:, labels]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (np.full((50, 6), np.nan), "must have one 1 in each column"),
        (np.zeros((50, 6)), "must have one 1 in each column"),
        (one_hot([0, 1, 2, 3, 4, 5]) * 2, "must have one 1 in each column"),
        (one_hot([60, 1, 2, 3, 4, 5], rows=70), "has shape (70, 6) where (50, 6) is needed"),
        (one_hot([0, 1, 2]), "has shape (50, 3) where (50, 6) is needed"),
    ],
    ids=["NaN", "none", "twos", "out of range", "too few"],
)
def test_wrong_omniglot_labels_are_refused(tmp_path, target, expected):
    line = message(build_datasets, chardata(tmp_path, target=target, testtarget=one_hot([0, 1, 2])))
    assert "chardata.mat: 'target'" in line and expected in line


def test_omniglot_has_classes_where_both_splits_have_labels(tmp_path):
    labels = one_hot([3, 1, 4, 1, 5, 9])
    data = build_datasets(chardata(tmp_path, target=labels, testtarget=one_hot([2, 6, 49])))
    assert data.spec.num_classes == 50 and data.test.labels.tolist() == [2, 6, 49]
    assert build_datasets(chardata(tmp_path, target=labels)).spec.num_classes is None


def test_array_datasets_refuse_labels_that_are_no_classes():
    images = torch.zeros(2, 1, 4, 4)
    for labels in (torch.tensor([float("nan"), 1.0]), torch.tensor([-1, 0])):
        with pytest.raises(ValueError, match="labels must be int64 and at least 0"):
            ArrayDataset(images, labels)


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.astype(np.uint8).tobytes()


@pytest.mark.parametrize(
    ("images", "labels", "expected"),
    [
        (idx(np.zeros((3, 28, 28)))[:-5], idx(np.zeros(3)), "files are damaged"),
        (b"<html>", idx(np.zeros(3)), "files are damaged"),
        (b"", idx(np.zeros(3)), "files are damaged"),
        (idx(np.zeros((3, 32, 32))), idx(np.zeros(3)), "(3, 32, 32) where (N, 28, 28)"),
        (idx(np.zeros((3, 28, 28))), idx(np.zeros(2)), "3 images, but labels of shape (2,)"),
        (idx(np.zeros((3, 28, 28))), idx(np.array([0, 10, 1])), "0 to 10 where 0 to 9"),
    ],
    ids=["truncated", "text", "empty", "shape", "count", "label"],
)
def test_damaged_mnist_files_are_refused(tmp_path, monkeypatch, images, labels, expected):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        (raw / f"{split}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(labels)
    monkeypatch.setattr(sources, "fetch_into", offline)  # what is damaged is not missing
    line = message(build_datasets, DataConfig(name="mnist", root=str(tmp_path)))
    assert str(tmp_path / "MNIST") in line and expected in line


def test_damaged_cifar10_files_are_refused_before_they_are_unpickled(tmp_path, monkeypatch):
    (tmp_path / "cifar-10-batches-py").mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    import_torchvision("datasets")
    monkeypatch.setattr("torchvision.datasets.cifar.pickle.load", offline)
    line = message(build_datasets, DataConfig(name="cifar10", root=str(tmp_path)))
    assert "cifar-10-batches-py: files are missing or damaged" in line


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_damaged_omniglot_file_is_refused(tmp_path, damage):
    cfg = chardata(tmp_path)
    path = tmp_path / "omniglot" / "chardata.mat"
    whole = path.read_bytes()
    path.write_bytes(
        {"truncated": whole[: len(whole) // 2], "text": b"<html>" * 99, "empty": b""}[damage]
    )
    line = message(build_datasets, cfg)
    assert str(path) in line and sources.OMNIGLOT_URL in line


def offline(*args: object, **kwargs: object) -> None:
    raise urllib.error.URLError("no network")


def test_missing_omniglot_without_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.urllib.request, "urlopen", offline)
    line = message(build_datasets, DataConfig(name="omniglot", root=str(tmp_path)))
    target = tmp_path / "omniglot" / "chardata.mat"
    assert all(
        part in line for part in (str(target), sources.OMNIGLOT_URL, "no network", "LSGM_DATA")
    )
    assert list((tmp_path / "omniglot").iterdir()) == []  # nothing half-done stays


def test_omniglot_is_fetched_once_and_checked(tmp_path, monkeypatch):
    source = tmp_path / "server"
    source.mkdir()
    chardata(source)
    calls = []

    def served(request, timeout):
        calls.append(request.full_url)
        return (source / "omniglot" / "chardata.mat").open("rb")

    monkeypatch.setattr(storage.urllib.request, "urlopen", served)
    cfg = DataConfig(name="omniglot", root=str(tmp_path / "new" / "root"))
    assert len(build_datasets(cfg).train) == len(build_datasets(cfg).train) == 6
    assert calls == [sources.OMNIGLOT_URL]

    (source / "omniglot" / "chardata.mat").write_bytes(b"<html>not found</html>")
    broken = DataConfig(name="omniglot", root=str(tmp_path / "other"))
    assert "sent is not the OMNIGLOT file" in message(build_datasets, broken)
    assert list((tmp_path / "other" / "omniglot").iterdir()) == []


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_missing_torchvision_data_without_network_say_what_to_do(tmp_path, monkeypatch, name):
    import_torchvision("datasets")
    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", offline)
    line = message(build_datasets, DataConfig(name=name, root=str(tmp_path)))
    assert "no network" in line or "Error downloading" in line
    assert str(tmp_path) in line and "LSGM_DATA" in line
    assert list(tmp_path.iterdir()) == []


def test_lsgm_data_names_the_root(tmp_path, monkeypatch):
    chardata(tmp_path)
    monkeypatch.setenv("LSGM_DATA", str(tmp_path))
    assert len(build_datasets(DataConfig(name="omniglot")).test) == 3
    monkeypatch.delenv("LSGM_DATA")
    assert storage.data_root(None) == Path("~/.cache/lsgm").expanduser()


def test_real_omniglot(data_dir):
    data = build_datasets(DataConfig(name="omniglot", root=str(data_dir)))
    assert (data.spec.image_size, data.spec.padding, data.spec.num_dims) == (28, 2, 784)
    assert len(data.train) > 20000 and data.train.labels is not None
    images = data.test.images[:, 0].float()
    place = torch.arange(28.0) - 13.5

    def spread(ink: torch.Tensor) -> torch.Tensor:
        weight = ink / ink.sum(1, keepdim=True)
        centre = (weight * place).sum(1, keepdim=True)
        return (weight * (place - centre) ** 2).sum(1)

    # Characters are taller than wide: 0.23 with a standard error of 0.01; transposed it is -0.23.
    elongation = (spread(images.sum(2)) / spread(images.sum(1))).log()
    assert elongation.mean() > 10 * elongation.std() / len(images) ** 0.5


def test_real_mnist(data_dir):
    data = build_datasets(DataConfig(name="mnist", root=str(data_dir)))
    assert (len(data.train), len(data.test), data.spec.network_shape) == (60000, 10000, (32, 32))
    ones = data.train.batch((data.train.labels == 1).nonzero()[:500, 0])
    ink = ones.sum((0, 1))
    place = torch.arange(32.0) - 15.5
    spread = [(ink.sum(axis) * place**2).sum() / ink.sum() for axis in (1, 0)]
    assert spread[0] > 2 * spread[1]  # a one is tall


# Folders


def folder_config(root: Path, **options: object) -> DataConfig:
    return DataConfig(name="folder", root=str(root), **({"image_size": 8} | options))


def test_folder_split_is_fixed_and_complete(tmp_path):
    write_images(tmp_path / "deep" / "er", 10)
    write_images(tmp_path, 10)
    config = folder_config(tmp_path, test_fraction=0.25, cache="off")
    one, two = (build_datasets(config) for _ in range(2))
    assert (len(one.train), len(one.test)) == (15, 5)
    assert one.test.paths == two.test.paths
    assert len({*one.train.paths, *one.test.paths}) == 20
    assert one.spec == DataSpec(
        "folder", 3, 8, 0, False, None, flip=True, affine_padding="reflection"
    )
    assert one.train[0].shape == (3, 8, 8)


def test_folder_with_splits_and_classes(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        for name in ("b", "a"):
            write_images(tmp_path / split / name, count)
    data = build_datasets(folder_config(tmp_path))
    assert (len(data.train), len(data.test), data.spec.num_classes) == (6, 4, 2)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_folder_resizes_the_shorter_side_and_crops_the_centre(tmp_path):
    wide = np.zeros((20, 60, 3), dtype=np.uint8)
    wide[:, 20:40] = (255, 128, 0)  # the centre square
    Image.fromarray(wide).save(tmp_path / "a.png")
    Image.fromarray(wide.swapaxes(0, 1).copy()).save(tmp_path / "b.png")
    data = FolderDataset(
        [tmp_path / "a.png", tmp_path / "b.png"],
        size=(20, 20),
        channels=3,
        labels=None,
        num_workers=0,
    )
    expected = torch.tensor([255, 128, 0]).view(1, 3, 1, 1).expand(2, 3, 20, 20) / 255.0
    torch.testing.assert_close(data.batch(torch.arange(2)), expected)


def test_folder_reads_grey_16_bit_and_rotated_images(tmp_path):
    write_images(tmp_path, 3, mode="L")
    assert build_datasets(folder_config(tmp_path)).spec.channels == 1
    assert build_datasets(folder_config(tmp_path, channels=3)).train[0].shape == (3, 8, 8)
    Image.fromarray(np.full((8, 8), 65535 // 2, dtype=np.uint16)).save(tmp_path / "deep.png")
    deep = FolderDataset(
        [tmp_path / "deep.png"], size=(8, 8), channels=1, labels=None, num_workers=0
    )
    assert deep[0].mean() == pytest.approx(0.5, abs=0.01)


def test_folder_with_threads_and_gathering_ahead_changes_nothing(tmp_path):
    write_images(tmp_path, 20)
    runs = [
        [
            images
            for _, images in Batches(
                build_datasets(folder_config(tmp_path, num_workers=n)).train, 4, train=True
            ).epoch()
        ]
        for n in (0, 3)
    ]
    assert len(runs[0]) == 4
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_folder_reads_each_file_once(tmp_path):
    write_images(tmp_path, 4)
    data = build_datasets(folder_config(tmp_path, test_fraction=0.25)).train
    first = data.batch(torch.arange(3))
    for path in tmp_path.glob("*.png"):
        path.unlink()
    assert torch.equal(data.batch(torch.arange(3)), first)


def test_unreadable_image_is_named(tmp_path):
    write_images(tmp_path, 3)
    whole = (tmp_path / "1.png").read_bytes()
    for contents in (b"not an image", whole[: len(whole) // 2], b""):
        (tmp_path / "1.png").write_bytes(contents)
        data = FolderDataset(
            [tmp_path / "1.png"], size=(8, 8), channels=3, labels=None, num_workers=2
        )
        assert message(data.batch, torch.tensor([0])).startswith(
            f"{tmp_path / '1.png'}: not a readable image"
        )
    batches = Batches(
        FolderDataset(
            sorted(tmp_path.glob("*.png")), size=(8, 8), channels=3, labels=None, num_workers=0
        ),
        3,
        train=True,
    )
    assert "1.png: not a readable image" in message(list, batches.epoch())


def test_folder_mistakes(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    line = message(build_datasets, folder_config(tmp_path))
    assert f"no image in {tmp_path}" in line and ".png .jpg" in line
    assert "is not a folder" in message(build_datasets, folder_config(tmp_path / "none"))
    assert "data.root" in message(build_datasets, DataConfig(name="folder", image_size=8))
    assert "data.image_size" in message(
        build_datasets, DataConfig(name="folder", root=str(tmp_path))
    )
    write_images(tmp_path, 1)
    assert "one image only" in message(build_datasets, folder_config(tmp_path))


# torchvision beside another build of torch


def test_torchvision_datasets_and_grids_work(tmp_path):
    utils, datasets = import_torchvision("utils"), import_torchvision("datasets")
    assert utils.make_grid(torch.rand(4, 3, 8, 8), nrow=2, padding=0).shape == (3, 16, 16)
    utils.save_image(torch.rand(2, 1, 8, 8), tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 0
    write_images(tmp_path / "classes" / "one", 2)
    assert len(datasets.ImageFolder(str(tmp_path / "classes"))) == 2
    assert import_torchvision() is import_torchvision()
