"""Labelled text of any size as batches for a task, and the metrics of the answers: no torch."""
