"""Scores of samples: what they equal, how sure they are, and that they say what they are."""

import json

import pytest
import torch
from state_model import StateModel

from lsgm.config.training import DataConfig
from lsgm.data import ArrayDataset, Datasets, DataSpec, binarise, fixed_binarisation
from lsgm.errors import UserError
from lsgm.evaluation.quality import features as registry
from lsgm.evaluation.quality.distances import (
    frechet_distance,
    inception_score,
    jackknife_error,
    kernel_distance,
    precision_recall,
)
from lsgm.evaluation.quality.features import Activations, NetworkExtractor
from lsgm.evaluation.quality.options import QualityOptions
from lsgm.evaluation.quality.scores import (
    difference,
    quality_of_images,
    real_activations,
    sample_quality,
)
from lsgm.models.results import Samples
from lsgm.sampling.sampler import SolverOptions

NUM, SIZE, PADDING = 300, 6, 1
DATA = DataConfig(name="digits", eval_binarisation_seed=5)


def blobs(num, seed, width=0.8):
    """Grey images ``(num, 1, 6, 6)``: a bump at a random place."""
    rng = torch.Generator().manual_seed(seed)
    place = 1.5 + 2 * torch.rand(num, 2, 1, 1, generator=rng)
    y, x = torch.meshgrid(*2 * (torch.arange(float(SIZE)),), indexing="ij")
    square = (y - place[:, 0]).square() + (x - place[:, 1]).square()
    return torch.exp(-square / (2 * width**2)).unsqueeze(1)


def dataset_of(images):
    return ArrayDataset((images * 255).round().to(torch.uint8), padding=PADDING)


@pytest.fixture
def datasets():
    spec = DataSpec("blobs", 1, SIZE, PADDING, binary=True)
    return Datasets(dataset_of(blobs(500, 1)), dataset_of(blobs(400, 2)), spec)


@pytest.fixture
def seen(monkeypatch):
    """Stands a linear extractor in for the classifier; returns the images that it was shown."""
    rng = torch.Generator().manual_seed(7)
    to_features = torch.randn(SIZE * SIZE, 5, generator=rng) / SIZE
    to_logits = torch.randn(5, 3, generator=rng)
    shown = []

    def network(images):
        shown.append(images)
        features = images.flatten(1).tanh() @ to_features
        return features, features @ to_logits

    extractor = NetworkExtractor("linear features", "none", "0123456789abcdef", network)
    monkeypatch.setitem(registry.EXTRACTORS, "classifier", lambda *args: extractor)
    return shown


class Model(StateModel):
    """What a report asks of a model."""

    def __init__(self, spec):
        super().__init__()
        self.spec = spec


def score(datasets, draw, cache, sampling=SolverOptions(), **options):  # noqa: B008 - frozen
    def drawn(model, num, sampling):
        name = sampling.solver or "fake"
        return Samples(draw(num, sampling), (), sampling.nfe or 10, 0.0, name)

    options = {"num": NUM, "cache": str(cache), "subsets": 3, **options}
    return sample_quality(
        Model(datasets.spec),
        datasets,
        QualityOptions(extractor="classifier", **options),
        sampling,
        DATA,
        draw=drawn,
    )


def good(num, sampling):
    return blobs(num, 3)


def test_scores_are_the_distances_of_the_features(datasets, seen, tmp_path):
    report = score(datasets, good, tmp_path)
    real, found, train = (torch.cat(seen[i:j]) for i, j in ((0, 2), (2, 4), (4, 6)))
    extractor = registry.EXTRACTORS["classifier"]()
    a, b = extractor.activations(found), extractor.activations(real)
    scores = report.samples.scores
    assert scores["frechet"].value == pytest.approx(frechet_distance(a.features, b.features))
    kernel = kernel_distance(a.features, b.features, subsets=3, seed=0).mean
    assert scores["kernel"].value == pytest.approx(kernel, abs=1e-9)
    covered = precision_recall(a.features, b.features, k=3)
    assert (scores["precision"].value, scores["recall"].value) == (
        covered.precision,
        covered.recall,
    )
    alone = inception_score(a.logits, splits=1).mean
    assert scores["inception_score"].value == pytest.approx(alone)
    floor = frechet_distance(extractor(train), b.features)
    assert report.floor.scores["frechet"].value == pytest.approx(floor)
    assert report.num_features == 5 and report.num_real == 400


def test_good_samples_score_like_training_images_and_bad_ones_do_not(datasets, seen, tmp_path):
    perfect = score(datasets, good, tmp_path)
    wide = score(datasets, lambda num, _: blobs(num, 3, width=1.4), tmp_path)
    for key, value in perfect.samples.scores.items():
        floor = perfect.floor.scores[key]
        error = (value.standard_error**2 + floor.standard_error**2) ** 0.5
        assert abs(value.value - floor.value) < 4 * error
    for key in ("frechet", "kernel"):
        worse, error = difference(wide.samples.scores[key], perfect.samples.scores[key])
        assert worse > 4 * error > 0


def test_standard_errors_are_the_scatter_over_independent_samples():
    def activations(num, seed, scale=1.0):
        rng = torch.Generator().manual_seed(seed)
        x = scale * torch.randn(num, 2, generator=rng, dtype=torch.float64)
        return Activations(x, torch.cat([x, -x], dim=1))

    real = activations(300, 999)
    points = [
        quality_of_images(
            activations(200, 1000 + n, 1.3), real, label="", extractor="", features="", subsets=3
        )
        for n in range(40)
    ]
    for key in points[0].scores:
        values = torch.tensor([p.scores[key].value for p in points], dtype=torch.float64)
        errors = torch.tensor([p.scores[key].standard_error for p in points])
        ratio = (errors.square().mean().sqrt() / values.std()).item()
        # the scatter of 40 values is known to 11%; recall, close to 1, errs on the safe side
        assert 0.7 < ratio < (1.4 if key != "recall" else 3)


def test_samplers_that_share_their_noise_are_compared_in_pairs(datasets, seen, tmp_path):
    def by_evaluations(num, sampling):
        return blobs(num, 3, width=1.2 if sampling.nfe == 4 else 0.8)

    report = score(datasets, by_evaluations, tmp_path, nfe=(4, 10), images="means")
    worse, same = report.by_nfe
    own = report.samples.scores["frechet"]
    value, error = difference(worse.scores["frechet"], own)
    alone = (worse.scores["frechet"].standard_error ** 2 + own.standard_error**2) ** 0.5
    assert value > 3 * error and error < alone
    assert difference(same.scores["frechet"], own) == (0.0, 0.0)
    assert [point.nfe for point in report.by_nfe] == [4, 10]
    with pytest.raises(ValueError, match="cannot be compared"):
        difference(own, report.samples.scores["recall"])


def test_few_evaluations_beside_an_adaptive_sampler_are_the_models_own(datasets, seen, tmp_path):
    asked = []

    def draw(num, sampling):
        asked.append((sampling.solver, sampling.nfe, sampling.tolerance))
        return blobs(num, 3)

    for solver, fixed in (("rk45", None), ("heun", "heun")):
        tolerance = 1e-5 if fixed is None else None
        own = SolverOptions(solver=solver, tolerance=tolerance)
        score(datasets, draw, tmp_path, sampling=own, nfe=(3, 10))
        assert asked[-3:] == [(solver, None, tolerance), (fixed, 3, None), (fixed, 10, None)]


def test_real_images_are_seen_once(datasets, seen, tmp_path):
    first = score(datasets, good, tmp_path)
    images = sum(map(len, seen))
    assert images == 400 + NUM + NUM  # test images, samples, training images
    seen.clear()
    second = score(datasets, good, tmp_path)
    assert sum(map(len, seen)) == NUM
    assert json.dumps(second.as_dict()) == json.dumps(first.as_dict())
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert json.dumps(score(datasets, good, tmp_path).as_dict()) == json.dumps(first.as_dict())
    seen.clear()
    other = Datasets(datasets.train, dataset_of(blobs(400, 9)), datasets.spec)
    changed = score(other, good, tmp_path)
    assert sum(map(len, seen)) == 400 + NUM
    assert changed.real_sha256 != first.real_sha256


def test_binary_images_are_drawn_or_grey(datasets, seen, tmp_path):
    drawn = score(datasets, good, tmp_path)
    real, samples = torch.cat(seen[:2]), torch.cat(seen[2:4])
    fixed = fixed_binarisation(datasets.test, 5).batch(torch.arange(400))
    assert torch.equal(real, fixed[..., PADDING:-PADDING, PADDING:-PADDING])
    assert set(samples.unique().tolist()) == {0.0, 1.0}
    grey = blobs(NUM, 3)
    deviation = (samples - grey).sum() / (grey * (1 - grey)).sum().sqrt()
    assert abs(deviation.item()) < 4
    other = binarise(grey, torch.Generator().manual_seed(5))
    assert (samples != other).any()
    seen.clear()
    means = score(datasets, good, tmp_path, images="means")
    assert torch.equal(torch.cat(seen[2:4]), grey)
    assert "Bernoulli draw" in drawn.images and "not drawn" in means.images
    assert drawn.samples.scores["frechet"].value != means.samples.scores["frechet"].value


def test_a_score_says_what_it_is(datasets, seen, tmp_path):
    report = score(datasets, good, tmp_path)
    names = [value.name for value in report.samples.scores.values()]
    assert names[0] == "Frechet distance, linear features"
    assert names[1] == "kernel distance, linear features (3 subsets of 300)"
    assert not any("FID" in name or "KID" in name or "Inception" in name for name in names)
    text = " ".join(report.notes)
    assert "Only 300 samples" in text and "Only 400 real images" in text and "not FID" in text
    assert report.weights_sha256 == "0123456789abcdef" and report.settings["num"] == NUM
    rng = torch.Generator().manual_seed(0)
    x = Activations(torch.randn(50, 3, generator=rng), torch.randn(50, 3, generator=rng))
    point = quality_of_images(x, x, label="", extractor="inception", features="Inception")
    assert point.scores["frechet"].name == "FID"
    assert point.scores["kernel"].name.startswith("KID (")
    assert point.scores["inception_score"].name.startswith("Inception score")
    assert jackknife_error(point.scores["frechet"].replicates) == pytest.approx(
        point.scores["frechet"].standard_error
    )


def test_a_model_of_grey_images_is_scored_on_grey_images(datasets, seen, tmp_path):
    grey = DataSpec("blobs", 1, SIZE, 0, binary=False)
    options = QualityOptions(extractor="classifier", num=NUM, cache=str(tmp_path), subsets=3)
    sample_quality(
        Model(grey), datasets, options, SolverOptions(), DATA,
        draw=lambda model, num, sampling: Samples(blobs(num, 3), (), 0, 0.0, "fake"),
    )  # fmt: skip
    whole = datasets.test.batch(torch.arange(400))
    assert torch.equal(torch.cat(seen[:2]), whole[..., PADDING:-PADDING, PADDING:-PADDING])
    assert torch.equal(torch.cat(seen[2:4]), blobs(NUM, 3))


def test_activations_of_some_images_are_those_rows(datasets, seen, tmp_path):
    extractor = registry.EXTRACTORS["classifier"]()
    options = {"convention": "draws", "seed": 5, "cache": tmp_path}
    whole = real_activations(datasets.train, datasets.spec, extractor, **options)
    index = torch.tensor([7, 3, 400])
    some = real_activations(datasets.train, datasets.spec, extractor, index=index, **options)
    torch.testing.assert_close(some.features, whole.features[index])


def test_too_few_training_images_give_no_floor(datasets, seen, tmp_path):
    report = score(datasets, good, tmp_path, num=600)
    assert report.floor is None and "no floor" in " ".join(report.notes)


@pytest.mark.parametrize(
    ("options", "word"),
    [({"num": 5}, "num"), ({"nfe": (0,)}, "nfe"), ({"images": "grey"}, "images")],
)
def test_wrong_options(options, word):
    with pytest.raises(ValueError, match=word):
        QualityOptions(**options)


def test_an_unknown_extractor(datasets, tmp_path):
    with pytest.raises(UserError, match="--quality.extractor"):
        sample_quality(
            Model(datasets.spec), datasets, QualityOptions("magic", cache=str(tmp_path)),
            SolverOptions(),
        )  # fmt: skip
