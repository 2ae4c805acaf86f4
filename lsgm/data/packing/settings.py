"""How pictures are packed, and the published choices by name."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from PIL import Image

from lsgm.config.checks import require, require_positive
from lsgm.data.images import Box

__all__ = ["PRESETS", "PackSettings", "Preset"]

RESAMPLES = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class PackSettings:
    """What is done to every picture, and how the splits are made.

    Attributes:
        image_size: Side in pixels; the height, where a width is given.
        image_width: Width of pictures that are not square.
        channels: 1 or 3; None: grey if all pictures are.
        box: Part of the upright picture that is taken first: left, top, right, bottom.
        crop: Side of the centre square that is taken first.
        resample: bicubic or bilinear; both antialias.
        test_fraction: Share of pictures that is held out where the source has no split.
        max_broken: Largest share of pictures that may be unreadable.
    """

    image_size: int
    image_width: int | None = None
    channels: int | None = None
    box: Box | None = None
    crop: int | None = None
    resample: str = "bicubic"
    test_fraction: float = 0.1
    max_broken: float = 0.01

    def __post_init__(self) -> None:
        require_positive(self, "image_size image_width crop")
        require(max(self.shape) <= 8192, f"image_size: at most 8192, not {max(self.shape)}")
        require(self.channels in (None, 1, 3), f"channels: must be 1 or 3, not {self.channels}")
        require(self.resample in RESAMPLES, f"resample: must be one of {', '.join(RESAMPLES)}")
        for name in ("test_fraction", "max_broken"):
            require(
                0.0 < getattr(self, name) < 1.0 or (name == "max_broken" and self.max_broken == 0),
                f"{name}: must lie between 0 and 1, not {getattr(self, name)}",
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.image_size, self.image_width or self.image_size

    def reading(self) -> dict[str, Any]:
        """The arguments of :func:`lsgm.data.images.read_pixels` that these are."""
        return {"box": self.box, "crop": self.crop, "resample": RESAMPLES[self.resample]}

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "box": None if self.box is None else list(self.box)}


@dataclass(frozen=True)
class Preset:
    """A published choice.

    Attributes:
        settings: Values of :class:`PackSettings`.
        counts: Pictures of each split that the data set has; empty: of any number.
        held_out: Pictures that are held out where the source has no split.
        partition: Name of the file that says the split of each picture, if there is one beside
            them: lines ``name number``, 0 train, 1 validation, 2 test.
    """

    settings: dict[str, Any]
    counts: dict[str, int] = field(default_factory=dict)
    held_out: int | None = None
    partition: str | None = None


_CELEBA = {"train": 162_770, "validation": 19_867, "test": 19_962}
PRESETS = {
    # The aligned 178 x 218 pictures as NVAE and LSGM crop them, and as NCSN and score-SDE do.
    "celeba64": Preset(
        {"image_size": 64, "box": (15, 40, 163, 188), "resample": "bilinear"},
        _CELEBA,
        partition="list_eval_partition.txt",
    ),
    "celeba64-ncsn": Preset(
        {"image_size": 64, "crop": 140, "resample": "bilinear"},
        _CELEBA,
        partition="list_eval_partition.txt",
    ),
    "celebahq256": Preset(
        {"image_size": 256, "resample": "bilinear"}, {"train": 27_000, "validation": 3_000}, 3_000
    ),
    "ffhq256": Preset(
        {"image_size": 256, "resample": "bilinear"}, {"train": 63_000, "validation": 7_000}, 7_000
    ),
    "lsun": Preset({"image_size": 256}),
    "imagenet32": Preset({"image_size": 32}),
    "cifar10": Preset({"image_size": 32}, {"train": 50_000, "test": 10_000}),
}
"""Published choices by name; a new one is its line here."""
