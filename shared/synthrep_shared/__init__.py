"""The contract between the services: what a sample is, where it lies, and when it exists."""
