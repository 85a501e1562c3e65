"""Core values: boxes, dtypes, strategies, layouts and catalogs. They open no file and no device."""
