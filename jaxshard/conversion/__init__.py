"""File-to-file conversion: open, select, plan, execute and verify, without a device.

Merging is converting to one complete checkpoint, slicing to many ranks. ``preparing`` decides
from headers alone, ``running`` does it: memory is bounded by a budget, not by the model, and
the result appears whole or not at all.
"""
