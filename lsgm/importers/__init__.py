"""Checkpoints of other implementations, read into our models."""

from __future__ import annotations
