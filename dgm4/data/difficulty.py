"""How hard the sample set is: every constant that decides what a detector can see.

Strength runs from 0 (cannot be seen) to 1. What lies near 0 keeps a detector from a perfect score, as
in the real benchmark. Ranges are (low, high) of a uniform draw.
"""

from __future__ import annotations

# Manipulations of the image.
FAINT_SHARE = 0.10  # share of face manipulations whose strength is drawn from FAINT
FAINT = (0.0, 0.2)
VISIBLE = (0.5, 1.0)
# A cast always leans the same way, as a generator's fingerprint does: a small network finds a mean colour
# long before it finds a seam or a grain. Black-and-white images show it as brightness alone.
SWAP_CAST = (0.02, -0.19, 0.02)  # red, green, blue of a swapped face: factor 1 + cast * strength
SWAP_GAIN = 0.10  # its brightness: factor 1 +- gain * strength
SWAP_FEATHER = (0.30, 0.03)  # width of the mask's edge, in radii, at strength 0 and 1
SWAP_GRAIN = 0.055  # standard deviation of the grain that a swapped face brings, at strength 1
CHANGE_SHARPEN = 2.0  # unsharp-mask amount on changed eyes or mouth, at strength 1
CHANGE_WARP = 0.30  # how far changed eyes or mouth are bent, in heights of the region
CHANGE_CAST = (-0.24, 0.06, -0.24)  # of the changed region, as for a swap

# The image, whatever was done to it.
GENUINE_FEATHER = 0.30  # radii
GRAIN = (0.008, 0.016)  # standard deviation of the whole image's grain, of a range of 1
SATURATION = 0.6  # of the photographs; less colour hides a forged face's cast less
NEAR = (92.0, 116.0)  # height of a face in pixels
FAR = (60.0, 76.0)
JPEG_QUALITY = (60, 96)

# Photographs as a camera or an editor leaves them.
PHOTOGRAPH_CROP = 0.4  # the smallest window, as a share of the largest
PORTRAIT_CROP = 0.6  # the same where a face stays whole
PORTRAIT_SHARE = 0.3  # share of photographs that show a face, where the split has any
PHOTOGRAPH_SATURATION = (0.3, 1.2)
PHOTOGRAPH_BALANCE = (0.9, 1.1)  # factor of each channel
PHOTOGRAPH_GAIN = (0.7, 1.15)  # what white becomes
PHOTOGRAPH_GREY_SHARE = 0.15
PHOTOGRAPH_GRAIN = (0.0, 0.016)

# Captions.
MOOD_WORDS = {1: 0.15, 2: 0.55, 3: 0.30}  # share of captions with so many mood words
FLIP_ALL_SHARE = 0.5  # share of mood flips that turn every mood word; the others turn a single one
SAME_LIGHT_DONOR_SHARE = 0.15  # share of swapped captions whose light and mood fit by accident
