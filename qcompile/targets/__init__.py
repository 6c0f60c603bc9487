"""Targets, one table a file, found by discovery."""
