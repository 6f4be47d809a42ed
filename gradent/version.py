"""The version of gradent, stated once: the package build reads it here."""

__version__ = "0.1.0"
