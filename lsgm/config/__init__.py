"""Typed configuration: its schema, and reading it from files and the command line."""
