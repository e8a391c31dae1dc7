"""Ways into other libraries through the doors that they have themselves, one file a library."""
