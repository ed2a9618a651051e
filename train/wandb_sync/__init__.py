"""A sync of a run in Weights & Biases that cannot hurt the run.

The trainer imports no wandb and waits for nothing: it starts a child process, and that reads the run's files, which are
the record. What the child loses can be synced again from them.
"""
