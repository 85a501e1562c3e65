"""Several processes: identity, barriers and partition of work.

partition  the files and shards that each process writes; process index and count
barriers   barriers with time-outs, over JAX's own coordinator
"""
