r"""The Normal-reference exponential integrator.

A mixed-Normal score (arXiv 2106.05931 section 3.2) says that the prior is nearly N(0, I). Under a
VP-type SDE the flow of an exact N(0, I) is the identity, yet the usual solvers move it: a DDIM step
multiplies ``z`` by ``cos(phi_s - phi_t)`` with ``m = cos phi``, ``sigma = sin phi``, so that few
steps shrink the samples. This integrator splits the Normal part off and integrates it exactly.

With ``V = total_var``, the variance of ``z_t`` if the smoothed data were N(0, I), the optimal noise
prediction is then ``sigma z / V``. For ``alpha`` in ``[0, 1]`` write

    eps(z, t) = (1 - alpha) sigma z / V + R(z, t)                                        (defines R)
    dz/dt     = [f + (1 - alpha) g^2 / (2 V)] z + g^2 / (2 sigma) R(z, t) .

For a mixed-Normal score with the model's ``alpha``, ``R`` is ``alpha`` times the network. From
``m' = f m`` and ``V' = 2 f V + g^2`` the linear part has, for every linear SDE, the closed-form
propagator

    E(s, t) = exp int_t^s [f + (1 - alpha) g^2 / (2 V)] du
            = (m_s / m_t)^alpha (V_s / V_t)^((1 - alpha) / 2) ,

and variation of constants gives

    z_s = E(s, t) z_t + int_t^s E(s, u) g^2(u) / (2 sigma_u) R(z_u, u) du .

``R`` is replaced by the Lagrange polynomial through its last evaluations in a variable ``X(t)``: an
exponential Adams-Bashforth method with one network call a step. ``alpha = 1`` is DEIS (arXiv
2204.13902); ``alpha = 0`` is exact on N(0, I) for any step. Since ``R`` is never divided by
``alpha``, small values lose no digits. With a corrector the new evaluation joins the polynomial (as
UniC does, arXiv 2302.04867), one order more at the same number of calls.

>>> from lsgm.sde import VPSDE
>>> from lsgm.solvers.normal_reference import NormalReference
>>> sde, x, times = VPSDE(), torch.ones(1, 2), torch.tensor([1.0, 0.01])
>>> found = NormalReference(alpha=0.0, order=1).solve(sde, sde.normal_component, x, times).x
>>> torch.allclose(found, x)  # one step, and exact
True
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lsgm.sde import LinearSDE
from lsgm.solvers.base import Problem
from lsgm.solvers.grids import noise_level
from lsgm.solvers.multistep import MultistepSolver

__all__ = ["EXTRAPOLATION_VARIABLES", "NormalReference", "StepWeights", "step_weights"]

EXTRAPOLATION_VARIABLES: dict[str, Callable[[LinearSDE, Tensor], Tensor]] = {
    "phi": lambda sde, t: noise_level(sde, t).atan(),
    "time": lambda sde, t: t,
    "sqrt_time": lambda sde, t: t.sqrt(),
    "log_snr": lambda sde, t: -noise_level(sde, t).log(),
    "sigma": noise_level,
}

_NODES, _WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(64))


@dataclass(frozen=True)
class StepWeights:
    """``z_s = propagator z_t + sum_j residual[j] R_j``, float64; A is the number of values of
    alpha.

    Attributes:
        propagator: ``(A,)``.
        residual: ``(K, A)``, one row for each of the K nodes.
    """

    propagator: Tensor
    residual: Tensor


def step_weights(
    sde: LinearSDE, t: float, s: float, nodes: Sequence[float], alpha: Tensor, variable: str = "phi"
) -> StepWeights:
    """Weights of a step from t to s with ``R`` interpolated between the times ``nodes``.

    Gauss-Legendre quadrature in ``sqrt(u)``, in which ``g^2 / (2 sigma) du`` stays smooth where
    ``sigma`` vanishes.

    Args:
        sde: The forward SDE.
        t: Start of the step.
        s: Its end.
        nodes: The K times at which ``R`` is known.
        alpha: ``(A,)``, float64.
        variable: Name in ``EXTRAPOLATION_VARIABLES``.
    """
    # u = r^2, du = 2 r dr. For a VP SDE from no noise sigma_u is about sqrt(beta_start u) near
    # zero, so that 1 / sigma in the integrand cancels against r. In a step backwards in time dr,
    # and with it the measure, is negative.
    left, right = t**0.5, s**0.5
    root = 0.5 * (right + left) + 0.5 * (right - left) * _NODES
    u = root.square()
    ends = torch.tensor([t, s], dtype=torch.float64)
    m, total = sde.mean_coef(ends), sde.total_var(ends)

    def propagator_to_s(m_u: Tensor, total_u: Tensor) -> Tensor:
        # E(s, u): the integral of the linear part in closed form, since f = (ln m)' and
        # f + g^2 / (2 V) = (ln V)' / 2
        log_m, log_total = (m[1] / m_u).log(), 0.5 * (total[1] / total_u).log()
        return (alpha[:, None] * log_m + (1 - alpha[:, None]) * log_total).exp()

    # (right - left) / 2 is the half-width of the interval of Gauss-Legendre, 2 r dr the rest
    measure = (right - left) * root * _WEIGHTS * sde.g2(u) / (2 * sde.var(u).sqrt())
    integrand = measure * propagator_to_s(sde.mean_coef(u), sde.total_var(u))  # (A, Q)
    x_of = EXTRAPOLATION_VARIABLES[variable]
    basis = _lagrange(x_of(sde, torch.tensor(nodes, dtype=torch.float64)), x_of(sde, u))
    return StepWeights(propagator_to_s(m[:1], total[:1])[:, 0], basis @ integrand.T)


@lru_cache(maxsize=1024)
def _coefficients(
    sde: LinearSDE,
    t: float,
    s: float,
    nodes: tuple[float, ...],
    alpha: tuple[float, ...],
    variable: str,
) -> Tensor:
    """Propagator and residual weights of a step in one tensor, ``(1 + K, A)``; kept, since every
    batch of a sampler takes the same steps.
    """
    values = torch.tensor(alpha, dtype=torch.float64)
    weights = step_weights(sde, t, s, nodes, values, variable)
    return torch.cat([weights.propagator[None], weights.residual])


def _lagrange(nodes: Tensor, x: Tensor) -> Tensor:
    """The Lagrange basis on ``nodes (K,)`` at ``x (Q,)``: ``(K, Q)``."""
    rows = []
    for j, node in enumerate(nodes):
        others = torch.cat([nodes[:j], nodes[j + 1 :]])[:, None]
        rows.append(((x - others) / (node - others)).prod(0))
    return torch.stack(rows)


@dataclass(frozen=True, kw_only=True)
class NormalReference(MultistepSolver):
    """The Normal-reference exponential integrator of this module; ``alpha = 1`` is DEIS (tAB of
    arXiv 2204.13902).

    Args:
        order: Of the method, 1 to 4; with a corrector 2 to 4, the predictor being one lower.
        alpha: Weight of the non-Normal part, in [0, 1]: a number, or one per channel (a sequence,
            or a tensor such as the ``mixing (1, C, 1, 1)`` of a mixed-Normal score). It belongs to
            the solver: any value gives a valid method.
        variable: What ``R`` is a polynomial in: a name in ``EXTRAPOLATION_VARIABLES``.
        corrector: Correct each step but the last with the evaluation at its predicted end.
        corrector_from: Fewest steps with which ``corrector`` and ``lower_order_final`` take effect.
            A correction of very long steps feeds back the error of their predictions.
    """

    alpha: float | Sequence[float] | Tensor = 0.02
    variable: str = "phi"
    corrector: bool = False
    corrector_from: int = 1

    def __post_init__(self) -> None:
        lowest = 2 if self.corrector else 1
        if not lowest <= self.order <= 4:
            raise ValueError(f"order must lie in [{lowest}, 4], got {self.order}")
        if self.corrector_from < 1:
            raise ValueError(f"corrector_from must be at least 1, got {self.corrector_from}")
        if self.variable not in EXTRAPOLATION_VARIABLES:
            known = ", ".join(EXTRAPOLATION_VARIABLES)
            raise ValueError(
                f"unknown extrapolation variable {self.variable!r}: choose from {known}"
            )
        # Plain numbers keep the solver hashable, and the model's parameter out of it.
        alpha = torch.as_tensor(self.alpha).detach().to("cpu", torch.float64)
        if not ((alpha >= 0) & (alpha <= 1)).all():
            raise ValueError(f"alpha must lie in [0, 1], got {self.alpha}")
        value = alpha.item() if alpha.ndim == 0 else tuple(alpha.flatten().tolist())
        object.__setattr__(self, "alpha", value)

    @property
    def corrects(self) -> bool:
        return self.corrector

    @property
    def needs_noise_at_end(self) -> bool:
        return False

    def _integrate(self, problem: Problem, x: Tensor) -> list[Tensor]:
        # "few steps" is known only here, so the plain method takes over for this solve
        if self.corrector and problem.num_steps < self.corrector_from:
            plain = replace(self, corrector=False, lower_order_final=False)
            return plain._integrate(problem, x)
        return super()._integrate(problem, x)

    def _advance(
        self, problem: Problem, i: int, x: Tensor, first: int, values: Sequence[Tensor]
    ) -> Tensor:
        t = problem.schedule.t
        nodes = tuple(t[first : first + len(values)])
        alpha = self._alphas(x)
        weights = _coefficients(problem.sde, t[i], t[i + 1], nodes, alpha, self.variable)
        if len(alpha) == 1:  # as numbers rather than tensors: one kernel launch per node
            propagator, *residual = weights[:, 0].tolist()
            x = propagator * x
            for weight, value in zip(residual, values, strict=True):
                x.add_(value, alpha=weight)
            return x
        propagator, *residual = _per_channel(weights, x)
        x = propagator * x
        for weight, value in zip(residual, values, strict=True):
            x.addcmul_(weight, value)
        return x

    def _evaluate(self, problem: Problem, x: Tensor, j: int) -> Tensor:
        """``R = eps - (1 - alpha) sigma z / V`` at the j-th time; one network call."""
        t = problem.times[j : j + 1]
        normal = problem.schedule.sigma[j] / problem.sde.total_var(t).item()
        linear = [(1 - alpha) * normal for alpha in self._alphas(x)]
        eps = problem.eps(x, problem.schedule.t[j])
        if len(linear) == 1:
            return eps.sub(x, alpha=linear[0])
        (coefficient,) = _per_channel(torch.tensor([linear], dtype=torch.float64), x)
        return eps.addcmul(coefficient, x, value=-1)

    def _alphas(self, x: Tensor) -> tuple[float, ...]:
        alpha = (self.alpha,) if isinstance(self.alpha, float) else tuple(self.alpha)
        if len(alpha) not in (1, x.shape[1]):
            raise ValueError(f"got {len(alpha)} values of alpha for {x.shape[1]} channels")
        return alpha


def _per_channel(coefficients: Tensor, x: Tensor) -> Tensor:
    """``(N, C)`` to ``(N, 1, C, 1, ...)``: each row multiplies ``x (B, C, ...)``."""
    return coefficients.to(x).reshape(len(coefficients), 1, -1, *(1,) * (x.ndim - 2))
