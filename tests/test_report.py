"""Reports of runs: numbers that add up, repeat, and say what they are."""

import json
import re
from pathlib import Path

import pytest
import torch

from lsgm.config.architecture import (
    PriorConfig,
    PriorNetworkConfig,
    SamplerConfig,
    ScoreModelConfig,
    SDEConfig,
    VAEConfig,
)
from lsgm.config.training import DataConfig
from lsgm.data import ArrayDataset, Datasets, DataSpec, build_datasets, random_subset
from lsgm.errors import UserError
from lsgm.evaluation.likelihood.bounds import evaluation_batches, nelbo, with_generators
from lsgm.evaluation.likelihood.decomposition import bound_curves, decompose
from lsgm.evaluation.quality import features as registry
from lsgm.evaluation.quality.features import NetworkExtractor
from lsgm.evaluation.quality.options import QualityOptions
from lsgm.evaluation.report.details import neighbours_of
from lsgm.evaluation.report.evaluate import applies, evaluate
from lsgm.evaluation.report.options import EvaluateOptions
from lsgm.evaluation.report.published import PUBLISHED, READ, SECOND_HAND, published_for
from lsgm.models.images import build_data_model
from lsgm.models.latent import LSGM, VAEModel, build_prior, build_vae
from lsgm.models.release import save
from lsgm.sampling.sampler import SolverOptions
from vae.objective import bounds

DIGITS = DataConfig(name="digits")
VAE = VAEConfig(
    num_channels_enc=8, num_channels_dec=8, channel_mult=(1, 1, 2), num_preprocess_blocks=1,
    num_preprocess_cells=1, num_postprocess_cells=1, num_latent_scales=2, num_groups_per_scale=2,
    num_latent_per_group=2, cell="res_bnswish",
)  # fmt: skip
PRIOR = PriorConfig(
    network=PriorNetworkConfig(
        num_channels=16, num_scales=1, num_cells_per_scale=1, embedding_dim=16
    ),
    mixing_init=-2.0,
)
PIXELS = ScoreModelConfig(
    ncsnpp=PriorNetworkConfig(
        num_channels=16, num_scales=1, num_cells_per_scale=1, embedding_dim=16
    ),
    sde=SDEConfig(time_eps=1e-2),
)


@pytest.fixture(scope="module")
def datasets() -> Datasets:
    return build_datasets(DIGITS)


def shaken(model):
    """The model with random weights everywhere, so that no part of it is trivial."""
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=rng)
    return model.eval()


@pytest.fixture(scope="module")
def models(datasets):
    torch.manual_seed(0)
    vae = build_vae(VAE, datasets.spec)
    score = build_prior(PRIOR, vae)
    return {
        "vae": shaken(VAEModel(vae, datasets.spec, VAE)),
        "lsgm": shaken(LSGM(build_vae(VAE, datasets.spec), score, datasets.spec, VAE, PRIOR)),
        "pixels": shaken(build_data_model("score_sde", PIXELS, SamplerConfig(), datasets.spec)),
    }


@pytest.fixture(scope="module")
def runs(models, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    folders = {name: root / name for name in models}
    for name, folder in folders.items():
        folder.mkdir()
        save(models[name], folder, DIGITS)
    return folders


def batches(datasets, num=24, size=10):
    return evaluation_batches(datasets.test, datasets.spec, limit=num, batch_size=size)


def options(*runs, **changes):
    values = {
        "limit": 20, "device": "cpu", "iw": (1, 4), "iw_images": 8, "neighbours": 4,
        "sampling": SolverOptions(batch_size=6, nfe=4),
    }  # fmt: skip
    return EvaluateOptions(run=tuple(map(str, runs)), **(values | changes))


def read(folder):
    return json.loads((folder / "report.json").read_text())


# The parts of a NELBO


@pytest.mark.parametrize("kind", ["vae", "lsgm"])
def test_the_parts_add_up_to_the_nelbo(models, datasets, kind):
    """Exactly: the same draws."""
    found = decompose(models[kind], batches(datasets), seed=4)
    direct = nelbo(models[kind], batches(datasets), seed=4)
    assert found.total.mean == pytest.approx(direct.nats.mean, rel=1e-6)
    assert found.total.standard_error == pytest.approx(direct.nats.standard_error, rel=1e-5)
    assert found.terms[0].nats.mean == pytest.approx(direct.reconstruction.mean, rel=1e-9)
    parts = sum(term.nats.mean for term in found.terms)
    assert parts == pytest.approx(found.total.mean, rel=1e-9)
    priors = [term.prior for term in found.terms[1:]]
    if kind == "vae":
        assert priors == ["N(0, I)"] * 4 and not found.under_normal
    else:
        assert priors == ["score-based prior", "N(0, I)", "N(0, I)"]
        # the same draws of the VAE: what the score-based prior does not see is as it was
        alone = decompose(VAEModel(models[kind].vae, datasets.spec, VAE), [*batches(datasets, 10)])
        joint = decompose(models[kind], [*batches(datasets, 10)])
        under = [term.nats.mean for term in joint.under_normal]
        assert under == pytest.approx([term.nats.mean for term in alone.terms[1:3]], rel=1e-6)


def test_bounds_tighten_with_their_weights(models, datasets):
    x = [*batches(datasets, 12, 6)]
    (curve,) = bound_curves(models["vae"], x, k=(4, 1, 2, 8), seed=1)
    assert curve.k == (1, 2, 4, 8) and curve.num_images == 12
    means = [nats.mean for nats in curve.nats]
    assert means == sorted(means, reverse=True) and means[0] > means[-1]
    direct = [bounds(models["vae"].vae, part, 8, rng) for part, rng in with_generators(x, 1)]
    assert means[0] == pytest.approx(torch.cat([b.nelbo for b in direct]).mean().item(), rel=1e-5)
    tightest = torch.cat([b.importance_weighted for b in direct]).mean().item()
    assert means[-1] == pytest.approx(tightest, rel=1e-5)
    own, normal = bound_curves(models["lsgm"], x[:1], k=(1, 2), steps=3)
    assert "score-based prior, paths of 3 steps" in own.name and "N(0, I)" in normal.name
    assert own.nats[0].mean > own.nats[1].mean


# Neighbours and published numbers


def test_copies_of_training_images_are_found_out():
    rng = torch.Generator().manual_seed(0)
    train, test = torch.randint(0, 256, (2, 60, 1, 4, 4), generator=rng, dtype=torch.uint8)
    data = Datasets(
        ArrayDataset(train, padding=2), ArrayDataset(test, padding=2),
        DataSpec("noise", 1, 4, 2, binary=False),
    )  # fmt: skip
    copies = train[[5, 50, 17]].float() / 255
    found = neighbours_of(copies, data, k=2)
    assert found.found.indices[:, 0].tolist() == [5, 50, 17]
    assert torch.equal(found.images[:, 0], copies) and found.images.shape == (3, 2, 1, 4, 4)
    assert found.median_distance == 0 < found.test_median_distance
    some = test[random_subset(60, 3)]
    far = torch.cdist(some.double().flatten(1) / 255, train.double().flatten(1) / 255)
    assert found.test_median_distance == pytest.approx(far.amin(1).median().item(), rel=1e-5)


def test_published_numbers_are_context():
    for table in PUBLISHED.values():
        nats = [number.nats for number in table.numbers]
        assert nats == sorted(nats, reverse=True)
        for number in table.numbers:
            assert re.fullmatch(r"\d{4}\.\d{5}", number.citation)
            assert number.source in (READ, SECOND_HAND)
    omniglot = published_for("omniglot")
    assert "not the published one" in omniglot.caveat(8115)
    assert "images are the same" in omniglot.caveat(8070)
    assert published_for("digits") is None
    (lsgm,) = [number for number in omniglot.numbers if number.model.startswith("LSGM")]
    assert lsgm.bound and lsgm.nats == 87.79


# Whole reports


@pytest.fixture
def linear(monkeypatch):
    rng = torch.Generator().manual_seed(7)
    weight = torch.randn(256, 4, generator=rng) / 16

    def network(images):
        features = images.flatten(1) @ weight
        return features, features

    extractor = NetworkExtractor("linear features", "none", "0" * 64, network)
    monkeypatch.setitem(registry.EXTRACTORS, "classifier", lambda *args: extractor)


@pytest.fixture
def command(monkeypatch):
    monkeypatch.setattr("sys.argv", ["scripts/evaluate.py", "--run", "runs/a b"])


def test_two_runs_of_a_command_agree_to_the_digit(runs, linear, command, tmp_path, capsys):
    quality = QualityOptions(
        "classifier", num=40, nfe=(2, 4), subsets=3, cache=str(tmp_path / "cache")
    )
    for out in ("a", "b"):
        chosen = options(
            runs["vae"], runs["lsgm"], metrics=("nelbo", "normal"), quality=quality,
            out=str(tmp_path / out),
        )  # fmt: skip
        evaluate(chosen)
    assert capsys.readouterr().out.count("| vae |") == 2
    for name in ("vae", "lsgm"):
        first, second = (read(tmp_path / out / name) for out in ("a", "b"))
        assert first.pop("timings").keys() == second.pop("timings").keys()
        for found in (first, second):
            found["repeat"]["options"].pop("out")
        assert first == second
        assert "seconds" not in json.dumps(first)
        drawn = [] if name == "vae" else ["quality.png"]  # no evaluations to plot
        pictures = sorted(path.name for path in (tmp_path / "a" / name).glob("*.png"))
        assert pictures == [
            "bounds.png", "decomposition.png", "neighbours.png", *drawn,
            "reconstructions.png", "samples.png",
        ]  # fmt: skip
        for picture in pictures:
            files = [(tmp_path / out / name / picture).read_bytes() for out in ("a", "b")]
            assert files[0] == files[1], picture
    numbers = first["numbers"]
    assert set(numbers["bounds"]) == {"nelbo", "normal"}
    total = numbers["decomposition"]["total"]["mean"]
    assert total == pytest.approx(numbers["bounds"]["nelbo"]["nats"]["mean"], rel=1e-6)
    text = (tmp_path / "a" / "lsgm" / "report.md").read_text()
    shown = set(re.findall(r"\]\((\w+\.png)\)", text))
    assert shown == set(pictures)
    repeat = first["repeat"]
    words = (
        "NELBO, score-based prior", "NELBO, N(0, I) prior", "importance-sampled variational",
        "binarisation_seed 0", "seed 0", "linear features", "not FID", "one Bernoulli draw",
        "python scripts/evaluate.py --run 'runs/a b'", repeat["weights_sha256"],
        repeat["data"]["test_sha256"], repeat["versions"]["torch"],
    )  # fmt: skip
    assert [word for word in words if word not in text] == []
    nats = numbers["bounds"]["nelbo"]["nats"]
    assert f"{nats['mean']:.2f} +- {nats['standard_error']:.2f}" in text
    assert repeat["threads"] == torch.get_num_threads()


def test_a_report_goes_into_its_run_and_may_be_left_out(runs, command, tmp_path, capsys):
    plain = SolverOptions(batch_size=6)
    with pytest.raises(UserError, match=r"--sampling\.nfe: .* without a solver"):
        evaluate(options(runs["vae"], iw=(), limit=6))
    evaluate(options(runs["vae"], iw=(), limit=6, report=False, sampling=plain))
    assert not (runs["vae"] / "evaluation").exists()
    evaluate(options(runs["vae"], iw=(), limit=6, split="train", sampling=plain))
    found = read(runs["vae"] / "evaluation")
    assert found["split"] == "train" and found["numbers"]["bound_curves"] == []
    assert found["numbers"]["quality"] is None and found["published"] is None
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out: .*file"):
        evaluate(options(runs["vae"], out=str(tmp_path / "file" / "report"), sampling=plain))
    capsys.readouterr()


def test_a_model_of_images_is_evaluated_as_what_it_is(runs, models, command, tmp_path, capsys):
    chosen = options(
        runs["pixels"], metrics=("nelbo", "bits"), limit=2, tolerance=0.1, out=str(tmp_path),
        sampling=SolverOptions(solver="ddim", nfe=2, batch_size=4),
    )  # fmt: skip
    evaluate(chosen)
    found = read(tmp_path)["numbers"]
    assert set(found["bounds"]) == {"bits"} and found["decomposition"] is None
    bits = found["bounds"]["bits"]
    assert "8-bit" in bits["bound"] and "dequantisation" in bits["estimator"]
    assert bits["num_images"] == 2 and "uniform" in bits["settings"]["convention"]
    assert not (tmp_path / "reconstructions.png").exists()
    assert (tmp_path / "samples.png").exists() and "8-bit" in capsys.readouterr().out
    kinds = ("vae", "lsgm", "pixels")
    defined = {
        name: [kind for kind in kinds if applies(name, models[kind])]
        for name in ("nelbo", "normal", "iw", "ode", "iw_exact", "bits")
    }
    assert defined == {
        "nelbo": ["vae", "lsgm"], "normal": ["lsgm"], "iw": ["vae", "lsgm"], "ode": ["lsgm"],
        "iw_exact": ["lsgm"], "bits": ["pixels"],
    }  # fmt: skip
    with pytest.raises(UserError, match="magic"):
        evaluate(options(runs["vae"], metrics=("magic",)))
