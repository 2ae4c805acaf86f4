"""Bounds on likelihoods of whole datasets."""
