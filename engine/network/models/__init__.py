"""The form for inference of every network: `Model`, and `fold` from the released tensors to its own."""
