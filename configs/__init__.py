"""Training configurations: `get_config()` of each module says command, cost and expected score."""
