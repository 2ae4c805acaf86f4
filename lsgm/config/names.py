"""Types of the keys that name an entry of a registry (:mod:`lsgm.registry`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from lsgm.registry import DATASETS, NETWORKS, PROPOSALS, SDES, WEIGHTINGS

__all__ = [
    "DatasetName",
    "NetworkName",
    "ProposalName",
    "ProposalOrSame",
    "SDEName",
    "WeightingName",
]

if TYPE_CHECKING:  # a type checker reads no registry
    SDEName: TypeAlias = str
    WeightingName: TypeAlias = str
    ProposalName: TypeAlias = str
    ProposalOrSame: TypeAlias = str
    NetworkName: TypeAlias = str
    DatasetName: TypeAlias = str
else:
    SDEName = Literal[tuple(SDES)]
    WeightingName = Literal[tuple(WEIGHTINGS)]
    ProposalName = Literal[tuple(PROPOSALS)]
    ProposalOrSame = Literal[("same", *PROPOSALS)]
    NetworkName = Literal[tuple(NETWORKS)]
    DatasetName = Literal[tuple(DATASETS)]
