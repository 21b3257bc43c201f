"""Pure functions on tensors: one meaning each (`oracle.py`), several implementations, picked by a table
(`choose.py`).
"""
