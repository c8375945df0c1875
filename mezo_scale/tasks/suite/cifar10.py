"""CIFAR-10 (Krizhevsky, 2009). Labels: 0 airplane, automobile, bird, cat, deer, dog, frog, horse, ship, 9 truck."""

from mezo_scale.tasks.pictures import pictures

TASK = pictures("which of ten things a small image shows", "img")
