"""What large inputs cost."""
