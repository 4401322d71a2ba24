"""Engines that run here: a loop in a thread, rows of a dense cache, encoders."""
