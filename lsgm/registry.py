"""What a configuration may name: each name with the place of its class or function.

This is the one list. A new SDE, weighting, time proposal, network or dataset is one class and its
line here; the configurations' types, ``--help``, their error messages and the builders follow.
Places are text, imported when they are asked for, so that a schema is read without PyTorch.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["DATASETS", "NETWORKS", "PROPOSALS", "SDES", "WEIGHTINGS", "Registry"]


class Registry(Mapping[str, Any]):
    """Names and what they stand for.

    Args:
        kind: What the names are names of, for messages.
        places: ``module:attribute`` by name.

    Raises:
        ValueError: from ``registry[name]``, for a name that is not there; it lists those that are.
    """

    def __init__(self, kind: str, places: Mapping[str, str]) -> None:
        self.kind = kind
        self._places = dict(places)

    def __getitem__(self, name: str) -> Any:
        if name not in self._places:
            raise ValueError(f"unknown {self.kind} {name!r}; known: {', '.join(self)}")
        module, _, attribute = self._places[name].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def name_of(self, entry: object) -> str | None:
        """The name of a class or function, or None if it has none here."""
        return next((name for name in self if self[name] is entry), None)


SDES = Registry(
    "SDE",
    {
        "vpsde": "lsgm.sde:VPSDE",
        "geometric": "lsgm.sde:GeometricVPSDE",
        "subvpsde": "lsgm.sde:SubVPSDE",
        "vesde": "lsgm.sde:VESDE",
    },
)
"""Subclasses of :class:`lsgm.sde.LinearSDE`. A configuration gives one those of the fields of
``SDEConfig`` that it has.
"""

WEIGHTINGS = Registry(
    "weighting",
    {
        "likelihood": "lsgm.weighting:LikelihoodWeighting",
        "unweighted": "lsgm.weighting:UnweightedWeighting",
        "reweighted": "lsgm.weighting:ReweightedWeighting",
        "rescaled": "lsgm.weighting:RescaledWeighting",
    },
)
"""Subclasses of :class:`lsgm.weighting.Weighting`, built without arguments."""

PROPOSALS = Registry(
    "time proposal",
    {
        "uniform": "lsgm.times:uniform_times",
        "importance": "lsgm.times:importance_times",
        "optimal": "lsgm.times:optimal_times",
        "mixture": "lsgm.times:mixture_times",
        "weighted": "lsgm.times:weighted_times",
    },
)
"""Functions ``(sde, weighting)`` to a :class:`lsgm.times.TimeProposal`."""

NETWORKS = Registry(
    "network",
    {
        "ncsnpp": "lsgm.networks.ncsnpp:NCSNpp",
        "refinenet": "lsgm.networks.ncsn:NCSN",
    },
)
"""Classes ``(channels, resolution, num_classes=0, **options)`` whose forward pass takes ``x (B, C,
S, S)``, ``t (B,)`` and ``labels (B,)`` or None, see :class:`lsgm.networks.data_score.DataScore`.
(NCSN's alone is built for noise levels instead.) The options are the section of
``ScoreModelConfig`` of the network's name, if there is one.
"""

DATASETS = Registry(
    "dataset",
    {
        "digits": "lsgm.data.sources:Digits",
        "mnist": "lsgm.data.sources:MNIST",
        "omniglot": "lsgm.data.sources:OMNIGLOT",
        "cifar10": "lsgm.data.sources:CIFAR10",
        "folder": "lsgm.data.folder:Folder",
    },
)
"""Classes built without arguments, whose calls turn a ``DataConfig`` into
:class:`lsgm.data.Datasets`.
"""
