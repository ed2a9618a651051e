"""Faults injected into the real commands. `promises.py` lists what is promised, a number for each fault.

A test says with `@pytest.mark.fault(4)` that it shows promise 4; docs/reliability.md is generated from these marks.
"""
