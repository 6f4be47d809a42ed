"""The command line: `gradent demo`, `audit`, `report`, `watch`, `compare`, `tokens`, `plan`, `doctor`."""
