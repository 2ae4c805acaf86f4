"""Trained models in the form of other software."""

from __future__ import annotations
