"""Latent score-based generative models (arXiv 2106.05931)."""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = ["__version__"]
