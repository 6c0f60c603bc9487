"""How the constants of a lowered graph are stored in the file."""
