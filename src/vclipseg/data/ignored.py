"""What the labels of a voxel hold that training leaves out."""

IGNORED = 255
"""Class index, in uint8 labels, of a voxel that training leaves out."""
