"""Measuring what a reduction costs in quality."""
