"""Attention inside of autograd and of captured graphs."""
