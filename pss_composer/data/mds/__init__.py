"""MDS shards, read with streaming: the one room that touches its private members (see the README here)."""
