"""What makes the model fast and changes no result."""
