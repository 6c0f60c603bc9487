"""Passes, one per file, found by discovery. Import as ``qcompile.passes``."""

if __name__ == "passes":  # a second import under the short name would register every pass twice
    raise ImportError("import qcompile.passes, not passes")
