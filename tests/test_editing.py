"""Editing: what is known stays, in the file too; mistakes are named."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

import lsgm
from lsgm.commands.edit import edit_command
from lsgm.config.architecture import (
    ClassifierConfig,
    PriorConfig,
    PriorNetworkConfig,
    SamplerConfig,
    ScoreModelConfig,
    VAEConfig,
)
from lsgm.config.training import DataConfig
from lsgm.data import build_datasets, preprocess
from lsgm.errors import UserError
from lsgm.models.classifier import build_classifier
from lsgm.models.images import build_data_model
from lsgm.models.latent import LSGM, build_prior, build_vae
from lsgm.models.release import save
from lsgm.sampling.codes import close_round_trip
from lsgm.sampling.editing import colourise, inpaint
from lsgm.sampling.masks import make_mask, state_mask
from lsgm.solvers import make_grid, make_solver
from lsgm.solvers.sampler import Sampler
from vae.random import RowGenerators

NETWORK = PriorNetworkConfig(num_channels=8, num_scales=1, num_cells_per_scale=1, embedding_dim=8)
FAST = ["--device", "cpu", "--solver", "ancestral", "--nfe", "4"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Untrained runs of each kind, and a folder of colour images."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    for i in range(40):
        label = root / "pictures" / "ab"[i % 2]
        label.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(label / f"{i}.png")
    colour = DataConfig("folder", root=str(root / "pictures"), image_size=16)
    grey = DataConfig("digits")
    for name, data, classes in (("colour", colour, True), ("grey", grey, False)):
        config = ScoreModelConfig(ncsnpp=NETWORK, class_conditional=classes)
        spec = build_datasets(data).spec
        model = build_data_model("score_sde", config, SamplerConfig(), spec)
        (root / name).mkdir()
        save(model, root / name, data)
    config = ClassifierConfig(num_channels=8, num_scales=1)
    judge = build_classifier(config, ScoreModelConfig(), build_datasets(colour).spec)
    torch.nn.init.zeros_(judge.network.head.weight)
    judge.network.head.bias.data = torch.tensor([-1.0, 1.0])  # everything is of class 1
    (root / "judge").mkdir()
    save(judge, root / "judge", colour)
    config = VAEConfig(
        num_channels_enc=8, num_channels_dec=8, channel_mult=(1, 1, 1), num_preprocess_cells=1,
        num_postprocess_cells=1, num_latent_scales=2, num_latent_per_group=2,
    )  # fmt: skip
    spec = build_datasets(grey).spec
    vae, prior = build_vae(config, spec), PriorConfig(network=NETWORK)
    (root / "lsgm").mkdir()
    save(LSGM(vae, build_prior(prior, vae), spec, config, prior), root / "lsgm", grey)
    return root


def tiles(path, columns):
    """The images (rows, columns, H, W, 3) of a grid with a border of one, everything doubled."""
    grid = np.asarray(Image.open(path).convert("RGB"))[::2, ::2][1:, 1:]
    rows = grid.shape[0] // 17
    return grid.reshape(rows, 17, columns, 17, 3)[:, :16, :, :16].swapaxes(1, 2)


def edit(runs, name, run, out, *arguments):
    edit_command(name, ["--run", str(runs / run), "--out", str(out), *arguments])


@pytest.mark.parametrize("run", ["grey", "colour"])
def test_known_pixels_are_exact_in_the_file(runs, tmp_path, run):
    out = tmp_path / "x.png"
    edit(runs, "inpaint", run, out, "--samples", "2", "--index", "0", "2", "--mask", "left", *FAST)
    found = tiles(out, 4)
    data = build_datasets(
        DataConfig("digits")
        if run == "grey"
        else DataConfig("folder", root=str(runs / "pictures"), image_size=16)
    )
    images = data.test.batch(torch.tensor([0, 2])).expand(-1, 3, -1, -1)
    exact = (255 * images).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(found[:, 0], exact)
    for k in (1, 2, 3):
        assert np.array_equal(found[:, k, :, 8:], exact[:, :, 8:])
        assert not np.array_equal(found[:, k, :, :8], exact[:, :, :8])
    assert not np.array_equal(found[:, 2], found[:, 3])


def test_colours_keep_the_grey_image(runs, tmp_path):
    out = tmp_path / "x.png"
    edit(runs, "colourise", "colour", out, "--samples", "1", *FAST)
    original, grey, coloured = tiles(out, 3).astype(float).swapaxes(0, 1)
    assert np.abs(original.mean(-1) - grey[..., 0]).max() <= 0.5 + 1e-6
    assert not np.array_equal(coloured, original)
    model = lsgm.load(runs / "colour")
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sampler = Sampler("ancestral", nfe=4, grid="time", t_end=1e-2)
    seen = []
    model.decode = lambda latents, rng=None: seen.extend(latents) or x
    colourise(model, x, sampler, RowGenerators.of(0, range(2)))
    (known,) = model.encode(x, mean=True)
    torch.testing.assert_close(seen[0].mean(1), known.mean(1), atol=1e-4, rtol=1e-4)
    assert (seen[0] - known).abs().mean() > 0.1
    with pytest.raises(UserError, match="colour images in data space"):
        edit(runs, "colourise", "lsgm", out)


def test_a_latent_model_keeps_the_latents_of_known_pixels(runs):
    model = lsgm.load(runs / "lsgm")
    x = 2.0 * (torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)) < 0.5) - 1
    sampler = Sampler("ancestral", nfe=4, grid="time", t_end=1e-2)
    seen = []
    model.decode = lambda latents, rng=None: seen.extend(latents) or x
    inpaint(model, x, make_mask("left", 16, 16), sampler, RowGenerators.of(0, range(2)))
    for new, old in zip(seen, model.encode(x, mean=True), strict=True):
        half = old.shape[-1] // 2
        assert torch.equal(new[..., half:], old[..., half:])
        assert (new[..., :half] != old[..., :half]).all()


def test_commands_write_their_grids(runs, tmp_path):
    flow = ["--device", "cpu", "--solver", "heun", "--nfe", "4"]
    out = tmp_path / "x.png"
    edit(runs, "interpolate", "grey", out, "--steps", "3", "--index", "0", "1", "2", *flow)
    assert tiles(out, 3).shape[0] == 2
    edit(
        runs, "interpolate", "lsgm", out, "--steps", "3", "--between", "seeds", "--samples", "1",
        *flow,
    )  # fmt: skip
    assert tiles(out, 3).shape[0] == 1
    edit(runs, "reconstruct", "lsgm", out, *flow)
    found = tiles(out, 3).astype(int)
    assert np.abs(found[:, 1] - found[:, 2]).max() <= 25
    edit(runs, "resample", "lsgm", out, "--keep", "0", "1", "2", "3", "--samples", "1", *FAST)
    found = tiles(out, 3)
    assert np.array_equal(found[:, 1], found[:, 2])
    edit(
        runs, "class-conditional", "colour", out, "--labels", "0", "1", "--samples", "2",
        "--guidance", "2", *FAST,
    )  # fmt: skip
    assert tiles(out, 2).shape[0] == 2


def test_a_judge_counts_what_it_takes_for_the_class(runs, tmp_path, capsys):
    edit(
        runs, "class-conditional", "colour", tmp_path / "x.png", "--labels", "0", "1", "1", "1",
        "--samples", "3", "--judge", str(runs / "judge"), *FAST,
    )  # fmt: skip
    assert "taken for their class: 75.0% +- 12.5% of 12" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "run", "arguments", "message"),
    [
        ("fly", "lsgm", [], "fly: no such edit; known are inpaint"),
        ("inpaint", "grey", ["--mask", "hole"], "--mask: hole is neither"),
        ("inpaint", "grey", ["--index", "100000"], "--index: 100000: the test split"),
        ("inpaint", "grey", ["--files", "no.png"], "--files: no.png: no such file"),
        ("resample", "grey", [], "no latent groups"),
        ("resample", "lsgm", ["--keep", "4", *FAST], "--keep: no latent group 4"),
        ("class-conditional", "lsgm", [], "without classes"),
        ("class-conditional", "grey", FAST, "without classes"),
        ("class-conditional", "lsgm", ["--classifier", "judge"], "--classifier: it guides a model"),
        ("class-conditional", "colour", ["--labels", "2", *FAST], "classes 0 to 1"),
        ("class-conditional", "colour", ["--judge", "no", *FAST], "no: no such run folder"),
        ("interpolate", "grey", ["--solver", "ancestral"], "--solver: ancestral draws noise"),
        ("interpolate", "grey", ["--steps", "1"], "steps: must be at least 2"),
        ("reconstruct", "grey", ["--keep", "1"], "--keep"),
    ],
)
def test_mistakes(runs, tmp_path, name, run, arguments, message):
    with pytest.raises(UserError, match=message):
        edit(runs, name, run, tmp_path / "x.png", "--device", "cpu", *arguments)
    assert not list(tmp_path.iterdir())


def test_masks(tmp_path):
    assert (~make_mask("centre", 16, 16)).sum() == 64
    for name in ("left", "right", "top", "bottom"):
        assert make_mask(name, 16, 16).sum() == 128
    assert abs(make_mask("random", 64, 64, 1).double().mean() - 0.5) < 4 * 0.5 / 64
    Image.fromarray(np.tile(np.uint8([[0, 255]]), (2, 1))).save(tmp_path / "m.png")
    assert torch.equal(make_mask(str(tmp_path / "m.png"), 2, 2), torch.tensor([[False, True]] * 2))
    known = torch.ones(6, 6, dtype=torch.bool)
    known[0, 3] = False
    assert torch.equal(state_mask(known, 1, (6, 6)), known)
    small = state_mask(known, 1, (2, 4, 4))  # blocks of 2 in an image padded to 8
    assert (~small).nonzero().tolist() == [[0, 2]]
    assert math.prod(small.shape) == 16


def _picture(path, alpha, grey):
    """A file with these alpha and grey values (H, W), each as numbers 0 to 255."""
    grey, alpha = np.asarray(grey, np.uint8), np.asarray(alpha, np.uint8)
    Image.fromarray(np.dstack([grey, grey, grey, alpha])).save(path)
    return str(path)


def test_the_transparent_pixels_of_a_mask_are_drawn(tmp_path):
    hole = np.full((4, 4), 255)
    hole[1:3, 1:3] = 0
    expected = torch.from_numpy(hole == 255)
    for hidden in (0, 255):  # whatever colour hides below the transparency, or lies beside it
        path = _picture(tmp_path / f"{hidden}.png", hole, np.full((4, 4), hidden))
        assert torch.equal(make_mask(path, 4, 4), expected)
    opaque = _picture(tmp_path / "opaque.png", np.full((4, 4), 255), hole)
    assert torch.equal(make_mask(opaque, 4, 4), expected)
    palette = Image.fromarray(hole.astype(np.uint8)).convert("P")
    palette.save(tmp_path / "palette.png", transparency=0)
    assert torch.equal(make_mask(str(tmp_path / "palette.png"), 4, 4), expected)


def test_a_mask_of_another_size_or_without_a_hole_is_refused(tmp_path):
    white = np.full((4, 4), 255)
    empty = _picture(tmp_path / "empty.png", white, white)
    with pytest.raises(UserError, match=r"--mask: .*empty\.png hides no pixel"):
        make_mask(empty, 4, 4)
    for width in (8, 16):
        wide = _picture(tmp_path / "wide.png", np.zeros((4, width)), np.zeros((4, width)))
        with pytest.raises(UserError, match=rf"{width} x 4 pixels, the images are 4 x 4"):
            make_mask(wide, 4, 4)
    with pytest.raises(UserError, match="16 x 4 pixels, the images are 16 x 16"):
        make_mask(wide, 16, 16)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match=r"--mask: .*text\.png: not a readable image"):
        make_mask(str(tmp_path / "text.png"), 4, 4)


@pytest.mark.parametrize("run", ["colour", "lsgm"])
def test_files_need_no_data_set(runs, tmp_path, monkeypatch, run):
    def no_data(config):
        raise UserError("the data set is not there")

    monkeypatch.setattr("lsgm.commands.edit.build_datasets", no_data)
    path = runs / "pictures" / "a" / "0.png"
    out = tmp_path / "x.png"
    edit(runs, "inpaint", run, out, "--samples", "1", "--files", str(path), *FAST)
    if run == "colour":  # binary images are drawn
        assert np.array_equal(tiles(out, 3)[0, 0], np.asarray(Image.open(path)))
    with pytest.raises(UserError, match="the data set is not there"):
        edit(runs, "inpaint", run, out, "--index", "0", *FAST)


def test_interpolations_are_decoded_in_batches_of_fixed_steps(runs, tmp_path, monkeypatch, capsys):
    """As many network calls as one image costs for each batch, and the images of one by one."""
    model, calls, out = lsgm.load(runs / "grey"), [], tmp_path / "x.png"
    model.score.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    monkeypatch.setattr("lsgm.commands.edit.load", lambda *_: model)
    ends = ["--steps", "3", "--index", "0", "1", "2", "--device", "cpu", "--nfe", "4"]
    edit(runs, "interpolate", "grey", out, *ends)
    assert calls == [3] * 4 + [6] * 4
    together = tiles(out, 3)
    said = capsys.readouterr().out
    assert "encoding 3 images, 3 at a time" in said and "decoding 6 images, 6 at a time" in said
    edit(runs, "interpolate", "grey", out, *ends, "--batch_size", "1")
    assert np.abs(tiles(out, 3).astype(int) - together).max() <= 1


def test_reconstructions_print_the_closure_that_was_measured(runs, tmp_path, capsys):
    flow = ["--device", "cpu", "--solver", "heun", "--batch_size", "2"]
    errors = []
    for nfe in ("4", "40"):
        edit(runs, "reconstruct", "lsgm", tmp_path / "x.png", *flow, "--nfe", nfe)
        closure = re.search(
            r"closure of the flow: (\S+) of (\S+) in the state", capsys.readouterr().out
        )
        errors.append([float(value) for value in closure.groups()])
    model = lsgm.load(runs / "lsgm")
    images = build_datasets(DataConfig("digits")).test.batch(torch.arange(4))
    x = preprocess(images, model.spec, 8, torch.Generator().manual_seed(0))
    times = make_grid(make_solver("heun").default_grid, model.sde, 2, 1e-3)
    found = close_round_trip(model, x, make_solver("heun"), times)
    off = (found.back - found.state).square().mean().sqrt().item()
    assert errors[0][0] == pytest.approx(off, rel=0.01)
    assert errors[0][1] == pytest.approx(found.state.square().mean().sqrt().item(), rel=0.01)
    assert errors[1][0] < errors[0][0] / 20  # second order: a hundredth
