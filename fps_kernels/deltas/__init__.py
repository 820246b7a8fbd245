"""Tuned entries apart from their model: as objects, as small files, merged."""
