"""`mtlflashattn selftest`: every tier of this machine against attention written out in float64."""
