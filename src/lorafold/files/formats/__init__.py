"""Formats besides PEFT's, one file each."""
