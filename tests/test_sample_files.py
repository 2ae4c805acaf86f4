"""What ``sample.py`` writes: single PNGs, chosen images, checkpoints; and what it refuses first."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lsgm.commands.sample import SampleOptions, sample_to_file
from lsgm.config.architecture import (
    PriorConfig,
    PriorNetworkConfig,
    SamplerConfig,
    ScoreModelConfig,
    VAEConfig,
)
from lsgm.config.training import (
    DataConfig,
    LSGMTrainConfig,
    NCSNTrainConfig,
    OptimConfig,
    TrainConfig,
    VAETrainConfig,
)
from lsgm.data.spec import DataSpec
from lsgm.errors import NonFiniteError, UserError
from lsgm.models.images import build_data_model
from lsgm.models.loading import load
from lsgm.models.release import save
from lsgm.training.checkpoint_model import load_checkpoint
from lsgm.training.runs.images import train_ncsn
from lsgm.training.runs.latent import train_lsgm, train_vae

NETWORK = PriorNetworkConfig(
    num_channels=8, num_scales=1, num_cells_per_scale=1, embedding_dim=8, attention_resolutions=()
)
VAE = VAEConfig(
    num_channels_enc=4, num_channels_dec=4, channel_mult=(1, 1), num_preprocess_blocks=1,
    num_preprocess_cells=1, num_postprocess_cells=1, num_latent_scales=1, num_groups_per_scale=1,
    num_latent_per_group=1, cell="res_bnswish",
)  # fmt: skip
OPTIM = OptimConfig(optimizer="adamw", lr=1e-3, ema_decay=0.5)
TRAIN = TrainConfig(
    batch_size=32, max_steps=4, checkpoint_every=2, keep_checkpoints=2, eval_images=8, device="cpu",
    num_threads=1,
)  # fmt: skip
DIGITS = DataConfig(name="digits")


def tiny_model(sampler: SamplerConfig, **score: object):
    config = ScoreModelConfig(ncsnpp=NETWORK, **score)
    spec = DataSpec("digits", 1, 8, padding=0, binary=False, num_classes=10)
    torch.manual_seed(0)
    model = build_data_model("score_sde", config, sampler, spec)
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A score model of the digits, with the corrector whose steps a batch shares."""
    folder = tmp_path_factory.mktemp("run")
    save(tiny_model(SamplerConfig(nfe=12, norm="batch")), folder, DIGITS)
    return folder


def draw(run: Path, out: Path, **options: object) -> Path:
    sample_to_file(SampleOptions(run=str(run), out=str(out), device="cpu", **options))
    return out


def levels(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


@pytest.mark.parametrize("chosen", [{}, {"solver": "rk45", "tolerance": 0.03}])
def test_image_k_alone_is_the_k_th_of_the_batch_bit_for_bit(run, tmp_path, chosen):
    """Also where a batch shares its steps: the batch is computed as a whole."""
    options = {"n": 7, "batch_size": 3, "seed": 5, **chosen}
    images = np.load(draw(run, tmp_path / "all.npz", **options))["images"]
    some = np.load(draw(run, tmp_path / "some.npz", index=(6, 1), **options))["images"]
    assert np.array_equal(some, images[[1, 6]])
    folder = draw(run, tmp_path / "single", index=(4,), **options)
    assert [p.name for p in folder.iterdir()] == ["000004.png"]
    assert np.array_equal(levels(folder / "000004.png"), np.rint(255 * images[4, 0]).astype("u1"))


def test_a_folder_has_one_png_an_image(run, tmp_path):
    images = np.load(draw(run, tmp_path / "a.npz", n=3, dtype="uint8"))["images"]
    folder = draw(run, tmp_path / "new" / "png", n=3)
    assert sorted(p.name for p in folder.iterdir()) == [f"{k:06d}.png" for k in range(3)]
    for k in range(3):
        assert np.array_equal(levels(folder / f"{k:06d}.png"), images[k, 0])
    with pytest.raises(UserError, match=r"--out: .*000000.png exists already"):
        draw(run, folder, n=2)


def test_an_image_beyond_n_is_drawn_alone(run, tmp_path, monkeypatch, capsys):
    """It is that of a longer run, and with batches of one nothing else is computed."""
    options = {"batch_size": 1, "seed": 5, "solver": "heun", "nfe": 4}
    whole = np.load(draw(run, tmp_path / "all.npz", n=7, dtype="uint8", **options))["images"]
    calls: list[int] = []
    model = load(run)
    model.score.register_forward_hook(lambda module, inputs, out: calls.append(len(out)))
    monkeypatch.setattr("lsgm.commands.sample.load", lambda *_: model)
    single = draw(run, tmp_path / "one.png", n=1, index=(6,), **options)
    assert np.array_equal(levels(single), whole[6, 0])  # no frame, not enlarged
    assert set(calls) == {1} and len(calls) <= 4
    assert "1 images" in (said := capsys.readouterr().out) and "peak memory" in said


@pytest.mark.parametrize("native", [True, False])
def test_precision_and_compilation_are_those_asked_for(run, tmp_path, monkeypatch, capsys, native):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": native})
    seen: set[torch.dtype] = set()
    model = load(run)
    convolution = next(m for m in model.score.modules() if isinstance(m, torch.nn.Conv2d))
    convolution.register_forward_hook(lambda module, inputs, out: seen.add(out.dtype))
    compiled: list[bool] = []
    monkeypatch.setattr(model.score, "compile", lambda: compiled.append(True))
    monkeypatch.setattr("lsgm.commands.sample.load", lambda *_: model)
    options = {"n": 4, "solver": "heun", "nfe": 4, "compile": True}
    low = np.load(draw(run, tmp_path / "low.npz", precision="bf16", **options))["images"]
    assert seen == {torch.bfloat16 if native else torch.float32} and compiled == [True]
    assert ("bf16" if native else "float32") in capsys.readouterr().out
    full = np.load(draw(run, tmp_path / "full.npz", **options))["images"]
    assert np.array_equal(low, full) != native and np.abs(low - full).max() < 0.1


def test_a_wrong_out_is_known_before_the_first_network_call(run, tmp_path, monkeypatch):
    monkeypatch.setattr("lsgm.commands.sample.iterate_samples", lambda *_: pytest.fail("sampled"))
    (tmp_path / "file").write_text("x")
    (tmp_path / "a.png").mkdir()
    wrong = ["file/a.npz", "file", "a.png"]
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        wrong.append("closed/a.png")
    for out in wrong:
        with pytest.raises(UserError, match=f"--out: .*{out.split('/')[0]}"):
            draw(run, tmp_path / out)
    assert (tmp_path / "file").read_text() == "x"
    for values in ({"out": "a.jpg"}, {"index": (-1,)}, {"latents": True, "out": "folder"}):
        with pytest.raises(ValueError, match=next(iter(values))):
            SampleOptions(**values)


@pytest.mark.parametrize("out", ["a.png", "a.npz", "a"])
def test_what_is_not_finite_is_no_picture(tmp_path, out, monkeypatch):
    model = tiny_model(SamplerConfig("heun", 8))
    with torch.no_grad():
        next(model.score.parameters()).fill_(float("nan"))
    monkeypatch.setattr("lsgm.commands.sample.load", lambda *_: model)  # which refuses such weights
    with pytest.raises(NonFiniteError, match=r"Heun: 3 of 3 samples \(100%\) are not finite"):
        draw(tmp_path / "run", tmp_path / "out" / out, n=5, batch_size=3)
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]


def test_times_without_noise_are_refused(run, tmp_path):
    for solver in ("predictor_corrector", "rk4", "dopri5", "dpmpp_2m"):
        with pytest.raises(UserError, match=rf"--solver {solver}: .*t = 0 has no noise: .*t_end"):
            draw(run, tmp_path / "a.png", solver=solver, t_end=0.0)
    draw(run, tmp_path / "a.npz", solver="heun", t_end=0.0, n=2)
    assert np.isfinite(np.load(tmp_path / "a.npz")["images"]).all()


# Checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of four steps with checkpoints at 2 and 4."""
    root = tmp_path_factory.mktemp("trained")
    patch = pytest.MonkeyPatch()
    # Grids and plots take longer than the training.
    for name in ("latent.evaluate_vae", "images.evaluate_score_model"):
        patch.setattr(f"lsgm.training.runs.{name}", lambda *_: {"loss": 0.0})
    vae = VAETrainConfig(data=DIGITS, vae=VAE, optim_vae=OPTIM, train=TRAIN)
    train_vae(vae, str(root / "vae"))
    lsgm = LSGMTrainConfig(
        vae_run=str(root / "vae"), data=DIGITS, optim_vae=OPTIM, optim_prior=OPTIM, train=TRAIN,
        prior=PriorConfig(NETWORK, drop_inactive=True),
    )  # fmt: skip
    train_lsgm(lsgm, str(root / "lsgm"))
    score = NCSNTrainConfig(
        kind="score_sde", data=DIGITS, score=ScoreModelConfig(ncsnpp=NETWORK), optim=OPTIM,
        sampler=SamplerConfig("heun", 8), train=TRAIN,
    )  # fmt: skip
    train_ncsn(score, str(root / "score_sde"))
    patch.undo()
    return {name: root / name for name in ("vae", "lsgm", "score_sde")}


@pytest.mark.parametrize("kind", ["vae", "lsgm", "score_sde"])
def test_a_checkpoint_of_an_unfinished_run_can_be_sampled(trained, tmp_path, kind):
    """Its last checkpoint holds, to the bit, what the run has released since."""
    run = trained[kind]
    released = load(run).state_dict()
    finished = load_checkpoint(run).state_dict()
    hidden = {name: run / name for name in ("run.json", "model.safetensors")}
    try:
        for name, path in hidden.items():
            path.rename(tmp_path / name)
        unfinished = load_checkpoint(run)
        earlier = load_checkpoint(run, "2").state_dict()
        draw(run, tmp_path / "a.png", checkpoint="latest", n=2)
    finally:
        for name, path in hidden.items():
            (tmp_path / name).rename(path)
    for state in (finished, unfinished.state_dict()):
        assert state.keys() == released.keys()
        assert all(torch.equal(state[key], released[key]) for key in released)
    assert any(not torch.equal(earlier[key], released[key]) for key in released)
    assert not unfinished.training


def test_a_missing_or_damaged_checkpoint_is_named(trained, run, tmp_path):
    with pytest.raises(UserError, match="no step 3; give latest or one of 2, 4"):
        load_checkpoint(trained["vae"], "3")
    with pytest.raises(UserError, match="has no checkpoints"):
        load_checkpoint(run)
    with pytest.raises(UserError, match="no such run folder"):
        load_checkpoint(tmp_path / "nowhere")
    path = trained["vae"] / "checkpoints" / "step_00000004.pt"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=r"step_00000004.pt is damaged"):
            load_checkpoint(trained["vae"], "4")
    finally:
        path.write_bytes(whole)


def test_options_that_a_vae_cannot_use_are_refused(trained, tmp_path):
    """Rather than ignored."""
    for values in ({"solver": "heun"}, {"nfe": 5}, {"t_end": 0.1}, {"denoise": True}):
        with pytest.raises(UserError, match=f"--{next(iter(values))}: .* is a VAE under N"):
            draw(trained["vae"], tmp_path / "a.png", **values)
    draw(trained["vae"], tmp_path / "a.png", n=2, temperature=0.7, seed=3)
