"""How fast this project is, beside a plain solution and beside transformers."""
