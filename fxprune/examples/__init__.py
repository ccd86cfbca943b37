"""Small problems on real images, with networks and how to train them: multi-task scenes, and single digits."""
