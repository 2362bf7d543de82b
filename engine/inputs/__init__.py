"""Images and captions to network inputs: what training and serving share."""
