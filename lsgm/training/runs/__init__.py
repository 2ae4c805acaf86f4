"""A training run of each kind, from its configuration to its run folder."""
