"""Converts images to MDS shards and checks them; not imported by training."""
