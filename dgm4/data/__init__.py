"""Pairs of a picture and its caption: the sample set."""
