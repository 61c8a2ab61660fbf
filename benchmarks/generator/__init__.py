"""From a prompt to a sealed shard: the device, the queue, the writer, the reader that waits.

Nothing is imported here, so that a peer's process holds the peer alone.
"""
