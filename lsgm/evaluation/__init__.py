"""Likelihood, pictures and reports of trained models."""
