"""Small transformers, and what is broken in them."""
