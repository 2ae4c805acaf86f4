"""What the second stage has to know of the VAE's latents before it starts, from a sample of the
training images: which channels carry nothing, and how far apart the encodings lie.

The sample is drawn by a fixed seed and shared by the processes; each image has its own noise, so
the result does not depend on their number. It is kept in the run folder, so that a start after a
kill does not repeat it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lsgm.data import Datasets, preprocess
from lsgm.models.latent import VAEModel
from lsgm.sde import largest_squared_distance
from lsgm.system.files import atomic_write_json, json_text
from lsgm.system.progress import progress_bar
from lsgm.training.distributed import World, gather_rows, on_main
from lsgm.training.precision import autocast
from vae.hierarchical import Posterior
from vae.objective import active_channels, kl_per_channel
from vae.random import RowGenerators

__all__ = ["LatentScan", "scan_size"]

POSITIONS = 2**14
"""Latent positions (images x height x width) of the sample: the standard error of a channel's mean
KL, which is compared with 0.1 nats an image, is then a few thousandths of it."""
FEWEST_IMAGES = 16
DISTANT_IMAGES = 10_000
"""Images among which the largest distance is sought: it needs the extremes."""
SEED = 0


def scan_size(asked: int | None, num_images: int, positions: int) -> int:
    """Number of images of the sample.

    Args:
        asked: As configured; None: as many as give :data:`POSITIONS`.
        num_images: Training images.
        positions: Height times width of the latents of the coarsest scale.
    """
    wanted = asked or max(FEWEST_IMAGES, math.ceil(POSITIONS / positions))
    return min(wanted, num_images)


class LatentScan:
    """Statistics of the latents of a trained VAE.

    Args:
        model: The VAE, in evaluation mode.
        datasets: What it was trained on.
        folder: The run's, where results are kept.
        world: The processes; each reads its part of the sample.
        batch_size: Images at a time on a process.
        precision: Of the network.
    """

    def __init__(
        self,
        model: VAEModel,
        datasets: Datasets,
        folder: Path,
        world: World,
        *,
        batch_size: int,
        precision: str,
    ) -> None:
        self.model = model
        self.datasets = datasets
        self.path = folder / "scan.json"
        self.world = world
        self.batch_size = batch_size
        self.precision = precision

    def inactive_channels(self, asked: int | None, *, augmented: bool) -> Tensor:
        """Channels of the coarsest scale whose KL to N(0, 1), averaged over the sample, is at most
        0.1 nats: ``(C,)`` bool.

        Args:
            asked: Images of the sample; see :func:`scan_size`.
            augmented: Images as in training, as published, rather than as in evaluation.
        """
        positions = math.prod(self.model.vae.top_shape[1:])
        size = scan_size(asked, len(self.datasets.train), positions)

        def measure() -> list[bool]:
            channels, groups = self.model.vae.top_shape[0], self.model.vae.num_groups_per_scale
            total = torch.zeros(channels, dtype=torch.float64, device=self.world.device)
            for posterior in self._posteriors(size, augmented):
                kl = kl_per_channel(posterior)[:groups].flatten().double()
                total += kl * len(posterior.eps[0])
            if self.world.size > 1:
                dist.all_reduce(total)
            found: list[bool] = (~active_channels(total / size)).tolist()
            return found

        return torch.tensor(self._kept(["inactive", size, augmented], measure))

    def largest_squared_distance(self) -> float:
        """Largest squared distance between encodings of the sample, a VESDE's ``sigma2_max``
        (2011.13456, App. C).
        """
        size = min(DISTANT_IMAGES, len(self.datasets.train))

        def measure() -> float:
            own = [
                self.model.vae.concat_top(posterior.eps).float().cpu()
                for posterior in self._posteriors(size, augmented=False)
            ]
            latents = gather_rows(torch.cat(own) if own else torch.empty(0), self.world)
            return float(largest_squared_distance([latents]))

        return float(self._kept(["distance", size], measure))

    @torch.no_grad()
    def _posteriors(self, size: int, augmented: bool) -> Iterator[Posterior]:
        """The posteriors of this process's part of a sample of ``size`` images."""
        world, model = self.world, self.model
        model.vae.to(world.device).eval()
        chosen = torch.randperm(
            len(self.datasets.train), generator=torch.Generator().manual_seed(SEED)
        )[:size]
        own = torch.arange(world.rank, size, world.size)
        bar = progress_bar(
            total=len(own), desc="scanning latents", unit="img", leave=False,
            disable=not world.is_main,
        )  # fmt: skip
        with bar:
            for rows in own.split(self.batch_size):
                images = self.datasets.train.batch(chosen[rows]).to(world.device)
                rng = RowGenerators.of(SEED, rows.tolist())
                bits = model.vae_config.num_x_bits
                x = preprocess(images, model.spec, bits, rng, train=augmented)
                with autocast(world.device, self.precision):
                    yield model.vae.encode(x, rng=rng, top_only=True)
                bar.update(len(rows))

    def _kept(self, what: list[Any], measure: Any) -> Any:
        """What ``measure`` finds, or has found for the same weights and data."""
        key = hashlib.sha256(
            json_text([*what, SEED, len(self.datasets.train), self._weights()]).encode()
        ).hexdigest()

        def stored() -> dict[str, Any]:
            try:
                values = json.loads(self.path.read_bytes())
            except (OSError, ValueError):
                return {}
            return values if isinstance(values, dict) else {}

        found = on_main(self.world, lambda: stored().get(key))
        if found is None:
            found = measure()

            def keep() -> None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                atomic_write_json(self.path, {**stored(), key: found})

            on_main(self.world, keep)
        return found

    def _weights(self) -> str:
        digest = hashlib.sha256()
        for name, value in self.model.vae.state_dict().items():
            digest.update(name.encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest()
