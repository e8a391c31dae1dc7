"""Tests of the FlashAttention-2 and -3 functions, against an fp64 oracle that shares no code with the product."""
