"""The HTTP side: bodies, answers, who may ask, and what is counted."""
