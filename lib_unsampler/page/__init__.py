"""What a page with the form needs, whoever serves it: answers to its script, and the files that it may name."""
