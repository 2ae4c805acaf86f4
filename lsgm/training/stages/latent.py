"""The two stages of LSGM as modules whose forward pass is the training loss.

The loop calls one ``backward()`` on one loss: a stage arranges that each of its trained modules
receives the gradient of its own objective (:mod:`lsgm.objectives`), so data-parallel wrappers, loss
scaling and gradient accumulation need to know nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lsgm.conditioning import ConditionalEpsFn, hide_labels
from lsgm.config.architecture import PriorConfig
from lsgm.config.training import ObjectiveConfig
from lsgm.data.preprocess import preprocess
from lsgm.data.spec import LabelledImages
from lsgm.errors import UserError
from lsgm.models.latent import LSGM, VAEModel
from lsgm.networks.resample import FIRConvDownsample, FIRConvUpsample
from lsgm.objectives import NormalControlVariate, PriorLosses, prior_losses
from lsgm.score import EpsFn
from lsgm.tensors import sum_except_batch
from lsgm.times import TimeProposal, make_proposal
from lsgm.training.state import Stage, StepContext, StepOutput
from lsgm.weighting import Weighting, make_weighting
from vae import HierarchicalVAE
from vae.objective import bits_per_dim, kl_balance_weights, kl_coefficient, kl_per_group
from vae.regularization import SpectralNormRegularizer, norm_regularizer

__all__ = [
    "LSGMStage",
    "VAEStage",
    "score_convolutions",
]


class _BoundStage(Stage):
    """What both stages share: the annealed coefficient of the KL, and regularisers with a state.

    Args:
        model: The model; ``objective``: the bound's terms and regularisers.
        regularizers: Spectral regularisers by name.
    """

    def __init__(
        self,
        model: VAEModel,
        objective: ObjectiveConfig,
        regularizers: dict[str, SpectralNormRegularizer],
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.regularizers = regularizers
        self.headline = model.spec.units

    def extra_state(self) -> dict[str, Any]:
        return {name: spectral.state_dict() for name, spectral in self.regularizers.items()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        for name in self.regularizers.keys() & state.keys():
            self.regularizers[name].load_state_dict(state[name])

    def kl_coefficient(self, context: StepContext) -> float:
        o = self.objective
        return kl_coefficient(
            context.step,
            context.total_steps,
            anneal_portion=o.kl_anneal_portion,
            const_portion=o.kl_const_portion,
            minimum=o.kl_const_coeff,
            maximum=o.kl_max_coeff,
        )


class VAEStage(_BoundStage):
    """First stage: the hierarchical VAE under N(0, I) (negative ELBO with annealed and balanced KL;
    2007.03898, Sec. 3.2).
    """

    def __init__(self, model: VAEModel, objective: ObjectiveConfig) -> None:
        regularized = objective.spectral_regularization > 0
        spectral = {"spectral": SpectralNormRegularizer(model.vae)} if regularized else {}
        super().__init__(model, objective, spectral)

    def trainables(self) -> dict[str, nn.Module]:
        return {"vae": self.model.vae}

    def forward(self, images: Tensor, context: StepContext) -> StepOutput:
        """``images`` ``(B, C, R, R)`` in [0, 1]; the loss is nats an image and regularisers."""
        model = self.model
        x = preprocess(images, model.spec, model.vae_config.num_x_bits, context.rng, train=True)
        output = model.vae(x, rng=context.rng)
        reconstruction = model.vae.reconstruction(output, x)
        kl = kl_per_group(output.posterior)
        coefficient = self.kl_coefficient(context)
        weights = kl_balance_weights(
            kl,
            model.vae.groups_per_scale,
            coefficient if self.objective.kl_balance else 1.0,
            sync=self.objective.kl_balance_sync,
        )
        weights = weights * _charged(kl, self.objective.free_bits)
        loss = (reconstruction + coefficient * (weights * kl).sum(1)).mean()
        metrics = {
            "nelbo": (reconstruction + kl.sum(1)).mean(),
            "reconstruction": reconstruction.mean(),
            "kl": kl.sum(1).mean(),
            "kl_coefficient": torch.tensor(coefficient),
            **{f"kl_group/{k}": value for k, value in enumerate(kl.mean(0))},
        }
        if self.regularizers:
            penalty = self.regularizers["spectral"]() + norm_regularizer(model.vae)
            loss = loss + self.objective.spectral_regularization * penalty
            metrics["regularizer"] = penalty
        metrics |= _bits(metrics["nelbo"], model)
        return StepOutput(loss=loss, metrics={k: v.detach() for k, v in metrics.items()})


def score_convolutions(score: nn.Module) -> dict[str, nn.Conv2d]:
    """Convolutions of a score network that its spectral regulariser counts, by name.

    As published: all but those inside FIR resamplers. Linear layers, those of the attention among
    them, do not count either.
    """
    resamplers = (FIRConvDownsample, FIRConvUpsample)
    filtered = {id(m.conv) for m in score.modules() if isinstance(m, resamplers)}
    return {
        name: layer
        for name, layer in score.named_modules()
        if isinstance(layer, nn.Conv2d) and id(layer) not in filtered
    }


def _bits(nelbo: Tensor, model: VAEModel) -> dict[str, Tensor]:
    """Of grey and colour data, the NELBO (nats an image) as bits/dim."""
    spec = model.spec
    return {} if spec.binary else {"bits_per_dim": bits_per_dim(nelbo, spec.num_dims)}


def _charged(kl: Tensor, free_bits: float) -> Tensor:
    """Which groups of a KL ``(B, N)`` the encoder pays for: 1, or 0 for one whose batch mean is at
    most ``free_bits`` nats; ``(N,)``.
    """
    mean = kl.detach().mean(0)
    return (mean > free_bits).to(mean) if free_bits > 0 else torch.ones_like(mean)


class _Balance:
    """What the encoder pays for each latent group, found where the prior's loss is computed.

    Args:
        vae: Gives the groups.
        log_q: ``(B, G)``, the entropy's part of the KL; ``kl_finer``: of the finer scales' groups,
            ``(B, N - G)``.
        constant: Of the cross-entropy, nats a variable.
        coefficient: Of the KL; ``balance_at``: the one that the groups are balanced for.
        free_bits: KL per group that costs nothing, in nats.
        sync: Balance by the KL of the whole batch.

    Attributes:
        weights: ``(N,)``, of the groups, after the call.
    """

    def __init__(
        self,
        vae: HierarchicalVAE,
        log_q: Tensor,
        kl_finer: Tensor,
        constant: float,
        *,
        coefficient: float,
        balance_at: float,
        free_bits: float,
        sync: bool,
    ) -> None:
        self.vae = vae
        self.log_q = log_q
        self.kl_finer = kl_finer
        self.constant = constant
        self.coefficient = coefficient
        self.balance_at = balance_at
        self.free_bits = free_bits
        self.sync = sync
        self.weights = log_q.new_ones(log_q.shape[1])

    def __call__(self, weighted: Tensor) -> Tensor:
        """Factors ``(1, C, 1, 1)`` on the prior's weighted errors ``(B, C, H, W)``, which lack the
        cross-entropy's constant.
        """
        groups = self.vae.num_groups_per_scale
        kl_top = self.log_q[:, :groups] + per_group(self.vae, weighted + self.constant)
        kl = torch.cat([kl_top, self.kl_finer], dim=1).detach()
        scales = self.vae.groups_per_scale
        weights = kl_balance_weights(kl, scales, self.balance_at, sync=self.sync)
        self.weights = weights * _charged(kl, self.free_bits)
        channels = weighted.shape[1] // groups
        factors = self.weights[:groups].repeat_interleave(channels).view(1, -1, 1, 1)
        return self.coefficient * factors


def _told(score: ConditionalEpsFn, labels: Tensor | None) -> EpsFn:
    """The noise prediction for these classes."""
    return lambda x_t, t: score(x_t, t, labels)


def per_group(vae: HierarchicalVAE, elements: Tensor) -> Tensor:
    """Sum ``(B, C, H, W)`` over each group of the coarsest scale: ``(B, G)``."""
    parts: Sequence[Tensor] = vae.split_top(elements)
    return torch.stack([sum_except_batch(part) for part in parts], dim=1)


class LSGMStage(_BoundStage):
    """Second stage: the score-based prior, end-to-end with the VAE or over a frozen one
    (2106.05931, Alg. 1-3).

    ``training`` of the config: ``joint`` shares one draw of noise and time (Alg. 3) unless
    ``proposal_q`` names one (Alg. 1); ``disjoint`` draws separately for each side (Alg. 2);
    ``frozen`` trains the prior alone, with the VAE in evaluation mode (``frozen_statistics`` batch:
    its batch norms in training mode). The VAE's parameters get the gradient of the negative ELBO
    with annealed and balanced KL and of its own regularisers, the prior's that of its own objective
    and regularisers, whatever the KL's coefficient. With ``kl_scales_prior`` the prior gets the
    gradient of the VAE's loss, and its own regularisers, where both have one objective.

    Raises:
        UserError: A time proposal and weighting that the SDE does not allow.
    """

    loss_name = "surrogate"  # right gradients for each side, no meaning as a number

    def __init__(self, model: LSGM, objective: ObjectiveConfig, prior: PriorConfig) -> None:
        super().__init__(model, objective, {})
        self.model: LSGM = model
        self.training_kind = prior.training
        self.stratified = prior.stratified_times
        self.label_dropout = prior.label_dropout
        self.likelihood = make_weighting("likelihood")
        self.weighting_p = make_weighting(prior.weighting_p)
        self.proposal_p = self._proposal("proposal_p", prior.proposal_p, self.weighting_p)
        name_q = prior.proposal_q
        if name_q == "same" and prior.training == "disjoint":
            name_q = "importance"
        self.proposal_q = (
            None if name_q == "same" else self._proposal("proposal_q", name_q, self.likelihood)
        )
        self.control_variate = NormalControlVariate.of(model.sde) if prior.control_variate else None
        # As published: the objectives are equal with one draw and one weighting.
        self.balance_prior = (
            prior.kl_scales_prior
            and self.trains_vae
            and self.proposal_q is None
            and prior.weighting_p == "likelihood"
        )
        self.batch_statistics = prior.frozen_statistics == "batch"
        self.update_q_ema = prior.update_q_ema
        self.q_ema_dropout = prior.q_ema_dropout
        # A tuple: not a submodule, its weights are the loop's.
        self._average_prior: tuple[nn.Module, ...] = ()
        self.spectral_weight = prior.spectral_regularization
        self.norm_weight = prior.norm_regularization
        if objective.spectral_regularization > 0 and self.trains_vae:
            self.regularizers["spectral"] = SpectralNormRegularizer(model.vae)
        if self.spectral_weight > 0:
            convolutions = score_convolutions(model.score)
            self.regularizers["prior_spectral"] = SpectralNormRegularizer(convolutions)
        if not self.trains_vae:
            if objective.free_bits > 0:
                raise UserError(
                    f"objective.free_bits: {objective.free_bits:g} spares an encoder that is being "
                    "trained; prior.training frozen needs 0"
                )
            model.vae.requires_grad_(False)

    def _proposal(self, field: str, name: str, weighting: Weighting) -> TimeProposal:
        sde = self.model.sde
        try:
            weighting(sde, torch.ones(1, dtype=torch.float64))
            return make_proposal(name, sde, weighting)
        except ValueError as error:
            raise UserError(
                f"prior.{field}: {name} does not fit the weighting {weighting.name} and the SDE "
                f"({error})"
            ) from None

    @property
    def trains_vae(self) -> bool:
        return self.training_kind != "frozen"

    def trainables(self) -> dict[str, nn.Module]:
        prior: dict[str, nn.Module] = {"prior": self.model.score}
        return {"vae": self.model.vae, **prior} if self.trains_vae else prior

    def train(self, mode: bool = True) -> LSGMStage:
        super().train(mode)
        if not self.trains_vae:
            self.model.vae.train(mode and self.batch_statistics)
        for average in self._average_prior:
            average.train(mode and self.q_ema_dropout)
        return self

    def use_average(self, averages: Mapping[str, nn.Module]) -> None:
        """Take the running average of the prior for the VAE's term, if the config asks for it."""
        if self.update_q_ema:
            average = averages["prior"].requires_grad_(False)
            self._average_prior = (average.train(self.training and self.q_ema_dropout),)

    def forward(self, images: Tensor | LabelledImages, context: StepContext) -> StepOutput:
        """``images`` ``(B, C, R, R)`` in [0, 1], with labels for a class-conditional prior; the
        value of the loss means nothing (see :mod:`lsgm.objectives`).
        """
        model, vae = self.model, self.model.vae
        images, labels = images if isinstance(images, LabelledImages) else (images, None)
        if labels is not None and model.num_classes is not None:
            labels = hide_labels(labels, model.num_classes, self.label_dropout, context.rng)
        x = preprocess(images, model.spec, model.vae_config.num_x_bits, context.rng, train=True)
        with torch.set_grad_enabled(self.trains_vae and torch.is_grad_enabled()):
            output = vae(x, rng=context.rng)
            reconstruction = vae.reconstruction(output, x)
        posterior = output.posterior
        num_top = vae.num_groups_per_scale
        top = vae.concat_top(posterior.eps).float()
        log_q = torch.stack([sum_except_batch(part) for part in posterior.log_q], dim=1)
        kl_finer = kl_per_group(posterior)[:, num_top:]
        coefficient = self.kl_coefficient(context)
        free_bits = self.objective.free_bits
        balanced = self.objective.kl_balance and coefficient < 1 and self.trains_vae
        balance = _Balance(
            vae,
            log_q,
            kl_finer,
            model.sde.cross_entropy_constant(),
            coefficient=coefficient,
            balance_at=coefficient if balanced else 1.0,
            free_bits=free_bits,
            sync=self.objective.kl_balance_sync,
        )
        losses: PriorLosses = prior_losses(
            model.sde,
            _told(model.score, labels),
            top,
            weighting_p=self.weighting_p,
            proposal_p=self.proposal_p,
            likelihood=self.likelihood,
            proposal_q=self.proposal_q,
            balance=balance if balanced or free_bits > 0 else coefficient,
            eps_fn_q=_told(self._average_prior[0], labels) if self._average_prior else None,
            control_variate=self.control_variate,
            stratified=self.stratified,
            balance_prior=self.balance_prior,
            loss_scale=context.loss_scale,
            rng=context.rng,
        )
        kl_top = log_q[:, :num_top].detach() + per_group(vae, losses.cross_entropy)
        weights = balance.weights
        kl = torch.cat([kl_top, kl_finer.detach()], dim=1)
        loss = losses.surrogate
        metrics: dict[str, Tensor] = {}
        if self.trains_vae:
            # The prior's share of the KL is in the surrogate already; what is left is the entropy
            # of q and the finer scales.
            rest = torch.cat([log_q[:, :num_top], kl_finer], dim=1)
            loss = loss + (reconstruction + coefficient * (weights * rest).sum(1)).mean()
            metrics["kl_coefficient"] = torch.tensor(coefficient)
            # What the VAE's parameters minimise, without regularisers; `loss` has another value.
            metrics["vae_loss"] = (reconstruction + coefficient * (weights * kl).sum(1)).mean()
            if "spectral" in self.regularizers:
                penalty = self.regularizers["spectral"]() + norm_regularizer(vae)
                loss = loss + self.objective.spectral_regularization * penalty
                metrics["regularizer"] = penalty
        if self.spectral_weight > 0:
            spectral = self.regularizers["prior_spectral"]()
            loss = loss + self.spectral_weight * spectral
            metrics["prior_spectral"] = spectral
        if self.norm_weight > 0:
            gains = norm_regularizer(model.score)
            loss = loss + self.norm_weight * gains
            metrics["prior_norm"] = gains
        metrics |= {
            "nelbo": (reconstruction + kl.sum(1)).mean(),
            "reconstruction": reconstruction.mean(),
            "kl": kl.sum(1).mean(),
            "cross_entropy": sum_except_batch(losses.cross_entropy).mean(),
            "prior_loss": losses.prior,
            "mixing": model.score.mixing.mean(),
            **{f"kl_group/{k}": value for k, value in enumerate(kl.mean(0))},
        }
        metrics |= _bits(metrics["nelbo"], model)
        return StepOutput(loss=loss, metrics={k: v.detach() for k, v in metrics.items()})
