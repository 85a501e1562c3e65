"""Several processes: identity, barriers with time-outs, and shares of work."""
