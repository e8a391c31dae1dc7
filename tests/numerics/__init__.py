"""Right numbers at the ends of the range and beside what is not a number, on every tier and against float64.

test_large_scores: from 1e0 to 1e30; test_hidden: what no query sees never matters; test_nonfinite: what one sees does;
test_padded_rows: rows of memory that no sequence has; test_transforms: derivatives other than autograd's.
"""
