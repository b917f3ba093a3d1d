"""How rollouts move between processes: a shared block of memory per rollout, and bells to wake each other."""
