"""Checks of what the project is deployed with: images, compose file, manifests, alarms."""
