"""Read and write weight files."""
