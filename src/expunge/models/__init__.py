"""Architectures for experiments."""
