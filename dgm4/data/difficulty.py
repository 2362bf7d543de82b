"""How hard the sample set is: every constant that decides what a detector can see.

Strength runs from 0 (cannot be seen) to 1. What lies near 0 keeps a detector from a perfect score, as
in the real benchmark. Ranges are (low, high) of a uniform draw.
"""

from __future__ import annotations

# Manipulations of the picture.
FAINT_SHARE = 0.10  # share of face manipulations whose strength is drawn from FAINT
FAINT = (0.0, 0.2)
VISIBLE = (0.5, 1.0)
SWAP_GAIN = 0.30  # brightness of a swapped face against its surroundings, as a factor 1 +- gain * strength
SWAP_TINT = 0.14  # the same for red against blue
SWAP_FEATHER = (0.30, 0.03)  # width of the mask's edge, in radii, at strength 0 and 1
SWAP_GRAIN = 0.055  # standard deviation of the grain that a swapped face brings, at strength 1
CHANGE_SHARPEN = 3.0  # unsharp-mask amount on changed eyes or mouth, at strength 1
CHANGE_WARP = 0.35  # how far changed eyes or mouth are bent, in heights of the region
CHANGE_GAIN = 0.25  # brightness of the changed region, as for a swap

# The picture, whatever was done to it.
GENUINE_FEATHER = 0.30  # radii
GRAIN = (0.008, 0.016)  # standard deviation of the whole picture's grain, of a range of 1
NEAR = (92.0, 116.0)  # height of a face in pixels
FAR = (60.0, 76.0)
JPEG_QUALITY = 92

# Captions.
MOOD_WORDS = {1: 0.15, 2: 0.55, 3: 0.30}  # share of captions with so many mood words
FLIP_ALL_SHARE = 0.5  # share of mood flips that turn every mood word; the others turn a single one
SAME_LIGHT_DONOR_SHARE = 0.15  # share of swapped captions whose light and mood fit by accident
