"""Data files of any size, of which a few rows are in memory at a time.

A stream is one file or many, in a fixed order, on this machine or at an address of fsspec; its rows
are numbered over all files. Where a sample is asked for, it is drawn from the whole stream.
"""
