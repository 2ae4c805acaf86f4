r"""Log-density of a score model through its probability-flow ODE.

Along ``dz/dt = v(z, t) = f z + g^2 eps / (2 sigma)`` the log-density changes by ``-div v``, so with
``z(1)`` the end of the ODE that starts from ``z_0`` at the cutoff (arXiv 2011.13456 eq. 39)

    log p(z_0) = log p_1(z(1)) + int_{t_end}^1 div v(z(t), t) dt .

Both integrals are solved as one adaptive system. Log-densities are in nats; what bounds are made of
them is in :mod:`vae.objective` and :mod:`lsgm.evaluation`.

With Hutchinson's estimate of ``div v`` and fixed probes the log-density is unbiased, so means of it
(a NELBO) are right. Its exponential is not: ``E exp(log p + noise) > p``, and an importance-
weighted "bound" made of it comes out below the true negative log-likelihood.
:meth:`OdeLogDensity.exact` gives log-densities for that use, and refuses estimated ones.

>>> from lsgm.likelihood import ode_log_density
>>> from lsgm.sde import VPSDE
>>> sde, z0 = VPSDE(), torch.tensor([[0.0, 0.0], [1.0, -2.0]])
>>> found = ode_log_density(sde, sde.normal_component, z0)  # the score of N(0, I)
>>> torch.allclose(found.log_prob, sde.prior_log_prob(z0.double()), atol=1e-4)
True
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lsgm.divergence import Divergence, ExactDivergence
from lsgm.sde import LinearSDE
from lsgm.solvers.base import EpsFn, probability_flow_velocity
from lsgm.solvers.ode import Backend, integrate_adaptive
from vae.random import Rng, RowGenerators

__all__ = ["OdeLogDensity", "ToleranceRow", "ode_log_density", "tolerance_convergence"]

METHODS: dict[str, Backend] = {"dopri5": "torchdiffeq", "rk45": "scipy"}


@dataclass(frozen=True)
class OdeLogDensity:
    """Result of :func:`ode_log_density`.

    Attributes:
        log_prob: ``(B,)`` nats, float64 (the state's precision). With a random divergence it is
            unbiased; ``exp(log_prob)`` is not.
        nfe: Network calls on the batch (each with the backward passes of the divergence).
        latent: The end of the ODE at ``t = 1``, ``(B, *shape)``.
        per_probe: The log-density by each probe, ``(P, B)`` nats; ``log_prob`` is their mean.
        random: Whether the divergence was estimated.
    """

    log_prob: Tensor
    nfe: int
    latent: Tensor
    per_probe: Tensor
    random: bool

    @property
    def probe_variance(self) -> Tensor | None:
        """Variance over probes of the log-density by one probe, ``(B,)`` nats squared, unbiased; 0
        for an exact divergence, None where a single probe cannot tell.
        """
        if not self.random:
            return torch.zeros_like(self.log_prob)
        return self.per_probe.var(0) if len(self.per_probe) > 1 else None

    def exact(self) -> Tensor:
        """``log_prob``, exact up to the solver's tolerance, for use as an importance weight.

        Raises:
            ValueError: The divergence was estimated.
        """
        if self.random:
            raise ValueError(
                "a log-density with an estimated divergence cannot be exponentiated: the bound "
                "would lie below the truth; use the exact divergence"
            )
        return self.log_prob


def ode_log_density(
    sde: LinearSDE,
    eps_fn: EpsFn,
    z0: Tensor,
    *,
    divergence: Divergence | None = None,
    t_end: float | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    rng: Rng = None,
    method: Literal["dopri5", "rk45"] = "dopri5",
    published: bool = False,
    state_dtype: torch.dtype = torch.float64,
) -> OdeLogDensity:
    """Log-density of ``z0`` under the model's probability-flow ODE.

    ``z0`` is taken to lie at ``t_end``; it is not perturbed, and nothing corrects for ``[0,
    t_end]``. State and log-density form one system with one error norm over the whole batch, so
    results depend on the batch within the tolerance.

    Args:
        sde: The forward SDE.
        eps_fn: The noise prediction, called in the dtype of ``z0``; must act on each image by
            itself.
        z0: ``(B, *shape)``.
        divergence: Exact by default. A random one draws its probe once, so that the right-hand side
            is a function.
        t_end: Time at which ``z0`` lies; default the SDE's cutoff. The kernel must have variance
            there.
        rtol: Relative tolerance of a step.
        atol: Absolute tolerance of a step.
        rng: Source of the probe.
        method: ``"dopri5"`` (torchdiffeq) or ``"rk45"`` (scipy, on the CPU: the published one).
        published: Follow the published evaluation of arXiv 2106.05931 to the letter: a new probe at
            every velocity evaluation, times and coefficients in the dtype of ``z0``. It needs more
            calls, the more so the smaller the tolerance.
        state_dtype: Precision of the state.

    Raises:
        ValueError: The kernel has no variance at ``t_end``, or an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose from {', '.join(METHODS)}")
    divergence = ExactDivergence() if divergence is None else divergence
    t_end = sde.time_eps if t_end is None else t_end
    if not 0 <= t_end < 1 or sde.var(torch.tensor(t_end, dtype=torch.float64)).item() <= 0:
        raise ValueError(f"need a time in [0, 1) with variance for the data, got t_end={t_end}")
    time_dtype = z0.dtype if published else torch.float64
    probe = divergence.probe(z0, rng)
    size, nfe = z0.numel(), 0

    def dynamics(t: Tensor, state: Tensor) -> Tensor:
        nonlocal nfe, probe
        nfe += 1
        if published and divergence.random and nfe > 1:
            probe = divergence.probe(z0, rng)
        time = t.detach().to("cpu", time_dtype)
        batch_t = torch.full((len(z0),), time.item(), dtype=z0.dtype, device=z0.device)

        def velocity(x: Tensor) -> Tensor:
            return probability_flow_velocity(sde, eps_fn(x, batch_t).to(x.dtype), x, time)

        x = state[:size].reshape(z0.shape).to(z0.dtype)
        value, traces = divergence.per_probe(velocity, x, probe)
        return torch.cat([value.flatten(), traces.flatten()]).to(state_dtype)

    start, end = torch.tensor([t_end, 1.0], dtype=time_dtype).tolist()
    rows = max(len(probe), 1)
    state = torch.cat([z0.detach().flatten(), z0.new_zeros(rows * len(z0))]).to(state_dtype)
    with torch.no_grad():
        state = integrate_adaptive(
            dynamics, state, start, end, rtol=rtol, atol=atol, backend=METHODS[method]
        )
    latent = state[:size].reshape(z0.shape)
    per_probe = sde.prior_log_prob(latent) + state[size:].reshape(rows, len(z0))
    return OdeLogDensity(per_probe.mean(0), nfe, latent, per_probe, divergence.random)


@dataclass(frozen=True)
class ToleranceRow:
    """One line of :func:`tolerance_convergence`.

    Attributes:
        tolerance: Relative and absolute.
        log_prob: Mean over the batch, nats.
        error: Root mean square over the batch of the difference to the tightest tolerance, nats.
        nfe: Network calls.
    """

    tolerance: float
    log_prob: float
    error: float
    nfe: int


def tolerance_convergence(
    sde: LinearSDE,
    eps_fn: EpsFn,
    z0: Tensor,
    tolerances: Sequence[float] = (1e-3, 1e-4, 1e-5, 1e-6),
    *,
    seed: int = 0,
    **options: Any,
) -> tuple[ToleranceRow, ...]:
    """How the log-density of ``z0`` ``(B, *shape)`` depends on the solver's tolerance, loosest
    first, with the same probes at each.

    ``options`` are those of :func:`ode_log_density`.
    """
    ordered = sorted(tolerances, reverse=True)
    found = [
        ode_log_density(
            sde,
            eps_fn,
            z0,
            rtol=tolerance,
            atol=tolerance,
            rng=RowGenerators.of(seed, range(len(z0))),
            **options,
        )
        for tolerance in ordered
    ]
    return tuple(
        ToleranceRow(
            tolerance,
            density.log_prob.mean().item(),
            (density.log_prob - found[-1].log_prob).square().mean().sqrt().item(),
            density.nfe,
        )
        for tolerance, density in zip(ordered, found, strict=True)
    )
