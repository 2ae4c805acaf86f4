"""The two trained models, and their release form: a run folder that :func:`load` opens anywhere.

``VAEModel`` is the hierarchical VAE under its N(0, I) prior; ``LSGM`` adds the score-based prior on
the coarsest latent scale (2106.05931, Sec. 3). Both answer the same two questions: :meth:`sample`
images, and :meth:`nelbo` of images, in nats.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from lsgm.config import (
    RETIRED_KEYS,
    DataConfig,
    PriorConfig,
    PriorNetworkConfig,
    SDEConfig,
    VAEConfig,
)
from lsgm.data.spec import DataSpec
from lsgm.errors import UserError
from lsgm.files import atomic_write, atomic_write_json
from lsgm.networks import NCSNpp
from lsgm.objectives import NormalReference, latent_cross_entropy
from lsgm.score import MixedNormalScore
from lsgm.sde import LinearSDE, make_sde
from lsgm.solvers import Solution, Solver
from lsgm.times import TimeProposal, make_proposal
from lsgm.weighting import make_weighting
from vae import HierarchicalVAE
from vae.objective import standard_normal_log_prob
from vae.random import Rng, randn

__all__ = [
    "LSGM",
    "NELBO",
    "VAEModel",
    "build_prior",
    "build_vae",
    "load",
    "load_data_config",
    "save",
]

WEIGHTS = "model.safetensors"
DESCRIPTION = "run.json"


@dataclass(frozen=True)
class NELBO:
    """Negative evidence lower bound of a batch, in nats an image; every field ``(B,)``.

    ``reconstruction``: ``-log p(x | z)``; ``negative_entropy``: ``log q(z | x)``;
    ``cross_entropy``: ``-log p(z)`` or an unbiased estimate of an upper bound of it. ``total`` is
    their sum.
    """

    reconstruction: Tensor
    negative_entropy: Tensor
    cross_entropy: Tensor

    @property
    def kl(self) -> Tensor:
        return self.negative_entropy + self.cross_entropy

    @property
    def total(self) -> Tensor:
        return self.reconstruction + self.kl


def build_vae(config: VAEConfig, spec: DataSpec) -> HierarchicalVAE:
    """The VAE of ``config`` for the images of ``spec``."""
    if spec.binary != (config.decoder_dist == "bin"):
        kind = "binary" if spec.binary else "grey or colour"
        right = "bin" if spec.binary else "dml, dl or normal"
        raise UserError(
            f"vae.decoder_dist: {config.decoder_dist} does not fit {spec.name}, which is {kind}; "
            f"use {right}"
        )
    levels = config.num_preprocess_blocks + config.num_latent_scales - 1
    if spec.network_size % 2**levels:
        raise UserError(
            f"vae.num_preprocess_blocks: images of side {spec.network_size} cannot be halved "
            f"{levels} times"
        )
    return HierarchicalVAE(
        image_channels=spec.channels,
        image_size=spec.network_size,
        crop=spec.padding,
        **asdict(config),
    )


def build_prior(config: PriorConfig, vae: HierarchicalVAE) -> MixedNormalScore:
    """The mixed-Normal score network of ``config`` for the coarsest latent scale of ``vae``."""
    channels, size, _ = vae.top_shape
    if size % 2 ** (config.network.num_scales - 1):
        raise UserError(
            f"prior.network.num_scales: {config.network.num_scales} is too many for latents of "
            f"side {size}"
        )
    sde = make_sde(**asdict(config.sde))
    network = NCSNpp(channels=channels, resolution=size, **asdict(config.network))
    return MixedNormalScore(
        network, sde, channels, mixing_init=config.mixing_init, mixed=config.mixed
    )


class VAEModel(nn.Module):
    """The hierarchical VAE under the prior N(0, I) on all its latents."""

    kind = "vae"

    def __init__(self, vae: HierarchicalVAE, spec: DataSpec, vae_config: VAEConfig) -> None:
        super().__init__()
        self.vae = vae
        self.spec = spec
        self.vae_config = vae_config

    def describe(self) -> dict[str, Any]:
        """What :func:`load` needs to rebuild the architecture."""
        return {"vae": asdict(self.vae_config), "spec": asdict(self.spec)}

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def to_images(self, x: Tensor) -> Tensor:
        """From network range and size ``(B, C, R, R)`` in [-1, 1] to images in [0, 1] without
        padding.
        """
        p = self.spec.padding
        return ((x + 1) / 2)[..., p : x.shape[-2] - p, p : x.shape[-1] - p]

    def reconstruct(self, x: Tensor, rng: Rng = None) -> Tensor:
        """Decoder means of one posterior draw for ``x`` ``(B, C, R, R)`` in [-1, 1]; images in [0,
        1] without padding.
        """
        return self.to_images(self.vae(x, rng=rng).likelihood.mean)

    def nelbo(self, x: Tensor, rng: Rng = None) -> NELBO:
        """One-sample NELBO of ``x`` ``(B, C, R, R)`` in [-1, 1] under the prior N(0, I)."""
        output = self.vae(x, rng=rng)
        posterior = output.posterior
        return NELBO(
            reconstruction=self.vae.reconstruction(output, x).double(),
            negative_entropy=_total(posterior.log_q),
            cross_entropy=-_total([standard_normal_log_prob(e) for e in posterior.eps]),
        )

    def sample_latents(self, num: int, rng: Rng, temperature: float = 1.0) -> list[Tensor]:
        """Latents of all groups from N(0, temperature^2 I), coarsest first."""
        return [
            temperature * randn((num, *shape), rng, device=self.device)
            for shape in self.vae.latent_shapes
        ]

    def decode(self, eps: Sequence[Tensor]) -> Tensor:
        """Images in [0, 1], the decoder's means, from latents of all groups."""
        return self.to_images(self.vae.decode(eps).mean).clamp(0, 1)


class LSGM(VAEModel):
    """The hierarchical VAE with a score-based prior on its coarsest latent scale; N(0, I) on the
    others.
    """

    kind = "lsgm"

    def __init__(
        self,
        vae: HierarchicalVAE,
        score: MixedNormalScore,
        spec: DataSpec,
        vae_config: VAEConfig,
        prior_config: PriorConfig,
    ) -> None:
        super().__init__(vae, spec, vae_config)
        self.score = score
        self.prior_config = prior_config
        self.reference = NormalReference.of(score.sde, make_weighting("likelihood"))

    @property
    def sde(self) -> LinearSDE:
        return self.score.sde

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"prior": asdict(self.prior_config)}

    def nelbo(self, x: Tensor, rng: Rng = None, *, proposal: TimeProposal | None = None) -> NELBO:
        """One-sample NELBO of ``x`` ``(B, C, R, R)`` in [-1, 1] under the score-based prior.

        The prior's cross-entropy is the variational bound of 2106.05931, eq. 8, at one time per
        image drawn from ``proposal`` (the likelihood's importance sampler unless given), with both
        ends of the integral accounted for (:func:`lsgm.objectives.endpoint_cross_entropy`): an
        unbiased estimate of an upper bound on the negative log-likelihood.
        """
        output = self.vae(x, rng=rng)
        likelihood = make_weighting("likelihood")
        proposal = proposal or make_proposal("importance", self.sde, likelihood)
        eps = output.posterior.eps
        top = self.vae.concat_top(eps).float()
        times = proposal.sample(len(x), rng, stratified=True, device=x.device)
        prior = latent_cross_entropy(
            self.sde, self.score, top, times, likelihood, rng, reference=self.reference
        ).bound
        rest = [standard_normal_log_prob(e) for e in eps[self.vae.num_groups_per_scale :]]
        return NELBO(
            reconstruction=self.vae.reconstruction(output, x).double(),
            negative_entropy=_total(output.posterior.log_q),
            cross_entropy=prior - (_total(rest) if rest else 0.0),
        )

    def sample_prior(
        self,
        num: int,
        rng: Rng,
        solver: Solver,
        times: Tensor,
        temperature: float = 1.0,
        callback: Any = None,
    ) -> Solution:
        """Draw latents of the coarsest scale ``(num, C, H, W)`` by solving the generative SDE or
        ODE on ``times``.
        """
        start = self.sde.prior_sample((num, *self.vae.top_shape), rng, device=self.device)
        return solver.solve(
            self.sde, self.score, temperature * start, times, rng=rng, callback=callback
        )

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Shape of what the score-based prior generates: the coarsest scale's latents."""
        return self.vae.top_shape

    def encode_state(
        self, x: Tensor, rng: Rng = None, *, mean: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """A posterior draw for ``x`` ``(B, C, R, R)`` in [-1, 1], or with ``mean`` the posterior's
        means: the coarsest scale ``(B, *state_shape)`` and the groups of the finer ones.
        """
        shapes = self.vae.latent_shapes
        zeros = [torch.zeros(len(x), *s, device=x.device) for s in shapes] if mean else None
        eps = self.vae.encode(x, rng, zeros).eps
        return self.vae.concat_top(eps), list(eps[self.vae.num_groups_per_scale :])

    def sample_finer(self, num: int, rng: Rng, temperature: float = 1.0) -> list[Tensor]:
        """The groups of the finer scales from N(0, temperature^2 I)."""
        finer = self.vae.latent_shapes[self.vae.num_groups_per_scale :]
        return [temperature * randn((num, *shape), rng, device=self.device) for shape in finer]

    def decode_state(self, state: Tensor, finer: Sequence[Tensor]) -> Tensor:
        """Images in [0, 1] from the coarsest scale's latents and the groups of the finer ones."""
        return self.decode([*self.vae.split_top(state.float()), *finer])

    def complete_latents(self, top: Tensor, rng: Rng, temperature: float = 1.0) -> list[Tensor]:
        """Split ``top`` into its groups and draw the finer scales from N(0, temperature^2 I)."""
        drawn = self.sample_finer(len(top), rng, temperature)
        return [*self.vae.split_top(top.float()), *drawn]


def _total(parts: Sequence[Tensor]) -> Tensor:
    """Sum over everything but the batch, in float64: ``(B,)``."""
    return torch.stack([part.double().flatten(1).sum(1) for part in parts]).sum(0)


def save(
    model: VAEModel, folder: Path, data: DataConfig, notes: dict[str, Any] | None = None
) -> None:
    """Write the model's weights and description into ``folder``; each file appears whole or not at
    all.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with atomic_write(folder / WEIGHTS) as file:
        file.write(to_safetensors(state))
    description = {
        "kind": model.kind,
        **model.describe(),
        "data": asdict(data),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        **(notes or {}),
    }
    atomic_write_json(folder / DESCRIPTION, description)


def read_description(folder: Path) -> dict[str, Any]:
    """The contents of a run's ``run.json``.

    Raises:
        UserError: The folder is not a finished run.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder")
    for name in (DESCRIPTION, WEIGHTS):
        if not (folder / name).is_file():
            hint = (
                "training has not finished; continue it with --resume"
                if (folder / "checkpoints").is_dir()
                else "not a run"
            )
            raise UserError(f"{folder}: {name} is missing ({hint})")
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / DESCRIPTION}: not valid JSON ({error})") from None
    if not isinstance(description, dict):
        raise UserError(f"{folder / DESCRIPTION}: expected a JSON object")
    return description


_MISFITS = (KeyError, TypeError, ValueError)


def _misfit(folder: Path, error: Exception) -> UserError:
    """What is wrong with a run's description, by the error that it led to."""
    reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return UserError(f"{folder / DESCRIPTION}: {reason}")


def _section(cls: type, values: dict[str, Any]) -> Any:
    """A config dataclass from plain JSON values.

    Raises:
        ValueError: Values that are no mapping, or not those of the dataclass.
    """
    if not isinstance(values, dict):
        raise ValueError(f"expected the keys of {cls.__name__}, not {values!r}")
    converted = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return cls(**converted)


def prior_config_from(values: dict[str, Any]) -> PriorConfig:
    values = {k: v for k, v in values.items() if f"prior.{k}" not in RETIRED_KEYS}
    network = _section(PriorNetworkConfig, values.pop("network"))
    sde = _section(SDEConfig, values.pop("sde"))
    return PriorConfig(network=network, sde=sde, **values)


def load(folder: str | Path, device: str | torch.device = "cpu") -> VAEModel:
    """Rebuild the model of a finished run, in eval mode: a :class:`LSGM` or a plain
    :class:`VAEModel`.

    Raises:
        UserError: The folder is not a finished run, or its files are damaged or do not fit
            together.
    """
    folder = Path(folder)
    description = read_description(folder)
    try:
        spec = DataSpec(**description["spec"])
        vae_config = _section(VAEConfig, description["vae"])
        vae = build_vae(vae_config, spec)
        model: VAEModel
        if description["kind"] not in (VAEModel.kind, LSGM.kind):
            raise ValueError(f"unknown kind {description['kind']!r}; known are vae and lsgm")
        if description["kind"] == LSGM.kind:
            prior_config = prior_config_from(description["prior"])
            model = LSGM(vae, build_prior(prior_config, vae), spec, vae_config, prior_config)
        else:
            model = VAEModel(vae, spec, vae_config)
    except _MISFITS as error:
        raise _misfit(folder, error) from error
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except safetensors.SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS}: damaged or truncated ({error})") from None
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(
            f"{folder / WEIGHTS}: weights do not fit {DESCRIPTION}: {first[:200]}"
        ) from None
    return model.to(device).eval()


def load_data_config(folder: str | Path, root: str | None = None) -> DataConfig:
    """The data section that a run was trained with; ``root`` says where the data lie now, if
    elsewhere.

    Raises:
        UserError: The folder is not a finished run, or its description is damaged.
    """
    folder = Path(folder)
    description = read_description(folder)
    try:
        data: DataConfig = _section(DataConfig, description["data"])
    except _MISFITS as error:
        raise _misfit(folder, error) from error
    return replace(data, root=root) if root else data
