"""The DGM4 data set: its annotations and the batches that training and evaluation read."""
