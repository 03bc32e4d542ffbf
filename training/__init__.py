"""Finetune a classifier: data, the loop, its saved state, several processes."""
