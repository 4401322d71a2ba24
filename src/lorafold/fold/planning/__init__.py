"""Which form for which module, and how much each adapter may lose."""
