"""The task's metrics of a bundle, beside those of the float32 network, and the accuracy gate."""
