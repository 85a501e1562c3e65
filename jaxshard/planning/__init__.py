"""Planning: reads, copies and writes between two layouts.

``moves`` say from where to where, ``blocks`` what is carried at a time, ``costs`` count it, and a
``plan`` is all of it, into the files of ``outputs``. Pure: no file, no device, no clock.
"""
