"""Training as a part of a compilation: what it needs, and whether the file is what was trained."""
