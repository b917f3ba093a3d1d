"""Learning in simulation with Ray."""
