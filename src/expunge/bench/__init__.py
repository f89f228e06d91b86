"""Experiments: configurations, stages, stored rows."""
