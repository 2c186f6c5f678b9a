"""Accurate 3D segmentation from a handful of annotated scans and many that nobody annotated."""

__version__ = "0.1.0"
