"""Folded libraries in the engines that people run: what those ask for, written when it is asked."""
