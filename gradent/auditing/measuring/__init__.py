"""Measuring an audit's pairs, batch by batch."""
