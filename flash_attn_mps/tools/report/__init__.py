"""`mtlflashattn report`: all that can be known of this machine in five minutes, in two files to attach to an issue."""
