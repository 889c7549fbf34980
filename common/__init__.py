"""What no reader needs on a first pass: options and checkpoints, reading and writing videos, the cache of decoded frames."""
