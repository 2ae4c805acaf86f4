"""The models, and opening and saving their run folders."""
