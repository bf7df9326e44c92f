"""What tools/compare.py is made of: runs are read, told apart, put into tables, charts and a page, and trained."""
