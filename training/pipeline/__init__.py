"""How rollouts move between processes: one shared block of memory per rollout, and bells that wake the other side."""
