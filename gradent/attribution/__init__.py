"""Attribution of a step: what moved each response's log-prob, and by how much."""
