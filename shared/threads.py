"""The one thread policy: how threads wait. How many there are is each stage's own setting."""

import os


def set_policy() -> None:
    """Let idle OpenMP threads sleep instead of spin; call it before torch is imported.

    Spinning gains little on an idle machine, and where another process holds a core it made a training step of small
    operations 20 times slower. A value that the user has set stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
