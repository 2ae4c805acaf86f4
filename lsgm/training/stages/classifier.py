"""Training of a classifier, of noisy or of clean images."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lsgm.data.spec import LabelledImages
from lsgm.models.classifier import ImageClassifier
from lsgm.times import UniformTimes
from lsgm.training.state import Stage, StepContext, StepOutput
from vae.random import Rng, randn

__all__ = [
    "ClassifierStage",
]


class ClassifierStage(Stage):
    """Cross-entropy of the labels, on images noised at uniform times if the classifier is told the
    time (2011.13456, App. I.1).

    Args:
        model: The classifier; its ``network`` is trained.
        label_smoothing: Probability spread evenly over the wrong classes in the target.
    """

    headline = ("loss", "accuracy")

    def __init__(self, model: ImageClassifier, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        self.proposal = UniformTimes(model.sde.time_eps)

    def trainables(self) -> dict[str, nn.Module]:
        return {"classifier": self.model.network}

    def forward(self, images: LabelledImages, context: StepContext) -> StepOutput:
        """``images`` ``(B, C, R, R)`` in [0, 1] with labels; the loss is nats an image."""
        pixels, rng = self.model.pixels, context.rng
        x = pixels.to_network(pixels.augment(images.images, rng), rng, noise=True)
        logits = self.logits(x, rng)
        loss = cross_entropy(logits, images.labels, label_smoothing=self.label_smoothing)
        right = (logits.detach().argmax(1) == images.labels).float()
        return StepOutput(loss=loss, metrics={"accuracy": right.mean()})

    def logits(self, x: Tensor, rng: Rng = None) -> Tensor:
        """Logits ``(B, K)`` of ``x (B, C, H, W)``, as the diffusion sees images, noised if the
        classifier is told the time.
        """
        if not self.model.config.noise_conditional:
            return self.model.network(x)
        noise = randn(x.shape, rng, device=x.device, dtype=x.dtype)
        t = self.proposal.sample(len(x), rng, stratified=True, device=x.device).t
        return self.model.network(self.model.sde.perturb(x, t.to(x), noise), t.to(x))
