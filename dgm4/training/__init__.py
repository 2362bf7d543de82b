"""Training of the three networks: objectives with momentum towers, recipes, the loop, exact resume."""
