"""The compose file on a real engine, on the CPU: built, brought up, used, hurt, taken down.

    python -m tests.compose

Uses the Docker engine that answers, or installs and starts Debian's as root. Where no image
registry answers, images of Debian's packages stand in for the base images, under the same names.
"""
