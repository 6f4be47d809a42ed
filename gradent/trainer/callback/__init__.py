"""`EntanglementCallback` and what it keeps of a step."""
