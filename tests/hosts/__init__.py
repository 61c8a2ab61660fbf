"""One training over two hosts that fail. Hosts are network namespaces joined by a cable.

    python -m tests.hosts

Needs Linux, root and `ip`. What a rank sees of a host is real: torchrun, its rendezvous and gloo
over TCP between two addresses; the processors and the disk are shared.
"""
