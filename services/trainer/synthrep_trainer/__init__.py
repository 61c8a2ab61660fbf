"""Contrastive training on shards while they are being made, and linear probes of the result."""
