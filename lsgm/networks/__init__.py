"""Networks that predict the noise."""

from __future__ import annotations

from lsgm.networks.ncsnpp import NCSNpp

__all__ = ["NCSNpp"]
