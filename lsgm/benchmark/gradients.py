r"""How noisy the gradients of the second stage are: one number for each side of it.

For fixed latents the gradient of a training step varies with its noise and times alone. Its
variance is the trace of the covariance, ``E || g - E g ||^2``; divided by ``|| E g ||^2`` it says
how many steps' worth of averaging the direction needs. What divides is the same for all estimators
of one gradient, so ratios of two relative variances are ratios of variances.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lsgm.errors import UserError
from lsgm.objectives import NormalControlVariate, prior_losses
from lsgm.score import EpsFn, MixedNormalScore
from lsgm.sde import LinearSDE
from lsgm.times import make_proposal
from lsgm.weighting import WEIGHTINGS, make_weighting

__all__ = [
    "SIDES",
    "STUDIED_TIMES",
    "Estimator",
    "GradientNoise",
    "Latents",
    "NoiseRow",
    "estimators",
    "gradient_noise",
    "step_gradients",
    "study",
]

STUDIED_TIMES = ("uniform", "importance", "optimal")
"""Proposals of the study, the paper's question."""

SIDES = ("loss", "prior", "z_0", "encoder")
"""The prior's loss itself; its gradient with respect to the score network; the gradient of the
cross-entropy with respect to the latents, and with respect to the encoder's parameters.
"""


@dataclass(frozen=True)
class GradientNoise:
    """Moments of a random vector from independent draws.

    Both are unbiased (the signal can be negative) and have jackknife standard errors; that of a
    signal far below the noise is up to the square root of two too large.

    Attributes:
        variance: Trace of the covariance.
        variance_error: Its standard error.
        signal: Squared norm of the mean.
        signal_error: Its standard error.
    """

    variance: float
    variance_error: float
    signal: float
    signal_error: float


def gradient_noise(gradients: Tensor) -> GradientNoise:
    """From ``(R, P)`` draws, at least three; what leaving out each of them changes is known from
    its distance to the mean.
    """
    count = len(gradients)
    mean = gradients.mean(0, dtype=torch.float64)
    squared, along = gradients.new_zeros(2, count, dtype=torch.float64)
    for i, row in enumerate(gradients):  # one after the other: they may be large
        centred = row.double() - mean
        squared[i], along[i] = centred.square().sum(), centred @ mean
    total, norm = squared.sum(), mean.square().sum()
    variance = total / (count - 1)
    without = (total - squared * count / (count - 1)) / (count - 2)
    norm_without = norm - 2 * along / (count - 1) + squared / (count - 1) ** 2
    signal_without = norm_without - without / (count - 1)

    def jackknife(values: Tensor) -> float:
        return math.sqrt((count - 1) / count * (values - values.mean()).square().sum().item())

    return GradientNoise(
        variance.item(),
        jackknife(without),
        (norm - variance / count).item(),
        jackknife(signal_without),
    )


@dataclass(frozen=True)
class Latents:
    """What is held fixed: latents ``z0`` ``(B, C, H, W)`` with their graph, and the parameters of
    the encoder that made them (none: the encoder's side is left out).
    """

    z0: Tensor
    encoder: tuple[nn.Parameter, ...] = ()

    @classmethod
    def of(cls, z0: Tensor, parameters: Iterable[nn.Parameter]) -> Latents:
        """With those of ``parameters`` that ``z0`` depends on."""
        chosen = tuple(parameters)
        if not chosen:
            return cls(z0)
        reached = torch.autograd.grad(z0.sum(), chosen, retain_graph=True, allow_unused=True)
        pairs = zip(chosen, reached, strict=True)
        return cls(z0, tuple(p for p, gradient in pairs if gradient is not None))

    def pull_back(self, gradient: Tensor) -> Tensor:
        """Gradient with respect to the encoder's parameters ``(P,)`` from that with respect to
        ``z0``.
        """
        return _flat(torch.autograd.grad(self.z0, self.encoder, gradient, retain_graph=True))


@dataclass(frozen=True)
class Estimator:
    """How a step estimates the prior's objective; the encoder's cross-entropy shares its draw."""

    weighting: str
    proposal: str
    stratified: bool


def estimators(
    sde: LinearSDE,
    weightings: Iterable[str] = WEIGHTINGS,
    proposals: Iterable[str] = STUDIED_TIMES,
) -> Iterator[Estimator]:
    """All that are valid for ``sde``: the rescaled weighting needs a variance below one."""
    names = [name for name in weightings if name != "rescaled" or sde.prior_var <= 1]
    for weighting in names:
        for proposal in proposals:
            for stratified in (False, True):
                yield Estimator(weighting, proposal, stratified)


def step_gradients(
    score: nn.Module,
    sde: LinearSDE,
    latents: Latents,
    estimator: Estimator,
    control_variate: NormalControlVariate,
    seed: int,
) -> dict[tuple[str, bool], Tensor]:
    """One draw of everything: ``(side, with control variate) -> (P,)``, detached.

    The network is evaluated once. The control variate is a term of its own, whose gradient is that
    of a step whose network predicts nothing that depends on ``z0``.
    """
    likelihood = make_weighting("likelihood")
    weighting = make_weighting(estimator.weighting)
    proposal = make_proposal(estimator.proposal, sde, weighting)
    z0 = latents.z0.detach().requires_grad_()
    parameters = [p for p in score.parameters() if p.requires_grad]

    def losses(eps_fn: EpsFn) -> tuple[Tensor, Tensor]:
        result = prior_losses(
            sde,
            eps_fn,
            z0,
            weighting_p=weighting,
            proposal_p=proposal,
            likelihood=likelihood,
            control_variate=control_variate,
            stratified=estimator.stratified,
            rng=torch.Generator().manual_seed(seed),
        )
        return result.surrogate, result.prior

    surrogate, loss = losses(score)
    controlled, *prior = torch.autograd.grad(surrogate, [z0, *parameters], materialize_grads=True)
    (control,) = torch.autograd.grad(losses(lambda x_t, t: 0 * x_t)[0], z0)
    found = {("loss", False): loss.reshape(1), ("prior", False): _flat(prior)}
    for with_control, gradient in ((False, controlled - control), (True, controlled)):
        found["z_0", with_control] = gradient.flatten()
        if latents.encoder:
            found["encoder", with_control] = latents.pull_back(gradient)
    return found


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.detach().flatten() for part in parts])


@dataclass(frozen=True)
class NoiseRow:
    """Variance of one estimator of one gradient.

    Attributes:
        sde: Name of the SDE.
        state: Of the score: trained, at the start of training, or exact for made-up latents.
        side: What is differentiated, one of :data:`SIDES`.
        weighting: Of the prior's loss.
        proposal: Times by name.
        stratified: Whether the times of a batch are spread evenly.
        control_variate: Whether the control variate was used.
        variance: Trace of the covariance; ``variance_error`` is its standard error.
        relative: Variance over the squared norm of the mean; None where that norm does not stand
            out of its own error. ``relative_error`` is its standard error.
        ratio: Variance over that with uniform, independent times and no control variate;
            ``ratio_error`` is its standard error.
        repeats: Draws of noise and times.
    """

    sde: str
    state: str
    side: str
    weighting: str
    proposal: str
    stratified: bool
    control_variate: bool
    variance: float
    variance_error: float
    relative: float | None
    relative_error: float | None
    ratio: float
    ratio_error: float
    repeats: int


def study(
    name: str,
    state: str,
    score: MixedNormalScore,
    latents: Latents,
    repeats: int,
    *,
    seed: int = 0,
    weightings: Iterable[str] = WEIGHTINGS,
    progress: Callable[[Iterable[Estimator]], Iterable[Estimator]] = iter,
) -> list[NoiseRow]:
    """All estimators of one score on one set of latents.

    Args:
        name: of the SDE, for the rows.
        state: of the score: ``"trained"`` or ``"start"``.
        score: in evaluation mode, so that nothing but noise and times is random.
        latents: the same in every draw.
        repeats: draws of noise and times for each estimator; the k-th has the same noise in all.
        seed: of the first draw.
        weightings: of the prior's objective.
        progress: wraps the loop.

    Raises:
        UserError: Fewer than three repeats.
    """
    if repeats < 3:
        raise UserError(f"--repeats: needs at least 3, not {repeats}")
    sde = score.sde
    control_variate = NormalControlVariate.of(sde)
    found: dict[tuple[Estimator, str, bool], GradientNoise] = {}
    for estimator in progress(list(estimators(sde, weightings))):
        draws: dict[tuple[str, bool], list[Tensor]] = {}
        for repeat in range(repeats):
            step = step_gradients(score, sde, latents, estimator, control_variate, seed + repeat)
            for key, gradient in step.items():
                draws.setdefault(key, []).append(gradient)
        for (side, control), gradients in draws.items():
            found[estimator, side, control] = gradient_noise(torch.stack(gradients))
    return [_row(name, state, key, noise, found, repeats) for key, noise in found.items()]


def _row(
    name: str,
    state: str,
    key: tuple[Estimator, str, bool],
    noise: GradientNoise,
    found: dict[tuple[Estimator, str, bool], GradientNoise],
    repeats: int,
) -> NoiseRow:
    estimator, side, control = key
    # The mean of the VAE's side is the same for all estimators, that of the prior's for those of
    # its weighting: the estimator that knows it best says what it is.
    same_mean = [
        other
        for (e, s, _), other in found.items()
        if s == side and (side in ("z_0", "encoder") or e.weighting == estimator.weighting)
    ]
    best = min(same_mean, key=lambda other: other.signal_error)
    relative = relative_error = None
    if best.signal > 2 * best.signal_error:
        relative, relative_error = _quotient(
            noise.variance, noise.variance_error, best.signal, best.signal_error
        )
    base = found[Estimator(estimator.weighting, "uniform", False), side, False]
    ratio, ratio_error = _quotient(
        noise.variance, noise.variance_error, base.variance, base.variance_error
    )
    return NoiseRow(
        sde=name,
        state=state,
        side=side,
        weighting=estimator.weighting,
        proposal=estimator.proposal,
        stratified=estimator.stratified,
        control_variate=control,
        variance=noise.variance,
        variance_error=noise.variance_error,
        relative=relative,
        relative_error=relative_error,
        ratio=ratio,
        ratio_error=0.0 if noise is base else ratio_error,
        repeats=repeats,
    )


def _quotient(a: float, a_error: float, b: float, b_error: float) -> tuple[float, float]:
    """``a / b`` and its standard error to first order; errors taken as independent."""
    if b == 0:
        return math.nan, math.nan
    value = a / b
    return value, math.hypot(a_error / b, value * b_error / b)
