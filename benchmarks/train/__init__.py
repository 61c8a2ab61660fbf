"""One training step as a share of what the processor can do."""
