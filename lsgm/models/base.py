r"""The one contract that every model of images keeps, whatever it was trained on.

A model draws images and bounds their likelihood; one with latents decodes its images from them.
A :class:`DiffusionModel` has a state under an SDE, which a solver samples: the images themselves,
or the part of the latents with a score-based prior.

``model.sample(16, nfe=5, seed=0).images`` are those of ``sample.py --n 16 --nfe 5 --seed 0``, bit
for bit.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lsgm.conditioning import classifier_free
from lsgm.config.training import DataConfig
from lsgm.data.preprocess import preprocess
from lsgm.data.spec import DataSpec
from lsgm.errors import UserError
from lsgm.models import release
from lsgm.models.results import LADDER_GRID, NO_SOLVER, Batch, Bound, SamplerDefaults, Samples
from lsgm.noise_ladder import NoiseLadder
from lsgm.sde import LinearSDE
from lsgm.solvers import (
    AnnealedLangevin,
    Callback,
    EpsFn,
    Hook,
    PredictorCorrector,
    Progress,
    Solver,
    make_solver,
)
from lsgm.solvers.base import require_finite
from lsgm.solvers.sampler import (
    DEFAULT_NFE,
    DEFAULT_SOLVER,
    DEFAULT_T_END,
    OptionError,
    Sampler,
    few_step_grid,
)
from lsgm.system.progress import progress_bar
from lsgm.tensors import expand_like
from vae.random import Rng, RowGenerators

__all__ = [
    "BATCH_SIZE",
    "DiffusionModel",
    "Model",
]

BATCH_SIZE = 64
"""Images at a time, unless said otherwise."""


Labels: TypeAlias = Tensor | Sequence[int] | int
"""Classes: one for each image, or one for all."""


class Model(nn.Module, ABC):
    """A model of images.

    Images are ``(B, C, H, W)`` in [0, 1]; a network sees ``x (B, C, R, R)`` in [-1, 1], padded and
    binarised or cut to bits where the data are (:meth:`preprocess`).

    Attributes:
        kind: Name of the kind of model in a run folder.
        spec: The facts of the data.
        has_latents: Whether images are decoded from latents other than themselves.
        bound_name: The bound that :meth:`bound` gives, in words; ``estimator`` how it is computed.
    """

    kind: str
    spec: DataSpec
    has_latents: ClassVar[bool] = False
    bound_name: ClassVar[str]
    estimator: ClassVar[str] = ""
    unit: ClassVar[str] = "nats per image"

    # What a model is

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What :func:`lsgm.load` needs to rebuild the architecture: plain values."""

    def in_words(self) -> str:
        """Size and kind, as a reader of the model's numbers has to know them."""
        return f"{sum(p.numel() for p in self.parameters()) / 1e6:.2f} M parameters"

    def save(
        self,
        folder: str | Path,
        data: DataConfig | None = None,
        notes: dict[str, Any] | None = None,
    ) -> None:
        """Write the run folder that :func:`lsgm.load` opens; ``data`` says what the model was
        trained on.

        Raises:
            UserError: A weight is NaN or infinite.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        release.save(self, Path(folder), data, notes)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an image, ``(C, H, W)``, without padding."""
        return self.spec.shape

    @property
    def num_bits(self) -> int:
        """Bits of a grey level that the model sees."""
        return 8

    @property
    def num_classes(self) -> int | None:
        """Classes that the model can be told; None if it takes none."""
        return None

    @property
    def diffusion(self) -> DiffusionModel | None:
        """The model as one that a solver samples; None for one whose latents are N(0, I)."""
        return None

    # Images there and back

    def preprocess(self, images: Tensor, rng: Rng = None) -> Tensor:
        """What the model sees, ``(B, C, R, R)`` in [-1, 1], of ``images`` in [0, 1], padded or not;
        ``rng`` draws the pixels of binary data.
        """
        padded = pad(self.unpad(images), (self.spec.padding,) * 4)
        x = preprocess(padded, self.spec, self.num_bits, rng)
        return x.to(self.device)

    def unpad(self, images: Tensor) -> Tensor:
        """Cut the padding, if there is any, off images ``(..., C, R, R)``: ``(..., C, H, W)``.

        Raises:
            ValueError: They are of another size than the model's.
        """
        return self.spec.unpad(images)

    @abstractmethod
    def encode(self, x: Tensor, rng: Rng = None, *, mean: bool = False) -> list[Tensor]:
        """Latents of ``x (B, C, R, R)`` in [-1, 1], coarsest first: a posterior draw, or with
        ``mean`` the posterior's means. The latent of a data-space model is the image itself.
        """

    @abstractmethod
    def decode(self, latents: Sequence[Tensor], rng: Rng = None) -> Tensor:
        """Images ``(B, C, H, W)`` in [0, 1] from latents as :meth:`encode` gives them; ``rng``
        serves a decoder that draws pixels.
        """

    def reconstruct(self, x: Tensor, rng: Rng = None) -> Tensor:
        """Images in [0, 1] of one posterior draw for ``x (B, C, R, R)`` in [-1, 1]."""
        return self.decode(self.encode(x, rng), rng)

    def drawn_pixels(self) -> AbstractContextManager[None]:
        """Inside, a decoder whose pixels are not independent draws them instead of showing means
        that belong to no image.
        """
        return nullcontext()

    # Likelihood

    @abstractmethod
    def bound_values(self, x: Tensor, rng: Rng = None, *, samples: int = 1) -> Tensor:
        """What :meth:`bound` averages over images: ``(B,)`` float64 nats."""

    @torch.no_grad()
    def bound(self, x: Tensor, *, samples: int = 1, seed: int = 0) -> Bound:
        """Bound on the negative log-likelihood of ``x (B, C, R, R)`` in [-1, 1], from ``samples``
        draws an image (of latents, or of the noise below a grey level).

        It is the first metric that ``evaluate`` reports for the model; see there for others.
        """
        rng = RowGenerators.of(seed, range(len(x)))
        values = self.bound_values(x.to(self.device), rng, samples=samples)
        return Bound(self.bound_name, self.unit, values.double().cpu())

    # Sampling

    @abstractmethod
    def draw(
        self,
        num: int,
        rng: Rng,
        sampler: Sampler | None = None,
        *,
        labels: Tensor | None = None,
        guidance: float = 1.0,
        temperature: float = 1.0,
        callback: Callback | None = None,
    ) -> Batch:
        """One batch of ``num`` images.

        Args:
            num: B.
            rng: Source of all noise.
            sampler: Of the states of a :class:`DiffusionModel` (:meth:`sampler_for`).
            labels: ``(B,)``, int64, the class of each image.
            guidance: Scale of classifier-free guidance; 1 is the conditional model.
            temperature: Of the noise that starts the images, on top of the sampler's.
            callback: Told after every step.

        Raises:
            NonFiniteError: States or images are not finite.
        """

    def sampler_for(
        self, sampler: Sampler | None, nfe: int | None = None, seed: int = 0
    ) -> Sampler | None:
        """The sampler that :meth:`sample` uses: ``sampler``, or the recommended one with ``nfe``
        evaluations, its times fixed; None for a model that needs none.

        Raises:
            ValueError: It does not apply to the model.
        """
        if sampler is not None:
            raise ValueError("sampler: this model's latents are N(0, I)")
        return None

    @torch.no_grad()
    def iterate(
        self,
        n: int,
        sampler: Sampler | None = None,
        *,
        seed: int = 0,
        temperature: float = 1.0,
        labels: Labels | None = None,
        batch_size: int = BATCH_SIZE,
        wanted: Collection[int] = (),
        callback: Callback | None = None,
    ) -> Iterator[Batch]:
        """The images of :meth:`sample`, batch by batch; tensors are on the CPU.

        Every image has its own generator, seeded by ``seed`` and its index, so that with fixed-step
        solvers it is the same whatever batches the images are made in. Adaptive solvers share their
        steps over a batch, and so does ``norm="batch"`` of the corrector.

        ``wanted``: give only the images of these indices: batches without one are left out, the
        others computed as a whole, so that an image does not depend on what else is wanted.
        """
        classes = None if labels is None else _classes(labels, n)
        for start in range(0, n, batch_size):
            rows = range(start, min(start + batch_size, n))
            keep = [i for i, k in enumerate(rows) if not wanted or k in wanted]
            if not keep:
                continue
            batch = self.draw(
                len(rows),
                RowGenerators.of(seed, rows),
                sampler,
                labels=None if classes is None else classes[rows.start : rows.stop],
                temperature=temperature,
                callback=callback,
            )
            latents = tuple(z[keep].cpu() for z in batch.latents)
            yield Batch(batch.images[keep].cpu(), latents, batch.nfe, [rows[i] for i in keep])

    def sample(
        self,
        n: int,
        *,
        sampler: Sampler | None = None,
        nfe: int | None = None,
        seed: int = 0,
        temperature: float = 1.0,
        labels: Labels | None = None,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Samples:
        """Draw ``n`` images, all held in memory (:meth:`iterate` gives them in batches).

        Args:
            n: Number of images.
            sampler: Instead of the recommended one.
            nfe: Network evaluations that the recommended sampler may take, in place of its own
                number; a model whose latents are N(0, I) takes none.
            seed: Of all noise, at least 0.
            temperature: Standard deviation of the starting noise and of N(0, I) latents, relative
                to the prior's (and to the sampler's own temperature).
            labels: The class of each image, or one for all, for models that take classes.
            batch_size: Images at a time; 64 unless given.
            progress: Whether to show a bar.

        Raises:
            ValueError: Arguments that do not go together or do not fit the model.
            UserError: The model takes no class, or has no such class.
            NonFiniteError: Samples are not finite.
        """
        if n < 1:
            raise ValueError(f"n: must be positive, not {n}")
        if sampler is not None and nfe is not None:
            raise ValueError("nfe: the sampler has its own; give one of the two")
        began = time.perf_counter()
        chosen = self.sampler_for(sampler, nfe, seed)
        parts = []
        with progress_bar(total=n, unit="img", disable=not progress) as bar:

            def show(step: Progress) -> None:
                bar.set_postfix(t=f"{step.t:.3g}", nfe=step.nfe)

            for batch in self.iterate(
                n,
                chosen,
                seed=seed,
                temperature=temperature,
                labels=labels,
                batch_size=batch_size or BATCH_SIZE,
                callback=show if progress else None,
            ):
                parts.append(batch)
                bar.update(len(batch.images))
        latents = tuple(map(torch.cat, zip(*(part.latents for part in parts), strict=True)))
        return Samples(
            torch.cat([part.images for part in parts]),
            latents,
            sum(part.nfe for part in parts) / len(parts),
            time.perf_counter() - began,
            chosen.name if chosen else NO_SOLVER,
        )


class DiffusionModel(Model):
    """A model with a state that diffuses, the first of its latents; the others are N(0, I).

    Attributes:
        sde: The forward SDE.
        score: The noise prediction, ``x_t (B, *state_shape), t (B,) -> eps``.
        ladder: The noise levels of an NCSN; None for the others.
    """

    sde: LinearSDE
    score: nn.Module
    ladder: NoiseLadder | None = None

    @property
    def diffusion(self) -> DiffusionModel:
        return self

    @property
    @abstractmethod
    def state_shape(self) -> tuple[int, ...]:
        """Shape of one state."""

    @property
    def state_groups(self) -> int:
        """Number G of latent groups in a state, of equal size side by side in the channels,
        coarsest first; 0 for a state that is the image.
        """
        return 0

    @property
    def state_limits(self) -> tuple[float, float] | None:
        """Least and largest value of a state that is an image; None for latents."""
        return None

    @property
    def mixing(self) -> Tensor | None:
        """One less the coefficient of the score's Normal part, one number a channel; None for a
        score without one.
        """
        return None

    def prior_start(
        self, num: int, rng: Rng, temperature: float = 1.0, solver: Solver | None = None
    ) -> Tensor:
        """Where generation by ``solver`` starts, at ``t = 1``: ``(num, *state_shape)``."""
        shape = (num, *self.state_shape)
        return temperature * self.sde.prior_sample(shape, rng, device=self.device)

    def sample_finer(self, num: int, rng: Rng, temperature: float = 1.0) -> list[Tensor]:
        """Draw the latents beside the state from N(0, temperature^2 I)."""
        return []

    def eps_fn(self, labels: Tensor | None = None, guidance: float = 1.0) -> EpsFn:
        """The noise prediction as solvers take it.

        ``labels``: ``(B,)``, int64, the class of each item; None: no class. ``guidance``: the scale
        of :func:`lsgm.conditioning.classifier_free`; 1 is the conditional model.

        Raises:
            UserError: The model takes no class, or has no such class.
        """
        if labels is None:
            return self.score
        classes = self.num_classes
        if classes is None:
            raise UserError("this model was trained without classes (class_conditional)")
        labels = labels.to(self.device)
        if labels.numel() and not (labels.min() >= 0 and labels.max() < classes):
            raise UserError(f"this model has the classes 0 to {classes - 1}")
        return classifier_free(self.score, labels, guidance)

    @torch.no_grad()
    def denoise(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The state's posterior mean ``E[x_0 | x_t] = (x_t - sigma_t eps) / m_t`` (Tweedie's
        formula) of ``x_t (B, *state_shape)`` at ``t (B,)``.
        """
        eps = self.eps_fn(labels)(x_t, t)
        sigma = expand_like(self.sde.var(t).sqrt(), x_t)
        return (x_t - sigma * eps) / expand_like(self.sde.mean_coef(t), x_t)

    def draw(
        self,
        num: int,
        rng: Rng,
        sampler: Sampler | None = None,
        *,
        labels: Tensor | None = None,
        guidance: float = 1.0,
        temperature: float = 1.0,
        callback: Callback | None = None,
    ) -> Batch:
        sampler = sampler or self.sampler()
        temperature = temperature * sampler.temperature
        with torch.no_grad():
            start = self.prior_start(num, rng, temperature, sampler.method)
            eps = self.eps_fn(labels, guidance)
            solution = sampler.solve(self.sde, eps, start, rng, callback)
            latents = [solution.x, *self.sample_finer(num, rng, temperature)]
            images = self.decode(latents, rng)
        require_finite(images, "the decoder")
        return Batch(images, tuple(latents) if self.has_latents else (), solution.nfe)

    # The sampler

    @property
    def defaults(self) -> SamplerDefaults:
        """The recommended sampler."""
        return SamplerDefaults()

    def sampler_for(
        self, sampler: Sampler | None, nfe: int | None = None, seed: int = 0
    ) -> Sampler:
        return self.sampler(nfe=nfe, seed=seed) if sampler is None else self._fixed(sampler, seed)

    def sampler(
        self,
        solver: str | None = None,
        *,
        nfe: int | None = None,
        grid: str | None = None,
        t_end: float | None = None,
        temperature: float = 1.0,
        hooks: Sequence[Hook] = (),
        seed: int = 0,
        **options: Any,
    ) -> Sampler:
        """The recommended sampler with what is given in place of what is recommended.

        Any solver takes the model's last time and, of its recommended options, those that it has;
        the recommended solver, named or not, also its evaluations and grid. A model whose sampler
        draws noise and takes many evaluations recommends a solver for few where few are asked for.

        Args:
            solver: Name of another solver.
            nfe: Network calls on a batch, at most.
            grid: Name of a time grid, ``pilot``, or ``ladder``: the noise levels of an NCSN.
            t_end: Last time.
            temperature: Of the starting noise.
            hooks: Conditioning.
            seed: Of the noise of a pilot.
            **options: Of the solver.

        Raises:
            ValueError: A solver, grid or option is unknown or does not fit.
            OptionError: An option would have no effect.
        """
        own, given_nfe = self.defaults, nfe
        last = own.t_end if t_end is None else t_end
        if solver is None and own.means_few_steps(nfe, grid, options):
            solver, nfe = DEFAULT_SOLVER, nfe or DEFAULT_NFE
            grid = grid or few_step_grid(self.sde, nfe)
            if t_end is None and not self.sde.var(torch.tensor([own.t_end]).double()).item() > 0:
                last = DEFAULT_T_END
        solver = solver or own.solver
        built = make_solver(solver, **(own.options_of(solver) | options))
        if isinstance(built, PredictorCorrector) and built.corrector_steps == 0:
            for name in {"snr", "norm"}.intersection(options):
                raise OptionError(
                    name,
                    f"{solver} takes no corrector steps that it could scale; give "
                    "corrector_steps 1 as well",
                )
        if solver == own.solver and built.evaluations(1) is not None:
            nfe, grid = nfe or own.nfe, grid or own.grid
        sampler = Sampler(built, None, None, last, None, temperature, hooks, solver)
        if grid == LADDER_GRID and not sampler.adaptive:
            sampler.ends_for(self.sde)
            if t_end is not None:
                raise OptionError("t_end", "the ladder ends at its last level; choose another grid")
            return self._on_ladder(sampler, nfe, given_nfe, "steps_per_level" in options)
        return self._fixed(replace(sampler, nfe=nfe, grid=grid), seed)

    def _on_ladder(
        self, sampler: Sampler, nfe: int | None, given: int | None, has_steps: bool
    ) -> Sampler:
        """The model's own noise levels; their number is fixed, and with Langevin dynamics the
        evaluations are spread over them.
        """
        if self.ladder is None:
            raise OptionError("grid", "only models trained on a list of noise levels have a ladder")
        solver, times, levels = sampler.method, self.ladder.times, len(self.ladder.times)
        if given is not None:
            if not isinstance(solver, AnnealedLangevin) or has_steps:
                raise OptionError(
                    "nfe",
                    f"on the {levels} levels of the ladder this sampler takes "
                    f"{solver.evaluations(levels - 1)} evaluations; leave it out, or choose "
                    "another grid",
                )
            if given < levels:
                raise OptionError("nfe", f"{levels} noise levels need at least as many evaluations")
        if isinstance(solver, AnnealedLangevin) and nfe and not has_steps:
            solver = replace(solver, steps_per_level=nfe // levels)
        return replace(sampler, solver=solver, times=solver.check(self.sde, times))

    def _fixed(self, sampler: Sampler, seed: int) -> Sampler:
        def start(num: int, rng: Rng) -> Tensor:
            return self.prior_start(num, rng, sampler.temperature, sampler.method)

        return sampler.on(self.sde, self.score, start, seed)


def _classes(labels: Labels, n: int) -> Tensor:
    """One class an image, ``(n,)``."""
    classes = torch.as_tensor(labels)
    if classes.ndim == 0:
        return classes.expand(n)
    if len(classes) != n:
        raise ValueError(f"labels: {len(classes)} classes for {n} images")
    return classes
