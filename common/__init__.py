"""Code to skip on a first reading: options and checkpoints, reading and writing videos, the cache of decoded frames."""
