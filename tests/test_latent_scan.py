"""The scan of the latents before the second stage: its sample, its numbers, its processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lsgm.config.architecture import VAEConfig
from lsgm.data import ArrayDataset, Datasets, DataSpec
from lsgm.models.latent import VAEModel, build_vae
from lsgm.training import World
from lsgm.training.runs.scan import LatentScan, scan_size
from vae.random import RowGenerators

SPEC = DataSpec("toy", 1, 8, 0, False)
VAE = VAEConfig(
    num_channels_enc=4, num_channels_dec=4, num_preprocess_blocks=1, num_preprocess_cells=1,
    num_postprocess_cells=1, num_latent_scales=2, num_groups_per_scale=2, num_latent_per_group=2,
    num_cell_per_cond_enc=1, num_cell_per_cond_dec=1, channel_mult=(1, 1, 1),
    cell="res_bnswish", decoder_dist="dml",
)  # fmt: skip
ALONE = World(torch.device("cpu"))


def make_model() -> VAEModel:
    torch.manual_seed(0)
    model = VAEModel(build_vae(VAE, SPEC), SPEC, VAE)
    with torch.no_grad():
        for p in model.vae.parameters():
            p += 0.2 * torch.randn_like(p)
    return model.eval()


def make_scan(folder: Path, world: World = ALONE, count: int = 30) -> LatentScan:
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    datasets = Datasets(ArrayDataset(images), ArrayDataset(images), SPEC)
    return LatentScan(make_model(), datasets, folder, world, batch_size=7, precision="float32")


def kl_by_hand(scan: LatentScan, size: int) -> Tensor:
    """``E log q - log N(0, 1)`` of the coarsest scale's channels, image by image."""
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))[:size]
    total = torch.zeros(4, dtype=torch.float64)
    for row, image in enumerate(order.tolist()):
        x = 2 * scan.datasets.train.batch(torch.tensor([image])) - 1
        posterior = scan.model.vae.encode(x, rng=RowGenerators.of(0, [row]))
        for g in range(2):
            eps, log_q = posterior.eps[g].double(), posterior.log_q[g].double()
            log_p = torch.distributions.Normal(0.0, 1.0).log_prob(eps)
            total[2 * g : 2 * g + 2] += (log_q - log_p).sum((0, 2, 3))
    return total / size


@torch.no_grad()
def test_channels_are_inactive_by_their_mean_kl(tmp_path, monkeypatch):
    scan = make_scan(tmp_path)
    kl = kl_by_hand(scan, 20)
    threshold = kl.sort().values[1:3].mean().item()  # between the second and the third
    monkeypatch.setattr("lsgm.training.runs.scan.active_channels", lambda found: found > threshold)
    assert torch.equal(scan.inactive_channels(20, augmented=False), kl <= threshold)


@torch.no_grad()
def test_the_coarsest_scale_alone_is_that_of_the_whole():
    vae, x = make_model().vae, torch.rand(3, 1, 8, 8)
    whole = vae.encode(x, rng=RowGenerators.of(3, range(3)))
    top = vae.encode(x, rng=RowGenerators.of(3, range(3)), top_only=True)
    assert len(top.eps) == 2 < len(whole.eps)
    for name in ("eps", "log_q", "mu", "log_sigma"):
        for a, b in zip(getattr(top, name), getattr(whole, name), strict=False):
            assert torch.equal(a, b)


@torch.no_grad()
def test_the_largest_distance_is_that_of_the_encodings(tmp_path):
    scan = make_scan(tmp_path)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    x = 2 * scan.datasets.train.batch(order) - 1
    latents = scan.model.vae.concat_top(
        scan.model.vae.encode(x, rng=RowGenerators.of(0, range(30))).eps
    )
    far = torch.cdist(latents.flatten(1).double(), latents.flatten(1).double()).max() ** 2
    assert scan.largest_squared_distance() == pytest.approx(far.item(), rel=1e-5)


def test_results_are_kept_for_the_same_weights_and_data(tmp_path, monkeypatch):
    first = make_scan(tmp_path).inactive_channels(20, augmented=False)

    def never(*_: object) -> None:
        raise AssertionError("scanned again")

    monkeypatch.setattr(LatentScan, "_posteriors", never)
    again = make_scan(tmp_path)
    assert torch.equal(again.inactive_channels(20, augmented=False), first)
    with torch.no_grad():
        next(again.model.vae.parameters()).add_(1e-3)
    for scan, size in ((again, 20), (make_scan(tmp_path), 19), (make_scan(tmp_path, count=31), 20)):
        with pytest.raises(AssertionError, match="scanned again"):
            scan.inactive_channels(size, augmented=False)
    (tmp_path / "scan.json").write_text("{")  # damaged: as if it were not there
    with pytest.raises(AssertionError, match="scanned again"):
        make_scan(tmp_path).inactive_channels(20, augmented=False)


@pytest.mark.parametrize(
    ("asked", "images", "positions", "size"),
    [(None, 60_000, 64, 256), (None, 27_000, 1024, 16), (None, 9, 1024, 9), (500, 60_000, 64, 500)],
)
def test_size_of_the_sample(asked, images, positions, size):
    assert scan_size(asked, images, positions) == size


def test_two_processes_find_what_one_finds(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    here = Path(__file__).parent
    environment = os.environ | {
        "PYTHONPATH": f"{here.parent}:{here}", "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path / "two")],
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    said = [json.loads(p.communicate(timeout=120)[0]) for p in processes]
    one = make_scan(tmp_path / "one")
    totals: list[Tensor] = []
    one.inactive_channels(21, augmented=False)
    for found in said:
        assert found["inactive"] == one.inactive_channels(21, augmented=False).tolist()
        assert found["distance"] == pytest.approx(one.largest_squared_distance(), rel=1e-5)
        totals.append(torch.tensor(found["kl"]))
    with torch.no_grad():
        torch.testing.assert_close(totals[0].double(), kl_by_hand(one, 21), rtol=1e-4, atol=1e-5)
    assert torch.equal(totals[0], totals[1])


def _process(folder: str) -> None:
    import lsgm.training.runs.scan as scan_module
    from lsgm.training import distributed

    seen: list[list[float]] = []
    original = scan_module.active_channels

    def record(kl: Tensor) -> Tensor:
        seen.append(kl.tolist())
        return original(kl)

    scan_module.active_channels = record
    with distributed("cpu") as world:
        scan = make_scan(Path(folder), world)
        inactive = scan.inactive_channels(21, augmented=False).tolist()
        found = {"inactive": inactive, "distance": scan.largest_squared_distance(), "kl": seen[0]}
    print(json.dumps(found))


if __name__ == "__main__":
    _process(sys.argv[1])
