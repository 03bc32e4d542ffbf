"""Measure the speed of this project, of a plain solution and of transformers."""
