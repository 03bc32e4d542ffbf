"""Weight files: read and written."""
