"""Trains a GPT with any registered optimizer; start reading at `train.py`."""
