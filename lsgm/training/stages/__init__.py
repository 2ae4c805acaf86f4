"""Training losses as modules, one a kind of model."""
