"""The benchmark suite: every claim side by side with what a user would pick instead."""
