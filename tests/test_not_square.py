"""Pictures of 48 x 64 go through everything: both stages, sampling, evaluation, editing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lsgm.commands.main import COMMANDS
from lsgm.config.architecture import PriorConfig, PriorNetworkConfig, VAEConfig
from lsgm.config.training import DataConfig
from lsgm.data import DataSpec, build_datasets
from lsgm.data.images import read_image
from lsgm.errors import UserError
from lsgm.models.latent import build_prior, build_vae
from lsgm.models.loading import load
from lsgm.networks import NCSNpp
from lsgm.networks.ncsn import NCSN
from lsgm.networks.resample import FIRDownsample, FIRUpsample
from lsgm.noise_ladder import NoiseLadder
from lsgm.sampling.masks import make_mask, state_mask

HEIGHT, WIDTH = 48, 64
SIZE = ("--data.image_size", str(HEIGHT), "--data.image_width", str(WIDTH))
TRAIN = (
    "--train.max_steps", "4", "--train.batch_size", "8", "--train.eval_every", "1",
    "--train.eval_images", "4", "--train.device", "cpu", "--train.num_threads", "1",
)  # fmt: skip
VAE = (
    "--vae.num_channels_enc", "4", "--vae.num_channels_dec", "4", "--vae.channel_mult", "1", "1",
    "1", "1", "--vae.num_preprocess_blocks", "2", "--vae.num_preprocess_cells", "1",
    "--vae.num_postprocess_cells", "1", "--vae.num_latent_scales", "2",
    "--vae.num_groups_per_scale", "1", "--vae.num_latent_per_group", "2", "--vae.cell",
    "res_bnswish", "--vae.decoder_dist", "dml",
)  # fmt: skip


def run(command: str, *arguments: object) -> None:
    COMMANDS[command]([str(a) for a in arguments], f"lsgm {command}")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pictures of a bright disc on a slope of colour, in two classes."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    for i in range(20):
        cy, cx = rng.uniform(10, 38), rng.uniform(10, 54)
        disc = ((y - cy) ** 2 + (x - cx) ** 2 < 64)[..., None]
        slope = np.stack([3 * x, 4 * y, np.full_like(x, 80)], -1)
        array = np.where(disc, [250, 220, 30], slope).clip(0, 255).astype(np.uint8)
        folder = root / ("left" if cx < WIDTH / 2 else "right")
        folder.mkdir(exist_ok=True)
        Image.fromarray(array).save(folder / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def runs(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    data = ("--data.name", "folder", "--data.root", pictures, *SIZE)
    run("train-vae", *data, *VAE, *TRAIN, "--out", root / "vae")
    run(
        "train-lsgm", "--vae", root / "vae", *TRAIN, "--prior.network.num_channels", 8,
        "--prior.network.num_cells_per_scale", 1, "--prior.class_conditional", "true",
        "--out", root / "lsgm",
    )  # fmt: skip
    return root


def test_both_stages_sample_evaluate_and_edit(runs, tmp_path, capsys):
    model = load(runs / "lsgm")
    assert model.shape == (3, HEIGHT, WIDTH) and model.state_shape == (2, 6, 8)
    assert [tuple(z.shape[1:]) for z in model.encode(torch.zeros(1, 3, HEIGHT, WIDTH))] == [
        (2, 6, 8), (2, 12, 16),
    ]  # fmt: skip
    for name in ("vae", "lsgm"):
        run("sample", "--run", runs / name, "--n", 3, "--out", tmp_path / name, "--device", "cpu")
        assert np.asarray(Image.open(tmp_path / name / "000002.png")).shape == (HEIGHT, WIDTH, 3)
    run("sample", "--run", runs / "lsgm", "--n", 4, "--out", tmp_path / "g.png", "--device", "cpu")
    grid = np.asarray(Image.open(tmp_path / "g.png"))
    assert grid.shape == (2 * (2 * (HEIGHT + 1) + 1), 2 * (2 * (WIDTH + 1) + 1), 3)
    run(
        "evaluate", "--run", runs / "lsgm", "--metrics", "nelbo", "--limit", 2, "--samples", 1,
        "--json", tmp_path / "r.json", "--device", "cpu",
    )  # fmt: skip
    (report,) = json.loads((tmp_path / "r.json").read_text())
    bits = report["nelbo"]["nats"]["mean"] / (HEIGHT * WIDTH * 3 * math.log(2))
    assert report["nelbo"]["bits_per_dim"] == pytest.approx(bits)
    common = ("--run", runs / "lsgm", "--device", "cpu", "--out", tmp_path / "e.png", "--nfe", 4)
    few = ("--index", 0, 1, "--samples", 1)
    run("edit", "inpaint", *common, *few, "--mask", "left", "--solver", "ancestral")
    run("edit", "reconstruct", *common, "--index", 0, "--solver", "heun")
    run("edit", "class-conditional", *common, "--labels", 0, 1, "--samples", 1)
    run("edit", "interpolate", *common, "--index", 0, 1, "--steps", 3)
    columns = np.asarray(Image.open(tmp_path / "e.png")).shape[1]
    assert columns == 2 * (3 * (WIDTH + 1) + 1)


def test_bits_per_dim_counts_every_value(runs):
    metrics = [json.loads(x) for x in (runs / "lsgm/metrics.jsonl").read_text().splitlines()]
    found = [m for m in metrics if "bits_per_dim" in m and "nelbo" in m]
    assert found
    for record in found:
        bits = record["nelbo"] / (HEIGHT * WIDTH * 3 * math.log(2))
        assert record["bits_per_dim"] == pytest.approx(bits, rel=1e-4)


def test_image_score_models_of_both_kinds(pictures, tmp_path):
    run(
        "train-score", "--kind", "score_sde", "--data.name", "folder", "--data.root", pictures,
        *SIZE, "--score.network", "ncsnpp", "--score.ncsnpp.num_channels", 8,
        "--score.ncsnpp.num_scales", 2, "--score.ncsnpp.attention_resolutions", 24, *TRAIN,
        "--sampler.nfe", 4, "--sampler.solver", "heun", "--out", tmp_path / "s",
    )  # fmt: skip
    model = load(tmp_path / "s")
    assert model.sample(2, nfe=3).images.shape == (2, 3, HEIGHT, WIDTH)
    ladder = NoiseLadder(1.0, 0.01, 10)
    network = NCSN(
        3, (HEIGHT, WIDTH), ladder, num_channels=4, channel_mult=(1, 2), dilations=(1, 1)
    )
    assert network(torch.rand(2, 3, HEIGHT, WIDTH), torch.tensor([0.3, 0.6])).shape[2:] == (48, 64)


def test_attention_is_where_the_shorter_side_says():
    wide = NCSNpp(3, (8, 16), num_channels=8, num_cells_per_scale=1, attention_resolutions=(4,))
    tall = NCSNpp(3, (16, 8), num_channels=8, num_cells_per_scale=1, attention_resolutions=(4,))
    square = NCSNpp(3, 8, num_channels=8, num_cells_per_scale=1, attention_resolutions=(4,))
    assert wide.state_dict().keys() == tall.state_dict().keys() == square.state_dict().keys()


@torch.no_grad()
def test_a_transposed_network_sees_the_transposed_picture():
    """With every kernel transposed, a network maps the transposed picture to the transposed map."""
    torch.manual_seed(0)
    options = {
        "num_channels": 8,
        "num_cells_per_scale": 1,
        "attention_resolutions": (4,),
        "fir": True,
    }
    wide, tall = NCSNpp(2, (8, 16), **options), NCSNpp(2, (16, 8), **options)
    for p in wide.parameters():
        p += 0.1 * torch.randn_like(p)
    weights = wide.state_dict()
    tall.load_state_dict({k: v.mT.clone() if v.ndim == 4 else v for k, v in weights.items()})
    x, t = torch.randn(2, 2, 8, 16), torch.tensor([0.2, 0.7])
    torch.testing.assert_close(tall(x.mT, t), wide(x, t).mT, rtol=1e-4, atol=1e-5)


def test_fir_resampling_is_two_passes_of_one_dimension():
    x = torch.randn(1, 2, 6, 10, dtype=torch.float64)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8

    def halve(line: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(line, (1, 1))
        return torch.stack(
            [(padded[..., 2 * i : 2 * i + 4] * taps).sum(-1) for i in range(line.shape[-1] // 2)],
            -1,
        )

    expected = halve(halve(x).mT).mT
    found = FIRDownsample()(x)
    assert found.shape == (1, 2, 3, 5)
    torch.testing.assert_close(found, expected)
    assert FIRUpsample()(x).shape == (1, 2, 12, 20)


def test_facts_of_a_data_set():
    spec = DataSpec("x", 3, HEIGHT, 2, False, image_width=WIDTH)
    assert spec.num_dims == HEIGHT * WIDTH * 3 and spec.network_shape == (52, 68)
    images = torch.rand(2, 3, HEIGHT, WIDTH)
    padded = torch.nn.functional.pad(images, (2,) * 4)
    assert torch.equal(spec.unpad(padded), images) and torch.equal(spec.unpad(images), images)
    for shape in ((2, 3, WIDTH, HEIGHT), (2, 3, 52, 64), (2, 3, 48, 68)):
        with pytest.raises(ValueError, match="expected images"):
            spec.unpad(torch.rand(shape))


def test_pictures_cover_the_size_and_lose_the_rest(pictures):
    path = next(pictures.rglob("*.png"))
    whole = np.asarray(Image.open(path))
    assert np.array_equal(read_image(path, (48, 64), 3).permute(1, 2, 0), whole)
    assert np.array_equal(read_image(path, 48, 3).permute(1, 2, 0), whole[:, 8:56])
    data = build_datasets(
        DataConfig("folder", root=str(pictures), image_size=HEIGHT, image_width=WIDTH)
    )
    assert data.train[0].shape == (3, HEIGHT, WIDTH)
    assert "(3 x 48 x 64)" in data.summary()


def test_a_pack_of_pictures_that_are_not_square(pictures, tmp_path, capsys):
    run("prepare", pictures, "--out", tmp_path / "p", "--image_size", 24, "--image_width", 32)
    said = capsys.readouterr().out
    assert "pictures of 24 x 32" in said and "cut away" not in said
    run("prepare", pictures, "--out", tmp_path / "q", "--image_size", 24)
    assert "25% of the pictures' area is cut away" in capsys.readouterr().out  # 16 of 64 columns
    data = build_datasets(DataConfig("folder", root=str(tmp_path / "p")))
    assert data.train[0].shape == (3, 24, 32) and data.spec.image_width == 32
    with pytest.raises(UserError, match=r"data\.image_width: .*24 x 32, not 24 wide"):
        build_datasets(DataConfig("folder", root=str(tmp_path / "p"), image_size=24))


def test_masks_of_pictures_and_of_latents():
    left = make_mask("left", 4, 6)
    assert left.tolist() == [[False] * 3 + [True] * 3] * 4
    assert (~make_mask("centre", 8, 12)).sum() == 4 * 6
    assert state_mask(left, 0, (7, 2, 3)).tolist() == [[False, False, True]] * 2


def test_sizes_that_cannot_be_halved_say_which_can():
    config = VAEConfig(
        num_preprocess_blocks=2, num_latent_scales=1, channel_mult=(1, 1, 1), decoder_dist="dml"
    )
    with pytest.raises(UserError, match="side 50 cannot be halved 2 times.* a side of 48 or 52"):
        build_vae(config, DataSpec("x", 3, 48, 0, False, image_width=50))
    vae = build_vae(config, DataSpec("x", 3, 48, 0, False, image_width=20))
    prior = PriorConfig(PriorNetworkConfig(num_scales=2))
    with pytest.raises(UserError, match="num_scales: 2 is too many for latents of side 5"):
        build_prior(prior, vae)
    with pytest.raises(ValueError, match="resolution 6 cannot be halved 2 times"):
        NCSNpp(1, (8, 6), num_scales=3)
