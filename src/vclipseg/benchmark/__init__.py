"""Grids of experiments: what a GRID.toml says, where its cells run, and how they are recorded."""
