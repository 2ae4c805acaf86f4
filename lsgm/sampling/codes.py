r"""Working with the latents of a model: encoding through the flow, interpolation, resampling.

The probability-flow ODE is a one-to-one map between states (images of a data-space model, coarsest
latents of an LSGM) and noise at ``t = 1`` (arXiv 2011.13456 section 4.3). An image thus has a
*code*: the noise from which the ODE makes its state, and the finer latents, which are N(0, I)
already. Codes are standard normal under the model, up to the prior's standard deviation, so that
moving along great circles keeps them typical.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lsgm.conditioning import ProjectionInpainting, mask_projector
from lsgm.models.base import DiffusionModel
from lsgm.solvers import Callback, EpsFn, Solver
from lsgm.solvers.sampler import Sampler
from vae.random import Rng, randn

__all__ = [
    "Closure",
    "Code",
    "close_round_trip",
    "decode",
    "draw_code",
    "encode",
    "interpolate",
    "resample_groups",
    "slerp",
]


@dataclass(frozen=True)
class Code:
    """Where images come from.

    Attributes:
        noise: The ODE's state at ``t = 1``, ``(B, *state_shape)``.
        finer: Latents outside the score-based prior, one ``(B, L, h, w)`` a group.
    """

    noise: Tensor
    finer: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.noise)

    def rows(self, index: Tensor | slice) -> Code:
        """The codes of some of the images."""
        return Code(self.noise[index], tuple(z[index] for z in self.finer))

    @staticmethod
    def cat(codes: Sequence[Code]) -> Code:
        """The codes of all images, one batch after another."""
        finer = zip(*(code.finer for code in codes), strict=True)
        return Code(torch.cat([c.noise for c in codes]), tuple(torch.cat(z) for z in finer))

    def scaled(self, temperature: float) -> Code:
        """The code times ``temperature``: below 1 the images move towards the model's mean."""
        return Code(temperature * self.noise, tuple(temperature * z for z in self.finer))


def draw_code(model: DiffusionModel, num: int, rng: Rng, temperature: float = 1.0) -> Code:
    """Codes of ``num`` samples of the model."""
    noise = model.sde.prior_sample((num, *model.state_shape), rng, device=model.device)
    return Code(temperature * noise, tuple(model.sample_finer(num, rng, temperature)))


@torch.no_grad()
def encode(
    model: DiffusionModel,
    x: Tensor,
    solver: Solver,
    times: Tensor,
    rng: Rng = None,
    *,
    mean: bool = True,
    score: EpsFn | None = None,
    callback: Callback | None = None,
) -> Code:
    """The code of images.

    Args:
        model: A model with a diffusion.
        x: ``(B, C, R, R)`` in [-1, 1].
        solver: A deterministic solver.
        times: The decreasing times of generation; encoding runs back through them.
        rng: Source of the posterior's noise, if ``mean`` is false.
        mean: Take the posterior's means rather than a draw.
        score: A noise prediction to use instead of the model's.
        callback: Told after every step.

    Raises:
        ValueError: The solver is stochastic, so that its map has no inverse.
    """
    if solver.stochastic:
        raise ValueError("encoding needs a deterministic solver")
    state, *finer = model.encode(x, rng, mean=mean)
    solution = solver.solve(
        model.sde, score or model.score, state.float(), times.flip(0), callback=callback
    )
    return Code(solution.x, tuple(finer))


@torch.no_grad()
def decode(
    model: DiffusionModel,
    code: Code,
    solver: Solver,
    times: Tensor,
    score: EpsFn | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Images ``(B, C, H, W)`` in [0, 1] from codes, through the flow; ``times`` decrease."""
    solution = solver.solve(model.sde, score or model.score, code.noise, times, callback=callback)
    return model.decode([solution.x, *code.finer])


@dataclass(frozen=True)
class Closure:
    """A state, and what the flow makes of it on the way to noise and back.

    Attributes:
        state, back: ``(B, *state_shape)``; an exact inverse would make them equal.
        finer: The latents outside the flow, as :class:`Code` has them.
    """

    state: Tensor
    back: Tensor
    finer: tuple[Tensor, ...]


def close_round_trip(
    model: DiffusionModel,
    x: Tensor,
    solver: Solver,
    times: Tensor,
    callback: Callback | None = None,
) -> Closure:
    """The states of images ``x (B, C, R, R)`` in [-1, 1] and those decoded from their codes."""
    with torch.no_grad():
        state = model.encode(x, mean=True)[0]
    code = encode(model, x, solver, times, callback=callback)
    back = solver.solve(model.sde, model.score, code.noise, times, callback=callback).x
    return Closure(state, back, code.finer)


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Spherical interpolation of each row of ``a, b (B, *shape)``: ``a`` at weight 0, ``b`` at 1.

    The direction moves along the great circle and the norm linearly; parallel rows are
    interpolated linearly, opposite ones have no great circle and pass through zero.
    """
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    norm_a, norm_b = (v.norm(dim=1, keepdim=True).clamp(min=1e-30) for v in (flat_a, flat_b))
    unit_a, unit_b = flat_a / norm_a, flat_b / norm_b
    # atan2 keeps small angles, where the cosine's rounding hides them
    angle = 2 * torch.atan2((unit_a - unit_b).norm(dim=1), (unit_a + unit_b).norm(dim=1))
    angle = angle[:, None]
    sine = angle.sin()
    straight = sine < 1e-7
    safe = torch.where(straight, 1.0, sine)
    weight_a = torch.where(straight, 1 - weight, ((1 - weight) * angle).sin() / safe)
    weight_b = torch.where(straight, weight, (weight * angle).sin() / safe)
    norm = (1 - weight) * norm_a + weight * norm_b
    return (norm * (weight_a * unit_a + weight_b * unit_b)).reshape(a.shape).to(a.dtype)


def interpolate(a: Code, b: Code, steps: int) -> list[Code]:
    """``steps`` codes from ``a`` to ``b``, both included, along great circles.

    Raises:
        ValueError: Fewer than two steps.
    """
    if steps < 2:
        raise ValueError(f"an interpolation has at least two steps, got {steps}")
    weights = [i / (steps - 1) for i in range(steps)]
    return [
        Code(
            slerp(a.noise, b.noise, w),
            tuple(slerp(*pair, w) for pair in zip(a.finer, b.finer, strict=True)),
        )
        for w in weights
    ]


@torch.no_grad()
def resample_groups(
    model: DiffusionModel,
    state: Tensor,
    finer: Sequence[Tensor],
    keep: Sequence[int],
    sampler: Sampler,
    rng: Rng,
) -> tuple[Tensor, list[Tensor]]:
    """Keep some latent groups and draw the others from the prior, given those that are kept.

    Groups of the state are drawn by inpainting with the score-based prior, finer ones from N(0,
    temperature^2 I), with the temperature of the sampler.

    Args:
        model: A model with latent groups.
        state: Latents of the score-based prior, ``(B, *state_shape)``.
        finer: The other groups.
        keep: Indices of the groups to keep, coarsest first; groups of the state are 0 to G - 1.
        sampler: One that draws noise at every time suits inpainting.
        rng: Source of all noise.

    Returns:
        The new state, whose kept groups are bit by bit those given, and the new finer groups.

    Raises:
        ValueError: There is no such group.
    """
    groups, temperature = model.state_groups, sampler.temperature
    total = groups + len(finer)
    if bad := [k for k in keep if not 0 <= k < total]:
        raise ValueError(f"no latent group {bad[0]}: there are groups 0 to {total - 1}")
    size = state.shape[1] // groups
    kept = torch.zeros(state.shape[1], dtype=torch.bool, device=state.device)
    for k in keep:
        if k < groups:
            kept[k * size : (k + 1) * size] = True
    if not kept.all():
        mask = kept[:, None, None]
        hook = ProjectionInpainting(model.sde, state, mask_projector(mask))
        start = model.sde.prior_sample(state.shape, rng, device=state.device, dtype=state.dtype)
        conditioned = replace(sampler, hooks=[hook] if kept.any() else [])
        state = conditioned.solve(model.sde, model.score, temperature * start, rng).x
    fresh = [
        z
        if groups + i in keep
        else temperature * randn(z.shape, rng, device=z.device, dtype=z.dtype)
        for i, z in enumerate(finer)
    ]
    return state, fresh
