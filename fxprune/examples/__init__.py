"""A small multi-task problem on real images: the scenes, a network, and how to train it."""
