"""Stored rows in, tables and one self-contained page out."""
