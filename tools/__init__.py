"""What is needed to make and test the package, and is no part of it."""
