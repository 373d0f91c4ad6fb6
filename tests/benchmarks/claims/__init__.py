"""The papers' claims on real images, in tables: what the papers report beside what this project measures.

`python -m tests.benchmarks.claims --out claims` trains the recipes of the papers, shortened to what a CPU does in
minutes (``--full``: at their own length and size), evaluates each run as `tessera evaluate` does, and prints a table a
claim. One module a claim, each with a ``CLAIM``.
"""
