"""The DGM4 data set: its annotations, the batches read from it, and a sample set that is made."""
