"""What people look at: the card of a prediction as a picture, and the same as HTML."""
