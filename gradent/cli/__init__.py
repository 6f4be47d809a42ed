"""The command line: `gradent demo`, `audit`, `report`, `compare`, `tokens`, `plan`, `doctor`."""
