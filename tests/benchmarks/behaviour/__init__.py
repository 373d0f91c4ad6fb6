"""What the papers say of their quantizers, on data and networks that train in seconds.

`python -m tests.benchmarks.behaviour` trains the small autoencoders of the specification's acceptance tables and prints
the tables, the specification's figures beside ours. The orderings in them are asserted by
``tests/quantizers/test_behaviour.py``, which trains the same rows.
"""
