"""What the commands are made of: self-test, benchmark and what they print."""
