"""Numbers to bytes and back: one coder for all that a form stores."""
