"""What a user does with a model: generate, predict, explain, export."""
