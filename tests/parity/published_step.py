"""The numbers that accompany a published second-stage checkpoint, from the published formulas.

The networks are ours; everything around them (mixed prediction, objectives, joint and disjoint
step, flow, discrete chain) is written out as the published code computes it, in float32.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from published import Draw, PublishedSDE, discrete_chain, draw_times
from published_layout import prior_state
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from lsgm.importers.official_names import published_names
from lsgm.importers.official_prior import load_official_prior
from lsgm.score import MixedNormalScore
from vae.hierarchical import HierarchicalVAE

__all__ = ["record_prior"]

HALF_LOG_2PI = 0.9189385332
ODE_EPS, ODE_TOLERANCE, TEMPERATURE, STEPS = 1e-4, 1e-4, 0.8, 8


def _wide(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)


@dataclass(frozen=True)
class Prior:
    """A published prior: network and mixing logits of ``score``, and the published SDE."""

    score: MixedNormalScore
    sde: PublishedSDE

    def network(self, z: Tensor, t: Tensor) -> Tensor:
        return self.score.network(z, t)

    def __call__(self, z: Tensor, t: Tensor, var: Tensor | None = None) -> Tensor:
        """The mixed prediction; ``var`` of the kernel where it is not that of ``t``."""
        var = self.sde.var(t) if var is None else var
        a = torch.sigmoid(self.score.mixing_logit)
        normal = _wide(var.sqrt() / self.sde.total(t)) * z
        return (1 - a) * normal + a * self.network(z, t)

    def velocity(self, z: Tensor, t: Tensor) -> Tensor:
        """Of the probability-flow ODE at a scalar time."""
        coefficient = 0.5 * self.sde.g2(t) / self.sde.var(t).sqrt()
        return self.sde.f(t) * z + coefficient * self(z, t.reshape(1))

    def error(self, z0: Tensor, noise: Tensor, draw: Draw) -> Tensor:
        z_t = _wide(draw.mean) * z0 + _wide(draw.var.sqrt()) * noise
        return (self(z_t, draw.t, draw.var) - noise).square()


def record_prior(
    raw: Mapping[str, Any], vae: HierarchicalVAE, x_u8: Tensor, generator: torch.Generator
) -> dict[str, Any]:
    """All arrays of ``prior_NAME.npz`` that the tests read.

    Args:
        raw: the checkpoint.
        vae: its VAE.
        x_u8: ``(B, C, 32, 32)``, images of the training step.
        generator: of all noise.
    """
    args = vars(raw["args"])
    fields = ("sde_type", "beta_start", "beta_end", "sigma2_0", "sigma2_min", "sigma2_max")
    sde = PublishedSDE(**{name: args[name] for name in (*fields, "time_eps")})
    raw_score, ema_score = (load_official_prior(raw, weights) for weights in ("raw", "ema"))
    arrays: dict[str, Any] = {
        "config": json.dumps(args),
        "ce_const": np.float32(sde.constant(sde.time_eps)),
        "step_x_u8": x_u8,
    }
    shape = (len(x_u8), *vae.top_shape)

    def noise(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    recorder = _Recorder(sde, args, Prior(raw_score, sde), Prior(ema_score, sde), shape, noise)
    arrays |= recorder.network(generator)
    arrays |= recorder.objectives(generator)
    arrays |= recorder.flow()
    if sde.sde_type in ("vpsde", "geometric_sde"):
        arrays |= recorder.chain()
    arrays |= _steps(raw, vae, recorder, x_u8, generator)
    if args["custom_conv_dae"]:
        norms = [m for m in raw_score.modules() if isinstance(m, nn.GroupNorm)]
        arrays["reg_dae_spectral"] = np.float32(0)
        arrays["reg_dae_norm"] = sum(m.weight.abs().max() for m in norms)
    return arrays


@dataclass(frozen=True)
class _Recorder:
    """What the prior alone computes."""

    sde: PublishedSDE
    args: Mapping[str, Any]
    raw: Prior
    ema: Prior
    shape: tuple[int, ...]
    noise: Callable[..., Tensor]

    @torch.no_grad()
    def network(self, generator: torch.Generator) -> dict[str, Any]:
        x, t = self.noise(*self.shape), torch.rand(self.shape[0], generator=generator)
        active = torch.ones(self.shape[1])
        active[0] = 0
        arrays: dict[str, Any] = {"net_x": x, "net_t": t, "is_active": active}
        arrays["net_scalar_t"] = torch.tensor(0.4)
        scales = self.args["num_scales_dae"]
        arrays["resolutions"] = np.array([self.shape[-1] >> i for i in range(scales)])
        for name, prior in (("raw", self.raw), ("ema", self.ema)):
            arrays[f"net_out_{name}"] = prior.network(x, t)
            arrays[f"mixed_{name}"] = prior(x, t)
        arrays["net_out_masked_ema"] = self.ema.network(x * _wide(active).view(1, -1, 1, 1), t)
        arrays["net_out_scalar_t_ema"] = self.ema.network(x, arrays["net_scalar_t"].reshape(1))
        arrays["temb"] = self._features(t)
        return arrays

    def _features(self, t: Tensor) -> Tensor:
        half = self.args["embedding_dim"] // 2
        if self.args["embedding_type"] == "fourier":
            frequencies = self.ema.score.network.embedding.features.frequencies
            angles = t[:, None] * frequencies * (2 * 3.14159265359)
        else:
            rates = torch.exp(-torch.arange(half) * (math.log(10000) / (half - 1)))
            angles = self.args["embedding_scale"] * t[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    @torch.no_grad()
    def objectives(self, generator: torch.Generator) -> dict[str, Any]:
        z0, noise = self.noise(*self.shape), self.noise(*self.shape)
        rho = torch.rand(self.shape[0], generator=generator)
        arrays: dict[str, Any] = {"obj_z0": z0, "obj_noise": noise, "obj_rho": rho}
        constant = self.sde.constant(self.sde.time_eps) * z0[0].numel()
        for mode in supported_modes(self.args):
            draw = draw_times(mode, self.sde, rho)
            arrays[f"obj_{mode}_t"] = draw.t
            for name, prior in (("raw", self.raw), ("ema", self.ema)):
                error = prior.error(z0, noise, draw).flatten(1).sum(1)
                arrays[f"obj_{mode}_p_{name}"] = draw.wp * error
                arrays[f"obj_{mode}_ce_{name}"] = draw.wq * error + constant
        return arrays

    def flow(self) -> dict[str, Any]:
        """Velocities, a sample and log-densities: float64 state, float32 velocities."""
        x, start = self.noise(*self.shape), self.noise(*self.shape)
        z0, probe = 0.5 * self.noise(*self.shape), self.noise(*self.shape)
        times = torch.tensor([1e-5, 1e-3, 0.1, 0.5, 1.0])
        with torch.no_grad():
            velocities = torch.stack([self.ema.velocity(x, t) for t in times])

        def options(t: float, flat: np.ndarray) -> tuple[Tensor, Tensor]:
            z = torch.from_numpy(flat[: x.numel()]).float().view(x.shape)
            return z, torch.tensor(t, dtype=torch.float32)

        def velocity(t: float, flat: np.ndarray) -> np.ndarray:
            z, time = options(t, flat)
            with torch.no_grad():
                return self.ema.velocity(z, time).flatten().numpy()

        def with_density(t: float, flat: np.ndarray) -> np.ndarray:
            z, time = options(t, flat)
            z.requires_grad_()
            v = self.ema.velocity(z, time)
            (product,) = torch.autograd.grad((v * probe).sum(), z)
            rate = -(product * probe).flatten(1).sum(1)
            return torch.cat([v.detach().flatten(), rate]).numpy()

        tolerances = {"rtol": ODE_TOLERANCE, "atol": ODE_TOLERANCE}
        first = TEMPERATURE * math.sqrt(self.sde.prior_var) * start.double().flatten().numpy()
        sample = solve_ivp(velocity, (1.0, float(np.float32(ODE_EPS))), first, **tolerances)
        first = np.concatenate([z0.double().flatten().numpy(), np.zeros(len(z0))])
        density = solve_ivp(with_density, (float(np.float32(ODE_EPS)), 1.0), first, **tolerances)
        end = torch.from_numpy(density.y[:, -1])
        z1, change = end[: x.numel()].view(x.shape), end[x.numel() :]
        prior = self.sde.prior_var
        log_prior = -0.5 * (z1.square() / prior + math.log(2 * math.pi * prior)).flatten(1).sum(1)
        return {
            **{"ode_vel_t": times, "ode_vel_x": x, "ode_vel": velocities},
            **{"ode_eps": np.float64(ODE_EPS), "ode_tol": np.float64(ODE_TOLERANCE)},
            **{"ode_temp": np.float64(TEMPERATURE), "ode_noise": start},
            "ode_sample": torch.from_numpy(sample.y[:, -1]).float().view(x.shape),
            "ode_sample_nfe": np.int64(sample.nfev),
            **{"nll_z0": z0, "nll_probe": probe, "nll_nfe": np.int64(density.nfev)},
            "nll": -(log_prior - change).float(),
        }

    @torch.no_grad()
    def chain(self) -> dict[str, Any]:
        """The ancestral sample at temperature 0.9."""
        betas, abar, post = discrete_chain(self.sde, STEPS)
        noise = self.noise(STEPS + 1, *self.shape)
        variances = betas if self.args["denoising_stddevs"] == "beta" else post
        z = 0.9 * noise[0]
        for k in range(STEPS, 0, -1):
            var = (1 - abar[k - 1]).reshape(1)
            pred = self.ema(z, torch.tensor([k / STEPS]), var)
            if k == 1:
                z = ((z - var.sqrt() * pred) / abar[0].sqrt()).clamp(-3, 3)
            else:
                beta = betas[k - 1]
                mean = (z - beta * pred / var.sqrt()) / (1 - beta).sqrt()
                z = mean + 0.9 * variances[k - 1].sqrt() * noise[STEPS + 1 - k]
        names = ("disc_betas", "disc_alpha_bars", "disc_betas_post")
        chain = dict(zip(names, (betas, abar, post), strict=True))
        return {**chain, "disc_noise": noise, "disc_sample": z}


def supported_modes(args: Mapping[str, Any]) -> list[str]:
    """Sampling modes of the prior's objective that the published code has for these options."""
    modes = [f"{name}_uniform" for name in ("ll", "drop_all", "drop_sigma2t")] + ["rescale_iw"]
    if args["sde_type"] == "sub_vpsde" and not args["iw_subvp_like_vp_sde"]:
        return modes
    without = args["sde_type"] == "geometric_sde"
    return modes + ["ll_iw", "drop_sigma2t_iw"] + ([] if without else ["drop_all_iw"])


# Training steps


def _steps(
    raw: Mapping[str, Any],
    vae: HierarchicalVAE,
    recorder: _Recorder,
    x_u8: Tensor,
    generator: torch.Generator,
) -> dict[str, Any]:
    args, noise = recorder.args, recorder.noise
    bits = args["num_x_bits"]
    x = torch.floor(x_u8.float() / 2 ** (8 - bits)) / (2**bits - 1) * 2 - 1
    with torch.no_grad():
        shapes = [eps.shape for eps in vae(x, rng=generator).posterior.eps]
    given: dict[str, Any] = {f"step_vae_noise_{i}": noise(*s) for i, s in enumerate(shapes)}
    given |= {f"step_noise_{name}": noise(*recorder.shape) for name in ("joint", "q", "p")}
    given |= {f"step_rho_{n}": torch.rand(len(x), generator=generator) for n in ("p", "q")}
    c0, c1 = args["kl_const_coeff_vada"], args["kl_max_coeff_vada"]
    total = args["num_total_iter"]
    rise = (raw["global_step"] - args["kl_const_portion_vada"] * total) / (
        args["kl_anneal_portion_vada"] * total
    )
    coefficient = max(min(c0 + (c1 - c0) * rise, c1), c0) if args["cont_kl_anneal"] else 1.0
    arrays = given | {
        "step_global_step": np.int64(raw["global_step"]),
        "step_kl_coeff": np.float64(coefficient),
    }
    for kind in ("joint", "disjoint"):
        for mode in ("eval", "train"):
            step = _Step(args, coefficient, copy.deepcopy(vae).train(mode == "train"), recorder)
            arrays |= {f"{kind}_{mode}_{k}": v for k, v in step.run(kind, x, given).items()}
            if (kind, mode) == ("joint", "eval"):
                arrays |= step.pieces(x, given)
    return arrays


@dataclass(frozen=True)
class _Step:
    """One optimisation step, up to the gradients."""

    args: Mapping[str, Any]
    coefficient: float
    vae: HierarchicalVAE
    recorder: _Recorder

    def _encode(self, x: Tensor, given: Mapping[str, Tensor]) -> tuple[Any, Tensor, Tensor, Tensor]:
        """Output, ``rec (B,)``, ``log q (B, G)`` and the finer groups' cross-entropies."""
        count = sum(key.startswith("step_vae_noise") for key in given)
        noises = [given[f"step_vae_noise_{i}"] for i in range(count)]
        output = self.vae.infer(self.vae.encoder(x), None, noises)
        log_prob = output.likelihood.log_prob(x)
        if self.args["dataset"] in ("mnist", "omniglot"):
            log_prob = log_prob[..., 2:30, 2:30]
        log_q = torch.stack([q.flatten(1).sum(1) for q in output.posterior.log_q], dim=1)
        finer = output.posterior.eps[self.args["num_groups_per_scale"] :]
        rest = [(0.5 * e.square() + HALF_LOG_2PI).flatten(1).sum(1) for e in finer]
        finer_ce = torch.stack(rest, dim=1) if rest else log_q[:, :0]
        return output, -log_prob.flatten(1).sum(1), log_q, finer_ce

    @torch.no_grad()
    def pieces(self, x: Tensor, given: Mapping[str, Tensor]) -> dict[str, Any]:
        output, recon, log_q, finer = self._encode(x, given)
        top = self.args["num_groups_per_scale"]
        return {
            **{"step_recon": recon, "step_sum_log_q": log_q.sum(1), "step_log_q_per_group": log_q},
            "step_remaining_ce": finer.sum(1) if finer.shape[1] else np.float32(0),
            "step_rem_per_group": finer,
            "step_kl_alpha": self._alpha(),
            "step_eps_top": torch.cat(output.posterior.eps[:top], dim=1),
        }

    def _alpha(self) -> Tensor:
        per_scale, scales = self.args["num_groups_per_scale"], self.args["num_latent_scales"]
        alpha = torch.tensor([4.0**i / per_scale for i in range(scales) for _ in range(per_scale)])
        return alpha / alpha.min()

    def _q_loss(self, recon: Tensor, log_q: Tensor, ce: Tensor, finer: Tensor) -> Tensor:
        constant = self.recorder.sde.constant(self.recorder.sde.time_eps)
        groups = [(part + constant).flatten(1).sum(1) for part in ce.chunk(self._top, dim=1)]
        kl = log_q + torch.cat([torch.stack(groups, dim=1), finer], dim=1)
        if self.args["kl_balance_vada"] and self.coefficient < 1:
            share = (kl.detach().abs().mean(0) + 0.01) / self._alpha()
            kl = kl * share / share.mean()
        return (self.coefficient * kl.sum(1) + recon).mean()

    @property
    def _top(self) -> int:
        return self.args["num_groups_per_scale"]

    def run(self, kind: str, x: Tensor, given: Mapping[str, Tensor]) -> dict[str, Any]:
        """Losses and gradients of the ``joint`` or the ``disjoint`` step, and the modes in it."""
        sde, disjoint = self.recorder.sde, kind == "disjoint"
        mode_p, mode_q = self.args["iw_sample_p"], self.args["iw_sample_q"]
        if disjoint and mode_q == "reweight_p_samples":
            mode_q = "ll_iw"
        use_ema = disjoint and self.args["update_q_ema"]
        prior, prior_q = self.recorder.raw, self.recorder.ema if use_ema else self.recorder.raw
        output, recon, log_q, finer = self._encode(x, given)
        z0 = torch.cat(output.posterior.eps[: self._top], dim=1)
        draw_p = draw_times(mode_p, sde, given["step_rho_p"])
        noise_p, noise_q = (given[f"step_noise_{n if disjoint else 'joint'}"] for n in ("p", "q"))
        shared = mode_q == "reweight_p_samples"
        equal = shared and mode_p in ("ll_uniform", "ll_iw")
        draw_q = draw_p if shared else draw_times(mode_q, sde, given["step_rho_q"])
        ce = _wide(draw_q.wq) * prior_q.error(z0, noise_q, draw_q)
        q_loss = self._q_loss(recon, log_q, ce, finer)
        error_p = prior.error(z0.detach(), noise_p, draw_p)
        p_loss = (draw_p.wp * error_p.flatten(1).sum(1)).mean()
        arrays = {"iw_p": mode_p, "iw_q": mode_q, "update_q_ema": np.bool_(use_ema)}
        arrays["losses"] = torch.stack([q_loss] if equal else [q_loss, p_loss])
        arrays |= _summary("vae", self._vae_gradients(q_loss))
        gradients = _prior_gradients(q_loss if equal else p_loss, prior.score)
        return arrays | _summary("dae", gradients)

    def _vae_gradients(self, loss: Tensor) -> dict[str, Tensor]:
        ours = dict(self.vae.named_parameters())
        owned = {n: ours[o] for n, o in published_names(self.vae).items() if o in ours}
        found = torch.autograd.grad(
            loss, list(owned.values()), retain_graph=True, materialize_grads=True
        )
        return dict(zip(owned, found, strict=True))


def _prior_gradients(loss: Tensor, score: MixedNormalScore) -> dict[str, Tensor]:
    """By published name: a copy whose parameters are the gradients is written as a checkpoint."""
    found = torch.autograd.grad(loss, list(score.parameters()), materialize_grads=True)
    holder = copy.deepcopy(score)
    with torch.no_grad():
        for parameter, gradient in zip(holder.parameters(), found, strict=True):
            parameter.copy_(gradient)
    return {k: v for k, v in prior_state(holder).items() if k != "temb_fun.w"}


def _summary(side: str, gradients: Mapping[str, Tensor]) -> dict[str, Any]:
    """What is recorded of the gradients of one side."""
    arrays: dict[str, Any] = {
        f"{side}_grad_names": np.array(list(gradients)),
        f"{side}_grad_norms": torch.stack([g.norm() for g in gradients.values()]),
    }
    if side == "vae":
        arrays["grad_enc_sampler0_bias"] = gradients["enc_sampler.0.1.bias"]
    else:
        arrays["grad_mixing_logit"] = gradients["mixing_logit"].flatten()
        arrays["grad_in_conv"] = gradients["all_modules.2.weight"]
    return arrays
