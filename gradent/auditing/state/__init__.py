"""What an audit remembers: its targets, its journal, its ranks."""
