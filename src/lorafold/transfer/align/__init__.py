"""Two bases side by side: texts run through both, what is kept of them, who is paired with whom."""
