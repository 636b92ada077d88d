"""What a file of results says: a page, its figures, the tables of docs/benchmarks.md."""
