"""Beyond the assignment: one paper per file, on the parts of the folder above."""
