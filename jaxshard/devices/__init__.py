"""Devices: meshes, shardings by rules, trees of arrays, and the host memory that feeds them."""
