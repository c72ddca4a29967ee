"""Hopper in reinforcement learning: an ablation, and the answers to its claims."""
