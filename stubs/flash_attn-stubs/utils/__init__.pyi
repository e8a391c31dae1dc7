# Written by stubs/make.py.
