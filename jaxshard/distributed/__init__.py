"""Several processes: identity, barriers and partition of work.

splitting    which files each process writes, which process writes each shard
environment  this process's number and how many there are, as a job starter says
barriers     meeting points with a time-out, over JAX's own coordinator
"""
