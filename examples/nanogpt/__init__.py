"""Trains a GPT with any optimizer of the registry; start reading at `train.py`."""
