"""LongSANA: text in, minute-long video out, with a memory that never grows."""

__version__ = "0.1.0"
