"""The sections of an audit's page, a module each."""
