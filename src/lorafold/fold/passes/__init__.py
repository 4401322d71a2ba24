"""The passes over a collection: measured, planned, written."""
