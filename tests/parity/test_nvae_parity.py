"""The hierarchical VAE against numbers that the published implementation produced.

Every ``nvae_*.npz`` in the folder ``LSGM_PARITY_DIR`` is checked, with every checkpoint that
belongs to it (``nvae_A.pt`` and ``nvae_A_variant.pt`` to ``nvae_A.npz``).
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vae.hierarchical as hierarchical
from lsgm.importers.official import (
    OfficialCheckpoint,
    load_official_regularizer,
    load_official_vae,
    official_optimizer_slots,
    read_official_checkpoint,
)
from lsgm.importers.official_names import published_names
from vae.distributions import DiscretizedLogisticMixture, decoder_distribution
from vae.flows import causal_mask
from vae.hierarchical import HierarchicalVAE, VAEOutput
from vae.layers import BatchNorm, Conv2d
from vae.objective import (
    bits_per_dim,
    bounds,
    elbo,
    kl_balance_alpha,
    kl_balance_weights,
    kl_coefficient,
    kl_per_channel,
    standard_normal_log_prob,
)
from vae.regularization import SpectralNormRegularizer, norm_regularizer

FOLDER = os.environ.get("LSGM_PARITY_DIR")
MODES = [(mode, weights) for mode in ("eval", "train") for weights in ("raw", "ema")]


def _archives() -> list[Path]:
    if not FOLDER:
        return []
    found = sorted(Path(FOLDER).glob("nvae_*.npz"))
    return [path for path in found if "num_groups" in np.load(path).files]


def _archive_of(checkpoint: Path) -> Path | None:
    """The archive of the same name, or else that of the longest name that it continues."""
    fits = [
        a
        for a in _archives()
        if checkpoint.stem == a.stem or checkpoint.stem.startswith(a.stem + "_")
    ]
    return max(fits, key=lambda a: len(a.stem), default=None)


CHECKPOINTS = (
    [p for p in sorted(Path(FOLDER).glob("nvae_*.pt")) if _archive_of(p) is not None]
    if FOLDER
    else []
)
PARTS = Path(FOLDER) / "nvae_parts.npz" if FOLDER else None

pytestmark = pytest.mark.skipif(not CHECKPOINTS, reason="LSGM_PARITY_DIR names no nvae_* fixtures")
each_mode = pytest.mark.parametrize(("mode", "weights"), MODES)
each_checkpoint = pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda p: p.stem)


class Arrays:
    """An archive, as tensors."""

    def __init__(self, path: Path) -> None:
        self.archive = np.load(path)
        self.names = set(self.archive.files)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(np.asarray(self.archive[name]))

    def groups(self, name: str) -> list[Tensor]:
        return [self[f"{name}.{k}"] for k in range(int(self["num_groups"]))]

    def strings(self, name: str) -> list[str]:
        return [str(s) for s in self.archive[name]]


def close(actual: Tensor | float, expected: Tensor, absolute: float, relative: float) -> None:
    actual = torch.as_tensor(actual).detach()
    torch.testing.assert_close(actual.double(), expected.double(), atol=absolute, rtol=relative)


@functools.cache
def _load(path: Path) -> tuple[OfficialCheckpoint, Arrays]:
    archive = _archive_of(path)
    assert archive is not None
    return read_official_checkpoint(path), Arrays(archive)


def _model(checkpoint: OfficialCheckpoint, mode: str, weights: Any) -> HierarchicalVAE:
    if weights == "ema" and checkpoint.vae_ema is None:
        pytest.skip("this checkpoint keeps no averages")
    return load_official_vae(checkpoint, weights).train(mode == "train")


def _capture(vae: HierarchicalVAE) -> dict[str, Any]:
    """Intermediate features of the next pass, under the names of the archive."""
    found: dict[str, Any] = {}
    groups = [group for scale in vae.decoder.scales for group in scale.groups]

    def keep(name: str) -> Any:
        return lambda _module, _inputs, output: found.__setitem__(name, output)

    def keep_input(name: str) -> Any:
        return lambda _module, inputs: found.__setitem__(name, inputs[0])

    vae.encoder.stem.register_forward_hook(keep("stem"))
    vae.encoder.preprocess.register_forward_hook(keep("pre"))
    vae.encoder.scales[-1].groups[-1].register_forward_hook(keep("enc_last_cell"))
    for i, scale in enumerate(vae.encoder.scales):
        if scale.pyramid is not None:
            scale.pyramid.register_forward_hook(keep(f"pyramid{i}"))
            vae.encoder.scales[i + 1].groups[0].register_forward_pre_hook(keep_input(f"skip{i}"))
    groups[0].combiner.register_forward_hook(keep("dec_first_combiner"))
    vae.decoder.postprocess.register_forward_pre_hook(keep_input("dec_last"))
    vae.decoder.postprocess.register_forward_hook(keep("post"))
    vae.decoder.head.register_forward_hook(keep("logits"))
    for k, group in enumerate(groups):
        if len(group.flows):
            group.flows.register_forward_pre_hook(keep_input(f"eps_preflow.{k}"))
    return found


@each_checkpoint
def test_names_and_order_of_parameters(path: Path) -> None:
    checkpoint, arrays = _load(path)
    vae = load_official_vae(checkpoint)
    names = published_names(vae)
    assert list(names) == list(checkpoint.vae_state)
    parameters = dict(vae.named_parameters())
    published = [name for name, ours in names.items() if ours in parameters]
    assert published == arrays.strings("param_names")
    assert len(published) == len(parameters)
    assert [parameters[names[n]].numel() for n in published] == arrays["param_numel"].tolist()


@each_checkpoint
@each_mode
def test_forward_pass(path: Path, mode: str, weights: str) -> None:
    checkpoint, arrays = _load(path)
    vae = _model(checkpoint, mode, weights)
    prefix = f"{mode}.{weights}."
    features = _capture(vae)
    x = arrays["x"]
    with torch.no_grad():
        output = vae(x, noise=arrays.groups("noise"))
    _check_features(features, arrays, prefix)
    _check_posterior(output, features, arrays, prefix)
    _check_bound(vae, output, arrays, prefix)
    close(output.likelihood.mean, arrays[prefix + "dec_mean"], 1e-5, 1e-5)
    eps, size = output.posterior.eps, vae.num_groups_per_scale
    scales = [torch.cat(eps[i : i + size], dim=1) for i in range(0, len(eps), size)]
    assert [list(z.shape) for z in scales] == arrays[prefix + "concat_eps_shape"].tolist()
    top = vae.concat_top(output.posterior.eps)
    assert tuple(top.shape[1:]) == vae.top_shape
    parts = vae.split_top(top)
    assert [list(z.shape) for z in parts] == arrays["decompose.shape"].tolist()
    assert all(torch.equal(a, b) for a, b in zip(parts, output.posterior.eps, strict=False))
    if mode == "train":
        buffers = dict(vae.named_buffers())
        names = published_names(vae)
        after = [buffers[names[name]].flatten() for name in arrays.strings("bn_buffer_names")]
        close(torch.cat(after), arrays[prefix + "bn_buffers_after"], 1e-5, 1e-5)


def _check_features(features: dict[str, Any], arrays: Arrays, prefix: str) -> None:
    logits = features["logits"]
    if prefix + "logits" in arrays:
        close(logits, arrays[prefix + "logits"], 1e-5, 1e-5)
    if prefix + "logits_sub" in arrays:
        close(logits[:, :, ::4, ::4], arrays[prefix + "logits_sub"], 1e-5, 1e-5)
        close(logits.double().mean(), arrays[prefix + "logits_mean"], 1e-5, 1e-5)
        close(logits.double().abs().mean(), arrays[prefix + "logits_absmean"], 1e-5, 1e-5)
    stored = [name for name in arrays.names if name.startswith(prefix + "feat.")]
    for name in stored:
        close(features[name.rsplit(".", 1)[1]], arrays[name], 1e-5, 1e-5)


def _check_posterior(
    output: VAEOutput, features: dict[str, Any], arrays: Arrays, prefix: str
) -> None:
    posterior = output.posterior
    for k in range(int(arrays["num_groups"])):
        close(posterior.mu[k], arrays[f"{prefix}mu.{k}"], 1e-5, 1e-5)
        close(posterior.log_sigma[k], arrays[f"{prefix}log_sigma.{k}"], 1e-5, 1e-5)
        close(posterior.eps[k], arrays[f"{prefix}eps.{k}"], 1e-5, 1e-5)
        close(posterior.log_q[k], arrays[f"{prefix}log_q.{k}"], 2e-5, 1e-5)
        if f"{prefix}eps_preflow.{k}" in arrays:
            close(features[f"eps_preflow.{k}"], arrays[f"{prefix}eps_preflow.{k}"], 1e-5, 1e-5)


def _check_bound(vae: HierarchicalVAE, output: VAEOutput, arrays: Arrays, prefix: str) -> None:
    terms = elbo(vae, output, arrays["x"])
    close(terms.reconstruction, arrays[prefix + "recon"], 1e-2, 2e-6)
    close(terms.nelbo, arrays[prefix + "nelbo"], 1e-2, 2e-6)
    close(terms.log_weight, arrays[prefix + "log_iw"], 1e-2, 2e-6)
    close(terms.log_q, arrays[prefix + "log_q_total"], 1e-2, 2e-6)
    close(terms.log_p, arrays[prefix + "log_p_total"], 1e-2, 2e-6)
    close(terms.kl, arrays[prefix + "kl"], 1e-3, 1e-5)
    close(kl_per_channel(output.posterior), arrays[prefix + "kl_diag"], 1e-3, 1e-5)
    close(kl_balance_alpha(vae.groups_per_scale), arrays[prefix + "kl_alpha"], 1e-7, 0)
    weights = kl_balance_weights(terms.kl, vae.groups_per_scale, 0.35)
    close(weights, arrays[prefix + "kl_coeffs"], 1e-4, 1e-5)
    close(0.35 * (weights * terms.kl).sum(1), arrays[prefix + "balanced_kl_035"], 1e-3, 1e-5)
    close(terms.kl.mean(0), arrays[prefix + "kl_vals"], 1e-3, 1e-5)


@each_checkpoint
@each_mode
def test_regularizers(path: Path, mode: str, weights: str) -> None:
    checkpoint, arrays = _load(path)
    vae = _model(checkpoint, mode, weights)
    prefix = f"{mode}.{weights}."
    regularizer = load_official_regularizer(checkpoint, vae)
    close(regularizer(), arrays[prefix + "spectral_first"], 1e-4, 1e-5)
    close(regularizer(), arrays[prefix + "spectral_second"], 1e-4, 1e-5)
    with torch.no_grad():
        close(regularizer(300), arrays[prefix + "spectral_exact"], 1e-4, 1e-3)
    assert regularizer.num_layers == int(arrays[prefix + "num_conv_layers"])
    assert sum(isinstance(m, BatchNorm) for m in vae.modules()) == int(
        arrays[prefix + "num_bn_layers"]
    )
    close(norm_regularizer(vae), arrays[prefix + "bn_loss"], 1e-4, 1e-5)


@each_checkpoint
@each_mode
def test_samples(path: Path, mode: str, weights: str) -> None:
    checkpoint, arrays = _load(path)
    vae = _model(checkpoint, mode, weights)
    prefix = f"{mode}.{weights}."
    features = _capture(vae)
    eps = arrays.groups("sample_eps")
    with torch.no_grad():
        images = vae.sample(eps[0].shape[0], eps=eps)
    close(images, arrays[prefix + "sample_img"], 1e-5, 1e-5)
    close(features["logits"][:, :, ::4, ::4], arrays[prefix + "sample_logits_sub"], 1e-5, 1e-5)


@each_checkpoint
def test_temperature_acts_on_the_latents_that_are_drawn(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, arrays = _load(path)
    vae = _model(checkpoint, "eval", "raw")
    eps = arrays.groups("sample_eps")
    top = eps[: vae.num_groups_per_scale]
    for given, name in ((top, "sample_top_t07_img"), ([], "sample_all_t07_img")):
        drawn = iter(eps[len(given) :])
        monkeypatch.setattr(hierarchical, "randn", lambda *_, drawn=drawn, **__: next(drawn))
        with torch.no_grad():
            images = vae.sample(eps[0].shape[0], temperature=0.7, eps=given)
        close(images, arrays[name], 1e-5, 1e-5)


@each_checkpoint
def test_importance_weighted_bound(path: Path) -> None:
    checkpoint, arrays = _load(path)
    vae = _model(checkpoint, "eval", "raw")
    draws = int(arrays["iw_k"])
    noise = [[group[j] for group in arrays.groups("iw_noise")] for j in range(draws)]
    x = arrays["x"]
    for j in range(draws):
        with torch.no_grad():
            terms = elbo(vae, vae(x, noise=noise[j]), x)
        close(terms.nelbo, arrays["iw.nelbo_k"][:, j], 1e-2, 2e-6)
        close(terms.log_weight, arrays["iw.log_iw_k"][:, j], 1e-2, 2e-6)
    result = bounds(vae, x, draws, noise=noise)
    close(result.log_weights.T, arrays["iw.log_iw_k"], 1e-2, 2e-6)
    close(result.nelbo.mean(), arrays["iw.nelbo"], 1e-2, 2e-6)
    close(result.importance_weighted.mean(), arrays["iw.neg_log_p"], 1e-2, 2e-6)
    assert bits_per_dim(1.0, vae.data_dimensions) == pytest.approx(float(arrays["iw.bpd_coeff"]))


@each_checkpoint
def test_random_draw_from_the_mixture(path: Path) -> None:
    checkpoint, arrays = _load(path)
    if "dml.sample" not in arrays:
        pytest.skip("no mixture of logistics")
    bits = int(checkpoint.args.get("num_x_bits", 8))
    mixture = DiscretizedLogisticMixture(arrays["eval.raw.logits"], bits)
    sample = mixture.sample_from_uniforms(arrays["dml.u_mix"], arrays["dml.u_logistic"])
    close(sample, arrays["dml.sample"], 1e-5, 1e-5)


@each_checkpoint
def test_data_pipeline(path: Path) -> None:
    preprocess = pytest.importorskip("lsgm.data.preprocess")
    checkpoint, arrays = _load(path)
    bits = int(checkpoint.args.get("num_x_bits", 8))
    close(2 * preprocess.reduce_bits(arrays["x_raw"], bits) - 1, arrays["x"], 1e-7, 0)


@each_checkpoint
def test_training_step(path: Path) -> None:
    """Loss, gradients, Adamax update with the stored moments, and the average after it."""
    checkpoint, arrays = _load(path)
    vae = _model(checkpoint, "train", "raw")
    regularizer = load_official_regularizer(checkpoint, vae)
    names = [n for n in published_names(vae).values() if n in dict(vae.named_parameters())]
    by_name = dict(vae.named_parameters())
    parameters = [by_name[name] for name in names]
    x, coefficient = arrays["x"], float(arrays["step_kl_coeff"])

    terms = elbo(vae, vae(x, noise=arrays.groups("noise")), x)
    weights = kl_balance_weights(terms.kl, vae.groups_per_scale, coefficient)
    nelbo = (terms.reconstruction + coefficient * (weights * terms.kl).sum(1)).mean()
    close(nelbo, arrays["step.nelbo_loss"], 1e-2, 2e-6)
    loss = nelbo + float(arrays["step_wdn"]) * (regularizer() + norm_regularizer(vae))
    close(loss, arrays["step.loss"], 1e-2, 2e-6)
    loss.backward()

    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    scale = torch.cat([g.abs().max().expand(g.numel()) for g in gradients])[::7]
    flat = torch.cat([g.flatten() for g in gradients])[::7]
    expected = arrays["step.grad_every7"]
    # A bias before a batch norm has no gradient but rounding, which scales with the others.
    floor = 1e-6 * float(expected.abs().max())
    assert ((flat - expected).abs() <= 1e-3 * scale + 1e-3 * expected.abs() + floor).all()
    norms = torch.stack([g.norm() for g in gradients])
    close(norms, arrays["step.grad_norm_per_param"], 1e-4 * float(norms.max()), 1e-3)
    sums = torch.stack([g.double().sum() for g in gradients])
    rounding = torch.stack([1e-3 * g.double().abs().sum() + floor * g.numel() for g in gradients])
    assert ((sums - arrays["step.grad_sum_per_param"]).abs() <= rounding).all()
    _check_update(checkpoint, vae, parameters, names, arrays)


def _check_update(
    checkpoint: OfficialCheckpoint,
    vae: HierarchicalVAE,
    parameters: list[Tensor],
    names: list[str],
    arrays: Arrays,
) -> None:
    group = checkpoint.raw["vae_optimizer"]["param_groups"][0]
    slots = official_optimizer_slots(checkpoint, vae)
    optimizer = torch.optim.Adamax(
        parameters,
        lr=float(arrays["step_lr"]),
        betas=tuple(group["betas"]),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
    )
    for parameter, name in zip(parameters, names, strict=True):
        slot = slots[name]
        optimizer.state[parameter] = {
            "step": torch.tensor(float(slot["step"])),
            "exp_avg": slot["exp_avg"].clone(),
            "exp_inf": slot["exp_inf"].clone(),
        }
    optimizer.step()

    def every7(tensors: list[Tensor]) -> Tensor:
        return torch.cat([t.detach().flatten() for t in tensors])[::7]

    slopes = every7([optimizer.state[p]["exp_inf"] for p in parameters])
    expected = arrays["step.exp_inf_every7"]
    close(slopes, expected, 1e-4, 1e-3)
    after = every7(parameters)
    # An entry that hardly ever had a gradient moves far on what little it has, rounding included.
    allowed = 1e-5 + 1e-5 * after.abs() + 2e-8 * float(arrays["step_lr"]) / slopes
    assert ((after - arrays["step.param_every7"]).abs() <= allowed).all()
    if checkpoint.vae_ema is not None:
        averages = [0.8 * slots[n]["ema"] + 0.2 * p for n, p in zip(names, parameters, strict=True)]
        assert ((every7(averages) - arrays["step.ema_every7"]).abs() <= allowed).all()


@pytest.fixture(scope="module")
def parts() -> Arrays:
    if PARTS is None or not PARTS.is_file():
        pytest.skip("no nvae_parts.npz")
    return Arrays(PARTS)


@pytest.mark.parametrize(
    ("name", "kind", "bits"),
    [
        ("dml8", "dml", 8),
        ("dml5", "dml", 5),
        ("dl", "dl", 8),
        ("normal", "normal", 8),
        ("bin", "bin", 8),
    ],
)
def test_distributions(parts: Arrays, name: str, kind: str, bits: int) -> None:
    likelihood = decoder_distribution(kind, parts[f"{name}.param"], bits)
    log_prob = likelihood.log_prob(parts[f"{name}.x"])
    expected = parts[f"{name}.log_p"]
    # Where a bin holds little mass, the difference of two sigmoids is mostly rounding in float32,
    # in the stored numbers too: there they say no more than their own distance from the exact
    # value.
    exact = decoder_distribution(kind, parts[f"{name}.param"].double(), bits)
    error = (exact.log_prob(parts[f"{name}.x"].double()) - expected).abs()
    assert error.median() < 1e-4
    allowed = 2e-5 + 2e-6 * expected.abs() + error
    assert ((log_prob - expected).abs() <= allowed).all()
    close(likelihood.mean, parts[f"{name}.mean"], 1e-5, 1e-5)
    if f"{name}.recon" in parts:
        close(-log_prob.flatten(1).sum(1), parts[f"{name}.recon"], 1e-2, 2e-6)
    if f"{name}.recon_crop" in parts:
        cropped = log_prob[..., 2:30, 2:30].flatten(1).sum(1)
        close(-cropped, parts[f"{name}.recon_crop"], 1e-2, 2e-6)
    for temperature in (1.0, 0.7):
        stored = f"{name}.sample_t{temperature}"
        if stored in parts:
            assert isinstance(likelihood, DiscretizedLogisticMixture)
            sample = likelihood.sample_from_uniforms(
                parts[f"{name}.u_mix"], parts[f"{name}.u_logistic"], temperature
            )
            close(sample, parts[stored], 1e-5, 1e-5)


def test_bit_reduction(parts: Arrays) -> None:
    preprocess = pytest.importorskip("lsgm.data.preprocess")
    for bits in range(1, 9):
        close(
            preprocess.reduce_bits(parts["bits.x_raw"], bits), parts[f"bits.x_{bits}bit"], 1e-7, 0
        )


def test_balancing_shares(parts: Arrays) -> None:
    names = [name for name in parts.names if name.startswith("kl_alpha.")]
    assert names
    for name in names:
        _, rule, scales, groups = name.split(".")
        alpha = kl_balance_alpha([int(groups)] * int(scales), rule)  # type: ignore[arg-type]
        close(alpha, parts[name], 1e-7, 1e-7)


def test_annealing(parts: Arrays) -> None:
    steps = parts["kl_anneal.steps"].tolist()
    values = [
        kl_coefficient(s, 1000, anneal_portion=0.1, const_portion=0.01, minimum=1e-4, maximum=0.7)
        for s in steps
    ]
    expected = parts["kl_anneal.coeff_total100_const10_min1e-4_max0.7"]
    close(torch.tensor(values, dtype=torch.float64), expected, 1e-12, 1e-12)


def test_balancing(parts: Arrays) -> None:
    kl = parts["klb.kl_all"]
    weights = kl_balance_weights(kl, [2, 2, 2], 0.5)
    close(weights, parts["klb.coeffs"], 1e-4, 1e-5)
    close(0.5 * (weights * kl).sum(1), parts["klb.balanced_05"], 1e-3, 1e-5)
    close(kl.mean(0), parts["klb.vals"], 1e-3, 1e-5)
    ones = kl_balance_weights(kl, [2, 2, 2], 1.0)
    close(ones, parts["klb.coeffs_10"], 0, 0)
    close((ones * kl).sum(1), parts["klb.balanced_10"], 1e-3, 1e-5)


def test_masks(parts: Arrays) -> None:
    names = [name for name in parts.names if name.startswith("mask.")]
    assert names
    for name in names:
        fields = {
            f.rstrip("0123456789"): int("".join(filter(str.isdigit, f)))
            for f in name[5:].split("_")
        }
        mask = causal_mask(
            fields["ci"],
            fields["co"],
            fields["k"],
            groups=fields["g"],
            strict=bool(fields["zd"]),
            mirrored=bool(fields["mir"]),
        )
        assert torch.equal(mask, parts[name]), name


def test_learning_rate(parts: Arrays) -> None:
    schedules = pytest.importorskip("lsgm.training.schedules")
    schedule = schedules.Schedule(
        lr=1e-2, lr_min=1e-4, warmup_steps=12, total_steps=48, steps_per_epoch=4
    )
    values = [schedules.published(schedule, step) for step in range(48)]
    close(torch.tensor(values, dtype=torch.float64), parts["lr.trace_12ep_3warm_4it"], 1e-12, 1e-9)


def test_power_iteration(parts: Arrays) -> None:
    kernels = [parts[f"pi.w{i}"] for i in range(3)]
    model = torch.nn.Sequential(
        *[Conv2d(w.shape[1], w.shape[0], w.shape[2], bias=False) for w in kernels]
    )
    for layer, kernel in zip(model, kernels, strict=True):
        layer.weight.data = kernel
    regularizer = SpectralNormRegularizer(model)
    start = {"8x36": parts["pi.u0_a"], "6x10": parts["pi.u0_b"]}
    regularizer.load_state_dict({"u": start, "fresh": False})
    close(regularizer(), parts["pi.loss_call1"], 1e-5, 1e-6)
    close(regularizer.u[8, 36], parts["pi.u1_a"], 1e-5, 1e-5)
    # v is updated just before u; one half-step on from the stored v is the stored u
    matrices = torch.stack([w.flatten(1) for w in kernels[:2]])
    forward = torch.einsum("nrc,nc->nr", matrices, parts["pi.v1_a"])
    close(torch.nn.functional.normalize(forward), regularizer.u[8, 36], 1e-5, 1e-5)
    close(regularizer(), parts["pi.loss_call2"], 1e-5, 1e-6)
    regularizer.load_state_dict({"u": start, "fresh": False})
    close(regularizer(40), parts["pi.loss_40iters"], 1e-5, 1e-6)


def test_adamax_with_average(parts: Arrays) -> None:
    optimizers = pytest.importorskip("lsgm.training.optimizers")
    averages = pytest.importorskip("lsgm.training.ema")
    config = pytest.importorskip("lsgm.config.training").OptimConfig
    model = torch.nn.ParameterList([parts[f"opt.p0_{i}"].clone() for i in range(3)])
    optimizer = optimizers.make_optimizer(
        model.parameters(),
        config(optimizer="adamax", lr=1e-2, betas=(0.9, 0.999), eps=1e-3, weight_decay=3e-4),
    )
    ema = averages.EMA(model, 0.9)
    for step in range(5):
        for i, parameter in enumerate(model):
            parameter.grad = parts[f"opt.g{step}_{i}"].clone()
        optimizer.step()
        ema.update(model)
        for i, (parameter, average) in enumerate(zip(model, ema.module, strict=True)):
            close(parameter, parts[f"opt.p{step + 1}_{i}"], 1e-6, 1e-6)
            close(average, parts[f"opt.ema{step + 1}_{i}"], 1e-6, 1e-6)
    for i, parameter in enumerate(model):
        for slot in ("exp_avg", "exp_inf"):
            close(optimizer.state[parameter][slot], parts[f"opt.{slot}5_{i}"], 1e-6, 1e-6)


def test_constant_of_the_prior() -> None:
    """The published constant is rounded to ten decimals, which float32 cannot tell."""
    close(standard_normal_log_prob(torch.zeros(1)), torch.tensor([-0.9189385332]), 1e-7, 0)
