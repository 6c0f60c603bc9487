"""Commands of the command line, one file each, over the Python API."""
