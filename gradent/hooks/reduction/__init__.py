"""From output gradients to Gram entries: which reducer takes what, and the ledger of what waits."""
