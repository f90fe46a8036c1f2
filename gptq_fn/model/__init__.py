"""The one interpreter of every spec."""
