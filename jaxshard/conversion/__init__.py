"""File-to-file conversion: open, select, plan, execute and verify, without a device.

Merging is converting to one complete checkpoint, slicing is converting to many ranks. ``prepare``
plans from headers alone, ``execute`` writes: a budget bounds the memory, not the model's size, and
the result is published atomically.
"""
