"""The networks as published, one file each."""
