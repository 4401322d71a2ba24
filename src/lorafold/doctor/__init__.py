"""Whether a running server has an adapter in effect, and at what strength: against a run here."""
