"""Reading, decoding and augmenting shards against the readers and libraries that others use."""
