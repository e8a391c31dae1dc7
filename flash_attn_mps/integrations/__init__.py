"""Integrations that use other libraries' own extension points, one file per library."""
