"""The page of a run's own records, as `EntanglementCallback(out=...)` writes them: afterwards, and while it goes on."""
