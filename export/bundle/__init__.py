"""Writing a bundle: all of its files or none, their hashes, and the model card."""
