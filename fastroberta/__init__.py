"""A custom-kernel, performance-first trainer for RoBERTa."""
