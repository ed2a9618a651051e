"""The sparse half of a step, in several forms; `sparse_ops` says what each can do, and gives them by name."""
