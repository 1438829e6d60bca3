"""From raw data to a verified model: one module a DVC stage, `python -m pipeline.<stage> <model>`."""
