"""Distances against closed forms, hand calculations and torch-fidelity; extractors."""

import math
import warnings

import pytest
import torch

from lsgm.config.training import DataConfig
from lsgm.data import ArrayDataset, Datasets, DataSpec, build_datasets
from lsgm.errors import UserError
from lsgm.evaluation.quality import features as module
from lsgm.evaluation.quality.distances import (
    Moments,
    SmallSampleWarning,
    frechet_distance,
    import_torch_fidelity,
    inception_score,
    inside_support,
    jackknife,
    jackknife_error,
    kernel_distance,
    kernel_distance_replicates,
    nearest_neighbours,
    precision_recall,
    small_sample_notes,
)
from lsgm.evaluation.quality.feature_classifier import ClassifierSettings, data_hash, tensors_hash
from lsgm.evaluation.quality.features import FeatureExtractor, extract, make_extractor, to_uint8_rgb

SETTINGS = ClassifierSettings(steps=150, features=8, width=8, lr=1e-2)


def normal(num, dims, seed, mean=0.0, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    return mean + scale * torch.randn(num, dims, generator=rng, dtype=torch.float64)


def whiten(x):
    """Rows with mean 0 and unbiased covariance I, exactly."""
    x = x - x.mean(0)
    factor = torch.linalg.cholesky(x.T @ x / (len(x) - 1))
    return torch.linalg.solve_triangular(factor, x.T, upper=False).T


# Frechet distance


def test_frechet_distance_of_two_gaussians():
    """Commuting covariances: |m|^2 + sum (s_a - s_b)^2, here after a common rotation."""
    rotation = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    a = whiten(normal(400, 2, 0)) * torch.tensor([1.0, 3.0]) @ rotation.T
    b = whiten(normal(300, 2, 1)) * torch.tensor([2.0, 0.5]) @ rotation.T + torch.tensor([1.0, 2.0])
    assert frechet_distance(a, b) == pytest.approx(5.0 + 1.0 + 6.25, rel=1e-10)
    assert frechet_distance(Moments.of(a), b) == frechet_distance(a, b)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)


def test_frechet_distance_of_covariances_that_do_not_commute():
    """tr (S_a S_b)^(1/2) of 2x2 matrices is (tr S_a S_b + 2 sqrt det S_a S_b)^(1/2)."""
    factor = torch.tensor([[2.0, 0.0], [1.0, 0.5]], dtype=torch.float64)
    a = whiten(normal(200, 2, 0)) @ factor.T
    b = whiten(normal(200, 2, 1)) * torch.tensor([1.0, 2.0])
    s_a, s_b = factor @ factor.T, torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64))
    root = ((s_a @ s_b).trace() + 2 * torch.linalg.det(s_a @ s_b).sqrt()).sqrt()
    expected = (s_a.trace() + s_b.trace() - 2 * root).item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_singular_covariances():
    """Lines of variance s^2 in D dimensions, at right angles: the root of the product is 0."""
    a, b = torch.zeros(50, 20, dtype=torch.float64), torch.zeros(60, 20, dtype=torch.float64)
    a[:, 0], b[:, 1] = whiten(normal(50, 1, 0))[:, 0], 2 * whiten(normal(60, 1, 1))[:, 0]
    assert frechet_distance(a, b) == pytest.approx(5.0, rel=1e-6)
    b[:, :2] = b[:, [1, 0]]
    assert frechet_distance(a, b) == pytest.approx(1.0, rel=1e-6)


def test_too_few_images_are_said_to_be():
    with pytest.warns(SmallSampleWarning, match="8 features from 8 images"):
        frechet_distance(normal(8, 8, 0), normal(100, 8, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(normal(9, 8, 0), normal(100, 8, 1))
    assert small_sample_notes(3000, 3000, 64) == ()
    few, singular = small_sample_notes(500, 50, 64)
    assert "500 samples" in few and "biased" in few
    assert "50 real images" in singular and "singular" in singular
    with pytest.raises(ValueError, match="N > 1"):
        frechet_distance(normal(1, 8, 0), normal(100, 8, 1))
    with pytest.raises(ValueError, match="8 features against 7"):
        frechet_distance(normal(9, 8, 0), normal(100, 7, 1))


# The other scores by hand


def test_kernel_distance_of_a_hand_case():
    """Subsets of the whole sets: one value, the unbiased estimate with kernel (xy + 1)^3."""
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]])
    # pairs within a: k(0, 1) = 1; within b: k(0, 2) = 1; across: 1, 1, 1, 27
    found = kernel_distance(a, b)
    assert found.mean == pytest.approx(1 + 1 - 2 * 30 / 4, rel=1e-12)
    assert found.deviation == pytest.approx(0, abs=1e-12) and found.subset_size == 2


def test_precision_and_recall_of_a_hand_case():
    """On a line, first neighbours: data 0, 1, 10 have radii 1, 1, 9; samples 1.5, 2.5, 30, 31
    have radii 1, 1, 1, 1.
    """
    real = torch.tensor([[0.0], [1.0], [10.0]])
    samples = torch.tensor([[1.5], [2.5], [30.0], [31.0]])
    found = precision_recall(samples, real, k=1)
    # in the data's support [-1, 2] and [1, 19]: 1.5 and 2.5; in the samples' [.5, 3.5], [29, 32]: 1
    assert (found.precision, found.recall) == (0.5, pytest.approx(1 / 3))
    assert inside_support(samples, real, 1).tolist() == [True, True, False, False]
    with pytest.raises(ValueError, match="more than 4"):
        precision_recall(samples, real, k=4)


def test_inception_score_of_a_probability_table():
    """p(y|x) = (3/4, 1/4) and (1/4, 3/4) in turn: exp(ln 2 - H(1/4)); certain classes: K."""
    table = torch.tensor([[0.75, 0.25], [0.25, 0.75]], dtype=torch.float64).repeat(10, 1)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    found = inception_score(table.log(), splits=1)
    assert found.mean == pytest.approx(math.exp(math.log(2) - entropy), rel=1e-12)
    certain = 100 * torch.eye(5, dtype=torch.float64).repeat(4, 1)
    assert inception_score(certain, splits=1).mean == pytest.approx(5, rel=1e-9)
    assert inception_score(torch.zeros(20, 5)).mean == pytest.approx(1, rel=1e-12)


def test_nearest_neighbours_of_a_hand_case():
    train = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0], [3.0, 4.0]])
    found = nearest_neighbours(torch.tensor([[3.0, 4.0], [0.25, 0.0]]), train, k=2, block=3)
    assert found.indices.tolist() == [[1, 3], [0, 2]]
    assert found.distances.tolist() == [[0.0, 0.0], [0.25, 0.75]]
    pixels = torch.rand(30, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    found = nearest_neighbours(pixels[[7, 20]] + 1e-4, pixels, k=1, block=8)
    assert found.indices.flatten().tolist() == [7, 20]
    assert found.distances.flatten().tolist() == pytest.approx([5e-4, 5e-4], rel=1e-3)


# Standard errors


def test_jackknife_error_of_a_mean_is_the_textbook_one():
    x = normal(40, 1, 0)[:, 0]
    replicates = jackknife(lambda kept: x[kept].mean().item(), 40, groups=40)
    assert jackknife_error(replicates) == pytest.approx((x.std() / 40**0.5).item(), rel=1e-9)


def test_jackknife_error_is_the_scatter_over_independent_samples():
    """Frechet distance, far from the truth, of 300 samples: 60 independent sets."""
    real = Moments.of(normal(2000, 3, 99, scale=1.5))
    sets = [normal(300, 3, seed) for seed in range(60)]
    values = torch.tensor([frechet_distance(x, real) for x in sets])
    errors = [
        jackknife_error(jackknife(lambda kept, x=x: frechet_distance(x[kept], real), 300))
        for x in sets
    ]
    mean_square = torch.tensor(errors).square().mean().sqrt().item()
    # a standard deviation of 60 values is known to 1/sqrt(118) = 9%
    assert mean_square == pytest.approx(values.std().item(), rel=0.3)


def test_kernel_distance_replicates_leave_groups_out():
    a, b = normal(37, 4, 0), normal(25, 4, 1, scale=1.3)

    def unbiased(x, y):
        k = [((u @ v.T) / 4 + 1) ** 3 for u, v in ((x, x), (y, y), (x, y))]
        own = [(m.sum() - m.trace()) / (len(m) * (len(m) - 1)) for m in k[:2]]
        return (own[0] + own[1] - 2 * k[2].mean()).item()

    expected = jackknife(lambda kept: unbiased(a[kept], b), 37, seed=3)
    torch.testing.assert_close(kernel_distance_replicates(a, b, seed=3), expected)
    assert kernel_distance(a[:25], b, subsets=1).mean == pytest.approx(unbiased(a[:25], b))


# torch-fidelity called directly


@pytest.fixture(scope="module")
def digits() -> Datasets:
    return build_datasets(DataConfig(name="digits"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def trained(digits, cache) -> FeatureExtractor:
    return make_extractor("classifier", digits, cache=cache, settings=SETTINGS)


class Images(torch.utils.data.Dataset):
    """Images in memory, 8-bit colour, as torch-fidelity reads them."""

    def __init__(self, images):
        self.images = to_uint8_rgb(images)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def test_scores_are_those_of_torch_fidelity(digits, trained):
    """On 8-bit images, with our extractor registered there."""
    fidelity = import_torch_fidelity()

    class Registered(fidelity.FeatureExtractorBase):
        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list():
            return "features", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "logits" if metric == "isc" else "features"

        def forward(self, images):
            found = trained.activations(images[:, :1].float() / 255)
            values = {"features": found.features, "logits": found.logits}
            return tuple(values[name] for name in self.features_list)

    fidelity.register_feature_extractor("lsgm-test", Registered)
    generator = torch.Generator().manual_seed(0)
    real = digits.test.batch(torch.arange(150))
    noise = 0.3 * torch.rand(real[:120].shape, generator=generator)
    samples = ((digits.train.batch(torch.arange(120)) + noise).clamp(0, 1) * 255).round() / 255
    theirs = fidelity.calculate_metrics(
        input1=Images(samples),
        input2=Images(real),
        feature_extractor="lsgm-test",
        fid=True,
        kid=True,
        isc=True,
        prc=True,
        kid_subset_size=100,
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
    )
    a, b = extract(trained, samples), extract(trained, real, batch_size=40)
    fid = theirs[fidelity.KEY_METRIC_FID]
    assert fid > 0.01 and frechet_distance(a.features, b.features) == pytest.approx(fid, rel=1e-5)
    kid = kernel_distance(a.features, b.features, subset_size=100)
    assert kid.mean == pytest.approx(theirs[fidelity.KEY_METRIC_KID_MEAN], rel=1e-6)
    assert kid.deviation == pytest.approx(theirs[fidelity.KEY_METRIC_KID_STD], rel=1e-6)
    score = inception_score(a.logits)
    assert score.mean == pytest.approx(theirs[fidelity.KEY_METRIC_ISC_MEAN], rel=1e-6)
    assert score.deviation == pytest.approx(theirs[fidelity.KEY_METRIC_ISC_STD], rel=1e-5)
    covered = precision_recall(a.features, b.features)
    assert covered.precision == theirs[fidelity.KEY_METRIC_PRECISION]
    assert covered.recall == theirs[fidelity.KEY_METRIC_RECALL]
    assert 0 < covered.precision < 1
    inside = inside_support(b.features, a.features).double().mean().item()
    assert inside == pytest.approx(covered.recall, abs=1e-6)  # ours, for standard errors


# Extractors


def test_classifier_learns_and_repeats(digits, trained, cache, tmp_path):
    index = torch.arange(len(digits.test))
    images = digits.test.batch(index)
    found = extract(trained, images)
    accuracy = (found.logits.argmax(1) == digits.test.labels).double().mean().item()
    assert accuracy > 0.7 and f"{accuracy:.3f} on test images" in trained.preprocessing
    assert found.features.dtype == torch.float64 and found.features.shape == (len(index), 8)
    torch.testing.assert_close(trained(images), found.features)  # the batch changes the last digits
    assert "classifier features (digits)" == trained.name
    stored = make_extractor("classifier", digits, cache=cache, settings=SETTINGS)
    again = make_extractor("classifier", digits, cache=tmp_path, settings=SETTINGS)
    assert trained.weights_sha256 == stored.weights_sha256 == again.weights_sha256
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:1000])  # damaged: trained anew
    anew = make_extractor("classifier", digits, cache=tmp_path, settings=SETTINGS)
    assert anew.weights_sha256 == trained.weights_sha256


def test_classifier_is_kept_under_what_it_was_made_from(digits, cache, tmp_path):
    settings = ClassifierSettings(steps=2, features=8, width=8)
    changed = digits.train.images.clone()
    changed[0, 0, 0, 0] += 1
    other = Datasets(ArrayDataset(changed, digits.train.labels), digits.test, digits.spec)
    for seed, data in ((0, digits), (1, digits), (0, other), (0, digits)):
        chosen = ClassifierSettings(steps=2, features=8, width=8, seed=seed)
        make_extractor("classifier", data, cache=tmp_path, settings=chosen)
    assert len(list(tmp_path.iterdir())) == 3
    bare = Datasets(ArrayDataset(digits.train.images), digits.test, digits.spec)
    with pytest.raises(UserError, match="no labels"):
        make_extractor("classifier", bare, cache=tmp_path, settings=settings)
    with pytest.raises(UserError, match="known are inception"):
        make_extractor("none", digits, cache=tmp_path)


def test_hashes_tell_data_and_weights_apart():
    images = torch.arange(16, dtype=torch.uint8).reshape(4, 1, 2, 2)
    whole = data_hash(ArrayDataset(images))
    assert data_hash(ArrayDataset(images.float() / 255)) == whole
    assert data_hash(ArrayDataset(images, torch.zeros(4, dtype=torch.int64))) != whole
    assert data_hash(ArrayDataset(images), limit=3) == data_hash(ArrayDataset(images[:3])) != whole
    state = {"a": torch.zeros(2), "b": torch.ones(3)}
    assert tensors_hash(state) == tensors_hash(dict(reversed(state.items())))
    assert tensors_hash(state) != tensors_hash(state | {"b": torch.ones(3, 1)})


def test_inception_weights_are_never_downloaded(monkeypatch, tmp_path):
    spec = DataSpec("none", 3, 8, 0, binary=False)
    data = Datasets(
        ArrayDataset(torch.zeros(1, 3, 8, 8)), ArrayDataset(torch.zeros(1, 3, 8, 8)), spec
    )
    monkeypatch.setenv("LSGM_INCEPTION", str(tmp_path / "weights.pth"))
    with pytest.raises(UserError, match=r"weights.pth.*missing.*https://.*LSGM_INCEPTION"):
        make_extractor("inception", data, cache=tmp_path)
    (tmp_path / "weights.pth").write_bytes(b"not the published file")
    with pytest.raises(UserError, match="is not that of the published"):
        make_extractor("inception", data, cache=tmp_path)


def test_inception_sees_the_images_as_torch_fidelity_does(monkeypatch, tmp_path):
    """With random weights in place of the published ones."""
    fidelity = import_torch_fidelity("feature_extractor_inceptionv3")
    network = fidelity.FeatureExtractorInceptionV3
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(network, "load_state_dict", lambda self, state: None)
        theirs = network("inception-v3-compat", ["2048", "logits_unbiased"])
    path = tmp_path / "weights.pth"
    torch.save(theirs.state_dict(), path)
    monkeypatch.setenv("LSGM_INCEPTION", str(path))
    monkeypatch.setattr(module, "INCEPTION_HASH", module._file_hash(path)[:8])
    data = Datasets(
        *2 * (ArrayDataset(torch.zeros(1, 1, 8, 8)),), DataSpec("none", 1, 8, 0, binary=False)
    )
    ours = make_extractor("inception", data, cache=tmp_path)
    grey = torch.rand(2, 1, 20, 20, generator=torch.Generator().manual_seed(1))
    levels = (grey * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    features, logits = theirs(levels)
    found = ours.activations(grey)
    torch.testing.assert_close(found.features, features.double())
    torch.testing.assert_close(found.logits, logits.double())


def test_efficientnet_recognises_what_is_in_a_picture(tmp_path):
    """A lit disc is a ball: ping-pong ball and croquet ball are classes 722 and 522 of ImageNet."""
    pytest.importorskip("efficientnet_lite_pytorch")
    data = Datasets(
        *2 * (ArrayDataset(torch.zeros(1, 3, 8, 8)),), DataSpec("none", 3, 8, 0, binary=False)
    )
    extractor = make_extractor("efficientnet_lite0", data, cache=tmp_path)
    y, x = torch.meshgrid(*2 * (torch.linspace(-1, 1, 96),), indexing="ij")
    radius = (x.square() + y.square()).sqrt()
    light = (1 - 0.5 * ((x + 0.3).square() + (y + 0.3).square())).clamp(0.2, 1)
    disc = torch.stack([light, 0.55 * light, 0.05 * light])
    picture = torch.where(radius < 0.75, disc, torch.tensor([0.2, 0.4, 0.1]).view(3, 1, 1))
    found = extractor.activations(picture[None])
    assert found.features.shape == (1, 1280)
    assert found.logits[0].topk(2).indices.tolist() == [722, 522]
