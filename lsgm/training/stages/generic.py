"""Training of the models of Python code (:mod:`lsgm.models.generic`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lsgm.models.generic import AutoencoderModel, LatentScoreModel, ScoreModel
from lsgm.score_matching import score_loss
from lsgm.times import TimeProposal
from lsgm.training.state import Stage, StepContext, StepOutput
from lsgm.weighting import Weighting

__all__ = ["AutoencoderStage", "GenericScoreStage"]


class GenericScoreStage(Stage):
    """Score matching of what the model diffuses: the data (arXiv 2011.13456 eq. 7), or latents of
    an autoencoder that stays as it is (arXiv 2106.05931 eq. 8).

    Args:
        model: its ``score`` is trained.
        weighting: of the squared error of the noise over time.
        proposal: of the training times.
        estimator: one of :data:`lsgm.score_matching.ESTIMATORS`, with ``projections``.
        stratified: spread the times of a batch evenly.
    """

    def __init__(
        self,
        model: ScoreModel,
        weighting: Weighting,
        proposal: TimeProposal,
        *,
        estimator: str = "dsm",
        projections: int = 1,
        stratified: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        self.weighting = weighting
        self.proposal = proposal
        self.estimator = estimator
        self.projections = projections
        self.stratified = stratified
        if isinstance(model, LatentScoreModel):
            model.autoencoder.requires_grad_(False)

    def trainables(self) -> dict[str, nn.Module]:
        return {"score": self.model.score}

    def train(self, mode: bool = True) -> GenericScoreStage:
        super().train(mode)
        if isinstance(self.model, LatentScoreModel):
            self.model.autoencoder.eval()
        return self

    def forward(self, images: Tensor, context: StepContext) -> StepOutput:
        """``images (B, *shape)``, any data; the loss is the mean over an item's values."""
        with torch.no_grad():
            (state,) = self.model.encode(images, context.rng)
        result = score_loss(
            self.model.sde,
            self.model.score,
            state.float(),
            weighting=self.weighting,
            proposal=self.proposal,
            estimator=self.estimator,
            num_projections=self.projections,
            stratified=self.stratified,
            rng=context.rng,
        )
        size = state[0].numel()
        return StepOutput(result.loss / size, {"error": result.error.mean() / size})


class AutoencoderStage(Stage):
    """Negative evidence lower bound under N(0, I) of any autoencoder (arXiv 1312.6114 eq. 3).

    Args:
        model: its ``autoencoder`` is trained.
    """

    def __init__(self, model: AutoencoderModel) -> None:
        super().__init__()
        self.model = model

    def trainables(self) -> dict[str, nn.Module]:
        return {"autoencoder": self.model.autoencoder}

    def forward(self, images: Tensor, context: StepContext) -> StepOutput:
        """``images (B, *shape)``, any data; the loss is nats an item."""
        return StepOutput(self.model.bound_values(images, context.rng).mean())
