"""Trains `glm5-tiny-code`: a GLM-5.2 of toy size that reads bytes of Python source."""
