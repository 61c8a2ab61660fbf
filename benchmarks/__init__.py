"""Ours against named peers, interleaved: `make bench`, or `python -m benchmarks --help`."""
