"""The sparse half of a step, in several forms: `base` says what each can do, and `sparse_ops` gives them by name."""
