"""Keys of /diagnostics that more than one node knows."""

LATENCY = "capture to command ms"
PERIOD = "period error ms"
PACE = "simulated over wall time"
