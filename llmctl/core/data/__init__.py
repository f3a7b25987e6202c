"""Data: documents in, packed token shards, and training samples out."""
