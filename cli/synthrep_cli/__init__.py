"""The command `synthrep`."""
