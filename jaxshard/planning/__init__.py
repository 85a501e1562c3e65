"""Planning: reads, copies and writes between two layouts.

``copies`` has the copies of one tensor and their blocks, ``bundles`` groups small tensors,
``outputs`` lists the files of a result, and a ``plan`` counts all reads, copies and writes.
This package opens no file and no device, and does not depend on the time.
"""
