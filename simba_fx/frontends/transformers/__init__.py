"""Models of transformers. Read `model` first."""
