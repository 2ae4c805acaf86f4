"""Training in Python: own networks, data and autoencoders."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import lsgm
from lsgm.config.architecture import (
    PriorConfig,
    PriorNetworkConfig,
    SamplerConfig,
    ScoreModelConfig,
    VAEConfig,
)
from lsgm.data import ArrayDataset, DataSpec
from lsgm.data.items import Items
from lsgm.errors import UserError
from lsgm.models.autoencoder import Autoencoder, Posterior
from lsgm.models.generic import AutoencoderModel, LatentScoreModel, ScoreModel
from lsgm.models.images import build_data_model
from lsgm.models.latent import LSGM, VAEModel, build_prior, build_vae
from lsgm.sde import VPSDE, LinearSDE
from lsgm.system.torchvision import import_torchvision
from lsgm.training import TrainingInterrupted

QUICK = {"device": "cpu", "log_every": 200, "ema_decay": 0.99, "warmup_steps": 20}
LIKELIHOOD = {"weighting": "likelihood", "proposal": "mixture", "eval_every": 25}


class MLP(nn.Module):
    """A noise prediction of vectors."""

    def __init__(self, dims: int = 2, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dims + 3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, dims),
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        features = torch.stack([t, torch.cos(math.pi * t), (t + 0.01).log() / 4], dim=1)
        return self.layers(torch.cat([x, features], dim=1))


class OwnSDE(LinearSDE):
    """Variance preserving, with ``beta = 20 t``."""

    time_eps = 0.015

    def mean_coef(self, t: Tensor) -> Tensor:
        return torch.exp(-5 * t**2)

    def var(self, t: Tensor) -> Tensor:
        return -torch.expm1(-10 * t**2)


class Mixture(Dataset):
    """An own dataset: two Normal distributions of standard deviation 0.3 at (+-1, 0)."""

    std = 0.3

    def __init__(self, n: int, seed: int = 0) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.sides = torch.randint(2, (n,), generator=rng)
        self.points = self.std * torch.randn(n, 2, generator=rng)
        self.points[:, 0] += 2.0 * self.sides - 1

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.points[i], int(self.sides[i])

    def log_prob(self, x: Tensor) -> Tensor:
        ends = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
        square = (x[:, None] - ends).square().sum(-1) / self.std**2
        return (-square / 2).logsumexp(1) - math.log(2) - math.log(2 * math.pi * self.std**2)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ScoreModel]:
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("fit") / "mixture"
    model = ScoreModel(MLP(), OwnSDE(), shape=(2,), normal=True)
    trained = lsgm.fit(
        model, Mixture(4000), test=Mixture(500, seed=1), out=out, epochs=25, batch_size=200,
        lr=5e-3, **LIKELIHOOD, **QUICK,
    )  # fmt: skip
    assert trained is model and not model.training
    return out, model


def test_a_mixture_is_learned_by_an_own_network_sde_and_dataset(
    fitted: tuple[Path, ScoreModel],
) -> None:
    """The likelihood by the ODE is near the entropy, and samples follow the density."""
    _, model = fitted
    truth = Mixture(400, seed=2)
    bound = model.bound(truth.points)
    entropy = -truth.log_prob(truth.points)
    assert bound.unit == "nats per item" and bound.standard_error < 0.1
    gap = (bound.values - entropy).mean().item()  # a KL divergence: at least 0
    assert -0.03 < gap < 0.2
    drawn = model.sample(2000, seed=1, nfe=30)
    assert drawn.images.shape == (2000, 2) and drawn.nfe <= 30 and drawn.latents == ()
    assert (-truth.log_prob(drawn.images)).mean() == pytest.approx(entropy.mean().item(), abs=0.3)
    assert (drawn.images[:, 0] > 0).double().mean() == pytest.approx(0.5, abs=0.06)
    again = model.sample(10, seed=1, nfe=30, batch_size=3).images
    torch.testing.assert_close(again, drawn.images[:10])


def test_a_run_opens_with_the_modules_that_are_not_the_librarys(
    fitted: tuple[Path, ScoreModel],
) -> None:
    out, model = fitted
    for name in ("model.safetensors", "run.json", "config.yaml", "metrics.jsonl", "start.json"):
        assert (out / name).is_file(), name
    again = lsgm.load(out, network=MLP(), sde=OwnSDE())
    assert torch.equal(again.sample(5, seed=3).images, model.sample(5, seed=3).images)
    with pytest.raises(UserError, match=r"its network \(test_fit.MLP\) is not .*run, network="):
        lsgm.load(out, sde=OwnSDE())
    with pytest.raises(UserError, match="is not to be given encoder"):
        lsgm.load(out, network=MLP(), sde=OwnSDE(), encoder=MLP())
    with pytest.raises(UserError, match="weights do not fit"):
        lsgm.load(out, network=MLP(width=32), sde=OwnSDE())


def test_the_same_call_after_the_end_opens_the_model(fitted: tuple[Path, ScoreModel]) -> None:
    out, model = fitted
    call = {"out": out, "epochs": 25, "batch_size": 200, "lr": 5e-3, **LIKELIHOOD, **QUICK}
    again = lsgm.fit(ScoreModel(MLP(), OwnSDE(), (2,), normal=True), Mixture(4000), **call)
    assert torch.equal(again.sample(5).images, model.sample(5).images)
    with pytest.raises(UserError, match="begun with another model"):
        lsgm.fit(ScoreModel(MLP(), VPSDE(), (2,)), Mixture(4000), **call)
    with pytest.raises(UserError, match="already holds a run"):
        lsgm.fit(model, Mixture(4000), resume=False, **call)


class StoppedMLP(MLP):
    """Sends this process a signal in a step."""

    left: int | None = None

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(x, t)


def test_a_stopped_fit_continues_to_the_same_bits(tmp_path: Path) -> None:
    def call(name: str, left: int | None = None) -> ScoreModel:
        torch.manual_seed(5)
        network = StoppedMLP()
        network.left = left
        model = ScoreModel(network, VPSDE(time_eps=1e-3), (2,))
        return lsgm.fit(
            model, Mixture(300).points.numpy(), out=tmp_path / name, epochs=10, batch_size=100,
            checkpoint_every=7, **QUICK,
        )  # fmt: skip

    call("whole")
    with pytest.raises(TrainingInterrupted, match="stopped at step 17"):
        call("stopped", left=17)
    call("stopped")
    whole, stopped = (tmp_path / n / "model.safetensors" for n in ("whole", "stopped"))
    assert whole.read_bytes() == stopped.read_bytes()


class LinearAutoencoder(Autoencoder):
    """A probabilistic autoencoder of vectors in 3 dimensions near a plane."""

    shape, latent_shape, decoder_std = (3,), (2,), 0.1

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 4), nn.Linear(2, 3)

    def encode(self, x: Tensor) -> Posterior:
        mean, log_std = self.encoder(x).chunk(2, dim=1)
        return Posterior(mean, log_std.clamp(-6, 3).exp())

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)


def plane(n: int, seed: int = 0) -> tuple[Tensor, float]:
    """Points of a factor analysis ``x = W z + 0.1 e``, and their mean entropy in nats."""
    rng = torch.Generator().manual_seed(seed)
    w = torch.tensor([[1.0, 0.3], [-0.5, 1.0], [0.2, 0.4]])
    x = torch.randn(n, 2, generator=rng) @ w.T + 0.1 * torch.randn(n, 3, generator=rng)
    covariance = (w @ w.T + 0.01 * torch.eye(3)).double()
    return x, 0.5 * (3 + 3 * math.log(2 * math.pi) + covariance.logdet().item())


def test_an_own_autoencoder_is_a_vae_and_carries_a_prior(tmp_path: Path) -> None:
    """Factor analysis: the linear VAE's bound is tight, and a prior over it keeps it."""
    torch.manual_seed(0)
    x, entropy = plane(4000)
    test, _ = plane(1000, seed=1)
    settings = {"batch_size": 200, **QUICK}
    autoencoder = LinearAutoencoder()
    lsgm.fit(autoencoder, TensorDataset(x), out=tmp_path / "vae", epochs=25, lr=2e-2, **settings)
    vae = lsgm.load(tmp_path / "vae", autoencoder=LinearAutoencoder())
    assert isinstance(vae, AutoencoderModel)
    bound = vae.bound(test)
    assert bound.mean == pytest.approx(entropy, abs=0.15)
    assert vae.sample(2000).images.std(0).tolist() == pytest.approx(x.std(0).tolist(), rel=0.1)

    before = {name: p.clone() for name, p in autoencoder.state_dict().items()}
    model = LatentScoreModel(autoencoder, MLP(), VPSDE())
    lsgm.fit(model, x, test=test, out=tmp_path / "prior", epochs=10, lr=3e-3, **settings)
    for name, value in autoencoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    again = lsgm.load(tmp_path / "prior", network=MLP(), autoencoder=LinearAutoencoder())
    assert again.bound(test, samples=4).mean == pytest.approx(bound.mean, abs=0.15)
    drawn = again.sample(2000)
    assert drawn.images.shape == (2000, 3) and drawn.latents[0].shape == (2000, 2)
    assert drawn.latents[0].std(0).tolist() == pytest.approx([1, 1], abs=0.15)
    torch.testing.assert_close(drawn.images.T.cov(), x.T.cov(), atol=0.12, rtol=0.1)


class DiffusersAutoencoder(Autoencoder):
    """The adapter of the documentation, over a small AutoencoderKL."""

    shape, latent_shape = (1, 8, 8), (2, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        import_torchvision()  # which diffusers imports, and which may lack its operators
        diffusers = pytest.importorskip("diffusers")
        self.vae = diffusers.AutoencoderKL(
            in_channels=1, out_channels=1, latent_channels=2, block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1, norm_num_groups=4,
        )  # fmt: skip

    def encode(self, x: Tensor) -> Posterior:
        q = self.vae.encode(x).latent_dist
        return Posterior(q.mean, q.std)

    def decode(self, z: Tensor) -> Tensor:
        return self.vae.decode(z).sample


class SmallConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        times = t.view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        return self.conv(torch.cat([x, times], dim=1))


def test_a_prior_over_somebody_elses_autoencoder(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    images = torch.randint(256, (200, 1, 8, 8), dtype=torch.uint8)
    model = LatentScoreModel(DiffusersAutoencoder(), SmallConv(), VPSDE())
    lsgm.fit(model, images, out=tmp_path / "run", epochs=1, batch_size=50, **QUICK)
    assert not torch.equal(model.scale, torch.ones_like(model.scale))
    (z,) = model.encode(images.float() / 255)
    assert z.mean((0, 2, 3)).tolist() == pytest.approx([0, 0], abs=0.1)
    assert z.std((0, 2, 3)).tolist() == pytest.approx([1, 1], abs=0.15)
    again = lsgm.load(tmp_path / "run", network=SmallConv(), autoencoder=DiffusersAutoencoder())
    drawn = again.sample(4, nfe=5, seed=2)
    assert drawn.images.shape == (4, 1, 8, 8) and drawn.nfe <= 5
    torch.testing.assert_close(drawn.images, model.decode([drawn.latents[0]]).detach())
    assert math.isfinite(again.bound(images.float() / 255).mean)


@pytest.mark.parametrize("count", [1, 7])
def test_items_are_gathered_from_arrays_and_datasets(count: int) -> None:
    values = np.arange(count * 6).reshape(count, 2, 3)
    index = torch.arange(count).flip(0)
    for data in (values.astype(np.uint8), torch.from_numpy(values.astype(np.uint8))):
        expected = torch.from_numpy(values).float().flip(0) / 255
        torch.testing.assert_close(Items(data).batch(index), expected)
    labelled = TensorDataset(torch.from_numpy(values).double(), torch.zeros(count))
    torch.testing.assert_close(
        Items(labelled).batch(index), torch.from_numpy(values).float().flip(0)
    )


def test_mistakes_are_named(tmp_path: Path) -> None:
    model, x = ScoreModel(MLP(), VPSDE(), (2,)), torch.zeros(8, 2)
    with pytest.raises(ValueError, match="no setting 'learning_rate' .* known: .*lr,"):
        lsgm.fit(model, x, out=tmp_path / "run", learning_rate=1.0)
    with pytest.raises(ValueError, match="epochs: must be positive"):
        lsgm.fit(model, x, out=tmp_path / "run", epochs=0)
    with pytest.raises(UserError, match=r"items have the shape \(3,\), the model wants \(2,\)"):
        lsgm.fit(model, torch.zeros(8, 3), out=tmp_path / "run", **QUICK)
    with pytest.raises(UserError, match="Linear is none of the models"):
        lsgm.fit(nn.Linear(2, 2), x, out=tmp_path / "run", **QUICK)
    with pytest.raises(ValueError, match="int64 is neither floating point nor 8 bits"):
        lsgm.fit(model, torch.zeros(8, 2, dtype=torch.int64), out=tmp_path / "run", **QUICK)
    with pytest.raises(ValueError, match="there are no items"):
        lsgm.fit(model, torch.zeros(0, 2), out=tmp_path / "run", **QUICK)
    assert not (tmp_path / "run").exists()


class LatentConv(nn.Module):
    """A noise prediction of latents with two channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        times = t.reshape(-1, 1, 1, 1).expand(len(z), 1, *z.shape[2:])
        return self.conv(torch.cat([z, times], dim=1))


def test_the_models_of_configurations_train_with_an_own_network(tmp_path: Path) -> None:
    """A VAE by fit, then the LSGM over it, end to end, with a network of one's own."""
    torch.manual_seed(0)
    spec = DataSpec("own", channels=1, image_size=8, padding=0, binary=True)
    config = VAEConfig(
        num_channels_enc=4, num_channels_dec=4, num_preprocess_cells=1, num_postprocess_cells=1,
        num_groups_per_scale=1, num_latent_per_group=2,
    )  # fmt: skip
    images = (torch.rand(64, 1, 8, 8) > 0.5).float()
    settings = {"epochs": 1, "batch_size": 16, "device": "cpu"}
    vae = VAEModel(build_vae(config, spec), spec, config)
    lsgm.fit(vae, images, test=images, out=tmp_path / "vae", **settings)
    again = lsgm.load(tmp_path / "vae")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), vae.parameters(), strict=True))

    prior = PriorConfig(training="joint")
    score = build_prior(prior, vae.vae, LatentConv())
    model = LSGM(vae.vae, score, spec, config, prior)
    first = [score.network.conv.weight, next(vae.vae.parameters())]
    before = [weight.detach().clone() for weight in first]
    lsgm.fit(model, images, out=tmp_path / "lsgm", seed=1, **settings)
    assert not any(torch.equal(a, b) for a, b in zip(first, before, strict=True))
    opened = lsgm.load(tmp_path / "lsgm", network=LatentConv())
    x = 2 * images[:4] - 1
    bounds = [m.nelbo(x, torch.Generator().manual_seed(0)).total for m in (model, opened)]
    assert torch.equal(*bounds)
    with pytest.raises(UserError, match=r"its network \(test_fit.LatentConv\) is not"):
        lsgm.load(tmp_path / "lsgm")


def test_a_model_of_images_trains_on_labelled_arrays(tmp_path: Path) -> None:
    spec = DataSpec("own", channels=1, image_size=8, padding=0, binary=False, num_classes=3)
    network = PriorNetworkConfig(
        num_channels=4, num_scales=2, num_cells_per_scale=1, embedding_dim=8,
        attention_resolutions=(), middle_attention=False,
    )  # fmt: skip
    config = ScoreModelConfig(ncsnpp=network, class_conditional=True)
    model = build_data_model("score_sde", config, SamplerConfig(), spec)
    images = torch.randint(256, (32, 1, 8, 8), dtype=torch.uint8)
    data = ArrayDataset(images, torch.arange(32) % 3)
    lsgm.fit(model, data, out=tmp_path / "run", epochs=2, batch_size=16, device="cpu")
    opened = lsgm.load(tmp_path / "run")
    assert opened.num_classes == 3
    x, t = torch.randn(2, 1, 8, 8), torch.tensor(0.5)
    told = torch.tensor([0, 3])  # 3: no class
    assert torch.equal(opened.score(x, t, told), model.score(x, t, told))


@pytest.mark.parametrize(
    ("instructions", "taken"),
    [({}, "float32"), ({"avx512_bf16": True}, "bf16"), ({"bf16": True}, "bf16")],
)
def test_bf16_is_taken_only_where_the_cpu_computes_it(
    tmp_path, monkeypatch, capsys, instructions, taken
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, **instructions})
    seen = set()
    network = MLP()
    network.layers[0].register_forward_hook(lambda module, inputs, out: seen.add(out.dtype))
    model = ScoreModel(network, VPSDE(), shape=(2,))
    lsgm.fit(model, torch.randn(64, 2), out=tmp_path, max_steps=2, precision="bf16", **QUICK)
    assert seen == {torch.bfloat16 if taken == "bf16" else torch.float32}
    assert f"precision: {taken}\n" in (tmp_path / "config.yaml").read_text()
    assert ("taking float32" in capsys.readouterr().out) == (taken == "float32")
