"""The commands behind ``scripts/`` and the console program ``lsgm``."""
