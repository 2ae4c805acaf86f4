"""Training of a score model in data space, NCSN's and score-SDE's alike.

Both are the weighted squared error of the noise (:func:`lsgm.score_matching.score_loss`); they
differ in the times: a list of noise levels, or a density on [time_eps, 1].
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from lsgm.conditioning import hide_labels
from lsgm.data.spec import LabelledImages
from lsgm.discrete_noise import BetaTable
from lsgm.errors import UserError
from lsgm.models.images import DataSGM
from lsgm.noise_ladder import LadderTimes
from lsgm.score import EpsFn
from lsgm.score_matching import ScoreLoss, score_loss
from lsgm.sde import LinearSDE
from lsgm.times import TimeProposal, make_proposal
from lsgm.training.state import Stage, StepContext, StepOutput
from lsgm.weighting import make_weighting
from vae.random import Rng

__all__ = [
    "ScoreStage",
]


class ScoreStage(Stage):
    """Denoising or sliced score matching of images (1907.05600, eq. 6; 2011.13456, eq. 7).

    Args:
        model: The model; its ``score`` is trained.
        estimator: One of :data:`lsgm.score_matching.ESTIMATORS`; ``projections`` of sliced ones.
        weighting: Of the squared error over time, by name; levels of noise are unweighted.
        proposal: Of the training times, by name; levels of noise are equally likely.
        stratified_times: Spread the times of a batch evenly.
        reduction: Scale of the loss over an image's values: mean, sum or half_sum.
        label_dropout: Fraction of images whose class is hidden.

    Raises:
        UserError: The weighting or the times do not fit the SDE.
    """

    def __init__(
        self,
        model: DataSGM,
        *,
        estimator: str = "dsm",
        projections: int = 1,
        weighting: str = "unweighted",
        proposal: str = "uniform",
        stratified_times: bool = True,
        reduction: str = "mean",
        label_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.model = model
        self.estimator = estimator
        self.projections = projections
        self.stratified = stratified_times
        self.reduction = reduction
        self.label_dropout = label_dropout
        try:
            self.weighting = make_weighting("unweighted" if model.levels is not None else weighting)
            self.kernel = model.sde
            if isinstance(model.levels, BetaTable):
                # DDPM's own kernel, of which the SDE's is the limit; at its levels nothing else of
                # an SDE is asked for.
                self.kernel = cast(LinearSDE, model.levels)
            self.proposal: TimeProposal
            if model.levels is not None:
                self.proposal = LadderTimes(model.levels)
            else:
                self.proposal = make_proposal(proposal, model.sde, self.weighting)
        except ValueError as error:
            raise UserError(f"objective: {error}") from error

    @property
    def scale(self) -> float:
        """Factor on the sum over an image's values that ``reduction`` asks for."""
        factors = {"mean": 1 / self.model.spec.num_dims, "sum": 1.0, "half_sum": 0.5}
        return factors[self.reduction]

    def trainables(self) -> dict[str, nn.Module]:
        return {"score": self.model.score}

    def forward(self, images: Tensor | LabelledImages, context: StepContext) -> StepOutput:
        """``images`` ``(B, C, R, R)`` in [0, 1], with labels for a class-conditional model; the
        loss has the scale of ``reduction``, the logged one is the mean over values.
        """
        pixels, rng = self.model.pixels, context.rng
        x, labels = images if isinstance(images, LabelledImages) else (images, None)
        x = pixels.to_network(pixels.augment(x, rng), rng, noise=True)
        result = self.loss(x, self.hide(labels, rng), rng)
        size = self.model.spec.num_dims
        # the mean is logged in the loss's place, so that runs of any reduction compare
        metrics = {"error": result.error.mean() / size, "loss": result.loss.detach() / size}
        return StepOutput(loss=self.scale * result.loss, metrics=metrics)

    def hide(self, labels: Tensor | None, rng: Rng = None) -> Tensor | None:
        """Replace a fraction ``label_dropout`` of ``labels (B,)`` by the class of no class."""
        if labels is None or self.model.num_classes is None:
            return None
        return hide_labels(labels, self.model.num_classes, self.label_dropout, rng)

    def loss(self, x: Tensor, labels: Tensor | None, rng: Rng = None) -> ScoreLoss:
        """The objective of ``x (B, C, H, W)``, as the diffusion sees images, summed over an
        image's values.
        """
        score = self.model.score

        def with_labels(x_t: Tensor, t: Tensor) -> Tensor:
            return score(x_t, t, labels)

        eps_fn: EpsFn = score if labels is None else with_labels
        return score_loss(
            self.kernel,
            eps_fn,
            x,
            weighting=self.weighting,
            proposal=self.proposal,
            estimator=self.estimator,
            num_projections=self.projections,
            stratified=self.stratified,
            rng=rng,
        )
